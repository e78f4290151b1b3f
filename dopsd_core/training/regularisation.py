"""Regularisation images: a dataset of ordinary images with captions, which should not change.

Their captions become prior anchors. For objectives that train on class images (DreamBooth), the images themselves are
these, in place of images that the untouched model draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config import TrainConfig
from ..data.captions import has_trigger
from ..data.dataset import ORDINARY_WORDS, DatasetReport, Pair
from ..data.triggers import concepts_of
from .training_set import TrainingSet


def check_regularisation(regularisation: Sequence[Pair], pairs: Sequence[Pair], trigger: str) -> list[str]:
    """Warnings about captions and images that would work against the training, one sentence each.

    pairs: the training images.

    Raises:
        ValueError: the regularisation images are edits.
    """
    if any(pair.source_images for pair in regularisation):
        raise ValueError("the regularisation images are edits: use a folder of ordinary images with captions")
    names = (trigger, *concepts_of(pair.trigger for pair in pairs))
    trained, found = {caption for pair in pairs for caption in pair.captions}, []
    images = {pair.pixels: pair.image_path.name for pair in pairs if pair.pixels}
    for pair in regularisation:
        name = f"regularisation image {pair.image_path.name}"
        if any(has_trigger(caption, name) for caption in pair.captions for name in names):
            found.append(f"{name}: its caption names the concept, so training would suppress it: remove the name")
        elif not trained.isdisjoint(pair.captions):
            found.append(f"{name}: its caption is a training caption too, which pulls both ways: change one of them")
        if pair.pixels in images:
            found.append(
                f"{name}: it is the training image {images[pair.pixels]} too, and as a class image teaches the concept "
                "for ordinary words: use another image"
            )
    return found


def without_name_warnings(report: DatasetReport) -> DatasetReport:
    """The report of regularisation images without the warnings that captions lack a name, as theirs should."""
    kept = tuple(problem for problem in report.problems if not problem.message.endswith(ORDINARY_WORDS))
    return replace(report, problems=kept)


def regularisation_remarks(config: TrainConfig, data: TrainingSet) -> list[str]:
    """Which part of the regularisation images this objective uses, as a sentence; none if there are no such images."""
    objective, count = config.objective, len(data.regularisation)
    if not count:
        return []
    if objective.takes_regularisation:
        return [f"the {count} regularisation images are the class images: none are drawn"]
    if objective.wants_anchors:
        return [
            f"of the {count} regularisation images only the captions are used, as prior anchors: the objective "
            f"{objective.name} needs no class images"
        ]
    return [f"the {count} regularisation images are not used: the objective is {objective.name}, without anchors"]
