"""Measures the gap to the teacher on fixed noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from torch import Tensor

from ..conditioning.encode import DualCondition
from ..config import TrainConfig
from ..data.encoding_plan import Example
from ..denoiser import Denoiser
from ..families import get_family
from ..objectives import ObjectiveInputs, measure_gap
from ..trainable import Mode, Trainable
from ..transfer import to_device
from .log import Gaps
from .rng import draw_noise, make_generator
from .training_set import TrainingSet, latent_shape, pair_to
from .world import Peers


class Probe:
    """Measures the gap between student and teacher on pairs and noise that are fixed for the whole run.

    The processes of the run share the pairs, and all of them get all gaps, in the bits of one process.
    """

    def __init__(
        self, config: TrainConfig, denoiser: Denoiser, adapters: Trainable, data: TrainingSet, peers: Peers
    ) -> None:
        self._config, self._denoiser, self._adapters, self._peers = config, denoiser, adapters, peers
        examples = probed_examples(data.examples, config.probe_pairs)
        chosen = [data.pairs[example.variants[0]] for example in examples]
        self._concepts = [example.concept for example in examples]
        self._pairs = [(pair, self._noise(number, pair)) for number, pair in enumerate(chosen)]
        self._heldout = [(pair, self._noise(-1, pair)) for pair in (data.heldout,) if pair is not None]

    def measure(self) -> Gaps:
        """The current gaps: mean over the training pairs, of each concept's, and of the held-out pair."""
        every = self._gaps([*self._pairs, *self._heldout])
        gaps, heldout = every[: len(self._pairs)], every[len(self._pairs) :]
        by_concept: dict[str, list[float]] = {}
        for concept, gap in zip(self._concepts, gaps, strict=True):
            by_concept.setdefault(concept, []).append(gap)
        concepts = tuple((name, sum(own) / len(own)) for name, own in by_concept.items() if name)
        return Gaps(sum(gaps) / len(gaps), heldout[0] if heldout else None, concepts)

    def measure_heldout(self, untrained: bool = False) -> float | None:
        """The current gap of the held-out pair, or without adapters if `untrained`; None if there is no such pair."""
        return self._gaps(self._heldout, untrained)[0] if self._heldout else None

    def _gaps(self, pairs: Sequence[tuple[DualCondition, Tensor]], untrained: bool = False) -> list[float]:
        """The gap of each pair, with its noise [1, C, h, w]."""

        def measured(share: Sequence[tuple[DualCondition, Tensor]]) -> list[float]:
            return [self._gap(pair, noise, untrained) for pair, noise in share]

        return self._peers.spread(pairs, measured)

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
