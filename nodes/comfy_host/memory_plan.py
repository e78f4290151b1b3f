"""Which trades make training fit the GPU: how many blocks recompute, what stays in RAM, and what else gives way.

Recomputing and streaming weights cost time and change nothing. The rest (frozen teacher, 8-bit Adam, m of K steps)
changes the run a little; it is chosen by the size of the card, not by what happens to be free, so that the same
settings are the same run tomorrow. Resolution and rank are the user's: about them there is only advice.
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
from ...dopsd_core.memory.footprint import Footprint, estimate
from ...dopsd_core.teachers import FrozenTeacher
from ...dopsd_core.training.training_set import latent_shape
from .denoiser import ComfyDenoiser
from .sockets import Conditions

AUTO = "auto"
_MB, _GB = 10**6, 10**9
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "not enough gpu video memory", "can't allocate memory")
_MARGIN = 0.95  # of what is free: for the allocator's gaps and the estimate's error


@dataclass(frozen=True)
class MemoryPreset:
    """card: the size that it is meant for. budget: what training may take of it. side, rank: what fits comfortably
    with an fp8 or int8 base. trades: what it gives up, in one sentence. It takes the frozen teacher and Adam in 8 bits
    if `lean`, and learns from `grad_steps` of the few, where `TrainConfig` is at its defaults."""

    card: int
    budget: int
    side: int
    rank: int
    trades: str
    lean: bool = False
    grad_steps: int | None = None


MEMORY_PRESETS: Mapping[str, MemoryPreset] = {
    "24 GB": MemoryPreset(
        24 * _GB, 19_500 * _MB, 1024, 64, "only time: blocks that do not fit recompute in the backward"
    ),
    "16 GB": MemoryPreset(
        16 * _GB,
        14_500 * _MB,
        1024,
        64,
        "the teacher's moving average (it is frozen) and Adam's precision (8 bits, if bitsandbytes is there)",
        lean=True,
    ),
    "12 GB": MemoryPreset(
        12 * _GB,
        11_000 * _MB,
        768,
        32,
        "besides that, half the gradient: it learns from 2 of the few steps, as streamed weights are slow",
        lean=True,
        grad_steps=2,
    ),
    "8 GB": MemoryPreset(
        8 * _GB,
        7_200 * _MB,
        512,
        16,
        "besides that, three quarters of the gradient: it learns from 1 of the few steps",
        lean=True,
        grad_steps=1,
    ),
}
"""From the least traded to the most. Budgets leave room for the screen and for CUDA itself."""

MEMORY_CHOICES = (AUTO, *MEMORY_PRESETS)


class OutOfMemory(RuntimeError):
    """The GPU's memory did not do; the message says what to change."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a run is fitted in. preset: its name in `MEMORY_PRESETS`. config: with the preset's trades in it.
    checkpoint_blocks: how many blocks recompute. streamed: bytes of weights that do not fit beside the rest. reserve:
    what ComfyUI is asked to keep free of weights, so that it leaves so many in RAM; its dynamic VRAM does not ask, and
    brings weights in and drops them as memory allows. notes: for the user, one line each."""

    preset: str
    config: TrainConfig
    footprint: Footprint
    checkpoint_blocks: int
    streamed: int
    reserve: int
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes on the device at most."""
        return self.footprint.total(self.checkpoint_blocks) - self.streamed


def plan_memory(choice: str, denoiser: ComfyDenoiser, conditions: Conditions, config: TrainConfig) -> MemoryPlan:
    """The plan for this model, data and card.

    "auto" is the first preset whose card is no larger than this one, or earlier the first that fits in this one whole.
    Where the card's memory is not known (DirectML), it is the first, which gives nothing up, and a note says so.
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
    return make_plan(name, denoiser, conditions, config, budget, free)


def _is_unknown() -> bool:
    """DirectML tells nothing of its memory, and ComfyUI reports 1 GB for it."""
    return bool(getattr(comfy.model_management, "directml_enabled", False))


def _plan_blindly(choice: str, denoiser: ComfyDenoiser, conditions: Conditions, config: TrainConfig) -> MemoryPlan:
    name = choice if choice != AUTO else next(iter(MEMORY_PRESETS))
    budget = MEMORY_PRESETS[name].budget
    plan = make_plan(name, denoiser, conditions, config, budget, budget)
    note = (
        f"how much memory the GPU has is not known under DirectML: planned for {name}, choose memory for a smaller one"
    )
    return dataclasses.replace(plan, notes=(*plan.notes, note)) if choice == AUTO else plan


def make_plan(
    name: str, denoiser: ComfyDenoiser, conditions: Conditions, config: TrainConfig, budget: int, free: int
) -> MemoryPlan:
    """The plan of one preset: recompute as few blocks as the budget allows; only if all of them do not suffice,
    leave weights in RAM."""
    preset = MEMORY_PRESETS[name]
    config, notes = _with_trades(config, preset, denoiser.device)
    footprint = footprint_of(denoiser, conditions, config)
    count = footprint.blocks_to_checkpoint(budget)
    beside = footprint.total(count) - footprint.weights
    streamed = min(max(footprint.total(count) - budget, 0), footprint.weights)
    if count:
        notes.append(f"{count} of {len(footprint.blocks)} blocks recompute in the backward (time, no quality)")
    if streamed:
        notes.append(_streaming(streamed, denoiser.is_dynamic))
    if beside > budget:
        notes.append(f"needs {_gb(beside)} of {_gb(budget)} even so: {_smaller(preset)}")
    elif streamed and _is_larger(preset, conditions, config):
        notes.append(f"it would be faster smaller: {_smaller(preset)}")
    # ComfyUI adds its own reserve to what it is asked to keep free; the plan has counted that already
    reserve = max(beside + max(free - budget, 0) - int(comfy.model_management.extra_reserved_memory()), 0)
    if patched := denoiser.patched_in_8_bits():
        notes.append(
            f"the MODEL has LoRAs or other patches on {patched} weights in 8 bits, which ComfyUI rounds at random when "
            "they are on the card and not when they stay in RAM: gradients differ by a fifth; train on the MODEL "
            "without patches, or on a bf16 file"
        )
    return MemoryPlan(name, config, footprint, count, streamed, reserve, tuple(notes))


def _streaming(size: int, is_dynamic: bool) -> str:
    if is_dynamic:
        return f"{_gb(size)} of the weights do not fit; ComfyUI's dynamic VRAM streams what it must (time, no quality)"
    return f"{_gb(size)} of the weights stay in RAM and stream in (time, no quality)"


def footprint_of(denoiser: ComfyDenoiser, conditions: Conditions, config: TrainConfig) -> Footprint:
    """What training with this configuration takes."""
    pairs, family = conditions.data.pairs, conditions.family
    students = [family.tokens(latent_shape(pair), pair.student) for pair in pairs]
    students += [(0, len(anchor.features)) for anchor in conditions.data.anchors]
    teachers = [family.tokens(latent_shape(pair), pair.teacher) for pair in pairs]
    return estimate(
        denoiser,
        family,
        config.adapter,
        _most(students),
        _most(teachers),
        denoiser.weight_bytes,
        batch=config.batch_size,
        itemsize=denoiser.compute_dtype.itemsize,
        weights_of_teacher=config.teacher,
        optimizer=config.optimizer,
    )


def _most(tokens: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(image for image, _ in tokens), max(text for _, text in tokens)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, CUDA or ComfyUI ran out of the device's memory."""
    if isinstance(error, torch.OutOfMemoryError) or comfy.model_management.is_oom(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def advice(plan: MemoryPlan, conditions: Conditions, device: torch.device) -> str:
    """What to change after memory ran out under this plan, and whether the run goes on then."""
    batch = plan.config.batch_size
    if batch > 1:
        return f"set batch_size to 1 (it is {batch}) and grad_accumulation to {batch}: a new run"
    names = list(MEMORY_PRESETS)
    later = names[names.index(plan.preset) + 1 :]
    if later:
        following = MEMORY_PRESETS[later[0]]
        same = _with_trades(plan.config, following, device)[0] == plan.config
        ending = "the run goes on then" if same else "that is a new run"
        return f"choose memory {later[0]}, which trades {following.trades}; {ending}"
    if _is_larger(MEMORY_PRESETS[plan.preset], conditions, plan.config):
        return f"{_smaller(MEMORY_PRESETS[plan.preset])}: a new run"
    return "close what else uses the GPU, or load the data set at a lower resolution (a new run)"


def free_device_memory() -> None:
    """Gives back all that can be given back, after a run that failed."""
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
    """The preset's trades where the user left the defaults, and a line for each."""
    changes: dict[str, Any] = {}
    notes = []
    if preset.lean and config.teacher.weights == "copy":
        changes["teacher"] = FrozenTeacher()
        notes.append("the teacher is the frozen model, not a moving average of the student")
    if preset.lean and (leaner := config.optimizer.leaner()) is not None and can_use_8bit(device):
        changes["optimizer"] = leaner
        notes.append("Adam's moments in 8 bits")
    wanted = preset.grad_steps
    if wanted and (fewer := config.objective.on_fewer_steps(wanted, config.rollout_steps)) != config.objective:
        changes["objective"] = fewer
        notes.append(f"learns from {wanted} of {config.rollout_steps} steps, drawn at random (time, more noise)")
    return config.replace(**changes), notes


def can_use_8bit(device: torch.device) -> bool:
    """Whether bitsandbytes is there for this device."""
    return device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None


def _is_larger(preset: MemoryPreset, conditions: Conditions, config: TrainConfig) -> bool:
    pixels = max(_area(latent_shape(pair)) for pair in conditions.data.pairs) * conditions.family.downscale**2
    return pixels > 1.05 * preset.side**2 or getattr(config.adapter, "rank", 0) > preset.rank


def _smaller(preset: MemoryPreset) -> str:
    return f"load the data set at resolution {preset.side} or less, use rank {preset.rank} or less, or an fp8 model"


def _area(shape: Sequence[int]) -> int:
    return shape[-1] * shape[-2]


def _gb(size: int) -> str:
    return f"{size / _GB:.1f} GB"
