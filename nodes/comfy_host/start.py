"""The initial weights of a run, from a LoRA of any trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...dopsd_core.adapters.lora_import import lora_digest
from ...dopsd_core.config import TrainConfig
from .denoiser import ComfyDenoiser
from .lora_header import trigger_of


@dataclass(frozen=True, eq=False)
class Start:
    """The initial weights of a run.

    Attributes:
        tensors: for `train(initial=...)`, by name: A [rank, in] and B [out, rank]; None without a LoRA.
        identity: digests that count towards the run's identity.
        notes: for the user, one line each.
    """

    tensors: Mapping[str, Tensor] | None = None
    identity: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def start_of(
    lora: Mapping[str, Tensor] | None,
    denoiser: ComfyDenoiser,
    config: TrainConfig,
    trigger: str = "",
    base_model: str = "",
) -> Start:
    """The initial weights from a LORA_MODEL of any trainer.

    Args:
        lora: tensors by name, such as lora_A [rank, in] and lora_B [out, rank]; None for no LoRA.
        trigger: of the run; a note says if the LoRA's differs.
        base_model: of the run; a note says if the LoRA's differs.

    Raises:
        ValueError: it is of another kind than the run's adapter, belongs to another model, or changes no layer that is
            trained.
    """
    if lora is None:
        return Start()
    imported = config.adapter.imported(lora, denoiser.sites())
    notes = _differences(getattr(lora, "facts", {}), trigger, base_model)
    if imported.left_out:
        notes.append(f"initial_lora: {imported.describe_left_out()}")
    return Start(imported.tensors, (lora_digest(imported.tensors),), tuple(notes))


def _differences(facts: Mapping[str, str], trigger: str, base_model: str) -> list[str]:
    notes = []
    if (own_trigger := trigger_of(facts)) and own_trigger != trigger:
        other = f"the dataset's is {trigger!r}" if trigger else "the dataset has none"
        notes.append(f"initial_lora was trained with the trigger {own_trigger!r}, {other}")
    if (base := facts.get("dopsd_base_model")) and base_model and base != base_model:
        notes.append(f"initial_lora was trained on {base}, this MODEL is {base_model}")
    return notes
