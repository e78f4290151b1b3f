"""Measures the gap to the teacher on fixed noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from torch import Tensor

from ..conditioning.encode import DualCondition
from ..config import TrainConfig
from ..data.dataset import Example
from ..denoiser import Denoiser
from ..families import get_family
from ..objectives import ObjectiveInputs, measure_gap
from ..trainable import Mode, Trainable
from ..transfer import to_device
from .log import Gaps
from .rng import draw_noise, make_generator
from .training_set import TrainingSet, latent_shape, pair_to


class Probe:
    """Measures the gap between student and teacher on pairs and noise that are fixed for the whole run."""

    def __init__(self, config: TrainConfig, denoiser: Denoiser, adapters: Trainable, data: TrainingSet) -> None:
        self._config, self._denoiser, self._adapters = config, denoiser, adapters
        examples = probed_examples(data.examples, config.probe_pairs)
        chosen = [data.pairs[example.variants[0]] for example in examples]
        self._concepts = [example.concept for example in examples]
        self._pairs = [(pair, self._noise(number, pair)) for number, pair in enumerate(chosen)]
        self._heldout = (data.heldout, self._noise(-1, data.heldout)) if data.heldout is not None else None

    def measure(self) -> Gaps:
        """The current gaps: mean over the training pairs, of each concept's, and of the held-out pair."""
        gaps = [self._gap(pair, noise) for pair, noise in self._pairs]
        by_concept: dict[str, list[float]] = {}
        for concept, gap in zip(self._concepts, gaps, strict=True):
            by_concept.setdefault(concept, []).append(gap)
        concepts = tuple((name, sum(own) / len(own)) for name, own in by_concept.items() if name)
        return Gaps(sum(gaps) / len(gaps), self.measure_heldout(), concepts)

    def measure_heldout(self, untrained: bool = False) -> float | None:
        """The current gap of the held-out pair, or without adapters if `untrained`; None if there is no such pair."""
        return self._gap(*self._heldout, untrained) if self._heldout else None

    def _gap(self, pair: DualCondition, noise: Tensor, untrained: bool = False) -> float:
        modes: tuple[Mode, Mode] = ("off", "off") if untrained else ("student", "teacher")
        device, family = self._denoiser.device, get_family(self._config.family)
        inputs = ObjectiveInputs(
            denoiser=self._denoiser,
            adapters=self._adapters,
            pairs=[pair_to(pair, device)],
            noise=to_device(noise, device),
            sigmas=family.grid(self._config.rollout_steps, latent_shape(pair)),
            generator=make_generator(self._config.seed, "probe"),
        )
        return measure_gap(inputs, student_mode=modes[0], teacher_mode=modes[1]).metrics["gap"]

    def _noise(self, number: int, pair: DualCondition) -> Tensor:
        return draw_noise(self._config.seed, -1, number, [latent_shape(pair)])


def probed_examples(examples: Sequence[Example], count: int) -> list[Example]:
    """The first examples; of several concepts the first ones of each in turn, and at least one of each."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.concept, []).append(example)
    turns = zip_longest(*groups.values())
    in_turn = [example for turn in turns for example in turn if example is not None]
    return in_turn[: max(count, len(groups))]
