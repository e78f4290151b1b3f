"""The report card of a LoRA in ComfyUI: draws its images, measures the gap to the teacher, scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...dopsd_core.data.images import read_image, to_tensor
from ...dopsd_core.metrics.evaluation import Evaluation, Measured, count_scores, evaluate
from ...dopsd_core.metrics.measures import Metrics, measures_of
from ...dopsd_core.metrics.protocol import ROWS_PER_CONCEPT, Shot, all_shots
from ...dopsd_core.metrics.teacher_gap import gap_measured, gap_of, visited
from ...dopsd_core.rollout import RolloutStep
from ...dopsd_core.training.rng import make_generator
from .denoiser import ComfyDenoiser, default_steps
from .families import family_of
from .lora_use import apply_lora
from .sampling import decode_image, few_step_sample
from .sockets import Conditions, Dataset, PreviewPrompt

MAX_IMAGES = 1000
"""Limit of a report, whose images are kept in memory: 6 GB at 1024 x 1024."""

_GAP_UNITS = 2  # of the progress bar, per prompt and variant


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the node was asked for.

    Attributes:
        prompts: with the trigger: other scenes of the concept; without it: ordinary prompts.
        strengths: of the LoRA, none 0.
        seed: of the noise.
        num_seeds: images per prompt.
        steps: sampling steps; 0 for the model's own number.
        resolution: images have about resolution x resolution pixels.
        class_name: what the concept is, for CLIP-S.
    """

    prompts: tuple[str, ...]
    strengths: tuple[float, ...]
    seed: int
    num_seeds: int
    steps: int
    resolution: int
    class_name: str


@dataclass(frozen=True, eq=False)
class LoraOnModel:
    """A LoRA, the model that it is for, and what draws with them.

    Attributes:
        name: of the LoRA.
        tensors: of the LoRA file by name, such as lora_A [rank, in] and lora_B [out, rank].
        model: the MODEL without the LoRA; never changed.
        clip: its CLIP.
        vae: its VAE.
    """

    name: str
    tensors: Mapping[str, Tensor]
    model: Any
    clip: Any
    vae: Any

    def at(self, strength: float) -> Any:
        """The MODEL with the LoRA, as ComfyUI's own loader applies it; without it at 0."""
        return apply_lora(self.model, self.tensors, strength) if strength else self.model


def shots_of(dataset: Dataset, model: Any, wanted: Wanted) -> list[Shot]:
    """The images to draw of a dataset's concept.

    Raises:
        ValueError: the dataset contains edits, or there are too many images.
    """
    pairs = dataset.report.pairs
    if any(pair.source_images for pair in pairs):
        raise ValueError("LoRA Report Card evaluates images with captions, and this dataset contains edits")
    if len(concepts := dataset.report.concepts) > 1:
        raise ValueError(
            f"LoRA Report Card evaluates one concept, and this dataset has {', '.join(concepts)}: choose the folder of "
            "one of them in Load Dataset"
        )
    shots = all_shots(
        pairs, wanted.prompts, dataset.trigger, wanted.class_name, seed=wanted.seed, num_seeds=wanted.num_seeds,
        area=wanted.resolution**2, multiple=family_of(model).pixel_multiple,
    )  # fmt: skip
    if (count := len(shots) * (len(wanted.strengths) + 2)) > MAX_IMAGES:
        raise ValueError(
            f"the report card would draw {count} images, and {MAX_IMAGES} is the limit: give fewer prompts, strengths "
            "or images_per_prompt"
        )
    return shots


def make_evaluation(
    lora: LoraOnModel,
    dataset: Dataset,
    conditions: Conditions | None,
    metrics: Callable[[], Metrics],
    wanted: Wanted,
    notes: Sequence[str],
) -> Evaluation:
    """Draws, measures and scores, with progress; can be cancelled between any two images.

    Args:
        conditions: for the gap to the teacher.
        metrics: loads the metrics, and says what is missing before anything is drawn.
        notes: for the reader.

    Raises:
        ValueError: inputs do not belong together, or a metric is not available.
    """
    shots = shots_of(dataset, lora.model, wanted)
    measures = measures_of(metrics())
    prompts = () if conditions is None else unseen_prompts(conditions, dataset)
    variants = len(wanted.strengths) + 2
    work = count_scores(shots, len(wanted.strengths), measures) + variants * (len(shots) + _GAP_UNITS * len(prompts))
    bar = comfy.utils.ProgressBar(work)

    def tick() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    gap = _measure_gap(lora, prompts, wanted, tick) if prompts else None
    sources = [to_tensor(read_image(pair.image_path)) for pair in dataset.report.pairs[:ROWS_PER_CONCEPT]]
    draw = _Painter(lora, wanted.steps, tick).draw
    done = evaluate(lora.name, shots, sources, wanted.strengths, draw, measures, tick, notes)
    return done if gap is None else replace(done, measured=(gap, *done.measured))


def unseen_prompts(conditions: Conditions, dataset: Dataset) -> tuple[PreviewPrompt, ...]:
    """The preview prompts that are no captions of the dataset; all of them if every one is."""
    trained = {caption for pair in dataset.report.pairs for caption in pair.captions}
    return tuple(prompt for prompt in conditions.previews if prompt.text not in trained) or conditions.previews


class _Painter:
    """Draws images as ComfyUI's own nodes would: its loader, its sampler, its VAE."""

    def __init__(self, lora: LoraOnModel, steps: int, tick: Callable[[], None]) -> None:
        self._lora, self._steps, self._tick = lora, steps or default_steps(lora.model), tick
        self._texts: dict[str, Any] = {}

    def draw(self, strength: float, shots: Sequence[Shot]) -> list[Tensor]:
        """One image [3, H, W] in [0, 1] per shot; the model is loaded once for all of them."""
        for shot in shots:
            self._encode(shot.prompt)
        model = self._lora.at(strength)
        latents = [self._sample(model, shot) for shot in shots]
        return [self._decode(latent) for latent in latents]

    def _sample(self, model: Any, shot: Shot) -> Tensor:
        family, device = family_of(model), comfy.model_management.intermediate_device()
        blank = torch.zeros(1, *family.latent_shape(shot.width, shot.height), device=device)
        sigmas = family.sigmas(self._steps, shot.width, shot.height)
        latent = few_step_sample(model, self._texts[shot.prompt], blank, shot.seed, sigmas)
        self._tick()
        return latent

    def _decode(self, latent: Tensor) -> Tensor:
        """Half precision, finer than 8 bits: a report keeps all of its images."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return decode_image(self._lora.vae, latent).movedim(-1, 0).float().cpu().clamp(0, 1).half()

    def _encode(self, text: str) -> None:
        if text not in self._texts:
            clip = self._lora.clip
            self._texts[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))


def _measure_gap(
    lora: LoraOnModel, prompts: Sequence[PreviewPrompt], wanted: Wanted, tick: Callable[[], None]
) -> Measured:
    """The gap to the teacher on prompts, for the untouched model, for it with other noise, and for every strength."""
    runs: dict[float | str, list[list[RolloutStep]]] = {
        name: _visited_by(lora.model, prompts, seed, tick)
        for name, seed in (("untouched", wanted.seed), ("other noise", wanted.seed + 1))
    }
    for strength in wanted.strengths:
        runs[strength] = _visited_by(lora.at(strength), prompts, wanted.seed, tick)
    denoiser = ComfyDenoiser(lora.model)
    gaps: dict[float | str, list[float]] = {name: [] for name in runs}
    with denoiser.loaded((1, *prompts[0].latent_shape)), torch.no_grad():
        for name, visits in runs.items():
            for prompt, steps in zip(prompts, visits, strict=True):
                teacher = prompt.teacher.to(denoiser.device)
                gaps[name].append(
                    gap_of(steps, lambda x, sigma, t=teacher: denoiser.predict_x0(x.to(denoiser.device), sigma, [t]))
                )
                tick()
    return gap_measured(
        [prompt.text for prompt in prompts], gaps["untouched"], gaps["other noise"],
        {strength: gaps[strength] for strength in wanted.strengths}, "gap to the teacher, unseen prompts",
    )  # fmt: skip


def _visited_by(
    model: Any, prompts: Sequence[PreviewPrompt], seed: int, tick: Callable[[], None]
) -> list[list[RolloutStep]]:
    """The few steps of a MODEL per prompt, from noise that only depends on seed and prompt."""
    denoiser, found = ComfyDenoiser(model), []
    family = family_of(model)
    with denoiser.loaded((1, *prompts[0].latent_shape)), torch.no_grad():
        for number, prompt in enumerate(prompts):
            noise = torch.randn(1, *prompt.latent_shape, generator=make_generator(seed, "report card", number))
            student = prompt.student.to(denoiser.device)
            sigmas = family.grid(family.rollout_steps, prompt.latent_shape)
            found.append(
                visited(lambda x, s, c=student: denoiser.predict_x0(x, s, [c]), noise.to(denoiser.device), sigmas)
            )
            tick()
    return found
