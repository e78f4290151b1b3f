"""The scripts that made the demo model: their fast forwards are the real networks', and the training pieces hold."""

from __future__ import annotations

import json

import pytest
import torch

from dopsd_core.demo.model_files import VAE_FILE, WEIGHTS
from dopsd_core.demo.world import render, sample_scenes
from dopsd_core.sigmas import z_image_turbo_sigmas
from dopsd_core.standalone.hosts.demo import load_demo_model, vision_patches
from dopsd_core.standalone.hosts.demo_networks import load_tokenizer
from dopsd_core.standalone.making.batched import (
    IMAGE_TOKENS,
    BatchedEncoder,
    BatchedTransformer,
    teacher_pixels,
)
from dopsd_core.standalone.making.build_tokenizer import merges_used
from dopsd_core.standalone.making.distill import (
    STEPS,
    SUBSTEPS,
    Guidance,
    guided_mean_velocity,
    substep_sigmas,
)
from dopsd_core.standalone.making.train_vae import Autoencoding, edge_loss
from dopsd_core.standalone.making.twins import WeightAverage, warmup_stable_decay


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


def test_batched_transformer_equals_diffusers(model) -> None:
    g = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(4, 16, 8, 8, generator=g), torch.tensor([1.0, 0.9, 0.5, 0.1])
    lengths = torch.tensor([31, 28, 17, 8])
    features = torch.randn(4, 32, 128, generator=g)
    network = model.denoiser.transformer
    with torch.no_grad():
        fast = BatchedTransformer(network)(x, sigma, features, lengths)
        rows = [f[:n] for f, n in zip(features, lengths, strict=True)]
        real = torch.stack(list(network(list(x.unsqueeze(2)), 1 - sigma, rows, return_dict=False)[0])).squeeze(2)
    assert torch.allclose(fast, -real, atol=2e-4, rtol=1e-4)


def test_batched_encoder_equals_transformers(model) -> None:
    encoder, image = model.encoder, render(sample_scenes(2, torch.Generator().manual_seed(0)))
    text = "a [K] badge, top, on a sand background"
    fast = BatchedEncoder(encoder.model)
    template = "<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"
    vision = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"
    with torch.no_grad():
        mixed = fast(encoder._rows(template.format(vision, text)).expand(2, -1), teacher_pixels(image))
        plain = fast(encoder._rows(template.format("", text)))[0]
    for i in range(2):
        assert torch.allclose(mixed[i], encoder.encode_image_text(image[i], text).features, atol=1e-4)
    assert torch.allclose(plain, encoder.encode_text(text).features, atol=1e-4)


def test_teacher_pixels_are_the_hosts(model) -> None:
    image = render(sample_scenes(1, torch.Generator().manual_seed(1)))
    patches, _ = vision_patches(image[0])
    cells = patches.reshape(3, 3, 2, 2, 3, 2, 16, 16)[
        :, :, :, :, :, 0
    ]  # cell row, column, inner row, column, RGB, y, x
    whole = cells.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, 96, 96)
    assert torch.allclose(whole, teacher_pixels(image)[0])


def test_substeps_refine_the_students_grid() -> None:
    coarse, fine = z_image_turbo_sigmas(STEPS), substep_sigmas()
    assert fine.shape == (STEPS, SUBSTEPS + 1)
    assert torch.allclose(fine[:, 0], torch.tensor(coarse[:-1])) and torch.allclose(
        fine[:, -1], torch.tensor(coarse[1:])
    )


def test_distillation_target_of_a_constant_velocity_is_that_velocity() -> None:
    velocity = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))

    def parent(x, sigma, features, lengths):
        return velocity.expand(len(x), -1, -1, -1)

    x, step = torch.zeros(2, 16, 8, 8), torch.arange(2)
    features, lengths, is_open = torch.zeros(2, 32, 128), torch.full((2,), 8), torch.tensor([True, False])
    empty, guidance = torch.zeros(1, 32, 128), Guidance(2.0, 3.0, rescale=0.0)
    got = guided_mean_velocity(parent, x, step, features, lengths, empty, is_open, guidance)  # type: ignore[arg-type]
    assert torch.allclose(got, velocity.expand(2, -1, -1, -1), atol=1e-4)


def guided(guidance: Guidance, is_open: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x0 of the guided velocity, x0 of the conditional one, of the unconditional one, x)."""
    g = torch.Generator().manual_seed(3)
    x, conditional, unconditional = torch.randn(3, 2, 16, 8, 8, generator=g).unbind(0)
    sigma, scale = torch.tensor([1.0, 0.75]), guidance.scale(torch.tensor([is_open] * 2))
    s = sigma[:, None, None, None]
    velocity = guidance.velocity(x, sigma, conditional, unconditional, scale)
    return x - s * velocity, x - s * conditional, x - s * unconditional, x


def test_guidance_of_one_is_the_conditional_velocity() -> None:
    got, conditional, _, _ = guided(Guidance(1.0, 4.0, rescale=0.7))
    assert torch.allclose(got, conditional, atol=1e-5)


def test_guidance_without_rescaling_extrapolates_and_open_prompts_have_their_own_scale() -> None:
    for is_open, scale in ((False, 2.0), (True, 3.0)):
        got, conditional, unconditional, _ = guided(Guidance(2.0, 3.0, rescale=0.0), is_open)
        assert torch.allclose(got, unconditional + scale * (conditional - unconditional), atol=1e-5)


def test_rescaled_guidance_has_the_spread_of_the_conditional_prediction() -> None:
    got, conditional, _, _ = guided(Guidance(3.0, 3.0, rescale=1.0))
    assert torch.allclose(got.std((1, 2, 3)), conditional.std((1, 2, 3)), rtol=1e-4)
    plain, *_ = guided(Guidance(3.0, 3.0, rescale=0.0))
    assert bool((plain.std((1, 2, 3)) > 1.5 * got.std((1, 2, 3))).all())


def test_rates_of_a_shortened_run_agree_while_constant() -> None:
    assert [warmup_stable_decay(s, 1000) for s in range(600)] == [warmup_stable_decay(s, 4000) for s in range(600)]
    assert warmup_stable_decay(999, 1000) < 0.01 < warmup_stable_decay(800, 1000) < 1


def test_weight_average_swaps_there_and_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage([parameter], 0.9)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update()
    average.swap()
    assert 0 < float(parameter.detach()[0].detach()) < 1
    average.swap()
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_tokenizer_keeps_real_ids_and_spells_the_rest() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.encode("<|im_start|>user\n").ids == [151644, 872, 198]
    assert tokenizer.encode("a [V] badge, top").ids == [64, 508, 53, 60, 23961, 11, 1909]
    assert tokenizer.decode(tokenizer.encode("zebra 多").ids) == "zebra 多"
    vocab = json.loads((WEIGHTS / "demo_tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert max(vocab.values()) > 150_000 and len(vocab) < 600


def test_merges_used_are_those_that_bpe_applies() -> None:
    rank = {("a", "b"): 0, ("ab", "c"): 1, ("b", "c"): 2}
    assert merges_used("abc", rank) == {("a", "b"), ("ab", "c")}


def test_edge_loss_sees_speckle_that_squared_error_hardly_sees() -> None:
    flat = torch.zeros(1, 3, 64, 64)
    speckled = 0.02 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    shifted = flat + 0.02
    assert float(edge_loss(flat, flat)) == 0 and float(edge_loss(shifted, flat)) < 1e-6
    assert float(edge_loss(speckled, flat)) > 0.05


def test_a_decoder_trained_further_keeps_its_latents() -> None:
    file = WEIGHTS / VAE_FILE
    both = Autoencoding(file)
    trained = {name for name, p in both.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("model.decoder.") for name in trained)
    loss, figures = both.loss(2, torch.Generator().manual_seed(0))
    loss.backward()
    assert figures["psnr"] > 25 and all(p.grad is None for p in both.model.encoder.parameters())
    assert any(p.requires_grad for p in Autoencoding().model.encoder.parameters())
