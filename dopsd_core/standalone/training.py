"""The command train: a LoRA, or all weights, of any model of the standalone host, in one process or several."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..conditioning.cache import ConditionCache
from ..conditioning.encode import DualCondition
from ..conditioning.teachers import TeacherView, choose_teacher
from ..config import TrainConfig
from ..data.captions import check_prompts
from ..data.dataset import DatasetReport, Pair
from ..data.resolutions import Scale
from ..denoiser import Denoiser
from ..families import Family, get_family
from ..memory.footprint import Footprint, estimate
from ..objectives import SFT
from ..sharing.model_spec import trigger_facts
from ..trainable import Trainable
from ..training.log import StepReport, gaps_by_concept
from ..training.regularisation import check_regularisation
from ..training.shown_images import mask_remarks, require_masks
from ..training.trainer import NoCallbacks, TrainResult, train
from ..training.training_set import TrainingSet, build_training_set, latent_shape
from ..training.world import Peers, World
from .accelerate_world import joined_world
from .datasets import read_images, read_regularisation, read_scales
from .hosts.model import HostModel, device_of, load_model, sees_images
from .hosts.source import find_family
from .model_options import DEMO, ModelOptions
from .previews import Painter, TrainingPreview, encode_shown, preview_texts
from .texts import say, warn
from .tracking import Tracking, chosen_trackers, open_tracking

STOPPED = 143
"""Exit code of a run that SIGTERM stopped: 128 + 15, as by a shell."""

_MARGIN = 0.92
"""Share of the free memory that training may take; the rest is for the allocator's gaps and the estimate's error."""


def run_train(args: argparse.Namespace) -> int:
    """Trains on a dataset, or resumes the run.

    args.train_config: the configuration from `arguments.config_from_args`.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    options = ModelOptions.of(args)
    args.trackers = chosen_trackers(args.track)
    with joined_world(device_of(options).type == "cpu") as world:
        peers = Peers(world)
        if not peers.is_first:
            logging.getLogger("dopsd").setLevel(logging.ERROR)
        with peers.ending_together():
            prepared = prepare(args, options, args.train_config, peers)
            denoiser = prepared.model.denoiser
            blocks = args.checkpoint_blocks
            if blocks is None:
                blocks = _blocks_to_checkpoint(prepared, denoiser, peers)
        return _trained(args, prepared, denoiser, blocks, world)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that `train` is called with, apart from the network.

    Attributes:
        model: the model.
        view: the teacher's view.
        config: the configuration.
        data: the encoded dataset.
        cache: of conditions and class images.
        shown: the prompts of previews, on rank 0.
        trigger: what `[V]` stands for in prompts.
        concepts: the triggers of the dataset.
    """

    model: HostModel
    view: TeacherView
    config: TrainConfig
    data: TrainingSet
    cache: ConditionCache
    shown: Sequence[DualCondition]
    trigger: str = ""
    concepts: tuple[str, ...] = ()


def prepare(args: argparse.Namespace, options: ModelOptions, config: TrainConfig, peers: Peers) -> Prepared:
    """Reads the dataset and encodes it: rank 0 first, then the others read what it has cached.

    Raises:
        ValueError: options, dataset and model do not fit together.
        OSError: files are missing or cannot be downloaded.
    """
    family = family_of(options)
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
    report = read_images(args, family, options)
    trigger, (scales, remarks) = report.trigger_in_prompts(args.trigger), read_scales(args, family, report)
    pairs = scales[0].pairs if scales else report.pairs
    regularisation = read_regularisation(args, family, options)
    ordinary = regularisation.pairs if regularisation else ()
    view = view_of(args, family, report, options)
    model = load_model(options, sees_images(view))
    if peers.is_first:
        say(report.describe())
        warn(remarks)
        warn(model.doubts([caption for pair in report.pairs for caption in pair.captions]))
        warn(mask_remarks(report.pairs, view.background))
        if regularisation:
            say(f"regularisation: {regularisation.describe()}")
            warn(check_regularisation(ordinary, report.pairs, trigger))
    cache = ConditionCache(args.output / "cache")

    def encode() -> tuple[TrainingSet, Sequence[DualCondition]]:
        data = _encoded(args, model, pairs, ordinary, view, config, cache, trigger, scales)
        texts = preview_texts(args.preview_prompts, pairs, trigger)
        wanted = peers.is_first and config.preview_every
        return data, encode_shown(texts, pairs, model, cache, view, args.teacher_image) if wanted else ()

    kept: list[tuple[TrainingSet, Sequence[DualCondition]]] = []
    peers.all(lambda: kept.append(encode()) if peers.is_first else None)
    data, shown = kept[0] if kept else encode()
    config = _without_missing_anchors(args, config, data, peers)
    return Prepared(model, view, config, data, cache, shown, trigger, report.concepts)


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
    known = ("vlm",) if options.is_demo else family.teachers
    others = args.teacher_image == "other"
    require_masks(report.pairs, args.teacher_background)
    view = choose_teacher(known, args.teacher_view, edits).with_background(args.teacher_background)
    return view.with_sentence(args.teacher_sentence, others)


def _encoded(
    args: argparse.Namespace, model: HostModel, pairs: Sequence[Pair], ordinary: Sequence[Pair], view: TeacherView,
    config: TrainConfig, cache: ConditionCache, trigger: str, scales: Sequence[Scale],
) -> TrainingSet:  # fmt: skip
    if args.heldout_caption is not None:
        warn(check_prompts([args.heldout_caption], "held-out caption", trigger))
    # SFT does not use anchors, but they are part of the fingerprint of saved runs
    anchors = config.objective.wants_anchors or isinstance(config.objective, SFT)
    with tqdm(unit="image", desc="encoding", disable=None if len(pairs) + len(ordinary) > MANY else True) as bar:

        def on_encoded(done: int, total: int, cached: bool) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return build_training_set(
            pairs, model.encoder, cache, teacher=view, trigger=trigger, teacher_image=args.teacher_image,
            caption_dropout=config.caption_dropout > 0, anchors=anchors, anchor_prompts=args.anchor_prompts or (),
            regularisation=ordinary, heldout_caption=args.heldout_caption, scales=scales, on_encoded=on_encoded,
        )  # fmt: skip


MANY = 20
"""Datasets with more images have a progress bar while they are encoded."""


def _without_missing_anchors(
    args: argparse.Namespace, config: TrainConfig, data: TrainingSet, peers: Peers
) -> TrainConfig:
    asked_for = any(name.endswith("anchor_probability") for name in vars(args))
    if not config.objective.anchor_share or data.anchors or asked_for:
        return config
    if peers.is_first:
        warn(["no caption contains the trigger, so there are no anchors; anchor_probability is set to 0"])
    return config.replace(objective=config.objective.without_anchors())


def _trained(args: argparse.Namespace, prepared: Prepared, denoiser: Denoiser, blocks: int, world: World | None) -> int:
    config, is_first = prepared.config, world is None or world.rank == 0
    preview = None
    if config.preview_every and is_first:
        painter = Painter(prepared.model, prepared.model.sample_steps, config.seed)
        preview = TrainingPreview(painter, prepared.shown, args.output)
    sheets = config.steps // config.preview_every + 2 if config.preview_every else 0
    with (
        tqdm(total=config.steps, unit="step", disable=not is_first) as bar,
        closing(_tracking(args, config, is_first)) as tracking,
        _watching(bar, preview, tracking) as callbacks,
    ):
        result = train(
            config, denoiser, prepared.data, args.output, callbacks, resume=not args.fresh,
            facts=_facts(args, prepared), sample_steps=prepared.model.sample_steps, cache=prepared.cache,
            checkpoint_blocks=blocks, host_bytes=preview.most_bytes(sheets) if preview else 0, world=world,
        )  # fmt: skip
    if is_first:
        _say_result(result, config)
        if config.adapter.trains_network:
            _write_folder(args, prepared, result)
        elif ModelOptions.of(args).is_undistilled:
            say(f"It was trained on {args.model}; use it on the distilled model, as sample --lora does.")
    return STOPPED if result.stopped else 0


def _tracking(args: argparse.Namespace, config: TrainConfig, is_first: bool) -> Tracking:
    return open_tracking(args.trackers if is_first else (), args.output, config)


def _write_folder(args: argparse.Namespace, prepared: Prepared, result: TrainResult) -> None:
    folder = args.output / "transformer"
    if prepared.model.write_network(result.lora_path, folder):
        say(f"In diffusers' layout: {folder}")


def _say_result(result: TrainResult, config: TrainConfig) -> None:
    stopped = "stopped after " if result.stopped else ""
    resumes = "; the same command resumes" if result.stopped else ""
    say(f"{stopped}{result.step} steps{resumes}; {config.adapter.product}: {result.lora_path}")
    best = result.best
    if best and (best.path or best.step != result.step):
        where = best.path or "no LoRA of that step is kept: use --save-every"
        say(f"smallest gap on the unseen prompt: {best.gap:.3f} at step {best.step}; {where}")


def _facts(args: argparse.Namespace, prepared: Prepared) -> dict[str, str]:
    return {
        "dopsd_base_model": prepared.model.title,
        "dopsd_base_fingerprint": prepared.model.fingerprint,
        **trigger_facts(prepared.trigger, prepared.concepts),
        "dopsd_teacher_sees": prepared.view.name,
        **({"dopsd_teacher_background": view} if (view := prepared.view.background) != "keep" else {}),
        **({"dopsd_undistilled": args.model} if ModelOptions.of(args).is_undistilled else {}),
    }


class _Watcher(NoCallbacks):
    """Shows progress, writes previews, passes both on to trackers, and stops after SIGTERM."""

    def __init__(self, bar: tqdm, preview: TrainingPreview | None, tracking: Tracking) -> None:
        self._bar, self._preview, self._tracking = bar, preview, tracking
        self.is_stopped = False

    def on_class_image(self, done: int, total: int) -> None:
        self._bar.set_postfix_str(f"class image {done} of {total}" if done < total else "")

    def on_step(self, report: StepReport) -> None:
        self._bar.update(report.step - self._bar.n)
        if report.relative_gap is not None:
            parts = [f"gap to teacher {report.relative_gap:.3f}"]
            parts += [f"{name} {gap:.3f}" for name, gap in gaps_by_concept(report.metrics).items()]
            self._bar.set_postfix_str(", ".join(parts))
        self._tracking.on_step(report)

    def on_preview(self, step: int, adapters: Trainable) -> None:
        if self._preview is not None:
            self._tracking.on_preview(step, self._preview.write(step, adapters))

    def should_stop(self) -> bool:
        return self.is_stopped


@contextmanager
def _watching(bar: tqdm, preview: TrainingPreview | None, tracking: Tracking) -> Iterator[_Watcher]:
    """The callbacks of the run; inside the `with` block SIGTERM, which cluster managers send, stops it after a step."""
    watcher = _Watcher(bar, preview, tracking)

    def stop(number: int, frame: object) -> None:
        watcher.is_stopped = True

    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield watcher
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield watcher
    finally:
        signal.signal(signal.SIGTERM, before)


# -- memory ------------------------------------------------------------------------------------------------------------


def _blocks_to_checkpoint(prepared: Prepared, denoiser: Denoiser, peers: Peers) -> int:
    """The smallest number of blocks with gradient checkpointing that fits into the GPU's free memory; 0 on a CPU."""
    if denoiser.device.type != "cuda":
        return 0
    footprint = footprint_of(prepared, denoiser)
    free = int(torch.cuda.mem_get_info(denoiser.device)[0] * _MARGIN) + footprint.weights  # those are loaded already
    blocks = max(peers.all(lambda: footprint.blocks_to_checkpoint(free)))
    if peers.is_first and blocks:
        say(f"gradient checkpointing on {blocks} of {len(footprint.blocks)} blocks (slower, same result)")
    if footprint.total(blocks) > free:
        gb = 10**9
        warn([
            f"training needs about {footprint.total(blocks) / gb:.1f} GB and the GPU has {free / gb:.1f}: use "
            f"{prepared.config.adapter.memory_hint}"
        ])  # fmt: skip
    return blocks


def footprint_of(prepared: Prepared, denoiser: Denoiser) -> Footprint:
    """The memory that training takes on each GPU."""
    data, family, config = prepared.data, prepared.model.family, prepared.config
    students = [family.tokens(latent_shape(pair), pair.student) for pair in data.pairs]
    students += [(0, len(anchor.features)) for anchor in data.anchors]
    teachers = [family.tokens(latent_shape(pair), pair.teacher) for pair in data.pairs]
    weights = sum(parameter.nbytes for site in denoiser.sites() for parameter in site.module.parameters())
    return estimate(
        denoiser, family, config.adapter, _most(students), _most(teachers), weights,
        batch=config.objective.forward_batch(config.batch_size), itemsize=denoiser.compute_dtype.itemsize,
        weights_of_teacher=config.teacher, optimizer=config.optimizer,
    )  # fmt: skip


def _most(tokens: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(image for image, _ in tokens), max(text for _, text in tokens)
