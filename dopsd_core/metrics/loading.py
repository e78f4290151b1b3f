"""Loads the metrics that were asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .clip_score import ClipScore
from .dino import DinoDistance
from .lpips_distance import LpipsDistance
from .measures import Metrics
from .preference_score import HumanPreferenceScore
from .vlm import TransformersVlm
from .vlm_questions import VlmJudge


def load_metrics(
    weights: Mapping[str, str | None],
    *,
    vlm_kind: str = "instance",
    device: torch.device | str = "cpu",
    download: bool = False,
) -> Metrics:
    """The metrics with weights.

    Args:
        weights: folder, file or hub id by name: dino, lpips, clip, vlm, hpsv3; a metric without is not loaded.
        vlm_kind: "instance" or "style".
        device: where they run.
        download: whether hub ids may be downloaded.

    Raises:
        MetricUnavailable: packages or weights of one that was asked for are missing.
    """
    given = {name: source for name, source in weights.items() if source}
    where = {"device": device, "download": download}
    return Metrics(
        dino=DinoDistance.load(given["dino"], **where) if "dino" in given else None,
        lpips=LpipsDistance.load(given["lpips"], **where) if "lpips" in given else None,
        clip=ClipScore.load(given["clip"], **where) if "clip" in given else None,
        vlm=VlmJudge(TransformersVlm.load(given["vlm"], **where), vlm_kind) if "vlm" in given else None,
        quality=HumanPreferenceScore.load(given["hpsv3"], **where) if "hpsv3" in given else None,
    )
