"""Small models in the layouts of the real ones: diffusers folders, ComfyUI's single files, Qwen3-VL's folder.

Made with diffusers and transformers alone, with random weights that every format here holds exactly.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from dopsd_core.demo.model_files import WEIGHTS

HEADS, HEAD_DIM = 2, (8, 12, 12)
TEXT_WIDTH = 32
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""What Qwen3's chat template makes of one message."""


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded values that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                values = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel())
            else:
                values = torch.rand(parameter.shape, generator=generator) * 0.4 + (0.8 if "norm" in name else -0.2)
            parameter.copy_(values.bfloat16())
    return module.eval().requires_grad_(False)


def z_image_transformer(seed: int = 0) -> Any:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    network = ZImageTransformer2DModel(
        dim=HEADS * sum(HEAD_DIM), n_heads=HEADS, n_kv_heads=HEADS, n_layers=2, n_refiner_layers=1,
        cap_feat_dim=TEXT_WIDTH, axes_dims=list(HEAD_DIM), axes_lens=[1536, 512, 512],
    )  # fmt: skip
    return fill(network, seed)


def klein_transformer(seed: int = 0) -> Any:
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    network = Flux2Transformer2DModel(
        num_layers=1, num_single_layers=2, num_attention_heads=1, attention_head_dim=32,
        joint_attention_dim=3 * TEXT_WIDTH, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False,
    )  # fmt: skip
    return fill(network, seed)


def text_encoder(layers: int, seed: int = 1) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    sizes: dict[str, Any] = {
        "hidden_size": TEXT_WIDTH, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 151936,
    }  # fmt: skip
    return fill(Qwen3Model(Qwen3Config(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e6})), seed)


def ae(seed: int = 2) -> Any:
    """FLUX.1's autoencoder, Z-Image's."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    kinds: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32,) * 4,
    }  # fmt: skip
    model = AutoencoderKL(
        latent_channels=16, layers_per_block=1, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159, **kinds,
    )  # fmt: skip
    return fill(model, seed)


def flux2_ae(seed: int = 2) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    model = AutoencoderKLFlux2(block_out_channels=(32,) * 4, layers_per_block=1)
    fill(model, seed)
    bn: Any = model.bn
    bn.running_mean.copy_(torch.linspace(-0.25, 0.25, 128).bfloat16())
    bn.running_var.fill_(0.5)
    return model


def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_file=str(WEIGHTS / "demo_tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    made.chat_template = CHAT
    return made


def write_z_image(folder: Path, seed: int = 0) -> Path:
    parts = {"transformer": z_image_transformer(seed), "vae": ae(), "text_encoder": text_encoder(4)}
    return _write(folder, "ZImagePipeline", parts, tokenizer())


def write_klein(folder: Path, seed: int = 0) -> Path:
    parts = {"transformer": klein_transformer(seed), "vae": flux2_ae(), "text_encoder": text_encoder(28)}
    return _write(folder, "Flux2KleinPipeline", parts, tokenizer())


def _write(folder: Path, pipeline: str, parts: dict[str, Any], words: Any) -> Path:
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.36.0", "scheduler": [None, None]}
    for name, model in parts.items():
        model.save_pretrained(folder / name)
        index[name] = ["transformers" if name == "text_encoder" else "diffusers", type(model).__name__]
    words.save_pretrained(folder / "tokenizer")
    index["tokenizer"] = ["transformers", "Qwen2Tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_vision(folder: Path, width: int = TEXT_WIDTH, seed: int = 3) -> Path:
    """A Qwen3-VL folder whose file has a language tensor too, which is not read."""
    from transformers import Qwen3VLConfig
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "depth": 4, "deepstack_visual_indexes": [0, 1, 2], "num_heads": 2,
        "num_position_embeddings": 36, "out_hidden_size": width,
    }  # fmt: skip
    tower = fill(Qwen3VLVisionModel(Qwen3VLVisionConfig(**sizes)), seed)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    folder.mkdir(parents=True, exist_ok=True)
    Qwen3VLConfig(vision_config=sizes, text_config={"rope_parameters": rope}).save_pretrained(folder)
    state = {f"model.visual.{name}": value.contiguous() for name, value in tower.state_dict().items()}
    save_file({**state, "model.language_model.norm.weight": torch.ones(2)}, folder / "model.safetensors")
    return folder


# -- single files ------------------------------------------------------------------------------------------------------


def write_z_image_file(path: Path, seed: int = 0) -> Path:
    from dopsd_core.standalone.hosts.demo_weight_files import transformer_to_single_file

    return _save(path, transformer_to_single_file(z_image_transformer(seed).state_dict()))


def write_text_encoder_file(path: Path, layers: int, fp8: bool = False) -> Path:
    """As ComfyUI's: Hugging Face's names; fp8: matrices of blocks in fp8, with a scale beside each."""
    state = {f"model.{name}": value for name, value in text_encoder(layers).state_dict().items()}
    if fp8:
        for name in [name for name, value in state.items() if ".layers." in name and value.ndim == 2]:
            scale = state[name].abs().max() / 448
            state[f"{name}_scale"] = scale
            state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
    return _save(path, state)


def _save(path: Path, state: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: _stored(value) for name, value in state.items()}, path)
    return path


def _stored(value: Tensor) -> Tensor:
    return (value.bfloat16() if value.dtype == torch.float32 and value.ndim else value).contiguous()


def write_photos(folder: Path, caption: str) -> Path:
    """Two images of 64 x 64 with a caption each: the given one and the file's name."""
    folder.mkdir(parents=True)
    for name, colour in (("a", "red"), ("b", "navy")):
        image = Image.new("RGB", (64, 64), colour)
        image.paste("white", (10, 20, 40, 50))
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{caption}, {name}", encoding="utf-8")
    return folder
