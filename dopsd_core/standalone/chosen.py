"""The family and the teacher's view that a command's arguments choose."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from ..conditioning.teachers import TeacherView, choose_teacher
from ..data.captions import put_trigger
from ..data.dataset import DatasetReport
from ..families import Family, get_family
from ..training.shown_images import require_masks
from .hosts.source import find_family
from .model_options import ModelOptions


def family_of(options: ModelOptions) -> Family:
    """The family of the model.

    Raises:
        ValueError, OSError: as `source.find_family`.
    """
    return get_family("z_image") if options.is_demo else get_family(find_family(options).family)


def view_of(args: argparse.Namespace, family: Family, report: DatasetReport, options: ModelOptions) -> TeacherView:
    """The teacher's view that the arguments select.

    Raises:
        ValueError: the model does not support it, or there are no masks for it.
    """
    edits = any(pair.source_images for pair in report.pairs)
    trigger = report.trigger_in_prompts(args.trigger)
    view = view_for(args, family, options, edits, others=args.teacher_image == "other", trigger=trigger)
    require_masks(report.pairs, view.background)
    return view


def view_for(
    args: argparse.Namespace, family: Family, options: ModelOptions, edits: bool, *, others: bool, trigger: str
) -> TeacherView:
    """The teacher's view that the arguments select.

    Args:
        edits: whether the dataset has source images.
        others: whether it sees other images.
        trigger: what `[V]` stands for in its sentence.

    Raises:
        ValueError: the model does not support it.
    """
    known = ("vlm",) if options.is_demo else family.teachers
    view = choose_teacher(known, args.teacher_view, edits).with_background(args.teacher_background)
    return view.with_sentence(put_trigger(args.teacher_sentence, trigger), others)


def require_family(lora: Path, facts: Mapping[str, str], family: Family, options: ModelOptions) -> None:
    """Checks, before anything is loaded, that a LoRA is of the model's family, by the facts of its header.

    Raises:
        ValueError: the header names another one.
    """
    of = facts.get("dopsd_family", family.name)
    if of != family.name:
        raise ValueError(f"{lora} is a LoRA of the family {of}, and --model {options.model} is a {family.title}")
