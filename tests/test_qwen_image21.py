"""The host of Qwen-Image 2.1 against diffusers' pipeline with the same weights: texts, references, latents, images; and
gradients against peft's."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.counters import LiveBytes
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.conditioning.encode import Condition, EncodeRequest, ImageInput, encode_dataset
from dopsd_core.conditioning.teachers import EDIT, EDIT_TARGET, VLM
from dopsd_core.families import QWEN_IMAGE21
from dopsd_core.kept_products import ATTENTION
from dopsd_core.memory.activation_checkpointing import block_bytes, checkpointed
from dopsd_core.memory.checkpoint_plan import Checkpointing
from dopsd_core.rollout import sample

pytest.importorskip("diffusers.models.transformers.transformer_qwenimage21")
from tests import qwen_image21_twins  # noqa: E402

PROMPT = "a badge in the style of [V], top"
SIZES = [(96, 64), (64, 96)]  # (width, height)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return qwen_image21_twins.pipeline()


@pytest.fixture(scope="module")
def host(pipe: Any) -> SimpleNamespace:
    from dopsd_core.standalone.hosts.qwen_image21 import QwenImage21Denoiser, QwenImage21Encoder

    encoder = QwenImage21Encoder(pipe.text_encoder.model, pipe.processor.tokenizer, pipe.vae, "small")
    return SimpleNamespace(denoiser=QwenImage21Denoiser(pipe.transformer), encoder=encoder)


def relative(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape and float(wanted.norm()) > 0
    return float((got - wanted).norm() / wanted.norm())


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Of whole numbers, so that both sides read the same."""
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return Image.fromarray(pixels.mul(255).byte().permute(1, 2, 0).contiguous().numpy())


def as_tensor(sample: Image.Image) -> Tensor:
    """[3, H, W] in [0, 1]."""
    values = torch.frombuffer(bytearray(sample.tobytes()), dtype=torch.uint8)
    return values.view(sample.height, sample.width, 3).permute(2, 0, 1).float() / 255


# -- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [PROMPT, "", "[V] " * 60])
def test_texts(pipe: Any, host: SimpleNamespace, text: str) -> None:
    with torch.no_grad():
        wanted, _, _ = pipe.encode_prompt(text)
    assert relative(host.encoder.encode_text(text).features, wanted[0]) < 1e-5


@pytest.mark.parametrize("count", [1, 2])
def test_texts_that_have_seen_references(pipe: Any, host: SimpleNamespace, count: int) -> None:
    """Their pixels' features make room for the latents; the others have read them."""
    references = [image(*size, seed) for seed, size in enumerate(SIZES[:count])]
    with torch.no_grad():
        wanted, _, is_image = pipe.encode_prompt(PROMPT, references)
    got = host.encoder.encode_with_references([as_tensor(sample) for sample in references], PROMPT)
    assert relative(got.features, wanted[0][~is_image[0].bool()]) < 1e-5
    runs = is_image[0].int().diff().eq(1).nonzero().flatten() + 1
    assert got.slots == tuple(int((~is_image[0, :place].bool()).sum()) for place in runs) and len(got.slots) == count
    other = host.encoder.encode_with_references([as_tensor(image(*size, 9)) for size in SIZES[:count]], PROMPT)
    assert other.features.shape == got.features.shape and relative(other.features, got.features) > 1e-3


def test_the_teacher_vlm_keeps_the_image(host: SimpleNamespace) -> None:
    first, second = (host.encoder.encode_image_text(as_tensor(image(96, 96, seed)), PROMPT).features for seed in (1, 2))
    alone = host.encoder.encode_text(PROMPT).features
    assert len(first) == len(alone) + len("<image1>") + 2 + 16 * 16  # seen at 512 x 512
    assert relative(first, second) > 0.01
    assert relative(first[-10:], second[-10:]) > 1e-4  # the caption's end has read the image


def test_latents(pipe: Any, host: SimpleNamespace) -> None:
    """Of opaque images."""
    for width, height in SIZES:
        sample = image(width, height)
        pixels = pipe.image_processor.preprocess(sample.convert("RGBA"), width=width, height=height).unsqueeze(2)
        with torch.no_grad():
            wanted = pipe._encode_vae_image(pixels, None)[0, :, 0]
        got = host.encoder.encode_latent(as_tensor(sample))
        assert got.shape == QWEN_IMAGE21.latent_shape(width, height) and relative(got, wanted) < 1e-4


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2], ids=["text to image", "edit", "two references"])
def test_images(pipe: Any, host: SimpleNamespace, count: int) -> None:
    """On Turbo's own grid; the pipeline does not cache keys and values here, as training does not."""
    references, sigmas = [image(*size, seed) for seed, size in enumerate(SIZES[:count])], QWEN_IMAGE21.sigmas(8, 96, 64)
    width, height = 96, 64
    noise = torch.randn(1, *QWEN_IMAGE21.latent_shape(width, height), generator=torch.Generator().manual_seed(3))
    wanted = pipe(
        prompt=PROMPT, image=references or None, latents=noise.flatten(2).transpose(1, 2), width=width, height=height,
        sigmas=list(sigmas[:-1]), output_resolution=80, output_type="latent", use_kv_cache=False,
    ).images  # fmt: skip
    tensors = [as_tensor(sample) for sample in references]
    if tensors:
        encoded = host.encoder.encode_with_references(tensors, PROMPT)
        latents = tuple(host.encoder.encode_latent(tensor) for tensor in tensors)
        condition = Condition(encoded.features, latents, encoded.slots)
    else:
        condition = host.encoder.encode_text(PROMPT)
    with torch.no_grad():
        got = sample(host.denoiser, [condition], noise, sigmas)
    assert relative(got, wanted.transpose(1, 2).unflatten(2, noise.shape[-2:])) < 1e-4
    assert relative(got, noise) > 0.1
    drawn = pipe.vae.decode(got.unsqueeze(2) * 0 + _scaled(pipe, got).unsqueeze(2), return_dict=False)[0][0, :3, 0]
    assert relative(host.encoder.decode(got)[0], drawn.add(1).div(2).clamp(0, 1)) < 1e-5


def _scaled(pipe: Any, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
    return latents * std + mean


def test_a_batch_of_different_layouts(host: SimpleNamespace) -> None:
    """Each sample as if it were alone."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 64, 4, 6, generator=generator)
    texts = [torch.randn(length, qwen_image21_twins.TEXT_WIDTH, generator=generator) for length in (7, 7, 12)]
    reference = torch.randn(64, 2, 4, generator=generator)
    conditions = [Condition(texts[0]), Condition(texts[1], (reference,), (3,)), Condition(texts[2])]
    with torch.no_grad():
        together = host.denoiser.predict_x0(x, 0.7, conditions)
        alone = [host.denoiser.predict_x0(x[i : i + 1], 0.7, [conditions[i]]) for i in range(3)]
    assert relative(together, torch.cat(alone)) < 1e-5
    with torch.no_grad():
        other = host.denoiser.predict_x0(x[1:2], 0.7, [Condition(texts[1], (reference,), (4,))])
    assert relative(other, alone[1]) > 1e-3  # the place counts


def test_a_batch_whose_references_alone_stand_at_different_places(host: SimpleNamespace) -> None:
    """All else has the same sizes, so one forward would take them together, at the places of the first."""
    generator = torch.Generator().manual_seed(6)
    texts = torch.randn(2, 7, qwen_image21_twins.TEXT_WIDTH, generator=generator)
    x, reference = torch.randn(2, 64, 4, 4, generator=generator), torch.randn(64, 2, 2, generator=generator)
    conditions = [Condition(text, (reference,), (slot,)) for text, slot in zip(texts, (2, 6), strict=True)]
    with torch.no_grad():
        together = host.denoiser.predict_x0(x, 0.7, conditions)
        alone = [host.denoiser.predict_x0(x[i : i + 1], 0.7, [conditions[i]]) for i in range(2)]
    assert relative(together, torch.cat(alone)) < 1e-5


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        (Condition(torch.zeros(5, 48), (torch.zeros(64, 2, 2),)), "1 references and 0 places for them"),
        (Condition(torch.zeros(5, 48), (torch.zeros(64, 3, 2),), (1,)), "must be even: crop the image to multiples"),
    ],
)
def test_what_does_not_fit_is_one_sentence(host: SimpleNamespace, condition: Condition, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        host.denoiser.predict_x0(torch.zeros(1, 64, 4, 4), 0.7, [condition])
    with pytest.raises(ValueError, match="multiples of 32 pixels: crop them"):
        host.encoder.encode_with_references([torch.zeros(3, 64, 80)], PROMPT)


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, "selective"], ids=["none checkpointed", "some", "all", "selective"])
@pytest.mark.parametrize("edits", [False, True], ids=["text", "a reference"])
def test_gradients_of_a_lora(host: SimpleNamespace, count: Any, edits: bool) -> None:
    """Ours and peft's, of a LoRA that does something already."""
    from peft import LoraConfig

    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 64, 4, 6, generator=generator)
    text = torch.randn(9, qwen_image21_twins.TEXT_WIDTH, generator=generator)
    reference = torch.randn(64, 2, 4, generator=generator)
    condition = Condition(text, (reference,), (4,)) if edits else Condition(text)
    weight = torch.randn(x.shape, generator=generator)
    config = QWEN_IMAGE21.lora_config(3, 6)
    adapters = AdapterSet(host.denoiser.sites(), config, teacher="frozen")
    start = {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in adapters.state().items()}
    adapters.load_state("student", start)
    names = [*(site.name for site in host.denoiser.sites()), ATTENTION]
    plan = Checkpointing.keeping(2, names) if count == "selective" else count
    with adapters.attached(), checkpointed(host.denoiser.blocks(), plan):
        x0 = host.denoiser.predict_x0(x, 0.7, [condition])
        (x0 * weight).sum().backward()
    ours = []
    for adapter in adapters._adapters:
        weights: Any = adapter.student
        a = weights.a
        ours += [(a.grad[3 * number : 3 * number + 3], b.grad) for number, b in enumerate(weights.b)]
    network = copy.deepcopy(host.denoiser.transformer)  # peft leaves its layers there
    names = [key.removesuffix(".lora_A.weight") for key in start if ".lora_A." in key]
    network.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=names), "ours")
    own = {key.replace(".ours.", "."): p for key, p in network.named_parameters() if ".ours." in key}
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(start[key])
    theirs_host = SimpleNamespace(transformer=network, compute_dtype=torch.float32)
    (type(host.denoiser).predict_x0(theirs_host, x, 0.7, [condition]) * weight).sum().backward()
    theirs = [(own[f"{name}.lora_A.weight"].grad, own[f"{name}.lora_B.weight"].grad) for name in names]
    assert len(theirs) == len(ours) == 2 * 7
    for number, pair in enumerate(theirs):
        for got, wanted in zip(ours[number], pair, strict=True):
            assert relative(got, wanted) < 1e-4, names[number]


# -- teachers ---------------------------------------------------------------------------------------------------------


def an_input(name: str, seed: int) -> ImageInput:
    return ImageInput(digest=name, load=lambda: as_tensor(image(64, 64, seed)))


def test_what_each_teacher_sees(host: SimpleNamespace) -> None:
    """The edit teacher's text has seen the image, and its latent has a place; the student's text has not."""
    plain = EncodeRequest(an_input("target", 1), PROMPT)
    (edit,) = encode_dataset([plain], host.encoder, None, teacher=EDIT)
    assert edit.student.slots == () and not edit.student.reference_latents
    (latent,) = edit.teacher.reference_latents
    assert edit.target_latent is not None and torch.equal(latent, edit.target_latent) and len(edit.teacher.slots) == 1
    encoded = host.encoder.encode_with_references([as_tensor(image(64, 64, 1))], EDIT.text(PROMPT))
    assert torch.equal(edit.teacher.features, encoded.features) and edit.teacher.slots == encoded.slots
    (vlm,) = encode_dataset([plain], host.encoder, None, teacher=VLM)
    assert not vlm.teacher.reference_latents and len(vlm.teacher.features) > len(vlm.student.features) + 250

    request = EncodeRequest(an_input("target", 1), "negate it", sources=(an_input("source", 2),))
    (pair,) = encode_dataset([request], host.encoder, None, teacher=EDIT_TARGET)
    assert len(pair.student.slots) == len(pair.student.reference_latents) == 1
    assert len(pair.teacher.slots) == len(pair.teacher.reference_latents) == 2
    assert torch.equal(pair.teacher.reference_latents[0], pair.student.reference_latents[0])
    assert pair.teacher.to("cpu", torch.float64).slots == pair.teacher.slots


def test_cached_places_are_the_same(host: SimpleNamespace, tmp_path) -> None:
    from dopsd_core.conditioning.cache import ConditionCache

    request = EncodeRequest(an_input("target", 1), PROMPT)
    first, second = (
        encode_dataset([request], host.encoder, ConditionCache(tmp_path), teacher=EDIT)[0] for _ in range(2)
    )
    assert first.teacher.slots == second.teacher.slots != ()
    assert torch.equal(first.teacher.features, second.teacher.features)


def test_saved_bytes_are_as_predicted(host: SimpleNamespace) -> None:
    """The formula of the family against what autograd saves for one more block."""
    saved = [_saved(layers) for layers in (2, 3)]
    (predicted, *_) = block_bytes(
        host.denoiser.blocks(), host.denoiser.sites(), QWEN_IMAGE21, QWEN_IMAGE21.lora_config(4), 96, 40, itemsize=4
    )
    assert saved[1] - saved[0] == pytest.approx(predicted.kept, rel=0.05)


def test_bytes_of_selective_checkpointing_are_as_predicted() -> None:
    """The formula against what one more block keeps alive after a forward."""

    def alive(layers: int) -> tuple[int, int]:
        denoiser = QwenImage21Denoiser(qwen_image21_twins.transformer(layers))
        config = QWEN_IMAGE21.lora_config(4)
        adapters = AdapterSet(denoiser.sites(), config, teacher="frozen")
        predicted = block_bytes(denoiser.blocks(), denoiser.sites(), QWEN_IMAGE21, config, 96, 40, itemsize=4)
        plan = Checkpointing.selective(predicted)
        condition = Condition(torch.randn(40, qwen_image21_twins.TEXT_WIDTH))
        with adapters.attached(), checkpointed(denoiser.blocks(), plan), LiveBytes() as live:
            x0 = denoiser.predict_x0(torch.randn(1, 64, 8, 12), 0.7, [condition])
        assert x0.requires_grad
        return live.now, predicted[0].saved(plan.kept[0])

    from dopsd_core.standalone.hosts.qwen_image21 import QwenImage21Denoiser

    assert alive(3)[0] - alive(2)[0] == pytest.approx(alive(2)[1], rel=0.02)


def _saved(layers: int) -> int:
    """Bytes of the distinct storages that autograd saves in a forward, the network's weights left out."""
    from dopsd_core.standalone.hosts.qwen_image21 import QwenImage21Denoiser

    denoiser = QwenImage21Denoiser(qwen_image21_twins.transformer(layers))
    adapters = AdapterSet(denoiser.sites(), QWEN_IMAGE21.lora_config(4), teacher="frozen")
    known = {p.untyped_storage().data_ptr() for p in (*denoiser.transformer.parameters(), *adapters.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in known:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    condition = Condition(torch.randn(40, qwen_image21_twins.TEXT_WIDTH))
    with adapters.attached(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        denoiser.predict_x0(torch.randn(1, 64, 8, 12), 0.7, [condition])
    return sum(value.untyped_storage().nbytes() for value in kept.values())
