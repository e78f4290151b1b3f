"""Preview sheets of the standalone host: the teacher before training, and what the student has learned."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..conditioning.cache import ConditionCache, plain_cpu
from ..conditioning.encode import Condition, DualCondition, encode_dataset
from ..conditioning.teachers import VLM, TeacherView
from ..data.captions import put_trigger
from ..data.dataset import Pair
from ..data.images import load_image
from ..data.triggers import concepts_of, require_names
from ..files.atomic import write_atomic
from ..files.disk import writing
from ..image_grid import Row, contact_sheet
from ..rollout import sample
from ..trainable import Mode, Trainable
from ..training.rng import make_generator
from ..training.shown_images import TeacherImage, encode_request, pair_of_prompt, shown_to_teacher
from ..training.training_set import latent_shape
from ..training.world import Peers
from .hosts.model import HostModel

PREVIEWS_NAME = "previews"
MAX_PROMPTS = 4
"""Captions that are drawn by default."""

TILE = 256
"""Side of an image on a sheet in pixels; larger images are scaled down."""

_ROWS = 3


@dataclass(frozen=True, eq=False)
class Painter:
    """Draws conditions with fixed noise in the model's few steps.

    Attributes:
        model: the model.
        steps: Euler steps.
        seed: of the noise.
    """

    model: HostModel
    steps: int
    seed: int

    def draw(self, conditions: Sequence[Condition], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """One image [3, H, W] in [0, 1] per condition, for latents of `shapes` (C, h, w); each has its own noise."""
        numbered = enumerate(zip(conditions, shapes, strict=True))
        return self.decode([self.latent(row, condition, shape) for row, (condition, shape) in numbered])

    def latent(self, row: int, condition: Condition, shape: tuple[int, ...]) -> Tensor:
        """The latent [1, C, h, w] of a condition, from the noise of its row."""
        denoiser, family = self.model.denoiser, self.model.family
        noise = torch.randn(1, *shape, generator=make_generator(self.seed, "preview", row)).to(denoiser.device)
        return sample(denoiser, [condition.to(denoiser.device)], noise, family.grid(self.steps, shape))

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """latents [1, C, h, w] -> images [3, H, W] in [0, 1] on the CPU."""
        return [plain_cpu(self.model.encoder.decode(latent)[0]) for latent in latents]


def encode_shown(
    texts: Sequence[str],
    pairs: Sequence[Pair],
    model: HostModel,
    cache: ConditionCache | None,
    view: TeacherView,
    teacher_image: TeacherImage,
) -> list[DualCondition]:
    """Each prompt for the student, and with a training image for the teacher; latents [C, h, w] of these images."""
    requests = []
    for number, text in enumerate(texts):
        index = pair_of_prompt(pairs, text, number)
        requests.append(
            encode_request(pairs[index], text, shown_to_teacher(pairs, index, teacher_image)[0], view.background)
        )
    return encode_dataset(requests, model.encoder, cache, teacher=view)


def preview_texts(given: Sequence[str] | None, pairs: Sequence[Pair], trigger: str) -> list[str]:
    """The given prompts with `[V]` replaced, or the captions of the first images.

    Raises:
        ValueError: `[V]` may stand for several concepts.
    """
    if given:
        require_names(given, "preview prompt", concepts_of(pair.trigger for pair in pairs))
        return [put_trigger(text, trigger) for text in given]
    return list(dict.fromkeys(pair.captions[0] for pair in pairs[:MAX_PROMPTS]))


def teacher_sheet(
    painter: Painter, shown: Sequence[DualCondition], pairs: Sequence[Pair], seen: Sequence[Tensor] = (),
    view: TeacherView = VLM,
) -> Image.Image:  # fmt: skip
    """Target, teacher and student of the untouched model side by side; for edits the source images too.

    Args:
        seen: what the teacher sees, [3, H, W] in [0, 1] each, if that is not the whole target.
        view: the teacher's.
    """
    shapes, texts = [latent_shape(dual) for dual in shown], [dual.caption for dual in shown]
    teacher = painter.draw([dual.teacher for dual in shown], shapes)
    student = painter.draw([dual.student for dual in shown], shapes)
    targets = [load_image(pair.image_path, pair.bucket) for pair in pairs]
    sources = [load_image(pair.source_images[0], pair.bucket) for pair in pairs if pair.source_images]
    reads = "source and instruction" if sources else "reads the caption"
    rows = [
        *([Row("source", "the image before the edit", sources, texts)] if sources else []),
        Row("target", "the training image", targets, () if sources else texts),
        *([Row("seen", "what the teacher sees", seen)] if seen else []),
        Row("teacher", f"the untouched model,\n{view.remark}", teacher),
        Row("student", f"the untouched model,\n{reads}", student),
    ]
    return contact_sheet("the teacher, before any training", rows, tile=TILE)


@dataclass(frozen=True)
class _Wanted:
    """An image of a sheet: which weights draw which prompt."""

    mode: Mode
    row: int


def _mode_of(one: _Wanted) -> Mode:
    return one.mode


class TrainingPreview:
    """Writes a sheet per preview step: untouched model, teacher and student from the same noise.

    The processes of the run share the images, and rank 0 puts the sheet together. Each image is drawn alone, so its
    bits do not depend on their number.
    """

    def __init__(
        self, painter: Painter, shown: Sequence[DualCondition], folder: Path, view: TeacherView = VLM,
        peers: Peers | None = None,
    ) -> None:  # fmt: skip
        self._painter, self._shown, self._folder, self._view = painter, shown, folder / PREVIEWS_NAME, view
        self._peers = peers or Peers()
        self._before: list[Tensor] = []

    def write(self, step: int, adapters: Trainable) -> Image.Image | None:
        """Draws the sheet of a step, writes it and returns it; the untouched model is drawn once.

        None on other ranks than 0.

        Raises:
            DiskError: it could not be written.
            PeerError: drawing failed on another rank.
        """
        modes: tuple[Mode, ...] = ("teacher", "student") if self._before else ("off", "teacher", "student")
        drawn = self._draw(adapters, modes)
        self._before = drawn.get("off", self._before)
        if not self._peers.is_first:
            return None
        sheet = self._sheet(step, drawn)
        data = io.BytesIO()
        sheet.save(data, "PNG")
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._folder / f"step-{step:06d}.png", data.getvalue())
        return sheet

    def most_bytes(self, sheets: int) -> int:
        """The largest size on disk of that many sheets."""
        return sheets * len(self._shown) * _ROWS * 3 * TILE**2

    def _sheet(self, step: int, drawn: Mapping[Mode, Sequence[Tensor]]) -> Image.Image:
        """images [3, H, W] in [0, 1] of student and teacher, in the order of the prompts."""
        rows = [
            Row("untouched", "before training", self._before, [dual.caption for dual in self._shown]),
            Row("teacher", self._view.remark, drawn["teacher"]),
            Row("student", "reads the prompt alone", drawn["student"]),
        ]
        return contact_sheet(f"step {step}", rows, tile=TILE)

    def _draw(self, adapters: Trainable, modes: Sequence[Mode]) -> dict[Mode, list[Tensor]]:
        """The images [3, H, W] in [0, 1] of all prompts, by the weights that draw them; on every rank."""
        count = len(self._shown)
        wanted = [_Wanted(mode, row) for mode in modes for row in range(count)]
        images = self._peers.spread(wanted, lambda share: self._share(adapters, share), _mode_of)
        return {mode: images[number * count : (number + 1) * count] for number, mode in enumerate(modes)}

    def _share(self, adapters: Trainable, share: Sequence[_Wanted]) -> list[Tensor]:
        """The images [3, H, W] in [0, 1] of a rank; all latents are drawn before the first is decoded."""
        latents = []
        for mode, group in groupby(share, key=_mode_of):
            with adapters.use(mode):
                latents += [self._latent(one) for one in group]
        return self._painter.decode(latents)

    def _latent(self, one: _Wanted) -> Tensor:
        """[1, C, h, w]."""
        dual = self._shown[one.row]
        condition = dual.teacher if one.mode == "teacher" else dual.student
        return self._painter.latent(one.row, condition, latent_shape(dual))
