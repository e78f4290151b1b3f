"""What a training starts from: the model, the encoded dataset and the teacher's view."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from tqdm import tqdm

from ..conditioning.cache import ConditionCache
from ..conditioning.encode import DualCondition, encode_texts
from ..conditioning.teachers import TeacherView
from ..config import TrainConfig
from ..data.captions import check_prompts, put_trigger
from ..data.dataset import Pair
from ..data.encoding_plan import plan_encoding
from ..data.resolutions import Scale, every_image
from ..families import Family, get_family
from ..objectives import SFT
from ..presets import ON_COMMAND_LINE
from ..shards.index import is_encoded
from ..shards.streamed_set import stream
from ..training.aims import aim_remarks, require_taught
from ..training.anchors import ordinary_prompts
from ..training.pair_keys import planned_digest
from ..training.prompt_remarks import anchor_remarks, equal_rows_remarks, slider_remarks
from ..training.regularisation import check_regularisation
from ..training.run_checks import idle_settings
from ..training.shown_images import mask_remarks
from ..training.start import start_from_file
from ..training.training_set import TrainingSet, build_training_set, encode_regularisation
from ..training.world import Peers, World
from .beforehand import check_beforehand, digest_of_pairs, may_lack_anchors
from .chosen import family_of, view_of
from .datasets import read_images, read_regularisation, read_scales
from .hosts.model import HostModel, load_model, sees_images
from .model_options import DEMO, ModelOptions
from .previews import MAX_PROMPTS, encode_shown, preview_texts
from .streamed import open_shards, require_same_encoding, shown_of, view_of_shards
from .texts import say, warn

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that `train` is called with, apart from the network.

    Attributes:
        model: the model.
        view: the teacher's view.
        config: the configuration.
        data: the encoded dataset.
        cache: of conditions and class images.
        shown: the prompts of previews.
        trigger: what `[V]` stands for in prompts.
        concepts: the triggers of the dataset.
        initial: the LoRA that the run starts from, tensors such as A [rank, in] and B [rows, rank]; None for none.
    """

    model: HostModel
    view: TeacherView
    config: TrainConfig
    data: TrainingSet
    cache: ConditionCache
    shown: Sequence[DualCondition]
    trigger: str = ""
    concepts: tuple[str, ...] = ()
    initial: Mapping[str, Tensor] | None = None


def prepare(
    args: argparse.Namespace,
    options: ModelOptions,
    config: TrainConfig,
    peers: Peers,
    before_encoding: Callable[[], None],
) -> Prepared:
    """Reads the dataset and encodes it: rank 0 first, then the others read what it has cached.

    before_encoding: called on rank 0 when all checks have passed, before anything is encoded.

    Raises:
        ValueError: `before_encoding` raised it, or options, dataset, model and processes do not fit together.
        DiskError, StateError, FolderInUse: the run cannot be written to its folder.
        OSError: files are missing or cannot be downloaded.
    """
    family = family_of(options)
    _require_fit(options, config, family)
    if is_encoded(args.dataset):
        return prepare_streamed(args, options, config, peers, before_encoding)
    report = read_images(args, family, options)
    trigger, (scales, remarks) = report.trigger_in_prompts(args.trigger), read_scales(args, family, report)
    pairs = every_image(report.pairs, scales)
    regularisation = read_regularisation(args, family, options)
    ordinary = regularisation.pairs if regularisation else ()
    view = view_of(args, family, report, options)
    require_taught(view, config.objective)
    model = load_model(options, sees_images(view))
    if peers.is_first:
        say(report.describe())
        warn(remarks)
        warn(model.doubts([caption for pair in report.pairs for caption in pair.captions]))
        warn(mask_remarks(report.pairs, view.background))
        warn(_aim_remarks(args, config, report.pairs, view))
        warn(idle_settings(config, bool(scales)))
        warn(_prompt_remarks(args, config, view, trigger, ordinary, report.pairs))
        if regularisation:
            say(f"regularisation: {regularisation.describe()}")
            warn(check_regularisation(ordinary, report.pairs, trigger))
    start = _start(args, config, model, trigger or ", ".join(report.concepts), peers)

    def keys() -> str:
        return planned_digest(
            pairs, model.encoder, teacher=view, teacher_image=args.teacher_image, trigger=trigger,
            caption_dropout=config.caption_dropout > 0, scales=scales,
        )  # fmt: skip

    check_beforehand(args, config, model, digest_of_pairs(report.pairs, ordinary), peers, keys)
    peers.first(before_encoding)
    cache = ConditionCache(args.output / "cache")

    def encode() -> tuple[TrainingSet, Sequence[DualCondition]]:
        data = _encoded(args, model, pairs, ordinary, view, config, cache, trigger, scales)
        texts = preview_texts(args.preview_prompts, pairs, trigger)
        shown = encode_shown(texts, pairs, model, cache, view, args.teacher_image) if config.preview_every else ()
        return data, shown

    data, shown = first_then_others(peers, encode)
    config = _without_missing_anchors(args, config, data, peers)
    return Prepared(model, view, config, data, cache, shown, trigger, report.concepts, start)


def _require_fit(options: ModelOptions, config: TrainConfig, family: Family) -> None:
    """Raises ValueError if the configuration does not fit the model, by its name and options."""
    if config.family != family.name:
        raise ValueError(
            f"the configuration is for {get_family(config.family).title} and --model {options.model} is a "
            f"{family.title}: leave out --config, or choose another model"
        )
    if options.is_undistilled and config.objective.needs_few_steps:
        raise ValueError(
            f"objective {config.objective.name} needs the few steps of the distilled model; choose --objective sft "
            f"for --model {options.model}, or --model {DEMO}"
        )
    if config.adapter.trains_network and options.quantise != "none":
        raise ValueError(
            f"adapter {config.adapter.name} trains the weights themselves, which --quantise {options.quantise} packs: "
            "leave out --quantise, or choose --adapter lora"
        )


def prepare_streamed(
    args: argparse.Namespace,
    options: ModelOptions,
    config: TrainConfig,
    peers: Peers,
    before_encoding: Callable[[], None],
) -> Prepared:
    """Opens an encoded dataset; captions that are not in it are encoded by rank 0 first.

    before_encoding: as in `prepare`.

    Raises:
        ValueError: it is incomplete or damaged, or was encoded with other options or another model.
    """
    family, shards = family_of(options), open_shards(args)
    view = view_of_shards(args, family, options, shards.index.encoding)
    require_taught(view, config.objective)
    model = load_model(options, sees_images(view))
    require_same_encoding(args, model, view, shards)
    regularisation = read_regularisation(args, family, options)
    ordinary = regularisation.pairs if regularisation else ()
    if peers.is_first:
        say(shards.index.describe(args.dataset))
        if regularisation:
            say(f"regularisation: {regularisation.describe()}")
            warn(check_regularisation(ordinary, (), args.trigger))
        warn(idle_settings(config, has_resolutions=False))
        warn(_prompt_remarks(args, config, view, args.trigger, ordinary))
    start = _start(args, config, model, args.trigger, peers)
    check_beforehand(args, config, model, shards.index.digest() + digest_of_pairs(ordinary), peers)
    peers.first(before_encoding)
    cache = ConditionCache(args.output / "cache")
    wanted = _wants_anchors(config)

    def encode() -> TrainingSet:
        prompts = ordinary_prompts(args.anchor_prompts or (), ordinary, args.trigger) if wanted else ()
        return stream(
            shards, repeats=args.repeats, anchors=wanted,
            prompts=encode_texts(prompts, model.encoder, cache) if prompts else (),
            regularisation=encode_regularisation(ordinary, model.encoder, cache) if ordinary else (),
        )  # fmt: skip

    data = first_then_others(peers, encode)
    shown = shown_of(data, MAX_PROMPTS) if config.preview_every else ()
    config = _without_missing_anchors(args, config, data, peers)
    return Prepared(model, view, config, data, cache, shown, args.trigger, initial=start)


def _aim_remarks(args: argparse.Namespace, config: TrainConfig, pairs: Sequence[Pair], view: TeacherView) -> list[str]:
    given = bool(args.anchor_prompts or args.regularisation)
    names_others = given or not config.objective.wants_anchors
    preset = ON_COMMAND_LINE.get(args.preset, "")
    return aim_remarks(preset, pairs, view, args.teacher_image, names_others=names_others)


def _start(
    args: argparse.Namespace, config: TrainConfig, model: HostModel, trigger: str, peers: Peers
) -> Mapping[str, Tensor] | None:
    """The tensors of --initial-lora, such as A [rank, in]; checked before anything is encoded."""
    if args.initial_lora is None:
        return None
    start = start_from_file(args.initial_lora, model.outline.sites(), config, trigger, model.title)
    if peers.is_first:
        warn(start.notes)
    return start.tensors


def _prompt_remarks(
    args: argparse.Namespace, config: TrainConfig, view: TeacherView, trigger: str, ordinary: Sequence[Pair],
    pairs: Sequence[Pair] = (),
) -> list[str]:  # fmt: skip
    """Anchor, preview and held-out prompts that work against the training, or show nothing of it."""
    names = list(dict.fromkeys(filter(None, (trigger, *(pair.trigger for pair in pairs)))))
    anchors = [put_trigger(text, trigger) for text in args.anchor_prompts or ()]
    remarks = anchor_remarks(anchors, names, {text for p in pairs if not p.source_images for text in p.captions})
    if config.objective.wants_anchors:
        given = [*anchors, *(text for pair in ordinary for text in pair.captions)]
        remarks += slider_remarks(given, view, plan_encoding(pairs, trigger=trigger).anchors)
    shown = [put_trigger(text, trigger) for text in args.preview_prompts or ()] if config.preview_every else []
    if args.heldout_caption and not config.probe_every:
        remarks.append("the held-out caption is not measured: probe_every is 0, so no step is known as the best")
    elif not args.heldout_caption and not is_encoded(args.dataset):
        needed = "give --heldout-caption" + (" and set --probe-every" if not config.probe_every else "")
        if config.save_every:
            remarks.append(f"which of the LoRA files is the best will not be known: {needed}")
        if config.stop_at_plateau:
            remarks.append(f"the run will not stop at a plateau, since no gap is measured: {needed}")
    return remarks + equal_rows_remarks(shown, view)


def runs_together(config: TrainConfig, world: World | None) -> bool:
    """Whether each process holds a part of the model, so that all of them run it at the same time."""
    return config.adapter.trains_network and world is not None and world.size > 1


def first_then_others(peers: Peers, work: Callable[[], T]) -> T:
    """The result of `work`, on rank 0 first, so that the others find in the cache what it encoded."""
    kept: list[T] = []
    peers.all(lambda: kept.append(work()) if peers.is_first else None)
    return kept[0] if kept else work()


def _wants_anchors(config: TrainConfig) -> bool:
    # SFT does not use anchors, but they are part of the fingerprint of saved runs
    return config.objective.wants_anchors or isinstance(config.objective, SFT)


def _encoded(
    args: argparse.Namespace, model: HostModel, pairs: Sequence[Pair], ordinary: Sequence[Pair], view: TeacherView,
    config: TrainConfig, cache: ConditionCache, trigger: str, scales: Sequence[Scale],
) -> TrainingSet:  # fmt: skip
    if args.heldout_caption is not None:
        warn(check_prompts([args.heldout_caption], "held-out caption", trigger))
    with tqdm(unit="image", desc="encoding", disable=None if len(pairs) + len(ordinary) > MANY else True) as bar:

        def on_encoded(done: int, total: int, cached: bool) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return build_training_set(
            pairs, model.encoder, cache, teacher=view, trigger=trigger, teacher_image=args.teacher_image,
            caption_dropout=config.caption_dropout > 0, anchors=_wants_anchors(config),
            anchor_prompts=args.anchor_prompts or (), regularisation=ordinary,
            heldout_caption=args.heldout_caption, scales=scales, on_encoded=on_encoded,
        )  # fmt: skip


MANY = 20
"""Datasets with more images have a progress bar while they are encoded."""


def _without_missing_anchors(
    args: argparse.Namespace, config: TrainConfig, data: TrainingSet, peers: Peers
) -> TrainConfig:
    if data.anchors or not may_lack_anchors(args, config):
        return config
    if peers.is_first:
        warn(["no caption contains the trigger, so there are no anchors; anchor_probability is set to 0"])
    return config.replace(objective=config.objective.without_anchors())
