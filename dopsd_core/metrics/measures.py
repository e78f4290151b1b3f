"""The measures of an evaluation, made from the metrics whose weights are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .evaluation import Case, Measure
from .pixels import resized_to
from .protocol import ShotKind
from .sharpness import relative_sharpness

Distance = Callable[[Tensor, Tensor], float]
"""(source [3, h, w], generated [3, H, W]), in [0, 1] -> distance or grade."""

TextScore = Callable[[Tensor, str], float]
"""(image [3, H, W] in [0, 1], prompt) -> score."""

_REWRITE: frozenset[ShotKind] = frozenset({"rewrite"})
_TEST: frozenset[ShotKind] = frozenset({"test"})
_TRIGGER: frozenset[ShotKind] = frozenset({"rewrite", "test"})
_ORDINARY: frozenset[ShotKind] = frozenset({"ordinary"})
_ALL: frozenset[ShotKind] = _TRIGGER | _ORDINARY


@dataclass(frozen=True)
class Metrics:
    """The metrics that are loaded; None for those whose package or weights are missing.

    Attributes:
        dino: DINO-D.
        lpips: LPIPS-D.
        clip: CLIP-S.
        vlm: VLM-J.
        quality: HPSv3.
    """

    dino: Distance | None = None
    lpips: Distance | None = None
    clip: TextScore | None = None
    vlm: Distance | None = None
    quality: TextScore | None = None


def measures_of(metrics: Metrics) -> list[Measure]:
    """The measures in the order of the report: those of the loaded metrics, and those that need no weights."""
    found = []
    for name, title, distance in (("dino", "DINO", metrics.dino), ("lpips", "LPIPS", metrics.lpips)):
        if distance is not None:
            found.append(
                Measure(f"{name}_d", f"{title}-D to the source", "concept", "lower", _REWRITE, _to_source(distance))
            )
            found.append(
                Measure(
                    f"{name}_retention", f"{title} distance to untouched", "retention", "unchanged", _ORDINARY,
                    _to_untouched(distance),
                )
            )  # fmt: skip
    if metrics.vlm is not None:
        found.append(Measure("vlm_j", "VLM-J, 1 to 4", "concept", "higher", _TEST, _to_source(metrics.vlm)))
    if metrics.clip is not None:
        found.append(Measure("clip_s", "CLIP-S", "following", "higher", _TRIGGER, _of_prompt(metrics.clip)))
    if metrics.quality is not None:
        found.append(Measure("hpsv3", "HPSv3 quality", "few steps", "higher", _ALL, _of_prompt(metrics.quality)))
    return [*found, *WITHOUT_WEIGHTS]


def pixel_distance(first: Tensor, second: Tensor) -> float:
    """Root mean square difference of two images [3, H, W] in [0, 1]."""
    return float((first.float() - second.float()).square().mean().sqrt())


def _to_source(distance: Distance) -> Callable[[Case], float]:
    def score(case: Case) -> float:
        return float("nan") if case.source is None else distance(case.source, case.image)

    return score


def _to_untouched(distance: Distance) -> Callable[[Case], float]:
    """Exactly 0 for the untouched model itself."""
    return lambda case: 0.0 if case.image is case.untouched else distance(case.untouched, case.image)


def _of_prompt(score: TextScore) -> Callable[[Case], float]:
    return lambda case: score(case.image, case.shot.scored)


def _sharpness(case: Case) -> float:
    return relative_sharpness(
        case.image, case.untouched if case.source is None else resized_to(case.source, case.image)
    )


WITHOUT_WEIGHTS = (
    Measure("sharpness", "sharpness, over the source's", "few steps", "near 1", _TRIGGER, _sharpness),
    Measure("sharpness_prior", "sharpness, ordinary prompts", "few steps", "near 1", _ORDINARY, _sharpness),
    Measure(
        "pixel_retention", "pixel distance to untouched", "retention", "unchanged", _ORDINARY,
        _to_untouched(pixel_distance),
    ),
)  # fmt: skip
"""Measures that need no weights."""
