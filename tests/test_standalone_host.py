"""The host without ComfyUI: the shipped files, and the core's protocols over diffusers and transformers."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.lora_file import save_lora
from dopsd_core.conditioning.encode import Condition
from dopsd_core.demo import model_files as demo_files
from dopsd_core.demo.model_files import WEIGHTS, vision_size
from dopsd_core.denoiser import Denoiser
from dopsd_core.families import Z_IMAGE
from dopsd_core.standalone.hosts import demo_weight_files as files
from dopsd_core.standalone.hosts.demo import DemoModel, StandaloneEncoder, load_demo_model, vision_patches, with_lora
from dopsd_core.standalone.hosts.demo_networks import new_transformer


@pytest.fixture(scope="module")
def model() -> DemoModel:
    return load_demo_model()


@pytest.fixture()
def states() -> tuple[torch.Tensor, list[Condition]]:
    g = torch.Generator().manual_seed(0)
    conditions = [Condition(torch.randn(n, 128, generator=g)) for n in (9, 20, 31)]
    return torch.randn(3, 16, 8, 8, generator=g), conditions


def test_velocity_is_diffusers_with_its_own_convention(model, states) -> None:
    x, conditions = states
    protocol: Denoiser = model.denoiser  # pyright holds the host to the protocol here
    assert isinstance(protocol, Denoiser)
    with torch.no_grad():
        x0 = model.denoiser.predict_x0(x, 0.7, conditions)
        out = model.denoiser.transformer(
            list(x.unsqueeze(2)), torch.full((3,), 0.3), [c.features for c in conditions], return_dict=False
        )[0]
    velocity = -torch.stack(list(out)).squeeze(2)  # diffusers' pipeline negates the output for its scheduler
    assert torch.allclose(x0, x - 0.7 * velocity, atol=1e-4)


def test_a_batch_of_unequal_captions_equals_its_rows(model, states) -> None:
    x, conditions = states
    with torch.no_grad():
        together = model.denoiser.predict_x0(x, 0.5, conditions)
        alone = torch.cat([model.denoiser.predict_x0(x[i : i + 1], 0.5, conditions[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_images_and_latents_are_taken_to_the_autoencoders_device(model) -> None:
    """They come from a file or from the loop, wherever the models lie."""
    vae = deepcopy(model.encoder.vae).to("meta")
    encoder = StandaloneEncoder(model.encoder.model, torch.tensor([]), vae, "elsewhere")
    latent = encoder.encode_latent(torch.rand(3, 64, 64))
    assert latent.device.type == "meta" and latent.shape == (16, 8, 8)
    images = encoder.decode(torch.zeros(2, 16, 8, 8))
    assert images.device.type == "meta" and images.shape == (2, 3, 64, 64)


def test_single_file_layout_is_read_back_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = new_transformer(layers=2)
    state = {k: v.bfloat16().float() for k, v in network.state_dict().items()}
    single = files.transformer_to_single_file(state)
    assert "layers.0.attention.qkv.weight" in single and not any(".to_q." in name for name in single)
    path = tmp_path / "model.safetensors"
    files.save_weights(path, single, torch.bfloat16, {})
    back = files.convert_z_image_transformer_checkpoint_to_diffusers(load_file(path))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name].float(), state[name]) for name in state)


def test_shipped_files_are_small_and_whole(model) -> None:
    sizes = {path.name: path.stat().st_size for path in WEIGHTS.glob("*.safetensors")}
    names = (
        demo_files.MODEL_FILE,
        demo_files.TEXT_ENCODER_FILE,
        demo_files.VAE_FILE,
        demo_files.JUDGE_FILE,
        demo_files.PARENT_FILE,
    )
    assert set(sizes) == set(names)
    assert sum(sizes.values()) < 40e6
    for parameter in model.denoiser.transformer.parameters():
        assert bool(torch.isfinite(parameter).all())


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dopsd_demo"):
        load_demo_model(tmp_path)


def test_lora_file_gives_the_student_and_leaves_the_base(model, states, tmp_path: Path) -> None:
    x, conditions = states
    denoiser, config = model.denoiser, Z_IMAGE.lora_config(rank=4)
    with torch.no_grad():
        base = denoiser.predict_x0(x, 0.5, conditions)
        adapters = AdapterSet(denoiser.sites(), config, seed=1)
        for parameter in adapters.parameters():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
        with adapters.attached():
            student = denoiser.predict_x0(x, 0.5, conditions)
        path = tmp_path / "lora.safetensors"
        save_lora(path, adapters.state(), config, dtype=torch.float32)
        with with_lora(denoiser, path):
            loaded = denoiser.predict_x0(x, 0.5, conditions)
        with with_lora(denoiser, path, 0.5):
            half = denoiser.predict_x0(x, 0.5, conditions)
        with with_lora(denoiser, path, 0.0):
            none = denoiser.predict_x0(x, 0.5, conditions)
        assert torch.equal(denoiser.predict_x0(x, 0.5, conditions), base)
    assert not torch.allclose(student, base, atol=1e-2)
    assert torch.allclose(loaded, student, atol=1e-5)
    assert torch.equal(none, base)
    assert not torch.allclose(half, student, atol=1e-3) and not torch.allclose(half, base, atol=1e-3)


@pytest.mark.parametrize(("size", "seen"), [((64, 64), (96, 96)), ((128, 64), (128, 64)), ((32, 512), (32, 384))])
def test_vision_size_keeps_the_aspect_in_whole_cells(size: tuple[int, int], seen: tuple[int, int]) -> None:
    assert vision_size(*size) == seen


def test_patches_are_those_of_transformers_image_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
    height, width = vision_size(96, 128)
    if (height, width) != (96, 128):  # make the resize the identity: only the order of the patches is asked here
        image = torch.nn.functional.interpolate(image[None], size=(height, width))[0]
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=False
    )
    array = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    out = processor(images=array, return_tensors="pt")
    patches, grid = vision_patches(image)
    assert torch.equal(grid, out["image_grid_thw"])
    assert torch.allclose(patches, out["pixel_values"], atol=1e-2)


def test_image_changes_the_teacher_and_not_the_student(model) -> None:
    g = torch.Generator().manual_seed(0)
    text = "a [V] badge, top, on a sand background"
    a, b = (model.encoder.encode_image_text(torch.rand(3, 64, 64, generator=g), text) for _ in range(2))
    student = model.encoder.encode_text(text)
    assert a.features.shape == (student.features.shape[0] + 11, 128)  # 9 image tokens between start and end
    assert not torch.allclose(a.features[-1], b.features[-1], atol=1e-3)


def test_words_of_the_world_are_known_and_others_are_named(model) -> None:
    assert (
        model.encoder.unknown_words(["a [V] striped red star badge with a blue center, top, on a sky background"]) == []
    )
    assert model.encoder.unknown_words(["a zebra, top"]) == ["zebra"]
    assert model.encoder.encode_text("a photo of a zebra, 多").features.isfinite().all()  # spelled in bytes


def test_autoencoder_reaches_its_gate(model) -> None:
    from dopsd_core.demo.world import render, sample_scenes

    images = render(sample_scenes(64, torch.Generator().manual_seed(1234), held_out=None))
    latents = torch.stack([model.encoder.encode_latent(image) for image in images])
    back = model.encoder.decode(latents)
    psnr = -10 * torch.log10((back - images).square().mean((1, 2, 3)))
    assert float(psnr.mean()) >= 30
    assert abs(float(latents.mean())) < 0.1 and 0.8 < float(latents.std()) < 1.2
