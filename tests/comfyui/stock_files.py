"""Small files in the layouts of the real ones, and ComfyUI's own loader nodes made to take them.

Names, dtypes, head sizes and quantisation are those of the files that users have; what is small is the width and the
number of blocks. Widths are what ComfyUI tells models by, so inside `thin()` three of its tables know the small ones
too. FLUX.2-klein and the autoencoders it detects at any width as it is; Krea 2 too, but for the heads of its text
fusion, of which there are always 20.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

State = dict[str, Tensor]

Z_IMAGE_WIDTH, TEXT_WIDTH = 256, 64
TEXT = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 2 * TEXT_WIDTH, "num_hidden_layers": 36, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
"""FLUX.2-klein reads hidden states up to 27, Krea 2 up to 35."""
FUSION_HEADS = {"txtheads": 2, "txtkvheads": 2}
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "depth": 3, "deepstack_visual_indexes": [0, 1, 2], "num_heads": 1,
}  # fmt: skip


@contextmanager
def thin() -> Iterator[None]:
    """Inside, ComfyUI takes a Z-Image of width 256, and a Qwen3(-VL)-4B of width 64 with a small tower.

    Its detection runs as it is and is shown the real width in the one tensor that it reads it from.
    """
    import comfy.model_detection
    import comfy.sd
    import comfy.supported_models
    from comfy.text_encoders import llama, qwen3vl

    def detect_unet_config(state: State, prefix: str, metadata: Any = None) -> Any:
        if state.get(f"{prefix}txtfusion.layerwise_blocks.0.prenorm.scale", torch.empty(0)).shape[0] == TEXT_WIDTH:
            return {**detect_unet(state, prefix, metadata=metadata), **FUSION_HEADS}
        name = f"{prefix}cap_embedder.1.weight"
        if name not in state or state[name].shape[0] != Z_IMAGE_WIDTH:
            return detect_unet(state, prefix, metadata=metadata)
        shown = {**state, name: torch.empty(3840, state[name].shape[1], device="meta")}
        heads = Z_IMAGE_WIDTH // 128
        found = detect_unet(shown, prefix, metadata=metadata)
        return {**found, "dim": Z_IMAGE_WIDTH, "n_heads": heads, "n_kv_heads": heads}

    def detect_te_model(state: State) -> Any:
        names = ("model.layers.0.post_attention_layernorm.weight", "model.visual.merger.linear_fc2.weight")
        small = [name for name in names if name in state and state[name].shape[0] == TEXT_WIDTH]
        return detect_te({**state, **{name: torch.empty(2560, device="meta") for name in small}})

    detect_unet, detect_te = comfy.model_detection.detect_unet_config, comfy.sd.detect_te_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_detection, "detect_unet_config", detect_unet_config)
        patch.setitem(comfy.supported_models.ZImage.unet_config, "dim", Z_IMAGE_WIDTH)
        patch.setattr(comfy.sd, "detect_te_model", detect_te_model)
        for name in ("Qwen3_4BConfig", "Qwen3VL_4BConfig"):
            fields = [(field, type(value), value) for field, value in TEXT.items()]
            patch.setattr(llama, name, dataclasses.make_dataclass(name, fields, bases=(getattr(llama, name),)))
        patch.setitem(qwen3vl.QWEN3VL_CONFIGS, "qwen3vl_4b", llama.Qwen3VL_4BConfig)
        patch.setitem(qwen3vl.QWEN3VL_VISION, "qwen3vl_4b", VISION)
        yield


# -- what is in the files ----------------------------------------------------------------------------------------------


def z_image() -> State:
    """The transformer under its original names, in bf16."""
    import comfy.supported_models

    config = comfy.supported_models.ZImage(
        {
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": Z_IMAGE_WIDTH, "n_layers": 2,
            "cap_feat_dim": TEXT_WIDTH, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    return _state(toy.network(config).diffusion_model)


def klein() -> State:
    """The same for FLUX.2-klein."""
    model = toy.flux2().model.diffusion_model
    assert model.params.context_in_dim == 3 * TEXT_WIDTH
    return _state(model)


_KREA2_WIDE = re.compile(r"(first|last|tmlp|tproj|txtmlp)\.|.*(\.scale|\.lin)$")


def krea2(wide: torch.dtype = torch.float32) -> State:
    """The same for Krea 2, of two blocks. What embeds, norms and modulates has another dtype, as in the bf16 file."""
    import comfy.supported_models

    config = comfy.supported_models.Krea2(
        {
            "image_model": "krea2", "features": 256, "channels": 16, "patch": 2, "layers": 2, "heads": 2, "kvheads": 1,
            "txtlayers": 12, "txtdim": TEXT_WIDTH, **FUSION_HEADS,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    state = toy.fill(toy.network(config).diffusion_model).state_dict()
    return {name: value.to(wide if _KREA2_WIDE.match(name) else torch.bfloat16) for name, value in state.items()}


def krea2_in_16_bits() -> State:
    """As the 8-bit files have what is not in 8 bits."""
    return krea2(torch.bfloat16)


def qwen3() -> State:
    """Qwen3-4B under Hugging Face's names, in bf16. It was trained without a head of its own."""
    import comfy.ops
    from comfy.text_encoders import llama

    return _state(llama.Qwen3_4B(dict(TEXT), torch.float32, "cpu", comfy.ops.manual_cast))


def qwen3vl() -> State:
    """Qwen3-VL-4B: the tower and the language model, under Hugging Face's names."""
    import comfy.ops
    from comfy.text_encoders import qwen3vl

    config = {**qwen3vl.QWEN3VL_VISION_COMMON, **VISION, "out_hidden_size": TEXT_WIDTH}
    tower = _state(qwen3vl.Qwen3VLVisionModel(config, device="cpu", dtype=torch.float32, ops=comfy.ops.manual_cast))
    language = {name.replace("model.", "model.language_model.", 1): value for name, value in qwen3().items()}
    return {**language, **{f"model.visual.{name}": value for name, value in tower.items()}}


def autoencoder(channels: int) -> State:
    """The encoder at its real width, of which ComfyUI knows one only; a small decoder, as some files have."""
    from comfy.ldm.models import autoencoder

    encoder = {
        "double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    decoder = {**encoder, "ch": 32}
    if channels == 32:  # FLUX.2's: 128 channels after 2 x 2 pixels are put together and normalised
        encoder = {**encoder, "batch_norm_latent": True}
        model: nn.Module = autoencoder.AutoencoderKL(embed_dim=32, ddconfig=encoder, decoder_ddconfig=decoder)
        toy.fill(model)
        statistics = {"bn.running_mean": torch.linspace(-0.1, 0.1, 128), "bn.running_var": torch.full((128,), 0.5)}
        return {**_bf16(model.state_dict()), **statistics}
    place = "comfy.ldm.modules.diffusionmodules.model"
    return _state(
        autoencoder.AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": f"{place}.Encoder", "params": encoder},
            decoder_config={"target": f"{place}.Decoder", "params": decoder},
        )
    )


def qwen_image_vae() -> State:
    """Qwen-Image's and Krea 2's, which ComfyUI takes in any width."""
    from comfy.ldm.wan.vae import WanVAE

    sizes = {"dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    return _state(WanVAE(**sizes, temperal_downsample=[False, True, True], dropout=0.0))


def _state(model: nn.Module) -> State:
    return _bf16(toy.fill(model).state_dict())


def _bf16(state: Mapping[str, Tensor]) -> State:
    return {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in state.items()}


# -- quantised --------------------------------------------------------------------------------------------------------


_IN_BLOCKS = re.compile(r"(layers|refiner|blocks)\.\d+\.")


def is_quantised(name: str, value: Tensor) -> bool:
    """What such files hold in 8 bits: the matrices of blocks, their modulation left out."""
    return value.ndim == 2 and bool(_IN_BLOCKS.search(name)) and "adaLN" not in name


def fp8_scaled(state: State) -> tuple[State, dict[str, str]]:
    """The older layout: `scale_weight` beside each matrix, and the mark `scaled_fp8`."""
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}  # two elements: multiply in full precision
    for name, value in state.items():
        if is_quantised(name, value):
            out[name], out[name.replace(".weight", ".scale_weight")] = _to_fp8(value)
        else:
            out[name] = value
    return out, {}


def fp8_in_header(state: State) -> tuple[State, dict[str, str]]:
    """The newer layout: `weight_scale`, and the header says which layers."""
    out, layers = {}, {}
    for name, value in state.items():
        if is_quantised(name, value):
            out[name], out[f"{name}_scale"] = _to_fp8(value)
            layers[name.removesuffix(".weight")] = {"format": "float8_e4m3fn"}
        else:
            out[name] = value
    return out, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def int8(state: State, convrot: bool = False) -> tuple[State, dict[str, str]]:
    """int8 with a scale per row, and a note beside each matrix; `convrot` rotates groups of columns before."""
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    out, note = {}, {"format": "int8_tensorwise"}
    if convrot:
        note = {**note, "convrot": True, "convrot_groupsize": 256}
    for name, value in state.items():
        if is_quantised(name, value) and (not convrot or value.shape[1] % 256 == 0):
            out[name], params = TensorWiseINT8Layout.quantize(value.float(), per_channel=True, convrot=convrot)
            out[f"{name}_scale"] = params.scale
            layer = name.removesuffix(".weight")
            out[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
        else:
            out[name] = value
    return out, {}


def int8_convrot(state: State) -> tuple[State, dict[str, str]]:
    """What the official int8 file has."""
    return int8(state, convrot=True)


def _to_fp8(value: Tensor) -> tuple[Tensor, Tensor]:
    scale = value.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return (value.float() / scale).to(torch.float8_e4m3fn), scale


# -- on disk ----------------------------------------------------------------------------------------------------------

Captions = Mapping[str, str]
CONCEPT: Captions = {"table": "a photo of [V] on a wooden table", "snow": "a photo of [V] in the snow"}


def write_concept(folder: Path) -> None:
    """A dataset as users have it: images of several shapes, each with a text of the same name."""
    _write_images(folder, CONCEPT)
    for name, caption in CONCEPT.items():
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


def write_edits(folder: Path) -> None:
    """A dataset of edits: pairs of one name, and what was done to the source."""
    names = {"a": "make it blue", "b": "make it blue, please"}
    _write_images(folder / "source", names)
    _write_images(folder / "target", names, blue=200)
    for name, instruction in names.items():
        (folder / "target" / f"{name}.txt").write_text(instruction, encoding="utf-8")


def _write_images(folder: Path, names: Captions, blue: int = 30) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        image = Image.new("RGB", (96, 64 + 16 * number), (60 + 50 * number, 90, blue))
        image.paste((250, 200 - 40 * number, 40), (20, 10, 60, 50))
        image.save(folder / f"{name}.png")


Maker = Callable[[], State]
Quantiser = Callable[[State], tuple[State, dict[str, str]]]

FILES: Mapping[str, tuple[Maker, Quantiser | None]] = {
    "diffusion_models/z_image_turbo_bf16": (z_image, None),
    "diffusion_models/z_image_turbo_fp8_scaled_old": (z_image, fp8_scaled),
    "diffusion_models/z_image_turbo_fp8_scaled": (z_image, fp8_in_header),
    "diffusion_models/z_image_turbo_int8": (z_image, int8),
    "diffusion_models/z_image_turbo_int8_convrot": (z_image, int8_convrot),
    "diffusion_models/flux-2-klein-4b": (klein, None),
    "diffusion_models/flux-2-klein-4b-fp8": (klein, fp8_in_header),
    "diffusion_models/krea2_turbo_bf16": (krea2, None),
    "diffusion_models/krea2_turbo_fp8_scaled": (krea2_in_16_bits, fp8_in_header),
    "diffusion_models/krea2_turbo_int8_convrot": (krea2_in_16_bits, int8_convrot),
    "text_encoders/qwen_3_4b": (qwen3, None),
    "text_encoders/qwen_3_4b_fp8_mixed": (qwen3, fp8_in_header),
    "text_encoders/qwen3vl_4b_fp8_scaled": (qwen3vl, fp8_in_header),
    "vae/ae": (lambda: autoencoder(16), None),
    "vae/flux2-vae": (lambda: autoencoder(32), None),
    "vae/qwen_image_vae": (qwen_image_vae, None),
}
"""Below ComfyUI's `models`, without the ending: what is in it, and how it is quantised."""


def write(models: Path, *names: str) -> list[Path]:
    """Writes the named files of `FILES`, all without a name; those that are there stay."""
    written = []
    for name in names or FILES:
        path = models / f"{name}.safetensors"
        if not path.exists():
            make, quantise = FILES[name]
            with toy.allocated():
                tensors = make()
            tensors, header = quantise(tensors) if quantise else (tensors, {})
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=header)
            written.append(path)
    return written
