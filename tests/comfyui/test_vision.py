"""The teacher reads as transformers' Qwen3-VL with the CLIP's language weights, and else as the CLIP reads text."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import towers
from torch import Tensor
from twins import relative

TEXT = "a [V] badge, top, on a sand background"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
Z_IMAGE = f"<|im_start|>user\n{IMAGE}{{}}<|im_end|>\n<|im_start|>assistant\n"
KLEIN = f"{Z_IMAGE}<think>\n\n</think>\n\n"
TEMPLATES = {"z_image": Z_IMAGE, "klein": KLEIN}
STATES = {"z_image": (-2,), "klein": (9, 18, 27)}
PAD, LONGEST = 151643, 1024


@pytest.fixture(scope="module")
def vision(comfyui: Any) -> Any:
    return comfyui.module("nodes.comfy_host.vision")


@pytest.fixture(scope="module")
def models(comfyui: Any, vision: Any) -> Any:
    """For a family: its CLIP, the vision tower from a file, and transformers' reader of the same weights."""
    spec = towers.tiny(vision)
    tower, state = towers.reference(spec)
    path = towers.in_a_file(comfyui.temp / "vision.safetensors", state)
    loaded = comfyui.module("nodes.comfy_host.vision_file").load_teacher_vision(path, spec)
    loaded.model.float()  # the positions are interpolated in the weights' dtype
    made = {}

    def of(family: str) -> SimpleNamespace:
        if family not in made:
            clip = towers.clip(family)
            made[family] = SimpleNamespace(
                clip=clip, vision=loaded, reader=towers.transformers_reader(clip, tower, spec)
            )
        return made[family]

    return of


def seeded(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def read_by_transformers(models: Any, family: str, image: Tensor, text: str, least: int) -> Tensor:
    """Hidden states [L, D] of image [3, H, W] and text, padded on the right to `least` tokens as the CLIP pads.

    Of more than 1024 tokens the text's last ones are left out, and the template's ending stands behind the others.

    The positions are given: transformers counts none for padding, while the text encoders of both hosts count on.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=512**2, max_pixels=768**2
    )
    seen = processor(images=image, do_rescale=False, do_convert_rgb=False, return_tensors="pt")
    marks = "<|image_pad|>" * int(seen["image_grid_thw"].prod() // 4)
    prompt = TEMPLATES[family].format(text).replace("<|image_pad|>", marks)
    tokenize = models.clip.tokenizer.qwen3_4b.tokenizer
    tokens = tokenize(prompt, return_tensors="pt")["input_ids"]
    if tokens.shape[1] > LONGEST:
        ending = tokenize(TEMPLATES[family].partition("{}")[2], return_tensors="pt")["input_ids"]
        assert torch.equal(tokens[:, -ending.shape[1] :], ending)
        tokens = torch.cat([tokens[:, : LONGEST - ending.shape[1]], ending], dim=1)
    padding = max(0, least - tokens.shape[1])
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, padding))
    tokens = torch.nn.functional.pad(tokens, (0, padding), value=PAD)
    kinds = (tokens == 151655).long()
    positions, _ = models.reader.get_rope_index(tokens, kinds, seen["image_grid_thw"])
    with torch.no_grad():
        out = models.reader(
            input_ids=tokens, attention_mask=mask, position_ids=positions, mm_token_type_ids=kinds, **seen,
            output_hidden_states=True,
        )  # fmt: skip
    return torch.cat([out.hidden_states[number][0] for number in STATES[family]], dim=-1)


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [
        (512, 768, TEXT),  # seen as it is: 384 tokens
        (1024, 1024, TEXT),  # reduced to 768^2: 576
        (300, 400, TEXT),  # enlarged: 266
        (96, 80, ""),  # enlarged: 270, and no caption
        (720, 1280, "badge, top, " * 60),
        (512, 512, "badge, top, " * 300),  # 400 tokens too many
    ],
)
@pytest.mark.parametrize("family", ["z_image", pytest.param("klein", marks=pytest.mark.long)])
def test_features_are_transformers(vision, models, family, height, width, words):
    models, image = models(family), seeded(3, height, width)
    expected = read_by_transformers(models, family, image, words, 512 if family == "klein" else 1)
    ours = vision.encode_image_text(models.clip, models.vision, words, image)
    assert ours.dtype == torch.float32 and len(ours) == len(expected) <= LONGEST
    assert relative(ours, expected) < 1e-5
    assert family == "z_image" or len(ours) >= 512 and ours.shape[1] == 3 * towers.WIDTH


@pytest.mark.parametrize("family", ["z_image", "klein"])
def test_of_a_long_caption_the_end_is_cut_and_not_the_templates(vision, models, family):
    """One token too many costs the caption's last token; the token ids end as those of every other prompt."""
    models = models(family)
    image, ending = torch.rand(1, 512, 512, 3), TEMPLATES[family].partition("{}")[2]
    tokenize = models.clip.tokenizer.qwen3_4b.tokenizer
    tail = tokenize(ending)["input_ids"]

    def ids(words: int) -> list[Any]:
        return vision._tokens(models.clip, " star" * words, image)

    fitting = next(n for n in range(1000) if len(ids(n)) + 256 - 1 == LONGEST)
    assert vision.count_tokens(models.clip, " star" * fitting, 256) == LONGEST
    for words in (fitting - 1, fitting, fitting + 1, fitting + 700):
        assert ids(words)[-len(tail) :] == tail
    assert len(ids(fitting - 1)) == len(ids(fitting)) - 1
    assert ids(fitting + 1)[4:] == ids(fitting + 700)[4:] == ids(fitting)[4:]
    assert vision.count_tokens(models.clip, " star" * (fitting + 700), 256) == LONGEST + 700


class Word(torch.nn.Module):
    """A tower to which every image is this one word, in one token, which has the place that a word would have."""

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, _: Tensor, grid: Tensor) -> tuple[Tensor, list[Tensor]]:
        grid[:] = torch.tensor([1, 2, 2])  # ComfyUI enlarges what is smaller than four tokens
        return self.embedding[None], []


@pytest.mark.parametrize(
    ("family", "words", "layer"),
    [
        *((family, words, None) for family in ("z_image", "klein") for words in (TEXT, "badge, top, " * 200)),
        *(("z_image", TEXT, layer) for layer in (-1, -4, -24, -40)),  # of 5 layers: more than there are is the default
        ("klein", TEXT, -4),  # which klein's text encoder takes no notice of
    ],
)
def test_an_image_that_looks_like_a_word_reads_as_that_word(vision, models, family, words, layer):
    """To the CLIP's own encoding of the text: template, hidden states, their order, padding and its mask.

    layer: as CLIP Set Last Layer sets it.
    """
    clip, real = models(family).clip.clone(), models(family).vision
    clip.clip_layer(layer)
    (word,) = clip.tokenizer.qwen3_4b.tokenizer("cat")["input_ids"]
    model = Word(clip.cond_stage_model.qwen3_4b.transformer.get_input_embeddings().weight[word])
    config = dataclasses.replace(real.lm_config, rope_theta=1e6)  # the CLIP's own
    tower = dataclasses.replace(real, model=model, lm_config=config, min_pixels=32**2, max_pixels=32**2)
    ours = vision.encode_image_text(clip, tower, words, seeded(3, 64, 64))
    text = clip.tokenize(words, llama_template=TEMPLATES[family].replace("<|image_pad|>", "cat"))
    expected = clip.encode_from_tokens(text)[0]
    assert family == "z_image" or len(expected) >= 512
    assert relative(ours, expected) < 1e-6


def test_a_layer_that_another_clip_has_set_is_not_used(vision, models):
    """CLIP Set Last Layer leaves its choice on the text encoder that all CLIPs of a loader share."""
    models, image = models("z_image"), seeded(3, 64, 64)
    before = vision.encode_image_text(models.clip, models.vision, TEXT, image)
    models.clip.cond_stage_model.set_clip_options({"layer": -4})
    try:
        assert torch.equal(vision.encode_image_text(models.clip, models.vision, TEXT, image), before)
    finally:
        models.clip.cond_stage_model.reset_clip_options()


def test_clips_without_qwen3_4b_are_refused(vision, models):
    """FLUX.2-klein 9B has a teacher, another one."""
    tower, image = models("klein").vision, seeded(3, 64, 64)
    with pytest.raises(ValueError, match="not Qwen3-4B.*load qwen_3_4b.*use the mode edit, which needs no vision"):
        vision.encode_image_text(towers.clip("klein_9b"), tower, TEXT, image)
    other: Any = SimpleNamespace(cond_stage_model=SimpleNamespace(), tokenizer=SimpleNamespace())
    with pytest.raises(ValueError, match="has a SimpleNamespace: load qwen_3_4b with type lumina2 for Z-Image-Turbo"):
        vision.encode_image_text(other, tower, TEXT, image)
    with pytest.raises(ValueError, match="the teacher needs a vision tower: connect `vision`"):
        vision.encode_image_text(models("z_image").clip, None, TEXT, image)


def test_images_are_seen_at_the_size_of_qwens_own_processor(vision):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    spec = vision.qwen3vl_4b()
    for height in range(300, 1600, 37):
        for width in range(300, 1600, 41):
            expected = smart_resize(height, width, 32, spec.min_pixels, spec.max_pixels)
            assert vision.seen_size(height, width, spec.min_pixels, spec.max_pixels) == expected
    assert vision.seen_size(1024, 1024, spec.min_pixels, spec.max_pixels) == (768, 768)
    assert vision.seen_size(64, 2048, spec.min_pixels, spec.max_pixels)[0] == 96  # enlarged to the least
