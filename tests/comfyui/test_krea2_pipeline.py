"""Krea 2 in ComfyUI's graph, drawn by Few-Step Sampler, against Krea2Pipeline of diffusers: text encoder, VAE and
network have the same weights, so texts, latents and images are the same. The teacher's features are transformers'."""

from __future__ import annotations

from typing import Any

import krea2_twins
import pytest
import torch
import twins
from inprocess import ComfyUI
from loras import give_values
from torch import Tensor

PROMPT, SEED, WIDTH, HEIGHT = "a badge in the style of [V], top", 5, 112, 80


@pytest.fixture(scope="module")
def ours(comfyui: ComfyUI) -> dict[str, Any]:
    return comfyui.call(make_models)


def make_models() -> dict[str, Any]:
    model = krea2_twins.model()
    vae, their_vae = krea2_twins.vaes()
    clip, encoder = krea2_twins.clips()
    network, tokenizer = krea2_twins.diffusers_krea2(model), krea2_twins.tokenizer(clip)
    pipe = krea2_twins.pipeline(network, their_vae, encoder, tokenizer)
    return {"model": model, "clip": clip, "vae": vae, "pipe": pipe}


@pytest.fixture(scope="module")
def encoder(comfyui: ComfyUI, ours: dict[str, Any]) -> Any:
    """Of Build Teacher Condition, without a vision file."""
    return comfyui.module("nodes.comfy_host.encoder").ComfyEncoder(ours["clip"], ours["vae"], None)


def in_inference_mode(function: Any, *args: Any) -> Any:
    with torch.inference_mode():
        return function(*args)


def pixels(height: int, width: int, seed: int = 0) -> Tensor:
    """[3, H, W] in [0, 1]."""
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]


@pytest.mark.parametrize("text", [PROMPT, "", "[V] " * 90])
def test_texts(comfyui: ComfyUI, ours: dict[str, Any], encoder: Any, text: str) -> None:
    """The pipeline's padding in the middle, which its mask excludes, is left out; ComfyUI does not pad."""
    got = comfyui.call(in_inference_mode, encoder.encode_text, text).features
    wanted = krea2_twins.text_features(ours["pipe"], text)
    assert got.shape == wanted.shape and got.shape[1] == 12 * krea2_twins.TEXT_WIDTH
    assert twins.relative(got, wanted) < 1e-5


def test_the_students_text_is_comfyuis_to_the_bit(comfyui: ComfyUI, ours: dict[str, Any], encoder: Any) -> None:
    """Also after the teacher has read an image with the same CLIP."""
    clip = ours["clip"]
    comfyui.call(in_inference_mode, encoder.encode_image_text, pixels(96, 64), PROMPT)
    got = comfyui.call(in_inference_mode, encoder.encode_text, PROMPT).features
    wanted = comfyui.call(in_inference_mode, lambda: clip.encode_from_tokens(clip.tokenize(PROMPT)).clone())
    assert torch.equal(got, wanted[0])


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [
        (512, 768, PROMPT),  # seen as it is: 384 tokens
        (1024, 1024, PROMPT),  # reduced to 768^2: 576
        (96, 80, ""),  # enlarged: 270, and no caption
    ],
)
def test_teacher_features_are_transformers(
    comfyui: ComfyUI, ours: dict[str, Any], encoder: Any, height: int, width: int, words: str
) -> None:
    image = pixels(height, width)
    got = comfyui.call(in_inference_mode, encoder.encode_image_text, image, words).features
    wanted = krea2_twins.seen_features(ours["pipe"].text_encoder, ours["clip"], words, image)
    assert got.shape == wanted.shape
    assert twins.relative(got, wanted) < 1e-4


def test_another_image_changes_the_teachers_features(comfyui: ComfyUI, encoder: Any) -> None:
    """Of every token behind the image too: those of the caption have read it."""
    first, second = (
        comfyui.call(in_inference_mode, encoder.encode_image_text, pixels(512, 512, seed), PROMPT).features
        for seed in (1, 2)
    )
    alone = comfyui.call(in_inference_mode, encoder.encode_text, PROMPT).features
    assert len(first) == len(second) == len(alone) + 256 + 2
    assert twins.relative(first, second) > 0.01
    assert twins.relative(first[-len(alone) + 3 :], second[-len(alone) + 3 :]) > 1e-3


def test_comfyuis_own_template_for_images_would_lose_the_image(comfyui: ComfyUI, ours: dict[str, Any]) -> None:
    """Why the teacher's template is explicit: without one, ComfyUI cuts the image off, and nothing says so."""
    clip = ours["clip"]

    def encode(seed: int) -> Tensor:
        return clip.encode_from_tokens(
            clip.tokenize(PROMPT, images=[pixels(64, 64, seed).movedim(0, -1)[None]])
        ).clone()

    one, other = (comfyui.call(in_inference_mode, encode, seed) for seed in (1, 2))
    assert one.shape == other.shape and one.shape[1] < 16  # fewer tokens than an image and the caption have


def test_of_a_long_caption_the_end_is_cut_and_not_the_templates(comfyui: ComfyUI, ours: dict[str, Any]) -> None:
    vision, clip = comfyui.module("nodes.comfy_host.vision"), ours["clip"]
    image = pixels(512, 512).movedim(0, -1)[None]
    tail = krea2_twins.tokenizer(clip)("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    short, long = (vision._tokens(clip, " star" * words, image) for words in (3, 2000))
    assert short[-len(tail) :] == long[-len(tail) :] == tail
    assert len(long) + 256 - 1 == vision.MAX_TOKENS == 1024
    assert vision.count_tokens(clip, " star" * 2000, 256) == len(short) - 3 + 2000 + 255


def test_a_caption_that_replaces_the_template_is_an_error(comfyui: ComfyUI, encoder: Any) -> None:
    with pytest.raises(ValueError, match="replaces the prompt's template: write it without <|im_start|>"):
        comfyui.call(in_inference_mode, encoder.encode_image_text, pixels(64, 64), "<|im_start|>user\nhello")


def test_latents_of_images(comfyui: ComfyUI, ours: dict[str, Any], encoder: Any) -> None:
    """In the space that the network works in, without ComfyUI's time axis."""
    for height, width in ((96, 64), (64, 112)):
        image = pixels(height, width)
        got = comfyui.call(in_inference_mode, encoder.encode_latent, image)
        wanted = krea2_twins.latent_of(ours["pipe"].vae, image)
        assert got.shape == (16, height // 8, width // 8) and wanted.std() > 0.1
        assert twins.relative(got, wanted) < 1e-4


@pytest.mark.parametrize("sampler", ["template", pytest.param("euler", marks=pytest.mark.long)])
def test_images(comfyui: ComfyUI, ours: dict[str, Any], sampler: str) -> None:
    graph: dict[str, Any] = {
        "given": give_values(comfyui, ("MODEL", "CLIP", "VAE"), [ours["model"], ours["clip"], ours["vae"]]),
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["given", 1], "text": PROMPT}},
        "sample": {
            "class_type": "DOPSD_FewStepSampler",
            "inputs": {
                "model": ["given", 0], "positive": ["text", 0], "seed": SEED, "steps": 0, "width": WIDTH,
                "height": HEIGHT, "batch_size": 1, "sampler": sampler,
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["given", 2]}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["decode", 0]}},
        "template": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["given", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0],
                "seed": SEED, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "empty": {
            "class_type": "EmptySD3LatentImage", "inputs": {"width": WIDTH, "height": HEIGHT, "batch_size": 1}
        },
        "show too": {"class_type": "PreviewAny", "inputs": {"source": ["template", 0]}},
    }  # fmt: skip
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    drawn, by_template = (run.value(name)["samples"] for name in ("sample", "template"))
    assert drawn.shape == (1, 16, 1, HEIGHT // 8, WIDTH // 8)
    assert twins.relative(drawn, by_template) < 1e-5

    pipe = ours["pipe"]
    noise = torch.randn(1, 16, HEIGHT // 8, WIDTH // 8, generator=torch.manual_seed(SEED))
    packed = pipe._pack_latents(noise, 1, 16, HEIGHT // 8, WIDTH // 8)
    wanted: dict[str, Tensor] = {
        kind: pipe(
            prompt=PROMPT, latents=packed.clone(), width=WIDTH, height=HEIGHT, num_inference_steps=8,
            guidance_scale=0.0, output_type=kind,
        ).images
        for kind in ("latent", "pt")
    }  # fmt: skip
    assert wanted["latent"].std() > 0.1 and wanted["pt"].std() > 0.05
    latents = pipe._unpack_latents(wanted["latent"], HEIGHT, WIDTH)
    assert twins.relative(ours["model"].model.process_latent_in(drawn), latents) < 1e-4
    assert twins.relative(run.value("decode").movedim(-1, 1), wanted["pt"]) < 1e-4


# -- the nodes --------------------------------------------------------------------------------------------------------


def test_a_connected_vision_tower_is_not_used(comfyui: ComfyUI, ours: dict[str, Any], encoder: Any) -> None:
    """It does not change the conditions' identity, and the node says so."""
    other = comfyui.module("nodes.comfy_host.encoder").ComfyEncoder(ours["clip"], ours["vae"], object())
    assert other.identity == encoder.identity and "krea2" in encoder.identity
    notes = comfyui.module("nodes.build_teacher_condition").unused_encoders
    vlm = comfyui.core("conditioning.teachers").VLM
    assert notes(vlm, ours["clip"], object()) == ("vision is not used: the text encoder has a vision tower",)
    assert notes(vlm, ours["clip"], None) == ()


def test_the_teacher_is_vlm_and_nothing_else(comfyui: ComfyUI, encoder: Any) -> None:
    teacher_for = comfyui.module("nodes.comfy_host.encoder").teacher_for
    assert teacher_for(encoder, "auto", False, "").name == teacher_for(encoder, "vlm", False, "").name == "vlm"
    with pytest.raises(ValueError, match="this model has no teacher 'edit'; choose one of: auto, vlm"):
        teacher_for(encoder, "edit", False, "")


def test_text_features_of_another_width_are_one_sentence(comfyui: ComfyUI, ours: dict[str, Any]) -> None:
    """The width is a product of two entries of the configuration; the real one's text encoder has a name."""
    fits, wide = comfyui.module("nodes.comfy_host.fits"), 12 * krea2_twins.TEXT_WIDTH
    assert fits.text_width(ours["model"]) == wide
    fits.require_text_width(ours["model"], wide, "positive has features")
    with pytest.raises(ValueError, match=f"^positive has features of width 2560, and this MODEL reads width {wide}"):
        fits.require_text_width(ours["model"], 2560, "positive has features")
    entry = comfyui.module("nodes.comfy_host.families").in_comfyui(comfyui.core("families").KREA2)
    assert entry.text_encoders[12 * 2560] == "qwen3vl_4b_fp8_scaled with type krea2"


def test_tokens_of_a_prompt_are_counted_with_the_template(comfyui: ComfyUI, encoder: Any) -> None:
    """The encoder cuts 34 of them off; diffusers' limit of 512 does not count these."""
    counted = encoder.count_text(PROMPT)
    features = comfyui.call(in_inference_mode, encoder.encode_text, PROMPT).features
    assert counted == len(features) + 34
    assert comfyui.module("nodes.comfy_host.families").in_comfyui(encoder.family).text_tokens == 512 + 34
