"""Training on an encoded dataset: that it was encoded with the same options and model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..conditioning.encode import DualCondition
from ..conditioning.teachers import TEACHER_VIEWS, TeacherView
from ..data.captions import put_trigger
from ..families import FAMILIES, Family, get_family
from ..shards.encoding import Encoding
from ..shards.index import AGAIN, INDEX, Index
from ..shards.reader import Shards
from ..text import printable
from ..training.training_set import TrainingSet
from .chosen import view_for
from .hosts.model import HostModel
from .model_options import ModelOptions


def open_shards(args: argparse.Namespace) -> Shards:
    """The encoded dataset; trigger and resolution that are not given are its own.

    Raises:
        ValueError: it is incomplete or damaged, or an option needs the images.
    """
    folder = args.dataset
    for name, needs, instead in (
        ("root", args.root is not None, "is for folders and JSONL files"),
        ("resolutions", bool(args.resolutions), "needs the images: train from the dataset itself"),
        ("teacher-image", args.teacher_image != "own", "other needs the images: train from the dataset itself"),
        ("preview-prompts", bool(args.preview_prompts), "needs the images for its teacher: use sample afterwards"),
    ):
        if needs:
            raise ValueError(f"{folder} is an encoded dataset, and --{name} {instead}")
    if not (folder / INDEX).exists():
        raise ValueError(printable(f"{folder} has shards but no {INDEX}: {AGAIN}, or copy the file"))
    index = Index.read(folder)
    if not index.is_complete:
        raise ValueError(printable(f"{folder} is not encoded completely: {AGAIN}, which continues"))
    args.trigger = args.trigger or index.encoding.trigger
    args.resolution = args.resolution or index.encoding.resolution
    return Shards(folder, index)


def view_of_shards(
    args: argparse.Namespace, family: Family, options: ModelOptions, encoding: Encoding
) -> TeacherView:  # fmt: skip
    """The teacher's view that the arguments select; the dataset's own if they select none.

    Raises:
        ValueError: the dataset was encoded for another family, the model does not support the view, or the index has
            an unknown one.
    """
    if encoding.family != family.name:
        known = get_family(encoding.family).title if encoding.family in FAMILIES else repr(encoding.family)
        raise ValueError(
            f"{args.dataset} was encoded for {known}, and --model {options.model} is a {family.title}: choose that "
            "model, or encode the dataset again into another folder"
        )
    if encoding.teacher not in TEACHER_VIEWS:
        raise ValueError(f"{args.dataset} was encoded for the unknown teacher {encoding.teacher!r}: {AGAIN}")
    stored = TEACHER_VIEWS[encoding.teacher]
    if args.teacher_view == "auto" and not args.teacher_sentence and args.teacher_background == "keep":
        return encoding.view()
    return view_for(args, family, options, stored.edits, others=False, trigger=args.trigger.strip())


def require_same_encoding(args: argparse.Namespace, model: HostModel, view: TeacherView, shards: Shards) -> None:
    """Checks that the model would encode the dataset in the same way with these options.

    Raises:
        ValueError: it would not; the message names what differs.
    """
    stored = shards.index.encoding
    heldout = stored.heldout if args.heldout_caption is None else put_trigger(args.heldout_caption, args.trigger)
    wanted = Encoding.of(
        model.encoder.identity, model.family.name, view, trigger=args.trigger.strip(), resolution=args.resolution,
        multiple=model.family.pixel_multiple, empty_captions=stored.empty_captions, heldout=heldout,
    )  # fmt: skip
    if changed := stored.differences(wanted):
        raise ValueError(
            printable(
                f"{args.dataset} was encoded in another way than this training needs: encode the dataset again into "
                f"another folder, or undo {', '.join(changed)}"
            )
        )


def shown_of(data: TrainingSet, count: int) -> Sequence[DualCondition]:
    """The first images with their captions, for previews: features [L, D], latents [C, h, w]."""
    pairs = [data.pairs[example.variants[0]] for example in data.examples[:count]]
    return list({pair.caption: pair for pair in reversed(pairs)}.values())[::-1]
