"""Times and counts our step and a plain restatement of the authors' step, on a network with a LoRA."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import counters
from benchmarks.authors_encoders import AuthorsEncoders
from benchmarks.cost_model import StepCost, pass_cost
from benchmarks.networks import Network
from dopsd_core.adapters import Lora
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.lora_weights import LoraWeights
from dopsd_core.compilation import compiled
from dopsd_core.conditioning.encode import Condition, DualCondition
from dopsd_core.config import TrainConfig
from dopsd_core.families import Family
from dopsd_core.memory.activation_checkpointing import checkpointed
from dopsd_core.memory.checkpoint_plan import Checkpointing
from dopsd_core.memory.footprint import Footprint, estimate
from dopsd_core.objectives import ObjectiveInputs, self_distillation_loss
from dopsd_core.options import flattened
from dopsd_core.rollout import rollout

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure.

    Attributes:
        family: its family.
        size: what of it is there, in words.
        comfyui: of `networks`: name and settings.
        diffusers: makes the Denoiser of a host without ComfyUI.
        context: width of the text features.
        texts: side of the image in pixels -> tokens of the student's text and of the teacher's.
        vision: side -> how many of the teacher's tokens are from a vision tower; None without one.
        references: reference images of student and teacher, of the image's size.
        encoder: width of the text encoder.
        targets: (variant, side) -> what is asked of it.
        presets: (name, side, rank, whether in fp8).
        wide: modules that the published 8-bit file has in 16 bits.
    """

    family: Family
    size: str
    comfyui: tuple[str, dict[str, Any]]
    diffusers: Callable[[], Any]
    context: int
    texts: Callable[[int], tuple[int, int]]
    vision: Callable[[int], int] | None = None
    references: tuple[int, int] = (0, 0)
    encoder: int
    targets: Mapping[tuple[str, int], str]
    presets: Sequence[tuple[str, int, int, bool]]
    wide: tuple[str, ...] = ()

    def conditions(self, side: int, device: torch.device) -> tuple[Condition, Condition]:
        """The student's and the teacher's, random."""
        latent = self.family.latent_shape(side, side)
        student, teacher = (
            Condition(
                torch.randn(length, self.context, device=device),
                tuple(torch.randn(latent, device=device) for _ in range(count)),
            )
            for length, count in zip(self.texts(side), self.references, strict=True)
        )
        return student, teacher


@dataclass
class Row:
    """One line of the table.

    Attributes:
        variant: what is measured: "none" of the blocks checkpointed, "selective" (all, which keep all of their
            products) or "all" (which keep their inputs alone); "authors"; or a memory preset.
        side: of the image in pixels.
        rank: of the LoRA.
        seconds: of a step; None in a dry run.
        peak_gb: includes weights.
        recompute: blocks with gradient checkpointing.
        repeated: FLOPs that it repeats, over those of the step without it.
        tflop: of a step, by the cost model.
        utilisation: model FLOPs (without checkpointing) per second, relative to a large bf16 (on a CPU: fp32) matrix
            product measured in this run.
        counted: FLOPs by torch's counter relative to the cost model.
        planned_gb: the peak by the memory formula.
        note: anything else.
    """

    variant: str
    side: int
    rank: int
    seconds: float | None = None
    peak_gb: float = 0.0
    recompute: int = 0
    repeated: float = 0.0
    tflop: float = 0.0
    utilisation: float | None = None
    counted: float | None = None
    planned_gb: float | None = None
    note: str = ""

    def line(self, target: str = "") -> str:
        """Of a Markdown table."""
        seconds = "" if self.seconds is None else f"{self.seconds:.3f}"
        used = "" if self.utilisation is None else f"{self.utilisation:.0%}"
        counted = "" if self.counted is None else f"{self.counted:.3f}"
        planned = "" if self.planned_gb is None else f" (planned {self.planned_gb:.2f})"
        cells = (
            self.variant,
            self.side,
            self.rank,
            seconds,
            f"{self.peak_gb:.2f}{planned}",
            self.recompute,
            f"{self.repeated:.1%}",
        )
        cells += (f"{self.tflop:.2f}", used, counted, "; ".join(filter(None, (self.note, target))))
        return "| " + " | ".join(map(str, cells)) + " |\n"


class Bench:
    """A network with a LoRA, one pair of a resolution, and the two kinds of step."""

    def __init__(
        self, subject: Subject, network: Network, side: int, config: TrainConfig, device: torch.device
    ) -> None:
        self.subject, self.network, self.side, self.config, self.device = subject, network, side, config, device
        self.latent = subject.family.latent_shape(side, side)
        self.student, self.teacher = subject.conditions(side, device)

    @property
    def lora(self) -> Lora:
        """The configuration's adapter."""
        if not isinstance(self.config.adapter, Lora):
            raise TypeError(f"the cost model knows LoRA, not {self.config.adapter.name}")
        return self.config.adapter

    def prepare(self) -> None:
        """Adapters, optimizer and inputs: after the network is loaded, as in a run, or they would take its room."""
        denoiser, config, device = self.network.denoiser, self.config, self.device
        self.adapters = AdapterSet(denoiser.sites(), self.lora, device=device, teacher=config.teacher)
        self.optimizer = config.optimizer.build(self.adapters.parameters())
        pair = DualCondition(self.student, self.teacher, torch.zeros(self.latent), "caption", "key")
        noise = torch.randn(1, *self.latent, device=device)
        sigmas = self.subject.family.sigmas(config.rollout_steps, self.side, self.side)
        self.inputs = ObjectiveInputs(denoiser, self.adapters, [pair], noise, sigmas, torch.Generator())

    def ours(self) -> None:
        """As run.py makes it, its checks and log aside."""
        self.optimizer.zero_grad(set_to_none=True)
        self.config.objective.backward(self.inputs)
        self.finish()

    def authors(self, encoders: AuthorsEncoders) -> None:
        """Encode, K student and teacher forwards, one backward over the mean."""
        self.optimizer.zero_grad(set_to_none=True)
        denoiser, adapters, inputs = self.network.denoiser, self.adapters, self.inputs
        vision = self.subject.vision(self.side) if self.subject.vision else 0
        features = encoders(*self.subject.texts(self.side), vision, self.subject.context)
        student, teacher = (replace(c, features=f) for c, f in zip((self.student, self.teacher), features, strict=True))
        losses = []
        predict = lambda x, sigma: denoiser.predict_x0(x, sigma, [student])  # noqa: E731
        for state in rollout(predict, inputs.noise, inputs.sigmas, grad_steps=range(len(inputs.sigmas))):
            with adapters.use("teacher"), torch.no_grad(), lora_out_of_place():
                target = denoiser.predict_x0(state.x, state.sigma, [teacher])
            losses.append(self_distillation_loss(state.x0, target, state.sigma))
        torch.stack(losses).mean().backward()
        self.finish()

    def finish(self) -> None:
        """Clips the gradients, and updates the LoRA and its teacher."""
        torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), 1.0)
        self.optimizer.step()
        self.adapters.update_teacher()

    def cost(self, checkpointing: Checkpointing | int) -> StepCost:
        """FLOPs of a step by the formula, with this gradient checkpointing."""
        family, lora, k = self.subject.family, self.lora, self.config.rollout_steps
        student, teacher = (
            pass_cost(self.network.denoiser, family, lora, family.tokens(self.latent, condition))
            for condition in (self.student, self.teacher)
        )
        m = flattened(self.config)["grad_steps"] or k
        return StepCost(student, teacher, k, m, checkpointing, self.config.teacher.weights == "copy")

    def footprint(self) -> Footprint:
        """What the formula says of memory."""
        family, network, whose = self.subject.family, self.network, self.config.teacher
        student, teacher = (family.tokens(self.latent, condition) for condition in (self.student, self.teacher))
        size, itemsize = network.weight_bytes, 4 if self.device.type == "cpu" else 2
        lora, sites = self.lora, network.denoiser
        return estimate(sites, family, lora, student, teacher, size, itemsize=itemsize, weights_of_teacher=whose)

    def measure(
        self,
        row: Row,
        checkpointing: Checkpointing,
        steps: int,
        rate: float,
        step: Callable[[], None],
        reserve: int = 0,
        beside: int = 0,
        keeps_casts: bool = True,
        is_compiled: bool = False,
    ) -> Row:
        """Mean of `steps` after one that is not counted; peak over all of them.

        beside: bytes that are resident. keeps_casts: `Footprint.keeps_casts` of the plan. is_compiled: whether
        torch.compile compiles the blocks.
        """
        cost = self.cost(checkpointing)
        row.recompute, row.repeated, row.tflop = checkpointing.count, cost.repeated, cost.flops / 1e12
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.network.trainable((1, *self.latent), reserve))
            self.prepare()
            self.adapters.keep_casts(keeps_casts)
            stack.enter_context(self.adapters.attached())
            stack.enter_context(compiled(self.network.denoiser.blocks(), is_compiled))
            stack.enter_context(checkpointed(self.network.denoiser.blocks(), checkpointing))
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step()  # warm-up
            if self.device.type != "cuda":
                row.peak_gb, row.counted = self.count(step, cost, beside)
            if self.device.type != "meta":
                row.seconds = self.time(step, steps)
                row.utilisation = cost.model_flops / row.seconds / rate
            if self.device.type == "cuda":
                row.peak_gb = torch.cuda.max_memory_allocated() / GB
        return row

    def time(self, step: Callable[[], None], steps: int) -> float:
        """Seconds of a step: the mean, as steps with m of K differ."""
        synchronise(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            step()
        synchronise(self.device)
        return (time.perf_counter() - began) / steps

    def count(self, step: Callable[[], None], cost: StepCost, beside: int) -> tuple[float, float]:
        """(peak GB, FLOPs over the model's) of a step, with what was there before added."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        weights = self.adapters.parameters() * (2 if self.adapters.has_teacher else 1)
        self.optimizer.zero_grad(set_to_none=True)
        with counters.LiveBytes() as live:
            step()
        with FlopCounterMode(display=False, custom_mapping=counters.CPU_ATTENTION) as flops:
            step()
        there = beside + self.network.weight_bytes + sum(tensor.nbytes for tensor in [*weights, *moments])
        return (live.peak + there) / GB, flops.get_total_flops() / cost.flops


def lora_out_of_place() -> Any:
    """Inside the `with`, LoRA leaves the outputs of Linears alone also where gradients are off, as in peft."""
    apply = LoraWeights.apply
    copied = lambda self, base, x: apply(self, base.clone(), x)  # noqa: E731
    return patch.object(LoraWeights, "apply", copied)


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square product of random numbers."""
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 3)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for number in range(3 + repeats):
        if number == 3:
            synchronise(device)
            began = time.perf_counter()
        torch.mm(a, b)
    synchronise(device)
    return 2 * size**3 * repeats / (time.perf_counter() - began)
