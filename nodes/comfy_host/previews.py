"""Preview images before, during and after training: prompts, samples, sheets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...dopsd_core.conditioning.cache import ConditionCache
from ...dopsd_core.conditioning.encode import Condition, Encoder, encode_dataset
from ...dopsd_core.conditioning.teachers import TeacherView
from ...dopsd_core.data.captions import put_trigger
from ...dopsd_core.data.dataset import Pair
from ...dopsd_core.data.images import ImageError, load_image, read_image, to_tensor
from ...dopsd_core.data.triggers import concepts_of, require_names
from ...dopsd_core.image_grid import Row, contact_sheet
from ...dopsd_core.rollout import sample
from ...dopsd_core.trainable import Trainable
from ...dopsd_core.training.rng import make_generator
from ...dopsd_core.training.shown_images import (
    TeacherImage,
    encode_request,
    pair_of_prompt,
    seen_images,
    shown_to_teacher,
)
from ...dopsd_core.training.training_set import latent_shape
from .denoiser import ComfyDenoiser
from .sampling import decode_image
from .sockets import Conditions, PreviewPrompt

log = logging.getLogger("dopsd")

MAX_DEFAULT_PROMPTS, MAX_PROMPTS = 4, 32
"""Of the captions that are drawn if there are no prompts; of prompts. A sheet has a column for each: its file formats
have a limit, and a wider JPEG would end ComfyUI's server."""

TILE = 192
"""Side of an image on the sheets, in pixels; larger images are scaled down."""


def split_lines(text: str) -> list[str]:
    """The lines that are not empty, stripped and without duplicates."""
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def preview_texts(given: str, pairs: Sequence[Pair], trigger: str) -> list[str]:
    """The prompts to draw: the given lines with `[V]` replaced, or the captions of the first images.

    Raises:
        ValueError: there are more than `MAX_PROMPTS`, or `[V]` may stand for several concepts.
    """
    require_names(split_lines(given), "preview prompt", concepts_of(pair.trigger for pair in pairs))
    lines = [put_trigger(line, trigger) for line in split_lines(given)]
    if len(lines) > MAX_PROMPTS:
        raise ValueError(
            f"preview_prompts: at most {MAX_PROMPTS} prompts, one per line, there are {len(lines)}: remove some, or "
            "draw them with Compare LoRA afterwards"
        )
    return lines or list(dict.fromkeys(pair.captions[0] for pair in pairs[:MAX_DEFAULT_PROMPTS]))


def encode_previews(
    texts: Sequence[str],
    pairs: Sequence[Pair],
    encoder: Encoder,
    cache: ConditionCache,
    teacher: TeacherView,
    teacher_image: TeacherImage,
) -> tuple[PreviewPrompt, ...]:
    """Each prompt encoded alone for the student, and with a training image for the teacher."""
    requests = []
    for number, text in enumerate(texts):
        index = pair_of_prompt(pairs, text, number)
        requests.append(
            encode_request(pairs[index], text, shown_to_teacher(pairs, index, teacher_image)[0], teacher.background)
        )
    encoded = encode_dataset(requests, encoder, cache, teacher=teacher)
    return tuple(PreviewPrompt(dual.caption, dual.student, dual.teacher, latent_shape(dual)) for dual in encoded)


def teacher_sheet(painter: PreviewPainter, conditions: Conditions, count: int) -> Image.Image:
    """A sheet with target, teacher and student of the untouched model for the first `count` training images; for edits
    the source images too, and what the teacher sees if that is not the whole image."""
    data = conditions.data
    count = min(count, data.scales[0].end) if data.scales else count  # behind these are the same images, smaller
    chosen = [data.pairs[example.variants[0]] for example in data.examples[:count]]
    shapes = [latent_shape(pair) for pair in chosen]
    shown = conditions.pairs[:count]
    targets = [load_image(pair.image_path, pair.bucket) for pair in shown]
    sources = [load_image(pair.source_images[0], pair.bucket) for pair in shown] if conditions.teacher.edits else []
    largest = conditions.pairs[: data.scales[0].end] if data.scales else conditions.pairs
    seen = seen_images(largest, len(shown), conditions.teacher_image, conditions.teacher.background)
    with painter.denoiser.loaded((1, *shapes[0])):
        teacher = painter.draw([pair.teacher for pair in chosen], shapes)
        painter.denoiser.load((1, *shapes[0]))  # decoding may have unloaded it
        student = painter.draw([pair.student for pair in chosen], shapes)
    texts, reads = [pair.caption for pair in chosen], "source and instruction" if sources else "reads the caption"
    rows = [
        *([Row("source", "the image before the edit", sources, texts)] if sources else []),
        Row("target", "the training image", targets, () if sources else texts),
        *([Row("seen", "what the teacher sees", seen)] if seen else []),
        Row("teacher", f"the untouched model,\n{conditions.teacher.remark}", teacher),
        Row("student", f"the untouched model,\n{reads}", student),
    ]
    return contact_sheet("the teacher, before any training", rows, tile=TILE)


class PreviewPainter:
    """Draws conditions with fixed noise: equal seeds give equal noise for every model.

    Args:
        vae: ComfyUI's VAE.
        steps: Euler steps on the model's own noise schedule, as in the Few-Step Sampler.
        seed: of the noise.
    """

    def __init__(self, denoiser: ComfyDenoiser, vae: Any, steps: int, seed: int) -> None:
        self.denoiser, self._vae, self._steps, self._seed = denoiser, vae, steps, seed

    def draw(self, conditions: Sequence[Condition], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """One image [3, H, W] in [0, 1] per condition, for latents of `shapes` (C, h, w)."""
        latents: list[Tensor | None] = [None] * len(conditions)
        for shape in dict.fromkeys(shapes):
            rows = [row for row, other in enumerate(shapes) if other == shape]
            for row, latent in zip(rows, self._sample([conditions[row] for row in rows], shape, rows), strict=True):
                latents[row] = latent
        return [self._decode(latent) for latent in latents if latent is not None]

    def sources(self, conditions: Sequence[Condition]) -> list[Tensor]:
        """The first reference image [3, H, W] in [0, 1] of each condition that has one."""
        firsts = [condition.reference_latents[0] for condition in conditions if condition.reference_latents]
        return [self._decode(latent.to(self.denoiser.device)) for latent in firsts]

    def _sample(self, conditions: Sequence[Condition], shape: tuple[int, ...], rows: Sequence[int]) -> Tensor:
        family, device = self.denoiser.family, self.denoiser.device
        sigmas = family.sigmas(self._steps, shape[2] * family.downscale, shape[1] * family.downscale)
        noise = [torch.randn(shape, generator=make_generator(self._seed, "preview", row)) for row in rows]
        here = [condition.to(device) for condition in conditions]
        return sample(self.denoiser, here, torch.stack(noise).to(device), sigmas)

    def _decode(self, latent: Tensor) -> Tensor:
        with torch.inference_mode():
            image = decode_image(self._vae, self.denoiser.to_vae_space(latent[None]))
        return image.movedim(-1, 0).float().cpu().clamp(0, 1)


class TrainingPreview:
    """A sheet per preview step: untouched model, teacher and student from the same noise; source images of edits."""

    def __init__(self, painter: PreviewPainter, conditions: Conditions, reload: Callable[[], None]) -> None:
        self._painter, self._prompts, self._reload = painter, conditions.previews, reload
        self._teacher = conditions.teacher
        self._shapes = [prompt.latent_shape for prompt in self._prompts]
        self._base: list[Tensor] | None = None
        self._sources: list[Tensor] = []

    def sheet(self, title: str, adapters: Trainable) -> Image.Image:
        """Draws the sheet; the untouched model and the source images are only drawn the first time."""
        texts = [prompt.text for prompt in self._prompts]
        alone = [prompt.student for prompt in self._prompts]
        if self._base is None:
            self._sources = self._painter.sources(alone)
            self._base = self._draw(adapters, "off", alone)
        student = self._draw(adapters, "student", alone)
        teacher = self._draw(adapters, "teacher", [prompt.teacher for prompt in self._prompts])
        edits = bool(self._sources)
        rows = [
            *([Row("source", "the image before the edit", self._sources, texts)] if edits else []),
            Row("untouched", "before training", self._base, () if edits else texts),
            Row("teacher", self._teacher.remark, teacher),
            Row("student", "source and instruction" if edits else "reads the prompt alone", student),
        ]
        return contact_sheet(title, rows, tile=TILE)

    def _draw(self, adapters: Trainable, mode: Any, conditions: Sequence[Condition]) -> list[Tensor]:
        with adapters.use(mode):
            images = self._painter.draw(conditions, self._shapes)
        self._reload()  # decoding may have unloaded the network
        return images


def load_sheets(folder: Path) -> Tensor:
    """Every sheet of a run in the order of its steps, [n, H, W, 3] in [0, 1]; one empty pixel where there are none.

    What cannot be read, or is not of the last sheet's size, is left out with a warning: one batch has one size.
    """
    sheets: dict[str, Tensor] = {}
    for path in sorted(folder.glob("step-*.png")):
        try:
            sheets[path.name] = to_tensor(read_image(path)).movedim(0, -1)
        except ImageError as error:
            log.warning("the preview sheet %s is not in the output: %s", path.name, error)
    same = {name: sheet for name, sheet in sheets.items() if sheet.shape == [*sheets.values()][-1].shape}
    if others := [name for name in sheets if name not in same]:
        log.warning("%d preview sheets of another size are not in the output: %s", len(others), ", ".join(others))
    return torch.stack([*same.values()]) if same else torch.zeros(1, 1, 1, 3)
