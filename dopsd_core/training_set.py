"""What a run trains on, after encoding, and the fixed noise that its distance to the teacher is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import AdapterSet
from .captions import put_trigger
from .conditioning import (
    Condition,
    ConditionCache,
    DualCondition,
    Encoder,
    EncodeRequest,
    OnEncoded,
    digest_bytes,
    encode_dataset,
    encode_texts,
)
from .config import TrainConfig
from .dataset import Example, Pair, plan_encoding
from .draws import draw_noise, make_generator
from .families import get_family
from .images import load_image
from .model import Denoiser
from .objectives import ObjectiveInputs, measure_gap
from .progress import Gaps

STRIPPED_SHARE = 0.75
"""Share of the captions without the concept's name among the prior anchors, where other prompts are given too."""


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Encoded pairs and how they are drawn.

    Attributes:
        pairs: every (picture, caption) in its two conditions, all with a target latent.
        anchors: conditions of captions without the concept, for the prior anchor.
        heldout: a training picture under a caption that is not trained, for the probe.
        examples: which pairs are captions of one picture (`plan_encoding`); by default each pair is its own.

    Raises:
        ValueError: there is no pair, one has no target latent, or an example does not fit.
    """

    pairs: Sequence[DualCondition]
    anchors: Sequence[Condition] = ()
    heldout: DualCondition | None = None
    examples: Sequence[Example] = ()

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("the training set has no pairs; give at least one picture with a caption")
        for pair in (*self.pairs, *((self.heldout,) if self.heldout else ())):
            if pair.target_latent is None:
                raise ValueError(f"the pair {pair.caption!r} has no target latent, which gives the noise its shape")
        if not self.examples:
            object.__setattr__(self, "examples", tuple(Example((index,)) for index in range(len(self.pairs))))
        for number, example in enumerate(self.examples):
            self._check_example(number, example)

    def _check_example(self, number: int, example: Example) -> None:
        used = {*example.variants, *(() if example.dropped is None else (example.dropped,))}
        if not example.variants or not all(0 <= index < len(self.pairs) for index in used) or example.repeats < 1:
            raise ValueError(f"example {number} ({example}) does not fit the {len(self.pairs)} pairs")
        if len({latent_shape(self.pairs[index]) for index in used}) > 1:
            raise ValueError(f"the captions of example {number} belong to pictures of different sizes")

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The latent shape of each example."""
        return tuple(latent_shape(self.pairs[example.variants[0]]) for example in self.examples)

    def fingerprint(self) -> str:
        """Equal for the same pairs, anchors, held-out pair and examples in the same order."""
        digest = hashlib.sha256()
        for pair in (*self.pairs, *((self.heldout,) if self.heldout else ())):
            digest.update(f"{pair.key}|{pair.caption}|{latent_shape(pair)}\n".encode())
        for anchor in self.anchors:
            digest.update(anchor.features.detach().cpu().float().contiguous().numpy().tobytes())
        digest.update(repr((len(self.pairs), self.heldout is None, tuple(self.examples))).encode())
        return digest.hexdigest()


def build_training_set(
    pairs: Sequence[Pair],
    encoder: Encoder,
    cache: ConditionCache | None = None,
    *,
    trigger: str = "",
    caption_dropout: bool = False,
    anchors: bool = False,
    anchor_prompts: Sequence[str] = (),
    heldout_caption: str | None = None,
    on_encoded: OnEncoded | None = None,
) -> TrainingSet:
    """Everything that a run needs of a data set, encoded or from the cache; the encoder may leave memory after it.

    Args:
        pairs: of a `DatasetReport` without errors.
        trigger: as given to `read_dataset`; taken out of the captions for the anchors.
        caption_dropout: encode the empty caption too.
        anchors: encode the captions without the concept, for the prior anchor. anchor_prompts: further ordinary prompts
            for it.
        heldout_caption: a caption not in the data, held against the first picture; `[V]` stands for the trigger.

    Raises:
        ValueError: `heldout_caption` is trained, or the encoder returns what cannot be used.
        ImageError: a picture has gone bad since it was checked.
    """
    plan = plan_encoding(pairs, trigger=trigger, caption_dropout=caption_dropout)
    requests = [encode_request(pair, text) for pair, text in plan.requests]
    if heldout_caption is not None:
        text = put_trigger(heldout_caption, trigger)
        if any(text == caption for _, caption in plan.requests):
            raise ValueError(f"the held-out caption {text!r} is one of the data set; give one that is not trained")
        requests.append(encode_request(pairs[0], text))
    encoded = encode_dataset(requests, encoder, cache, on_encoded)
    return TrainingSet(
        pairs=encoded[: len(plan.requests)],
        anchors=encode_texts(_weighted_anchors(plan.anchors, anchor_prompts), encoder, cache) if anchors else (),
        heldout=encoded[-1] if heldout_caption is not None else None,
        examples=plan.examples,
    )


def _weighted_anchors(stripped: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Captions without the concept's name, repeated to about `STRIPPED_SHARE` of all, and other ordinary prompts.

    They differ from what is trained by the name alone, so that is where the concept leaks first.
    """
    if not stripped or not prompts:
        return [*stripped, *prompts]
    repeats = max(1, round(len(prompts) * STRIPPED_SHARE / (1 - STRIPPED_SHARE) / len(stripped)))
    return [*list(stripped) * repeats, *prompts]


def encode_request(pair: Pair, caption: str) -> EncodeRequest:
    """The pair's picture, cropped to its bucket, under a caption."""
    return EncodeRequest(
        image_digest=digest_bytes(pair.image_path.read_bytes()),
        caption=caption,
        load_image=lambda: load_image(pair.image_path, pair.bucket),
        settings={"bucket": [pair.bucket.width, pair.bucket.height]},
    )


class Probe:
    """Measures the gap between student and teacher on pairs and noise that stay the same for the whole run."""

    def __init__(self, config: TrainConfig, denoiser: Denoiser, adapters: AdapterSet, data: TrainingSet) -> None:
        self._config, self._denoiser, self._adapters = config, denoiser, adapters
        chosen = [data.pairs[example.variants[0]] for example in data.examples[: config.probe_pairs]]
        self._pairs = [(pair, self._noise(number, pair)) for number, pair in enumerate(chosen)]
        self._heldout = (data.heldout, self._noise(-1, data.heldout)) if data.heldout is not None else None

    def measure(self) -> Gaps:
        """The gaps now: mean over the pairs, and of the held-out pair."""
        gaps = [self._gap(pair, noise) for pair, noise in self._pairs]
        return Gaps(sum(gaps) / len(gaps), self._gap(*self._heldout) if self._heldout else None)

    def _gap(self, pair: DualCondition, noise: Tensor) -> float:
        device = self._denoiser.device
        inputs = ObjectiveInputs(
            denoiser=self._denoiser,
            adapters=self._adapters,
            pairs=[pair_to(pair, device)],
            noise=noise.to(device),
            sigmas=grid_of(self._config, latent_shape(pair)),
            generator=make_generator(self._config.seed, "probe"),
        )
        return measure_gap(inputs).gap

    def _noise(self, number: int, pair: DualCondition) -> Tensor:
        return draw_noise(self._config.seed, -1, number, [latent_shape(pair)])


def latent_shape(pair: DualCondition) -> tuple[int, ...]:
    """(C, h, w) of the pair's target."""
    if pair.target_latent is None:
        raise ValueError(f"the pair {pair.caption!r} has no target latent")
    return tuple(pair.target_latent.shape)


def grid_of(config: TrainConfig, shape: tuple[int, ...]) -> tuple[float, ...]:
    """The family's grid of K steps for a latent of shape (C, h, w)."""
    family = get_family(config.family)
    return family.sigmas(config.rollout_steps, shape[2] * family.downscale, shape[1] * family.downscale)


def pair_to(pair: DualCondition, device: torch.device) -> DualCondition:
    """The pair with its conditions on a device; shares memory where nothing moves."""
    return DualCondition(pair.student.to(device), pair.teacher.to(device), pair.target_latent, pair.caption, pair.key)
