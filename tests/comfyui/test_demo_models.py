"""The demo model as ComfyUI objects is the standalone host's, and stock nodes work on it; the teacher's vision."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inprocess import ComfyUI
from torch import Tensor

TEXT = "a [V] badge, top, on a sand background"
LOAD = {"class_type": "DOPSD_LoadDemoModels", "inputs": {}}
MODULES = ("layers.0.attention.to_q", "layers.3.attention.to_out.0", "noise_refiner.0.feed_forward.w1")


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def drawing(**model_nodes: dict) -> dict:
    """Stock nodes from a prompt to an image and back, on the MODEL of node "model"."""
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
        "image": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["demo", 2]}},
        "latent": {"class_type": "VAEEncode", "inputs": {"pixels": ["image", 0], "vae": ["demo", 2]}},
        "again": {"class_type": "VAEDecode", "inputs": {"samples": ["latent", 0], "vae": ["demo", 2]}},
        "latent_tiled": {"class_type": "VAEEncodeTiled", "inputs": {"pixels": ["image", 0], **tiles}},
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
    return comfyui.core("standalone.hosts.demo").load_demo_model()


@pytest.fixture
def vision(comfyui: ComfyUI) -> Any:
    return comfyui.module("nodes.comfy_host.vision")


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
    theirs = run.value("image").movedim(-1, 1)
    assert theirs.std() > 0.05
    assert torch.allclose(theirs, standalone.encoder.decode(x), atol=1e-3)


def test_velocity_is_the_standalone_hosts(comfyui, demo, standalone):
    condition = comfyui.core("conditioning.encode").Condition
    g = torch.Generator().manual_seed(0)
    x, features = torch.randn(2, 16, 8, 8, generator=g), torch.randn(2, 23, 128, generator=g)
    device = demo.model.load_device
    with torch.inference_mode():
        for sigma in (1.0, 0.75, 0.3):
            at, text = torch.full((2,), sigma, device=device), features.to(device)
            theirs = demo.model.model.apply_model(x.to(device), at, c_crossattn=text, num_tokens=23)
            ours = standalone.denoiser.predict_x0(x, sigma, [condition(f) for f in features])
            assert torch.allclose(ours, theirs.cpu(), atol=2e-4), sigma


def test_text_is_the_standalone_hosts(run, standalone):
    ((features, extra),) = run.value("text")
    assert torch.allclose(features[0], standalone.encoder.encode_text(TEXT).features, atol=1e-4)
    assert extra["attention_mask"].all()


def test_autoencoder_is_the_standalone_hosts(demo, run, standalone):
    """Through latent_format, which ComfyUI applies around every model."""
    images, inside = run.value("image"), demo.model.model.process_latent_in(run.value("latent")["samples"])
    ours = torch.stack([standalone.encoder.encode_latent(p) for p in images.movedim(-1, 1)])
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
        assert all(torch.equal(value.cpu(), theirs[name].cpu()) for name, value in copy.model.state_dict().items())
        assert not any(p.is_inference() for p in copy.model.parameters())


def test_a_lora_file_acts_as_in_the_standalone_host(comfyui, demo, standalone):
    """Written with diffusers' names, loaded by LoraLoaderModelOnly, at its strength."""
    core = comfyui.core("adapters")
    g = torch.Generator().manual_seed(0)
    sites = {part.name: (part.stop - part.start, site.in_features)
             for site in standalone.denoiser.sites() for part in site.parts}  # fmt: skip
    tensors = {}
    for name in MODULES:
        rows, columns = sites[name]
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=g) / columns**0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=g) / 2
    path = comfyui.output / "loras" / "demo_test.safetensors"
    config = core.Lora(rank=4, alpha=4.0, targets=MODULES)
    comfyui.core("adapters.lora_file").save_lora(path, tensors, config, dtype=torch.float32)
    load = {"class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["demo", 0], "lora_name": path.name, "strength_model": 0.5}}  # fmt: skip
    run = comfyui.execute(drawing(model=load))
    assert run.status == "success", run.error

    x, condition = seeded(1, 16, 8, 8), standalone.encoder.encode_text(TEXT)
    host = comfyui.module("nodes.comfy_host.denoiser")
    with torch.inference_mode(), host.ComfyDenoiser(run.value("model")).loaded(x.shape) as denoiser:
        theirs = denoiser.predict_x0(x.to(denoiser.device), 0.75, [condition]).cpu()
    with torch.no_grad():
        base = standalone.denoiser.predict_x0(x, 0.75, [condition])
        with comfyui.core("standalone.hosts.demo").with_lora(standalone.denoiser, path, 0.5):
            ours = standalone.denoiser.predict_x0(x, 0.75, [condition])
    assert (ours - base).abs().max() > 0.05
    assert torch.allclose(theirs, ours, atol=5e-4)


# -- the teacher's reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 96), (48, 80), (100, 37)])
def test_image_and_text_are_the_standalone_hosts(demo, standalone, vision, height, width):
    image = seeded(3, height, width)
    theirs = vision.encode_image_text(demo.clip, demo.vision, TEXT, image)
    ours = standalone.encoder.encode_image_text(image, TEXT).features
    assert theirs.dtype == torch.float32 and theirs.shape == ours.shape
    assert torch.allclose(theirs, ours, atol=1e-3)


def test_the_image_is_read_with_qwen3_vls_positions(comfyui, demo, vision):
    """With the language model's own settings it is another condition."""
    from comfy.text_encoders import llama

    image = seeded(3, 64, 64)
    base = vision.encode_image_text(demo.clip, demo.vision, TEXT, image)
    sizes = comfyui.core("demo.model_files").TEXT_SIZES
    plain = comfyui.module("nodes.comfy_host.demo_models").language_config(sizes)
    plain.rope_theta = 1e6
    assert isinstance(plain, llama.Qwen3VL_4BConfig)
    other = vision.encode_image_text(demo.clip, dataclasses.replace(demo.vision, lm_config=plain), TEXT, image)
    assert not torch.allclose(base, other, atol=1e-2)


def test_a_long_caption_is_cut_and_the_image_stays(demo, vision):
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


def test_every_weight_of_the_autoencoder_may_stay_in_ram(demo):
    """With --novram, or where memory is short, ComfyUI brings a weight for its use, to layers of its own only."""
    for path, module in demo.vae.first_stage_model.named_modules():
        assert not list(module.parameters(recurse=False)) or hasattr(module, "comfy_cast_weights"), path
