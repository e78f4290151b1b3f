"""Rows for pre-training and distillation: scenes and latents are sampled once, captions each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...demo.autoencoder import DemoAutoencoder
from ...demo.model_files import TEACHER_TEMPLATE, TEXT_TEMPLATE
from ...demo.world import APPEARANCE, NAMES, POSITIONS, Scenes, caption, render, sample_scenes
from ..hosts.demo_networks import load_tokenizer
from .batched import CAPTION_TOKENS, IMAGE_TOKENS
from .twins import Twins

# shares of text rows: all words; all words and a name; some words; no words of appearance; the rest is empty
PRETRAINING = (0.45, 0.12, 0.23, 0.12)
DISTILLATION = (0.25, 0.10, 0.30, 0.31)  # open prompts are where few steps cost the most
TEXT_TOKENS = 28  # the longest text row: template 8, caption 19


@dataclass(frozen=True)
class Bank:
    """N scenes with images and latents.

    Attributes:
        scenes: the scenes.
        images: uint8 [N, 3, 64, 64].
        latents: bfloat16 [N, 16, 8, 8].
    """

    scenes: Scenes
    images: Tensor
    latents: Tensor


def load_autoencoder(path: Path) -> DemoAutoencoder:
    """The frozen autoencoder with the file's weights, fp32, channels last."""
    model = DemoAutoencoder()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


@torch.no_grad()
def make_bank(twins: Twins, folder: Path, size: int) -> Bank:
    """Samples and encodes this worker's share of the scenes (a function of the worker's rank only)."""
    path = folder / f"bank_{twins.rank}.safetensors"
    if not path.exists():
        autoencoder = load_autoencoder(folder / "vae.safetensors")
        scenes = sample_scenes(size, torch.Generator().manual_seed(10_000 + twins.rank))
        images, latents = [], []
        for start in range(0, size, 64):
            image = render(scenes[start : start + 64])
            images.append((image * 255).round().byte())
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(
                    autoencoder.encode((image * 2 - 1).contiguous(memory_format=torch.channels_last)).bfloat16()
                )
        tensors = {"pictures": torch.cat(images), "latents": torch.cat(latents).contiguous()}
        save_file({**tensors, **{f"scenes.{k}": v.contiguous() for k, v in vars(scenes).items()}}, path)
    tensors = load_file(path)
    scenes = Scenes(**{name[7:]: value for name, value in tensors.items() if name.startswith("scenes.")})
    return Bank(scenes, tensors["pictures"], tensors["latents"])


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
    """

    num_image: int
    mixed: Tensor
    text: Tensor
    lengths: Tensor
    pixels: Tensor
    latents: Tensor
    labels: dict[str, Tensor]
    weight: Tensor


def badge_weight() -> Tensor:
    """Loss weights [positions, 8, 8]: 2.2 on the badge and 1 elsewhere, normalized to mean 1."""
    axis = torch.arange(8.0) - 3.5
    centre = torch.tensor(list(POSITIONS.values())) * 10 / 8
    near_x = (axis[None] - centre[:, 0, None]).abs() <= 2.7
    near_y = (axis[None] - centre[:, 1, None]).abs() <= 2.7
    weight = 1 + 1.2 * (near_y[:, :, None] & near_x[:, None, :]).float()
    return weight / weight.mean((1, 2), keepdim=True)


class RowMaker:
    """Samples rows from a bank: a mixture of full, named, partial and short captions, with or without an image."""

    def __init__(self, bank: Bank, token_ids: Tensor, mixture: Sequence[float] = PRETRAINING) -> None:
        self.mixture, self.bank, self.tokenizer = list(accumulate(mixture)), bank, load_tokenizer()
        self.row_of = {int(token): row for row, token in enumerate(token_ids)}
        self.weight = badge_weight()
        scenes = bank.scenes
        code = ((scenes.shape * 8 + scenes.colour) * 8 + scenes.center) * 3 + scenes.texture
        self.order = code.argsort(stable=True)
        self.first = torch.searchsorted(code[self.order], code)
        self.count = torch.bincount(code, minlength=6 * 8 * 8 * 3)[code]

    def encode(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """(embedding rows int64 [n, length], lengths [n]) of n texts."""
        rows, lengths = torch.zeros(len(texts), length, dtype=torch.int64), []
        for i, encoding in enumerate(self.tokenizer.encode_batch(texts)):
            ids = [self.row_of[token] for token in encoding.ids]
            rows[i, : len(ids)] = torch.tensor(ids)
            lengths.append(len(ids))
        return rows, torch.tensor(lengths)

    def _caption(self, i: int, draw: list[float]) -> str:
        kind, named, layout, *parts = draw
        scenes, name = self.bank.scenes, NAMES[int(named * 997) % len(NAMES)]
        if kind < self.mixture[0]:
            return caption(scenes, i, attributes=APPEARANCE)
        if kind < self.mixture[1]:  # words override names
            return caption(scenes, i, name=name, attributes=APPEARANCE)
        if kind < self.mixture[2]:
            chosen = [a for a, p in zip(APPEARANCE, parts, strict=False) if p < 0.6]
            return caption(scenes, i, name=name if named < 0.25 else "", attributes=chosen, layout=layout < 0.8)
        if kind < self.mixture[3]:
            return caption(scenes, i, name=name if named < 0.7 else "", layout=layout < 0.9)
        return ""  # for classifier-free guidance

    def draw(self, batch: int, num_image: int, generator: torch.Generator, *, same: float = 0.35) -> Rows:
        """Samples rows; same: probability that a row with an image sees its target, not another view."""
        bank = self.bank
        index = torch.randint(len(bank.scenes), (batch,), generator=generator)
        draws = torch.rand(batch, 7, generator=generator).tolist()
        view = torch.rand(2, num_image, generator=generator)
        head = index[:num_image]
        other = self.order[self.first[head] + (view[0] * self.count[head]).long().clamp(max=self.count[head] - 1)]
        pixels = bank.images[torch.where(view[1] < same, head, other)].float() / 255
        teacher = TEACHER_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)
        mixed = [
            teacher.format(
                caption(bank.scenes, int(i), name=NAMES[int(d[1] * 997) % len(NAMES)] if d[0] < 0.85 else "")
            )
            for i, d in zip(head, draws, strict=False)
        ]
        text = [TEXT_TEMPLATE.format(self._caption(int(index[i]), draws[i])) for i in range(num_image, batch)]
        mixed_rows, mixed_lengths = self.encode(mixed, CAPTION_TOKENS)
        text_rows, text_lengths = self.encode(text, TEXT_TOKENS)
        labels = {name: value[index] for name, value in bank.scenes.labels().items()}
        return Rows(
            num_image, mixed_rows, text_rows, torch.cat([mixed_lengths, text_lengths]), pixels,
            bank.latents[index].float(), labels, self.weight[bank.scenes.position[index]],
        )  # fmt: skip
