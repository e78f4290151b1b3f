"""Shared code of the benchmarks at real size, zimage_cost and klein_cost: our step, a plain restatement of the authors'
step, counters and the table.

    --device cuda   measures: seconds, peak memory, utilisation
    --device cpu    the same, reduced in size; the peak is that of tensors and FLOPs are counted, both op by op
    --device meta   a dry run at full size: no seconds, but peak and FLOPs counted as on a GPU (ComfyUI only)

Variants: ours with gradient checkpointing on no block, selectively and fully on all blocks, offloaded (selectively,
with all that the blocks keep in RAM), with compiled blocks (diffusers on CUDA), and (ComfyUI only) with each memory
preset, at the largest resolution also with activation offloading as far as the planner uses it; and the authors' loop:
the graphs of all K steps in memory until one backward, checkpointing on all blocks, resident text encoders of the real
shapes, run in every step. Their VAE is omitted, in their favour. Network: ComfyUI's own class with our node's denoiser
if $COMFYUI_PATH (or ~/comfy/ComfyUI) is a checkout, else diffusers'.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import platform
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import counters, networks
from benchmarks.authors_encoders import AuthorsEncoders
from benchmarks.networks import Network
from benchmarks.real_step import GB, Bench, Row, Subject, matmul_rate
from dopsd_core import host_memory, objectives
from dopsd_core.compilation import obstacle
from dopsd_core.conditioning.encode import DualCondition
from dopsd_core.config import TrainConfig
from dopsd_core.memory.checkpoint_plan import Checkpointing
from dopsd_core.memory.footprint import Footprint
from dopsd_core.memory.ram_budget import offloading_ram
from dopsd_core.training.training_set import TrainingSet

HEAD = (
    "| variant | side | rank | s/step | peak GB | recompute | repeated | TFLOP | utilisation | counted | |\n"
    + "|---" * 11
    + "|\n"
)

VARIANTS = ("none", "selective", "all", "offloaded")
OFFLOADING = ", offloading"
"""End of the names of presets with activation offloading."""
COMPILED = ", compiled"
"""End of the names of variants with compiled blocks."""
RAM = 32 * 10**9
"""Bytes for activations that a dry run assumes."""


class Session:
    """Device, options and the rows so far."""

    def __init__(self, subject: Subject, args: argparse.Namespace, device: torch.device) -> None:
        self.subject, self.args, self.device = subject, args, device
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.rate = 0.0 if self.device.type == "meta" else matmul_rate(self.device, self.dtype)
        self.rows: list[Row] = []
        lora = subject.family.lora_config(args.rank)
        objective = objectives.DOPSD(anchor_probability=0)
        self.config = TrainConfig(adapter=lora, rollout_steps=args.rollout_steps, objective=objective)

    def add(self, row: Row, make: Callable[[Row], Row]) -> None:
        """Fills a row in and prints it, if it is asked for; running out of memory is a row too."""
        if self.args.only and row.variant not in self.args.only:
            return
        try:
            make(row)
        except torch.OutOfMemoryError:
            row.note = "out of memory"
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.rows.append(row)
        say(row.line(self.subject.targets.get((row.variant, row.side), "")))

    def new_network(self, weights: torch.dtype | None = None) -> Network:
        """A random network of the host that the arguments ask for; weights: the dtype it is stored in, if another."""
        wanted = self.args.host
        if wanted == "comfyui" or (wanted == "auto" and (networks.COMFYUI / "main.py").exists()):
            return networks.comfyui(self.subject.comfyui, self.device, self.dtype, weights, self.subject.wide)
        return networks.diffusers(self.subject.diffusers, self.device, self.dtype)

    def bench(self, network: Network, side: int, config: TrainConfig) -> Bench:
        """The network with a LoRA and one pair at this resolution."""
        return Bench(self.subject, network, side, config, self.device)

    def ours(self, network: Network, row: Row) -> Row:
        """Measures our step."""
        bench = self.bench(network, row.side, self.config)
        footprint = bench.footprint().casting_each_time()
        checkpointing = known_checkpointing(row.variant.removesuffix(COMPILED), footprint)
        row.planned_gb = footprint.total(checkpointing) / GB
        row.note = in_ram(checkpointing, footprint)
        is_compiled = row.variant.endswith(COMPILED)
        return bench.measure(
            row, checkpointing, self.args.steps, self.rate, bench.ours, keeps_casts=False, is_compiled=is_compiled
        )

    def authors(self, network: Network, encoders: AuthorsEncoders, row: Row) -> Row:
        """Measures the authors' step, with their encoders resident."""
        bench = self.bench(network, row.side, self.config)
        size = sum(p.numel() * p.itemsize for p in encoders.parameters())
        every = Checkpointing.full(len(network.denoiser.blocks()))
        step = lambda: bench.authors(encoders)  # noqa: E731
        bench.measure(row, every, self.args.steps, self.rate, step, beside=size, keeps_casts=False)
        row.counted = None  # their encoders are not in the cost model
        return row

    def preset(self, weights: torch.dtype, row: Row) -> Row:
        """On a card that the planner takes to be as large as this one."""
        network = self.new_network(weights)
        free = None if self.device.type == "meta" else free_memory(self.device)
        wanted = self.config.replace(activation_offloading=row.variant.endswith(OFFLOADING))
        name, is_meta = row.variant.removesuffix(OFFLOADING), self.device.type == "meta"
        ram = (RAM if is_meta else offloading_ram(wanted, self.device)) if wanted.activation_offloading else 0
        plan = make_plan(self.subject, network, name, row.side, row.rank, wanted, free, ram)
        config = TrainConfig.from_json(plan.config.to_json())
        bench = self.bench(network, row.side, config)
        checkpointing = Checkpointing(plan.checkpointing.kept, plan.checkpointing.in_ram)
        row.planned_gb = plan.peak / GB
        row.note = f"{'fp8' if weights == torch.float8_e4m3fn else 'bf16'} base"
        row.note += f"; {in_ram(checkpointing, plan.footprint)}" if checkpointing.in_ram else ""
        keeps = plan.footprint.keeps_casts
        bench.measure(row, checkpointing, self.args.steps, self.rate, bench.ours, plan.reserve, keeps_casts=keeps)
        if self.device.type == "meta":
            row.peak_gb -= plan.streamed / GB
        if config.objective != self.config.objective:
            row.counted = None  # what m of K cost is an average over the draws
        return row


def in_ram(checkpointing: Checkpointing, footprint: Any) -> str:
    """How much of the activations is in RAM, in words; footprint: the core's, or that of the node's copy of it."""
    size = checkpointing.ram_bytes(footprint.blocks)
    return f"{size / GB:.1f} GB of activations in RAM" if size else ""


def known_checkpointing(variant: str, footprint: Footprint) -> Checkpointing:
    """That of the variants "none", "selective", "all" and "offloaded"."""
    if variant == "offloaded":
        return Checkpointing.offloaded(footprint.blocks)
    if variant == "selective":
        return Checkpointing.selective(footprint.blocks)
    return Checkpointing.full(0 if variant == "none" else len(footprint.blocks))


def make_plan(
    subject: Subject,
    network: Network,
    preset: str,
    side: int,
    rank: int,
    config: TrainConfig,
    free: int | None = None,
    ram: int = 0,
) -> Any:
    """The MemoryPlan of the training node.

    free: bytes of the device, the preset's budget if not given. ram: bytes that activations may take.
    """
    family, memory = subject.family, network.memory
    student, teacher = subject.conditions(side, counters.META)
    latent = torch.empty(family.latent_shape(side, side), device=counters.META)
    data = TrainingSet([DualCondition(student, teacher, latent, "", "")])
    conditions = types.SimpleNamespace(data=data, family=family)
    # the node's core is a copy of its own, with classes of its own: the configuration goes there as JSON
    wanted = memory.TrainConfig.from_json(config.replace(adapter=family.lora_config(rank)).to_json())
    budget = memory.MEMORY_PRESETS[preset].budget
    return memory.make_plan(preset, network.denoiser, conditions, wanted, budget, free or budget, ram)


def free_memory(device: torch.device) -> int:
    """As ComfyUI sees it, with nothing of its own left there."""
    management = importlib.import_module("comfy.model_management")
    management.unload_all_models()
    management.soft_empty_cache()
    return int(management.get_free_memory(device))


def check_only(subject: Subject, only: Sequence[str] | None) -> None:
    """Refuses names of rows that no run of this model has.

    Raises:
        SystemExit: one is unknown; the message lists those there are.
    """
    presets = [name + ending for name, *_ in subject.presets for ending in ("", OFFLOADING)]
    known = [*VARIANTS, "selective" + COMPILED, "authors", *presets]
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise SystemExit(f"--only: no rows named {', '.join(map(repr, unknown))}; there are {', '.join(known)}")


def run(subject: Subject, args: argparse.Namespace) -> Session:
    """Measures every row of a model, or those of `args.only`, and prints the table.

    Raises:
        SystemExit: `args.only` names a row that there is not, at all or with this device, host and options.
    """
    check_only(subject, args.only)
    session = Session(subject, args, torch.device(args.device))
    describe(session)
    network = session.new_network()
    with ExitStack() as stack:
        if session.device.type == "meta":
            host = networks.pack(session.device)("comfy_host.denoiser")
            stack.enter_context(counters.dry_run(host, objectives, host_memory))
        elif session.device.type == "cpu":
            stack.enter_context(counters.uncounted_ram(host_memory))
        blocks = len(network.denoiser.blocks())
        say(f"network: {network.title}'s, {network.weight_bytes / GB:.2f} GB of weights, {blocks} blocks\n\n{HEAD}")
        for side in args.resolutions:
            for variant in VARIANTS if side == max(args.resolutions) else VARIANTS[:-1]:
                session.add(Row(variant, side, args.rank), partial(session.ours, network))
        if session.device.type == "cuda" and network.memory is None and not obstacle(session.device):
            session.add(Row("selective" + COMPILED, max(args.resolutions), args.rank), partial(session.ours, network))
        if args.baseline and "authors" in (args.only or ["authors"]):
            kind = (subject.encoder, subject.vision is not None)
            encoders = AuthorsEncoders(*kind, session.device, session.dtype, args.encoder_layers)
            for side in args.resolutions:
                row = Row("authors", side, args.rank)
                session.add(row, partial(session.authors, network, encoders))
            del encoders
        presets = args.presets and session.device.type != "cpu" and network.memory is not None
        del network
        gc.collect()
        for name, side, rank, fp8 in subject.presets if presets else ():
            weights = torch.float8_e4m3fn if fp8 else torch.bfloat16
            for ending in ("", OFFLOADING) if side == max(args.resolutions) else ("",):
                session.add(Row(name + ending, side, rank), partial(session.preset, weights))
        compare(session.rows)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in session.rows], indent=1) + "\n", encoding="utf-8")
    absent = {*(args.only or ())} - {row.variant for row in session.rows}
    if absent:
        why = "memory presets need ComfyUI and no CPU, compiled blocks CUDA and diffusers, offloading the largest side"
        raise SystemExit(f"--only: not measured: {', '.join(map(repr, sorted(absent)))}; {why}")
    return session


def describe(session: Session) -> None:
    """Date, machine, versions and options."""
    name = platform.processor() or platform.machine()
    if session.device.type == "cuda":
        name = torch.cuda.get_device_name()
    args = session.args
    say(f"{date.today()}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {session.dtype}\n")
    say(f"{session.subject.size}, K = {args.rollout_steps}, batch 1; ")
    speed = f"{args.steps} steps timed, matrix products run at {session.rate / 1e12:.2f} TFLOP/s"
    say((speed if session.rate else "dry run: counted, not measured") + "\n")


def compare(rows: Sequence[Row]) -> None:
    """The authors' loop over ours, per resolution."""
    known = {(row.variant, row.side): row for row in rows if row.peak_gb}
    say("\n")
    for (variant, side), theirs in known.items():
        for name in VARIANTS:
            ours = known.get((name, side))
            if variant == "authors" and ours is not None:
                say(f"{side}, {name} checkpointed: {ours.peak_gb / theirs.peak_gb:.2f} of the authors' peak memory")
                say(
                    f", {theirs.seconds / ours.seconds:.2f} x their steps/s\n"
                    if theirs.seconds and ours.seconds
                    else "\n"
                )


def say(text: str) -> None:
    """Prints without a line break, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu", "meta")
    )
    made.add_argument("--host", default="auto", choices=("auto", "comfyui", "diffusers"))
    made.add_argument("--encoder-layers", type=int, default=36, help="of the authors' language models; really 36")
    made.add_argument("--resolutions", type=int, nargs="+", default=[512, 768, 1024])
    made.add_argument("--rank", type=int, default=64)
    made.add_argument("--rollout-steps", type=int, default=4, help="K")
    made.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    made.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True, help="the authors' loop")
    made.add_argument("--presets", action=argparse.BooleanOptionalAction, default=True, help="memory presets (no CPU)")
    made.add_argument("--only", nargs="+", metavar="VARIANT", help='rows by name, such as selective authors "16 GB"')
    made.add_argument("--json", type=Path, metavar="FILE", help="the rows for a program")
    return made
