"""The images that a command is given, at the model's resolution."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.dataset import DatasetReport, read_dataset
from ..data.resolutions import Resolution, Scale, parse_resolutions, scales_of, smaller_budgets
from ..data.sources.hugging_face import PREFIX
from ..data.sources.tars import tars_of
from ..families import Family
from ..shards.index import is_encoded
from ..training.regularisation import without_name_warnings
from .model_options import ModelOptions


def require_images(dataset: Path) -> None:
    """Checks that a dataset is none of those that only other commands read.

    Raises:
        ValueError: it is; the message names the command.
    """
    if is_encoded(dataset):
        raise ValueError(f"{dataset} is an encoded dataset, which only train reads: give the folder of the images")
    is_hugging_face = str(dataset).startswith(PREFIX) and not dataset.exists()
    if is_hugging_face or tars_of(dataset):
        what = "a Hugging Face dataset" if is_hugging_face else "a WebDataset"
        raise ValueError(f"{dataset} is {what}: write it as shards with encode first, and train on those")


def read_images(args: argparse.Namespace, family: Family, options: ModelOptions) -> DatasetReport:
    """The dataset at the model's resolution.

    Raises:
        ValueError: it has errors, or edits that the model cannot learn.
    """
    require_images(args.dataset)
    report = read_dataset(
        args.dataset, pixel_budget=side_of(args, family, options) ** 2, multiple=family.pixel_multiple,
        trigger=args.trigger, repeats=args.repeats, root=args.root,
        smaller_budgets=smaller_budgets(_resolutions(args, family)),
    )  # fmt: skip
    report.raise_for_errors()
    if options.is_demo and any(pair.source_images for pair in report.pairs):
        raise ValueError(f"{args.dataset} contains edits, but the demo model cannot edit: use images with captions")
    return report


def read_regularisation(args: argparse.Namespace, family: Family, options: ModelOptions) -> DatasetReport | None:
    """The regularisation images at the model's resolution, whose captions need no name; None without a folder.

    Raises:
        ValueError: they have errors.
    """
    if args.regularisation is None:
        return None
    budget = side_of(args, family, options) ** 2
    report = read_dataset(args.regularisation, pixel_budget=budget, multiple=family.pixel_multiple)
    report.raise_for_errors()
    return without_name_warnings(report)


def read_scales(
    args: argparse.Namespace, family: Family, report: DatasetReport
) -> tuple[tuple[Scale, ...], tuple[str, ...]]:
    """(the dataset at each of several resolutions, remarks on images that are left out of one); none without any.

    Raises:
        ValueError: the resolutions are not valid, or too large for every image.
    """
    return scales_of(report, _resolutions(args, family), family.pixel_multiple)


def _resolutions(args: argparse.Namespace, family: Family) -> tuple[Resolution, ...]:
    return parse_resolutions(" ".join(getattr(args, "resolutions", None) or ()), family.pixel_multiple)


def side_of(args: argparse.Namespace, family: Family, options: ModelOptions) -> int:
    """Images have about this x this pixels: --resolution, or the model's own."""
    from ..demo.world import IMAGE_SIZE

    if several := _resolutions(args, family):
        return several[-1].side
    return args.resolution or (IMAGE_SIZE if options.is_demo else round(family.pixel_budget**0.5))
