"""Rows for pre-training and distillation: embedding rows, latents and images of drawn captions and scenes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...demo.autoencoder import DemoAutoencoder
from ...demo.model_files import TEACHER_TEMPLATE, TEXT_TEMPLATE, WEIGHTS
from ...demo.world import APPEARANCE, LAYOUT, POSITIONS, Scenes, render, sample_scenes
from ..hosts.demo_networks import load_tokenizer
from .batched import CAPTION_TOKENS, IMAGE_TOKENS, autocast
from .captions import PRETRAINING, Appearance, CaptionMaker, Draft, Mixture

TEXT_TOKENS = 28  # the longest text row: template 8, caption 20


@dataclass(frozen=True)
class Rows:
    """B training rows, the first `num_image` of which have an image.

    Attributes:
        num_image: number of rows with an image.
        mixed: [num_image, 32], embedding rows of image and text.
        text: [B - num_image, 28], embedding rows of text.
        lengths: [B].
        pixels: [num_image, 3, 64, 64] in [0, 1].
        latents: [B, 16, 8, 8].
        labels: class index [B] per attribute.
        weight: [B, 8, 8], higher on the badge, with mean 1.
        is_open: bool [B], text rows without a name or a word of appearance.
        captions: the captions [B].
        scenes: what the B targets show.
        seen: what the images of the first `num_image` rows show.
    """

    num_image: int
    mixed: Tensor
    text: Tensor
    lengths: Tensor
    pixels: Tensor
    latents: Tensor
    labels: dict[str, Tensor]
    weight: Tensor
    is_open: Tensor
    captions: tuple[str, ...]
    scenes: Scenes
    seen: Scenes


def badge_weight() -> Tensor:
    """Loss weights [positions, 8, 8]: 2.2 on the badge and 1 elsewhere, normalized to mean 1."""
    axis = torch.arange(8.0) - 3.5
    centre = torch.tensor(list(POSITIONS.values())) * 10 / 8
    near_x = (axis[None] - centre[:, 0, None]).abs() <= 2.7
    near_y = (axis[None] - centre[:, 1, None]).abs() <= 2.7
    weight = 1 + 1.2 * (near_y[:, :, None] & near_x[:, None, :]).float()
    return weight / weight.mean((1, 2), keepdim=True)


class TextEncoding:
    """Captions as rows of the encoder's embedding table; token_ids: the real token id of each row, int64 [V]."""

    def __init__(self, token_ids: Tensor) -> None:
        self.tokenizer = load_tokenizer()
        self.row_of = {int(token): row for row, token in enumerate(token_ids)}

    def __call__(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """(embedding rows int64 [n, length], lengths [n]) of n texts of at most `length` tokens."""
        rows, lengths = torch.zeros(len(texts), length, dtype=torch.int64), []
        for i, encoding in enumerate(self.tokenizer.encode_batch(list(texts))):
            ids = [self.row_of[token] for token in encoding.ids]
            rows[i, : len(ids)] = torch.tensor(ids)
            lengths.append(len(ids))
        return rows, torch.tensor(lengths, dtype=torch.int64)


def teacher_text(text: str) -> str:
    """The teacher's prompt with its image tokens, for a caption."""
    return TEACHER_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS).format(text)


def load_autoencoder(path: Path) -> DemoAutoencoder:
    """The frozen autoencoder with the file's weights, fp32, channels last."""
    model = DemoAutoencoder()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def own_or_shipped(folder: Path, name: str, shipped: str) -> Path:
    """The work folder's `name`, or if that stage was not run the file that ships; prints which.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    return result_of(folder, name) or WEIGHTS / shipped


def result_of(folder: Path, *names: str) -> Path | None:
    """The first of the work folder's files `names` that is there, the last stage's first; prints which is used.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file is older than one of an earlier stage, from which it was made.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: make it, and leave it empty to begin with the files that ship")
    there = [folder / name for name in names if (folder / name).exists()]
    if not there:
        print(f"{folder} has no {' or '.join(names)}: taking the file that ships", flush=True)
        return None
    newer = [path for path in there[1:] if path.stat().st_mtime > there[0].stat().st_mtime]
    if newer:
        raise ValueError(f"{there[0]} was made before {newer[0].name}: delete it, and run its stage again")
    print(f"taking {there[0]}", flush=True)
    return there[0]


class RowMaker:
    """Draws rows: captions of every kind of the mixture, and rows with an image and a short caption.

    Every row is a new render, so that where the badge stands exactly stays a matter of chance.
    """

    def __init__(self, autoencoder: DemoAutoencoder, token_ids: Tensor, mixture: Mixture = PRETRAINING) -> None:
        self.autoencoder, self.encode = autoencoder, TextEncoding(token_ids)
        self.weight, self.captions = badge_weight(), CaptionMaker(mixture)

    @torch.no_grad()
    def draw(self, batch: int, num_image: int, generator: torch.Generator, *, same: float = 0.35) -> Rows:
        """Draws rows; same: probability that a row with an image sees its target, not another view."""
        chance = random.Random(int(torch.randint(2**62, (), generator=generator)))
        drafts = [self.captions.image_row(chance) for _ in range(num_image)]
        drafts += [self.captions.text_row(chance) for _ in range(batch - num_image)]
        scenes = _scenes([draft.appearance for draft in drafts], generator)
        captions = tuple(draft.caption(scenes, i) for i, draft in enumerate(drafts))
        seen = _views(drafts[:num_image], scenes, generator, same)
        mixed, mixed_lengths = self.encode([teacher_text(text) for text in captions[:num_image]], CAPTION_TOKENS)
        plain = [TEXT_TEMPLATE.format(text) for text in captions[num_image:]]
        text, text_lengths = self.encode(plain, TEXT_TOKENS)
        return Rows(
            num_image, mixed, text, torch.cat([mixed_lengths, text_lengths]), render(seen), self._latents(scenes),
            scenes.labels(), self.weight[scenes.position], torch.tensor([draft.kind == "open" for draft in drafts]),
            captions, scenes, seen,
        )  # fmt: skip

    def _latents(self, scenes: Scenes) -> Tensor:
        image = (render(scenes) * 2 - 1).contiguous(memory_format=torch.channels_last)
        with autocast():
            return self.autoencoder.encode(image).float().contiguous()


def _scenes(appearances: Sequence[Appearance], generator: torch.Generator) -> Scenes:
    """Scenes of these appearances in a random layout."""
    columns = torch.tensor(appearances, dtype=torch.int64).reshape(-1, len(APPEARANCE)).unbind(1)
    layout = sample_scenes(len(appearances), generator)
    return replace(layout, **dict(zip(APPEARANCE, columns, strict=True)))


def _views(drafts: Sequence[Draft], targets: Scenes, generator: torch.Generator, same: float) -> Scenes:
    """What the images of the rows show: their targets, or other views of what `seen` says."""
    views = _scenes([draft.seen for draft in drafts], generator)
    is_same = torch.rand(len(drafts), generator=generator) < same
    is_same &= torch.tensor([draft.seen == draft.appearance for draft in drafts], dtype=torch.bool)
    layout = {
        name: torch.where(is_same.view(-1, *[1] * (value.ndim - 1)), getattr(targets, name)[: len(drafts)], value)
        for name, value in ((n, getattr(views, n)) for n in (*LAYOUT, "jitter"))
    }
    return replace(views, **layout)
