"""The demo: trains the embedded model on an unseen concept and evaluates it.

It uses the same code as real training: files on disk, the dataset reader, cached conditions, the trainer, a LoRA file.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..conditioning.cache import ConditionCache
from ..conditioning.encode import Condition, DualCondition
from ..config import TrainConfig
from ..data.dataset import Pair, read_dataset
from ..data.images import load_image
from ..demo.concept import Concept
from ..demo.settings import SAMPLE_STEPS
from ..demo.world import IMAGE_SIZE, TRIGGER
from ..denoiser import Denoiser
from ..families import Z_IMAGE
from ..objectives import ObjectiveInputs, measure_gap
from ..rollout import sample
from ..teachers import FrozenTeacher
from ..trainable import Trainable
from ..training.rng import make_generator
from ..training.trainer import Callbacks, TrainingSet, train
from ..training.training_set import build_training_set
from .evaluate import Samples, Scores, score
from .hosts.demo import DemoModel, StandaloneDenoiser, load_undistilled, with_lora
from .judge import Judge, judged_right

_BATCH = 32


@dataclass(frozen=True, eq=False)
class PromptConditions:
    """Conditions of the evaluation prompts.

    Attributes:
        trigger: prompts with the trigger, text only.
        described: prompts without the trigger that describe an appearance, text only.
        generic: prompts without the trigger or any appearance, text only.
        named: prompts with a bound name, text only.
        taught: the prompts with the trigger, with the teacher's view of a target.
    """

    trigger: Sequence[Condition]
    described: Sequence[Condition]
    generic: Sequence[Condition]
    named: Sequence[Condition]
    taught: Sequence[Condition]


class Demo:
    """The demo for one concept, in an output folder where `write_dataset` has written the training images."""

    def __init__(self, model: DemoModel, judge: Judge, concept: Concept, output: Path) -> None:
        self.model, self.judge, self.concept, self.output = model, judge, concept, output
        self.conditions, self.data = self._prepare()

    def _prepare(self) -> tuple[PromptConditions, TrainingSet]:
        concept, encoder = self.concept, self.model.encoder
        folder = self.output / "dataset"
        report = read_dataset(folder, trigger=TRIGGER, pixel_budget=IMAGE_SIZE**2, multiple=Z_IMAGE.pixel_multiple)
        report.raise_for_errors()
        data = self.training_set(report.pairs, ConditionCache(self.output / "cache"))
        images = [load_image(pair.image_path, pair.bucket) for pair in report.pairs]
        taught = [
            encoder.encode_image_text(images[i % len(images)], text) for i, text in enumerate(concept.unseen.texts)
        ]
        kinds = (concept.unseen, concept.described, concept.generic, concept.named)
        text = {t: encoder.encode_text(t) for t in {t for prompts in kinds for t in prompts.texts}}
        trigger, described, generic, named = ([text[t] for t in prompts.texts] for prompts in kinds)
        return PromptConditions(trigger, described, generic, named, taught), data

    def training_set(self, pairs: Sequence[Pair], cache: ConditionCache) -> TrainingSet:
        """What is trained on; a subclass may encode the images in another way."""
        return build_training_set(
            pairs, self.model.encoder, cache, trigger=TRIGGER, anchors=True,
            anchor_prompts=self.concept.anchors, heldout_caption=self.concept.unseen.texts[0],
        )  # fmt: skip

    def draw(self, conditions: Sequence[Condition], seed: int) -> Tensor:
        """Draws one few-step sample per condition, [n, 3, 64, 64] in [0, 1]. Equal seeds have equal noise."""
        shape = Z_IMAGE.latent_shape(IMAGE_SIZE, IMAGE_SIZE)
        noise = torch.randn(len(conditions), *shape, generator=make_generator(seed, "demo samples"))
        sigmas = Z_IMAGE.sigmas(SAMPLE_STEPS, IMAGE_SIZE, IMAGE_SIZE)
        latents = [
            sample(self.model.denoiser, conditions[i : i + _BATCH], noise[i : i + _BATCH], sigmas)
            for i in range(0, len(conditions), _BATCH)
        ]
        return self.model.encoder.decode(torch.cat(latents))

    def samples(self, seed: int, lora: Path | None = None) -> Samples:
        """Samples of the model, with a LoRA if one is given."""
        parts = self.conditions
        with with_lora(self.model.denoiser, lora) if lora else nullcontext():
            trigger, described = self.draw(parts.trigger, seed), self.draw(parts.described, seed + 1000)
            generic, named = self.draw(parts.generic, seed + 2000), self.draw(parts.named, seed + 3000)
            return Samples(trigger, described, generic, named)

    def taught(self, seed: int, base: Samples) -> Samples:
        """Samples of the untouched model with the teacher's conditions; prompts without the trigger have no target."""
        return replace(base, trigger=self.draw(self.conditions.taught, seed))

    def score(self, samples: Samples) -> Scores:
        """The judge's scores of the samples."""
        return score(samples, self.concept, self.judge)

    def train(
        self,
        name: str,
        config: TrainConfig,
        callbacks: Callbacks | None = None,
        *,
        undistilled: bool = False,
        counted: Denoiser | None = None,
    ) -> Path:
        """Trains in `runs/<name>`, or resumes the run there, and returns the LoRA's path.

        undistilled: whether to train the model before its distillation.
        counted: what to train through instead of the model's own denoiser, on the same network.

        Raises:
            FileNotFoundError: the undistilled model is not there.
        """
        model = self._undistilled if undistilled else (counted or self.model.denoiser, self.model.fingerprint)
        denoiser, fingerprint = model
        facts = {"dopsd_base_fingerprint": fingerprint} | ({"dopsd_undistilled": "yes"} if undistilled else {})
        folder = self.output / "runs" / name
        result = train(config, denoiser, self.data, folder, callbacks, facts=facts, sample_steps=SAMPLE_STEPS)
        return result.lora_path

    @cached_property
    def _undistilled(self) -> tuple[StandaloneDenoiser, str]:
        return load_undistilled()

    def relative_gap(self, adapters: Trainable, seed: int, count: int = 8) -> float:
        """The gap of weights in training to the untouched model that sees a target, relative to that without them.

        On `count` of the unseen prompts, along the model's own few steps.
        """
        parts, step = self.conditions, max(1, len(self.conditions.trigger) // count)
        pairs = [
            DualCondition(student, teacher, None, "", "")
            for student, teacher in list(zip(parts.trigger, parts.taught, strict=True))[::step][:count]
        ]
        generator = make_generator(seed, "gap")
        inputs = ObjectiveInputs(
            denoiser=self.model.denoiser,
            adapters=adapters,
            pairs=pairs,
            noise=torch.randn(len(pairs), *Z_IMAGE.latent_shape(IMAGE_SIZE, IMAGE_SIZE), generator=generator),
            sigmas=Z_IMAGE.sigmas(SAMPLE_STEPS, IMAGE_SIZE, IMAGE_SIZE),
            generator=generator,
        )
        now, before = (
            measure_gap(inputs, student_mode=mode, teacher_mode="off").metrics["gap"] for mode in ("student", "off")
        )
        return now / before

    def concept_error(
        self, adapters: Trainable, config: TrainConfig, seed: int, count: int, undistilled: bool
    ) -> float:
        """The concept error of weights in training, on `count` of the unseen prompts.

        undistilled: whether the weights are attached to the undistilled model; they are drawn with the distilled one.
        """
        scenes, conditions = self.concept.unseen.scenes, self.conditions.trigger
        chosen = torch.arange(0, len(conditions), max(1, len(conditions) // count))[:count]
        drawn = [conditions[i] for i in chosen.tolist()]
        if undistilled:
            other = config.adapter.build(self.model.denoiser, FrozenTeacher(), config.seed)
            other.load_state("student", adapters.state())
            with other.attached():
                images = self.draw(drawn, seed)
        else:
            with adapters.use("student"):
                images = self.draw(drawn, seed)
        right = judged_right(self.judge, images, scenes[chosen].labels())
        decided = self.concept.decided
        return 1 - sum(float(right[name].float().mean()) for name in decided) / len(decided)
