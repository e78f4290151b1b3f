"""Makes training fit the GPU: gradient checkpointing, weights in RAM, and changes to the run.

Gradient checkpointing and streaming weights from RAM are slower, with the same result. The other changes (frozen
teacher, 8-bit Adam, m of K steps) affect the run a little; they depend on the size of the card, not on the memory that
is free now, so that equal settings are the same run later. Resolution and rank are up to the user, with advice.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ...dopsd_core.config import TrainConfig
from ...dopsd_core.memory.checkpoint_plan import Checkpointing
from ...dopsd_core.memory.footprint import Footprint, estimate
from ...dopsd_core.memory.ram_budget import offloading_ram, why_not_offloaded
from ...dopsd_core.teachers import FrozenTeacher
from ...dopsd_core.training.anchors import anchor_tokens
from ...dopsd_core.training.training_set import latent_shape
from .denoiser import ComfyDenoiser
from .sockets import Conditions

AUTO = "auto"
_MB, _GB = 10**6, 10**9
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "not enough gpu video memory", "can't allocate memory")
_MARGIN = 0.95  # of what is free: for the allocator's gaps and the estimate's error


@dataclass(frozen=True)
class MemoryPreset:
    """A choice of the input `memory`.

    Attributes:
        card: size of the card that it is meant for, in bytes.
        budget: bytes that training may take of it.
        side: resolution that fits comfortably with an fp8 or int8 model.
        rank: rank that fits comfortably with an fp8 or int8 model.
        trades: what it changes, in one sentence.
        lean: whether it uses a frozen teacher and 8-bit Adam, where `TrainConfig` has its defaults.
        grad_steps: how many of the few steps it learns from, where `TrainConfig` has its default; None for all.
    """

    card: int
    budget: int
    side: int
    rank: int
    trades: str
    lean: bool = False
    grad_steps: int | None = None


MEMORY_PRESETS: Mapping[str, MemoryPreset] = {
    "24 GB": MemoryPreset(
        24 * _GB, 19_500 * _MB, 1024, 64, "time only: gradient checkpointing on blocks that do not fit"
    ),
    "16 GB": MemoryPreset(
        16 * _GB,
        14_500 * _MB,
        1024,
        64,
        "the teacher's moving average (it is frozen) and Adam's precision (8 bits, if bitsandbytes is installed)",
        lean=True,
    ),
    "12 GB": MemoryPreset(
        12 * _GB,
        11_000 * _MB,
        768,
        32,
        "in addition half of the gradient: it learns from 2 of the few steps, since streamed weights are slow",
        lean=True,
        grad_steps=2,
    ),
    "8 GB": MemoryPreset(
        8 * _GB,
        7_200 * _MB,
        512,
        16,
        "in addition three quarters of the gradient: it learns from 1 of the few steps",
        lean=True,
        grad_steps=1,
    ),
}
"""From the fewest changes to the most. Budgets leave room for the screen and for CUDA."""

MEMORY_CHOICES = (AUTO, *MEMORY_PRESETS)


class OutOfMemory(RuntimeError):
    """The GPU ran out of memory; the message says what to change."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a run fits into memory.

    Attributes:
        preset: its name in `MEMORY_PRESETS`.
        config: the configuration with the preset's changes.
        footprint: estimate of what the training takes.
        checkpointing: the blocks with gradient checkpointing, and what each keeps.
        streamed: bytes of weights that do not fit beside the rest.
        reserve: bytes that ComfyUI is asked to keep free of weights, so that it leaves the others in RAM; its dynamic
            VRAM ignores it, and loads and drops weights as memory allows.
        notes: for the user, one line each.
    """

    preset: str
    config: TrainConfig
    footprint: Footprint
    checkpointing: Checkpointing
    streamed: int
    reserve: int
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes on the device at most."""
        return self.footprint.total(self.checkpointing) - self.streamed


def plan_memory(choice: str, denoiser: ComfyDenoiser, conditions: Conditions, config: TrainConfig) -> MemoryPlan:
    """The plan for this model, data and card.

    "auto" is the first preset whose card is no larger than this one, or an earlier one that fits completely. If the
    card's memory is not known (DirectML), it is the first one, without changes to the run, and a note says so.
    """
    device = denoiser.device
    if _is_unknown():
        return _plan_blindly(choice, denoiser, conditions, config)
    total = int(comfy.model_management.get_total_memory(device))
    if device.type != "cpu":
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
    free = int(comfy.model_management.get_free_memory(device))
    name = choice if choice != AUTO else _fitting(total, denoiser, conditions, config)
    budget = int(free * _MARGIN) if choice == AUTO else min(int(free * _MARGIN), MEMORY_PRESETS[name].budget)
    return make_plan(name, denoiser, conditions, config, budget, free, offloading_ram(config, device))


def _is_unknown() -> bool:
    """Whether the size of the memory is unknown: ComfyUI reports 1 GB for every DirectML device."""
    return bool(getattr(comfy.model_management, "directml_enabled", False))


def _plan_blindly(choice: str, denoiser: ComfyDenoiser, conditions: Conditions, config: TrainConfig) -> MemoryPlan:
    name = choice if choice != AUTO else next(iter(MEMORY_PRESETS))
    budget = MEMORY_PRESETS[name].budget
    plan = make_plan(name, denoiser, conditions, config, budget, budget)
    note = (
        f"how much memory the GPU has is not known under DirectML: planned for {name}; choose memory for a smaller card"
    )
    return dataclasses.replace(plan, notes=(*plan.notes, note)) if choice == AUTO else plan


def make_plan(
    name: str,
    denoiser: ComfyDenoiser,
    conditions: Conditions,
    config: TrainConfig,
    budget: int,
    free: int,
    ram: int = 0,
) -> MemoryPlan:
    """The plan of one preset: as little gradient checkpointing as possible, then weights in RAM.

    Args:
        budget: bytes that training may take.
        free: bytes that are free on the device.
        ram: bytes of RAM that activations may take.
    """
    preset = MEMORY_PRESETS[name]
    config, notes = _with_trades(config, preset, denoiser.device)
    footprint = footprint_of(denoiser, conditions, config).within(budget, ram)
    checkpointing = footprint.checkpointing(budget, ram)
    beside = footprint.total(checkpointing) - footprint.weights
    streamed = min(max(footprint.total(checkpointing) - budget, 0), footprint.weights)
    if checkpointing.count:
        notes.append(footprint.sentence(checkpointing))
    if config.activation_offloading and not checkpointing.in_ram:
        notes.append(why_not_offloaded(ram, denoiser.device))
    if streamed:
        notes.append(_streaming(streamed, denoiser.is_dynamic))
    if beside > budget:
        notes.append(f"still needs {_gb(beside)} of {_gb(budget)}: {_smaller(preset)}")
    elif streamed and _is_larger(preset, conditions, config):
        notes.append(f"for more speed: {_smaller(preset)}")
    # ComfyUI adds its own reserve to this; the plan already includes that
    reserve = max(beside + max(free - budget, 0) - int(comfy.model_management.extra_reserved_memory()), 0)
    if patched := denoiser.patched_in_8_bits():
        notes.append(
            f"the MODEL has LoRAs or other patches on {patched} weights in 8 bits, which ComfyUI rounds at random when "
            "they are on the GPU but not when they stay in RAM: gradients differ by about 20 %; train the MODEL "
            "without patches, or use a bf16 file"
        )
    return MemoryPlan(name, config, footprint, checkpointing, streamed, reserve, tuple(notes))


def _streaming(size: int, is_dynamic: bool) -> str:
    if is_dynamic:
        return (
            f"{_gb(size)} of the weights do not fit: ComfyUI's dynamic VRAM streams them from RAM (slower, same result)"
        )
    return f"{_gb(size)} of the weights are streamed from RAM (slower, same result)"


def footprint_of(denoiser: ComfyDenoiser, conditions: Conditions, config: TrainConfig) -> Footprint:
    """The memory that training with this configuration takes."""
    pairs, family = conditions.data.pairs, conditions.family
    students = [family.tokens(latent_shape(pair), pair.student) for pair in pairs]
    students += anchor_tokens(family, conditions.data.anchors, conditions.data.shapes())
    teachers = [family.tokens(latent_shape(pair), pair.teacher) for pair in pairs]
    return estimate(
        denoiser,
        family,
        config.adapter,
        _most(students),
        _most(teachers),
        denoiser.weight_bytes,
        batch=config.objective.forward_batch(config.batch_size),
        itemsize=denoiser.compute_dtype.itemsize,
        weights_of_teacher=config.teacher,
        optimizer=config.optimizer,
    )


def _most(tokens: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(image for image, _ in tokens), max(text for _, text in tokens)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, CUDA or ComfyUI ran out of the device's memory."""
    if not isinstance(error, RuntimeError):  # newer ComfyUIs only check the words, which may be in any message
        return False
    if isinstance(error, torch.OutOfMemoryError) or comfy.model_management.is_oom(error):
        return True
    return any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def advice(plan: MemoryPlan, conditions: Conditions, device: torch.device) -> str:
    """What to change after memory ran out under this plan, and whether the run is then resumed."""
    batch = plan.config.batch_size
    if batch > 1:
        return f"set batch_size to 1 (it is {batch}) and grad_accumulation to {batch} (starts a new run)"
    names = list(MEMORY_PRESETS)
    later = names[names.index(plan.preset) + 1 :]
    if later:
        following = MEMORY_PRESETS[later[0]]
        same = _with_trades(plan.config, following, device)[0] == plan.config
        ending = "the run is resumed" if same else "starts a new run"
        return f"choose memory {later[0]}, which costs {following.trades} ({ending})"
    if _is_larger(MEMORY_PRESETS[plan.preset], conditions, plan.config):
        return f"{_smaller(MEMORY_PRESETS[plan.preset])} (starts a new run)"
    return "close other programs that use the GPU, or load the dataset at a lower resolution (starts a new run)"


def free_device_memory() -> None:
    """Frees all device memory that can be freed, after a failed run."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def _fitting(total: int, denoiser: ComfyDenoiser, conditions: Conditions, config: TrainConfig) -> str:
    for name, preset in MEMORY_PRESETS.items():
        if total >= preset.card * _MARGIN:
            return name
        footprint = footprint_of(denoiser, conditions, _with_trades(config, preset, denoiser.device)[0])
        if footprint.total(len(footprint.blocks)) <= total * _MARGIN - _GB:
            return name
    return list(MEMORY_PRESETS)[-1]


def _with_trades(config: TrainConfig, preset: MemoryPreset, device: torch.device) -> tuple[TrainConfig, list[str]]:
    """The configuration with the preset's changes, where the user left the defaults, and a line for each."""
    changes: dict[str, Any] = {}
    notes = []
    if preset.lean and config.teacher.weights == "copy":
        changes["teacher"] = FrozenTeacher()
        notes.append("the teacher is the frozen model instead of a moving average of the student")
    if preset.lean and (leaner := config.optimizer.leaner()) is not None and can_use_8bit(device):
        changes["optimizer"] = leaner
        notes.append("Adam's moments are in 8 bits")
    wanted = preset.grad_steps
    if wanted and (fewer := config.objective.on_fewer_steps(wanted, config.rollout_steps)) != config.objective:
        changes["objective"] = fewer
        notes.append(f"learns from {wanted} of the {config.rollout_steps} steps, sampled at random (faster, noisier)")
    return config.replace(**changes), notes


def can_use_8bit(device: torch.device) -> bool:
    """Whether bitsandbytes is installed and works on this device."""
    return device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None


def _is_larger(preset: MemoryPreset, conditions: Conditions, config: TrainConfig) -> bool:
    pixels = max(_area(latent_shape(pair)) for pair in conditions.data.pairs) * conditions.family.downscale**2
    return pixels > 1.05 * preset.side**2 or getattr(config.adapter, "rank", 0) > preset.rank


def _smaller(preset: MemoryPreset) -> str:
    return f"load the dataset at resolution {preset.side} or less, or use rank {preset.rank} or less, or an fp8 model"


def _area(shape: Sequence[int]) -> int:
    return shape[-1] * shape[-2]


def _gb(size: int) -> str:
    return f"{size / _GB:.1f} GB"
