"""The command train: a LoRA, or all weights, of any model of the standalone host, in one process or several."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from .. import compilation
from ..config import ConfigError, TrainConfig
from ..denoiser import Denoiser
from ..memory.checkpoint_plan import Checkpointing
from ..memory.footprint import Footprint, estimate
from ..memory.ram_budget import offloading_ram, why_not_offloaded
from ..sharing.model_spec import trigger_facts
from ..trainable import Trainable
from ..training.log import StepReport, gaps_by_concept
from ..training.run_checks import idle_settings
from ..training.trainer import NoCallbacks, TrainResult, train
from ..training.world import Peers, World
from .accelerate_world import joined_world
from .hosts.model import device_of
from .model_options import ModelOptions
from .prepared import Prepared, prepare, runs_together
from .previews import Painter, TrainingPreview
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
    if args.compile and (problem := compilation.obstacle(device_of(ModelOptions.of(args)))):
        raise ConfigError((problem,))
    if args.train_config.activation_offloading and args.checkpoint_blocks is not None:
        raise ConfigError(("activation_offloading chooses what each block keeps: leave --checkpoint-blocks out",))
    if args.threads:
        torch.set_num_threads(args.threads)
    options = ModelOptions.of(args)
    args.trackers = chosen_trackers(args.track)
    with joined_world(device_of(options).type == "cpu") as world, ExitStack() as opened:
        peers, started = Peers(world), [Tracking(())]
        if not peers.is_first:
            logging.getLogger("dopsd").setLevel(logging.ERROR)

        def start() -> None:
            started.append(opened.enter_context(closing(_tracking(args))))

        with peers.ending_together():
            prepared = prepare(args, options, args.train_config, peers, start)
            if peers.world.size > 1 and peers.is_first:
                batches = prepared.config.grad_accumulation
                say(f"{peers.world.size} processes share the {batches} batches of each step")
            started[-1].begin(prepared.config)
            denoiser = prepared.model.denoiser
            given = args.checkpoint_blocks
            plan = _plan(prepared, denoiser, peers) if given is None else _Plan(Checkpointing.full(given))
        return _trained(args, prepared, denoiser, plan, world, started[-1])


@contextmanager
def _without(messages: Sequence[str]) -> Iterator[None]:
    """Keeps warnings that were shown before out of the log."""

    def is_new(record: logging.LogRecord) -> bool:
        return record.getMessage() not in messages

    log = logging.getLogger("dopsd")
    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


def _trained(
    args: argparse.Namespace, prepared: Prepared, denoiser: Denoiser, plan: _Plan, world: World | None,
    tracking: Tracking,
) -> int:  # fmt: skip
    config, is_first = prepared.config, world is None or world.rank == 0
    preview = _preview(args, prepared, world) if config.preview_every else None
    sheets = config.steps // config.preview_every + 2 if config.preview_every else 0
    said = idle_settings(config, bool(prepared.data.scales))
    with (
        _without(said),
        tqdm(total=config.steps, unit="step", disable=not is_first) as bar,
        _watching(bar, preview, tracking, is_first, runs_together(config, world)) as callbacks,
    ):
        result = train(
            config, denoiser, prepared.data, args.output, callbacks, resume=not args.fresh,
            facts=_facts(args, prepared), initial=prepared.initial, sample_steps=prepared.model.sample_steps,
            cache=prepared.cache, checkpointing=plan.checkpointing, compiles=args.compile,
            keeps_casts=plan.keeps_casts, host_bytes=preview.most_bytes(sheets) if preview else 0, world=world,
        )  # fmt: skip
    if is_first:
        _say_result(result, config)
        if config.adapter.trains_network:
            _write_folder(args, prepared, result)
        elif ModelOptions.of(args).is_undistilled:
            say(f"It was trained on {args.model}; use it on the distilled model, as sample --lora does.")
    return STOPPED if result.stopped else 0


def _tracking(args: argparse.Namespace) -> Tracking:
    """The trackers; without those that nobody asked for, if they cannot be started."""
    try:
        return open_tracking(args.trackers, args.output)
    except ValueError as error:
        if "auto" not in args.track:
            raise
        warn([f"{error}; the curves are in train.jsonl alone"])
        return Tracking(())


def _preview(args: argparse.Namespace, prepared: Prepared, world: World | None) -> TrainingPreview:
    painter, peers = Painter(prepared.model, prepared.model.sample_steps, prepared.config.seed), Peers(world)
    if runs_together(prepared.config, world):
        peers.run_in_step()
    return TrainingPreview(painter, prepared.shown, args.output, prepared.view, peers)


def _write_folder(args: argparse.Namespace, prepared: Prepared, result: TrainResult) -> None:
    folder = args.output / "transformer"
    if prepared.model.write_network(result.lora_path, folder):
        say(f"In diffusers' layout: {folder}")


def _say_result(result: TrainResult, config: TrainConfig) -> None:
    stopped = "stopped after " if result.stopped else ""
    resumes = "; the same command resumes" if result.stopped else ""
    say(f"{stopped}{result.step} steps{resumes}; {config.adapter.product}: {result.lora_path}")
    best = result.best
    if best and (line := best.sentence(result.step, str(best.path or ""), "use --save-every")):
        say(line)


def _facts(args: argparse.Namespace, prepared: Prepared) -> dict[str, str]:
    return {
        "dopsd_base_model": prepared.model.title,
        "dopsd_base_fingerprint": prepared.model.fingerprint,
        **trigger_facts(prepared.trigger, prepared.concepts),
        **prepared.view.facts,
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
        sheet = self._preview.write(step, adapters) if self._preview else None
        if sheet is not None:
            self._tracking.on_preview(step, sheet)

    def should_stop(self) -> bool:
        return self.is_stopped


@contextmanager
def _watching(
    bar: tqdm, preview: TrainingPreview | None, tracking: Tracking, writes: bool, in_parts: bool = False
) -> Iterator[_Watcher]:
    """The callbacks of the run; inside the `with` block SIGTERM, which cluster managers send, stops it after a step.

    in_parts: whether Ctrl-C does too, since no process can save weights in parts in the middle of a step.
    """
    watcher = _Watcher(bar, preview, tracking)
    signals = (signal.SIGTERM, signal.SIGINT) if in_parts else (signal.SIGTERM,)

    def stop(number: int, frame: object) -> None:
        if number == signal.SIGINT and writes and not watcher.is_stopped:
            say("stopping after this step")
        watcher.is_stopped = True

    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield watcher
        return
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield watcher
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How training fits into memory.

    Attributes:
        checkpointing: the blocks with gradient checkpointing.
        keeps_casts: whether casts of the adapter's weights are kept between forwards.
    """

    checkpointing: Checkpointing
    keeps_casts: bool = True


def _plan(prepared: Prepared, denoiser: Denoiser, peers: Peers) -> _Plan:
    """The least gradient checkpointing that fits into the GPU's free memory; none on a CPU."""
    config, device = prepared.config, denoiser.device
    ram = 0 if runs_together(config, peers.world) else offloading_ram(config, device, peers.world.size)
    plan = _planned(prepared, denoiser, peers, ram)
    if config.activation_offloading and not plan.checkpointing.in_ram and peers.is_first:
        warn([why_not_offloaded(ram, device)])
    return plan


def _planned(prepared: Prepared, denoiser: Denoiser, peers: Peers, ram: int) -> _Plan:
    device = denoiser.device
    if device.type != "cuda":
        return _Plan(Checkpointing())
    if runs_together(prepared.config, peers.world):
        return _Plan(Checkpointing.full(len(denoiser.blocks())))
    footprint = footprint_of(prepared, denoiser)
    free = int(torch.cuda.mem_get_info(device)[0] * _MARGIN) + footprint.weights  # those are loaded already
    footprint = footprint.within(free, ram)
    every = peers.all(lambda: footprint.checkpointing(free, ram))
    chosen = max(every, key=lambda one: one.flops(footprint.blocks))  # that of the GPU with the least memory
    if peers.is_first and chosen.count:
        say(footprint.sentence(chosen))
    if footprint.total(chosen) > free:
        gb = 10**9
        warn([
            f"training needs about {footprint.total(chosen) / gb:.1f} GB and the GPU has {free / gb:.1f}: use "
            f"{prepared.config.adapter.memory_hint}"
        ])  # fmt: skip
    return _Plan(chosen, footprint.keeps_casts)


def footprint_of(prepared: Prepared, denoiser: Denoiser) -> Footprint:
    """The memory that training takes on each GPU."""
    family, config = prepared.model.family, prepared.config
    most = prepared.data.most_tokens(family)
    weights = sum(parameter.nbytes for site in denoiser.sites() for parameter in site.module.parameters())
    return estimate(
        denoiser, family, config.adapter, most.student, most.teacher, weights,
        batch=config.objective.forward_batch(config.batch_size), itemsize=denoiser.compute_dtype.itemsize,
        weights_of_teacher=config.teacher, optimizer=config.optimizer,
    )  # fmt: skip
