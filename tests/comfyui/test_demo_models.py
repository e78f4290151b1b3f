"""The demo model as ComfyUI objects is the standalone host's, and stock nodes work on it; the teacher's vision."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from inprocess import ComfyUI
from safetensors.torch import save_file
from torch import Tensor

TEXT = "a [V] badge, top, on a sand background"
LOAD = {"class_type": "DOPSD_LoadDemoModels", "inputs": {}}
MODULES = ("layers.0.attention.to_q", "layers.3.attention.to_out.0", "noise_refiner.0.feed_forward.w1")


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def drawing(**model_nodes: dict) -> dict:
    """Stock nodes from a prompt to a picture and back, on the MODEL of node "model"."""
    tiles = {"vae": ["demo", 2], "tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    return {
        "demo": LOAD,
        "model": {"class_type": "ModelSamplingAuraFlow", "inputs": {"model": ["demo", 0], "shift": 3.0}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": TEXT}},
        "empty": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["model", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0],
                "seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "picture": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["demo", 2]}},
        "latent": {"class_type": "VAEEncode", "inputs": {"pixels": ["picture", 0], "vae": ["demo", 2]}},
        "again": {"class_type": "VAEDecode", "inputs": {"samples": ["latent", 0], "vae": ["demo", 2]}},
        "latent_tiled": {"class_type": "VAEEncodeTiled", "inputs": {"pixels": ["picture", 0], **tiles}},
        "tiled": {"class_type": "VAEDecodeTiled", "inputs": {"samples": ["latent_tiled", 0], **tiles}},
        "show_tiled": {"class_type": "PreviewImage", "inputs": {"images": ["tiled", 0]}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["again", 0]}},
        **model_nodes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(comfyui: ComfyUI) -> Any:
    run = comfyui.execute(drawing())
    assert run.status == "success", run.error
    return run


@pytest.fixture(scope="module")
def demo(run: Any) -> SimpleNamespace:
    """What Load Demo Models gave, inside the executor."""
    return SimpleNamespace(model=run.value("demo", 0), clip=run.value("demo", 1), vae=run.value("demo", 2),
                           vision=run.value("demo", 3))  # fmt: skip


@pytest.fixture(scope="module")
def standalone(comfyui: ComfyUI) -> Any:
    return comfyui.core("standalone.host").load_demo_model()


@pytest.fixture
def vision(comfyui: ComfyUI) -> Any:
    return comfyui.module("nodes.vision")


# -- MODEL, CLIP, VAE -------------------------------------------------------------------------------------------------


def test_stock_nodes_draw_what_the_standalone_host_draws(comfyui, run, standalone):
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(7))
    sigmas = comfyui.core("sigmas").z_image_turbo_sigmas(4)
    condition = standalone.encoder.encode_text(TEXT)
    x = noise
    with torch.no_grad():
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            x0 = standalone.denoiser.predict_x0(x, sigma, [condition] * 2)
            x = x0 + (x - x0) * following / sigma
    theirs = run.value("picture").movedim(-1, 1)
    assert theirs.std() > 0.05
    assert torch.allclose(theirs, standalone.encoder.decode(x), atol=1e-3)


def test_velocity_is_the_standalone_hosts(comfyui, demo, standalone):
    condition = comfyui.core("conditioning").Condition
    g = torch.Generator().manual_seed(0)
    x, features = torch.randn(2, 16, 8, 8, generator=g), torch.randn(2, 23, 128, generator=g)
    with torch.inference_mode():
        for sigma in (1.0, 0.75, 0.3):
            theirs = demo.model.model.apply_model(x, torch.full((2,), sigma), c_crossattn=features, num_tokens=23)
            ours = standalone.denoiser.predict_x0(x, sigma, [condition(f) for f in features])
            assert torch.allclose(ours, theirs, atol=2e-4), sigma


def test_text_is_the_standalone_hosts(run, standalone):
    ((features, extra),) = run.value("text")
    assert torch.allclose(features[0], standalone.encoder.encode_text(TEXT).features, atol=1e-4)
    assert extra["attention_mask"].all()


def test_autoencoder_is_the_standalone_hosts(demo, run, standalone):
    """Through latent_format, which ComfyUI applies around every model."""
    pictures, inside = run.value("picture"), demo.model.model.process_latent_in(run.value("latent")["samples"])
    ours = torch.stack([standalone.encoder.encode_latent(p) for p in pictures.movedim(-1, 1)])
    assert torch.allclose(inside, ours, atol=1e-4)
    assert torch.allclose(run.value("again").movedim(-1, 1), standalone.encoder.decode(ours), atol=1e-4)


def test_vae_knows_all_that_stock_nodes_ask_of_it(demo, run):
    import comfy.sd
    import comfy.taesd.taesd

    stock = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=16).state_dict())
    assert vars(stock).keys() == vars(demo.vae).keys()
    with torch.inference_mode():
        assert demo.vae.encode(seeded(1, 67, 70, 4)).shape == (1, 16, 8, 8)  # cropped, alpha dropped
    assert torch.allclose(run.value("tiled"), run.value("again"), atol=1e-5)
    assert torch.allclose(run.value("latent_tiled")["samples"], run.value("latent")["samples"], atol=1e-5)
    assert demo.vae.get_sd() and demo.vae.size == sum(p.numel() * 4 for p in demo.vae.first_stage_model.parameters())


def test_weights_are_as_a_users(demo):
    """Loaded by a node, so in inference mode: what training must cope with."""
    for patcher in (demo.model, demo.clip.patcher, demo.vae.patcher, demo.vision.patcher):
        assert any(p.is_inference() for p in patcher.model.parameters())


def test_deep_copies_have_weights_of_their_own(demo):
    for patcher in (demo.model, demo.clip.patcher, demo.vae.patcher):
        with torch.inference_mode(False):
            copy = patcher.clone(force_deepcopy=True)
        assert copy.model is not patcher.model and copy.model_options == patcher.model_options
        theirs = patcher.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in copy.model.state_dict().items())
        assert not any(p.is_inference() for p in copy.model.parameters())


def test_a_lora_file_acts_as_in_the_standalone_host(comfyui, demo, standalone):
    """Written with diffusers' names, loaded by LoraLoaderModelOnly, at its strength."""
    core = comfyui.core("lora_config")
    g = torch.Generator().manual_seed(0)
    sites = {part.name: (part.stop - part.start, site.in_features)
             for site in standalone.denoiser.sites() for part in site.parts}  # fmt: skip
    tensors = {}
    for name in MODULES:
        rows, columns = sites[name]
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=g) / columns**0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=g) / 2
    path = comfyui.output / "loras" / "demo_test.safetensors"
    config = core.LoraConfig(rank=4, alpha=4.0, targets=MODULES)
    comfyui.core("lora_file").save_lora(path, tensors, config, dtype=torch.float32)
    load = {"class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["demo", 0], "lora_name": path.name, "strength_model": 0.5}}  # fmt: skip
    run = comfyui.execute(drawing(model=load))
    assert run.status == "success", run.error

    x, condition = seeded(1, 16, 8, 8), standalone.encoder.encode_text(TEXT)
    host = comfyui.module("nodes.host")
    with torch.inference_mode(), host.ComfyDenoiser(run.value("model")).loaded(x.shape) as denoiser:
        theirs = denoiser.predict_x0(x, 0.75, [condition])
    with torch.no_grad():
        base = standalone.denoiser.predict_x0(x, 0.75, [condition])
        with comfyui.core("standalone.host").with_lora(standalone.denoiser, path, 0.5):
            ours = standalone.denoiser.predict_x0(x, 0.75, [condition])
    assert (ours - base).abs().max() > 0.05
    assert torch.allclose(theirs, ours, atol=5e-4)


# -- the teacher's reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 96), (48, 80), (100, 37)])
def test_picture_and_text_are_the_standalone_hosts(demo, standalone, vision, height, width):
    image = seeded(3, height, width)
    theirs = vision.encode_image_text(demo.clip, demo.vision, TEXT, image)
    ours = standalone.encoder.encode_image_text(image, TEXT).features
    assert theirs.dtype == torch.float32 and theirs.shape == ours.shape
    assert torch.allclose(theirs, ours, atol=1e-3)


def test_the_picture_is_read_with_qwen3_vls_positions(comfyui, demo, vision):
    """With the language model's own settings it is another condition."""
    from comfy.text_encoders import llama

    image = seeded(3, 64, 64)
    base = vision.encode_image_text(demo.clip, demo.vision, TEXT, image)
    sizes = comfyui.core("standalone.demo_files").TEXT_SIZES
    plain = comfyui.module("nodes.demo_models").language_config(sizes)
    plain.rope_theta = 1e6
    assert isinstance(plain, llama.Qwen3VL_4BConfig)
    other = vision.encode_image_text(demo.clip, dataclasses.replace(demo.vision, lm_config=plain), TEXT, image)
    assert not torch.allclose(base, other, atol=1e-2)


def test_a_long_caption_is_cut_and_the_picture_stays(demo, vision):
    image, words = seeded(3, 64, 64), "badge, top, " * 600
    long = vision.encode_image_text(demo.clip, demo.vision, words, image)
    assert len(long) == vision.MAX_TOKENS
    short = vision.encode_image_text(demo.clip, demo.vision, "badge, top, badge", image)
    assert torch.allclose(long[:12], short[:12], atol=1e-3)  # causal: later words change nothing


def test_the_language_model_is_given_back_also_after_an_error(demo, vision, monkeypatch):
    model = demo.clip.cond_stage_model.qwen3_4b.transformer.model
    before = model.config
    vision.encode_image_text(demo.clip, demo.vision, TEXT, seeded(3, 64, 64))
    assert model.config is before

    def fail(*_: Any, **__: Any) -> None:
        assert model.config is demo.vision.lm_config and model.config is not before
        raise RuntimeError("on purpose")

    monkeypatch.setattr(model.layers[1], "forward", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        vision.encode_image_text(demo.clip, demo.vision, TEXT, seeded(3, 64, 64))
    assert model.config is before


def test_clip_and_vision_that_do_not_belong_together_are_refused(demo, vision):
    real = dataclasses.replace(demo.vision, lm_config=vision.qwen3vl_4b().lm_config)
    with pytest.raises(ValueError, match="128 wide.*2560"):
        vision.encode_image_text(demo.clip, real, TEXT, seeded(3, 64, 64))
    other = SimpleNamespace(cond_stage_model=SimpleNamespace())
    with pytest.raises(ValueError, match="qwen_3_4b with type lumina2"):
        vision.encode_image_text(other, demo.vision, TEXT, seeded(3, 64, 64))


def test_pictures_are_seen_at_the_size_of_qwens_own_processor(vision):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    spec = vision.qwen3vl_4b()
    for height in range(300, 1600, 37):
        for width in range(300, 1600, 41):
            expected = smart_resize(height, width, 32, spec.min_pixels, spec.max_pixels)
            assert vision.seen_size(height, width, spec.min_pixels, spec.max_pixels) == expected
    assert vision.seen_size(1024, 1024, spec.min_pixels, spec.max_pixels) == (768, 768)
    assert vision.seen_size(64, 2048, spec.min_pixels, spec.max_pixels)[0] == 96  # enlarged to the least


def test_the_real_layout_is_transformers_qwen3_vl(vision, tiny, tmp_path):
    """Z-Image's stock CLIP with a vision file against Qwen3-VL with that language model, at a real picture size."""
    import comfy.sd
    from comfy.supported_models_base import ClipTarget
    from comfy.text_encoders import z_image
    from transformers import Qwen3VLConfig, Qwen3VLModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    width = tiny.tower["out_hidden_size"]
    sizes = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 2,
             "num_key_value_heads": 1}  # fmt: skip
    target = ClipTarget(z_image.ZImageTokenizer, z_image.te())
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, "qwen3_4b_model_config": sizes})
    toy.fill(clip.cond_stage_model)
    tower, state = reference(tiny)
    loaded = vision.load_teacher_vision(in_a_file(tmp_path / "vl.safetensors", state), tiny)
    loaded.model.float()  # the positions are interpolated in the weights' dtype

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text_config = {**sizes, "vocab_size": 151936, "head_dim": 128, "rope_parameters": rope}
    whole = Qwen3VLModel(Qwen3VLConfig(text_config=text_config, vision_config=dict(tiny.tower))).eval()
    whole.visual.load_state_dict(tower.state_dict())
    whole.language_model.load_state_dict(clip.cond_stage_model.qwen3_4b.transformer.model.state_dict())
    image = seeded(3, 512, 768).mul(255).round()
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=512**2, max_pixels=768**2
    )
    pixels = processor(images=image.movedim(0, -1).byte().numpy(), return_tensors="pt")
    prompt = vision.TEACHER_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * (16 * 24)).format(TEXT)
    tokens = clip.tokenizer.qwen3_4b.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = whole(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True, **pixels,
            mm_token_type_ids=(tokens == 151655).long(),
        )  # fmt: skip
    expected = out.hidden_states[-2][0]
    ours = vision.encode_image_text(clip, loaded, TEXT, image / 255)
    assert ours.shape == expected.shape and (ours - expected).norm() < 1e-4 * expected.norm()


# -- vision files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(vision: Any) -> Any:
    """The real tower's layout at toy sizes."""
    real = vision.qwen3vl_4b()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "depth": 4, "deepstack_visual_indexes": [0, 1, 2],
             "num_heads": 2, "num_position_embeddings": 36, "out_hidden_size": 48}  # fmt: skip
    config = dataclasses.replace(real.lm_config, hidden_size=sizes["out_hidden_size"])
    return dataclasses.replace(real, tower={**real.tower, **sizes}, lm_config=config)


def reference(tiny: Any) -> Any:
    """transformers' tower with weights that bf16 holds exactly, and its tensors."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    torch.manual_seed(0)
    model = Qwen3VLVisionModel(Qwen3VLVisionConfig(**tiny.tower)).eval()
    state = {name: (value + 0.02 * torch.randn_like(value)).bfloat16() for name, value in model.state_dict().items()}
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model, state


def look(model: Any) -> list[Tensor]:
    """(merged, *DeepStack) of a seeded picture of 6x6 patches."""
    patches, grid = torch.randn(36, 1536, generator=torch.Generator().manual_seed(1)), torch.tensor([[1, 6, 6]])
    with torch.inference_mode():
        out = model(patches, grid)
    merged, deepstack = out if isinstance(out, tuple) else (out.pooler_output, out.deepstack_features)
    return [merged, *deepstack]


def in_a_file(path: Path, state: dict[str, Tensor], prefix: str = "model.visual.", **metadata: str) -> Path:
    """With other parts of the model beside it, which must not be read."""
    tensors = {prefix + name: value for name, value in state.items()}
    tensors["model.language_model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
    if f"{prefix}scaled_fp8" in tensors:
        tensors["scaled_fp8"] = tensors.pop(f"{prefix}scaled_fp8")
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_a_plain_file_is_transformers_tower(vision, tiny, tmp_path, prefix):
    model, state = reference(tiny)
    loaded = vision.load_teacher_vision(in_a_file(tmp_path / "vl.safetensors", state, prefix), tiny)
    for theirs, ours in zip(look(model), look(loaded.model), strict=True):
        assert torch.allclose(theirs, ours, atol=1e-4)
    assert (loaded.min_pixels, loaded.max_pixels) == (512 * 512, 768 * 768)
    assert loaded.lm_config.rope_theta == 5e6 and loaded.lm_config.rope_dims == [24, 20, 20]


@pytest.mark.parametrize("layout", ["tensors", "header", "older"])
def test_an_fp8_scaled_file_is_its_dequantised_weights(vision, tiny, tmp_path, layout):
    model, state = reference(tiny)
    quantised, plain, layers = {}, dict(state), {}
    for name, value in state.items():
        quantised[name] = value
        if name.endswith(".weight") and value.ndim == 2 and name.startswith(("blocks.", "merger.linear", "deepstack")):
            layer, scale = name.removesuffix(".weight"), value.abs().max().float() / 448
            quantised[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            quantised[f"{layer}.{'scale_weight' if layout == 'older' else 'weight_scale'}"] = scale
            plain[name] = (quantised[name].float() * scale).bfloat16()
            layers[layer] = {"format": "float8_e4m3fn"}
    names = [name for name in layers if "norm" not in name]
    assert len(names) == len(layers) >= 4 * 4
    metadata = {}
    if layout == "tensors":
        text = json.dumps({"format": "float8_e4m3fn"}).encode()
        quantised |= {f"{name}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8) for name in layers}
    elif layout == "older":
        quantised["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    else:
        others = {"model.language_model.layers.0.mlp.up_proj": {"format": "float8_e4m3fn"}}
        mine = {f"model.visual.{name}": value for name, value in layers.items()}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": {**mine, **others}})
    loaded = vision.load_teacher_vision(in_a_file(tmp_path / "fp8.safetensors", quantised, **metadata), tiny)
    assert loaded.model.blocks[0].mlp.linear_fc1.quant_format == "float8_e4m3fn"
    model.load_state_dict({name: value.float() for name, value in plain.items()})
    for theirs, ours in zip(look(model), look(loaded.model), strict=True):
        assert (theirs - ours).norm() < 0.01 * theirs.norm()


def test_wrong_files_are_refused_with_what_was_found(vision, tiny, tmp_path):
    _, state = reference(tiny)
    path, whole = tmp_path / "wrong.safetensors", {f"visual.{name}": value for name, value in state.items()}
    cases = {
        "no vision tower": {"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)},
        "another kind .Qwen2.5-VL": {"visual.merger.mlp.0.weight": torch.zeros(2, 2)},
        "output 64": whole | {"visual.merger.linear_fc2.weight": torch.zeros(64, 2)},
        "0 DeepStack mergers": {name: value for name, value in whole.items() if "deepstack" not in name},
        "5 blocks": whole | {"visual.blocks.4.norm1.weight": torch.zeros(64)},
        "only a part.*visual.merger.norm.bias": {k: v for k, v in whole.items() if k != "visual.merger.norm.bias"},
        "size mismatch": whole | {"visual.pos_embed.weight": torch.zeros(9, 64)},
    }
    for found, tensors in cases.items():
        save_file({name: value.clone() for name, value in tensors.items()}, path)
        with pytest.raises(ValueError, match=found) as error:
            vision.load_teacher_vision(path, tiny)
        assert "wrong.safetensors" in str(error.value) and "Qwen3-VL-4B" in str(error.value)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="cannot be read"):
        vision.load_teacher_vision(path, tiny)


def test_the_8b_is_told_from_the_4b(vision, tmp_path):
    tensors = {"visual.pos_embed.weight": torch.zeros(1, 1152), "visual.merger.linear_fc2.weight": torch.zeros(4096, 1)}
    tensors |= {f"visual.blocks.{i}.norm1.bias": torch.zeros(1) for i in range(27)}
    tensors |= {f"visual.deepstack_merger_list.{i}.norm.bias": torch.zeros(1) for i in range(3)}
    save_file(tensors, tmp_path / "qwen3vl_8b.safetensors")
    expected = "width 1024, 24 blocks, 3 DeepStack mergers, output 2560"
    found = "found width 1152, 27 blocks, 3 DeepStack mergers, output 4096"
    with pytest.raises(ValueError, match=f"{expected}.*{found}"):
        vision.load_teacher_vision(tmp_path / "qwen3vl_8b.safetensors")


def test_load_teacher_vision_takes_a_text_encoder_file(comfyui, tmp_path, monkeypatch):
    """The node itself: a file of models/text_encoders by its name, and the user reads the sentence."""
    folder = comfyui.base / "models" / "text_encoders"
    folder.mkdir(exist_ok=True)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, folder / "text_only.safetensors")
    graph = {
        "1": {"class_type": "DOPSD_LoadTeacherVision", "inputs": {"vision_name": "text_only.safetensors"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    run = comfyui.execute(graph)
    assert run.status == "error" and "no vision tower" in run.error, run.error
