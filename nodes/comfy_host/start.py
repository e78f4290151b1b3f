"""The LoRA that a run starts from, put on what the trainer trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...dopsd_core.adapters.lora_import import import_lora, lora_digest
from ...dopsd_core.config import TrainConfig
from .denoiser import ComfyDenoiser
from .lora_header import trigger_of


@dataclass(frozen=True, eq=False)
class Start:
    """tensors: for `train(initial=...)`; None without a LoRA. identity: what it adds to the run's. notes: for the
    user."""

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
    """The start that a LORA_MODEL of any trainer gives the run.

    trigger, base_model: of the run; the notes say where the LoRA names others.

    Raises:
        ValueError: it is no plain LoRA, of another model, or changes nothing that is trained.
    """
    if lora is None:
        return Start()
    imported = import_lora(lora, denoiser.sites(), config.adapter.targets)
    notes = _differences(getattr(lora, "facts", {}), trigger, base_model)
    if imported.left_out:
        notes.append(f"initial_lora: {imported.describe_left_out()}")
    return Start(imported.tensors, (lora_digest(imported.tensors),), tuple(notes))


def _differences(facts: Mapping[str, str], trigger: str, base_model: str) -> list[str]:
    notes = []
    if (learned := trigger_of(facts)) and learned != trigger:
        own = f"the dataset's is {trigger!r}" if trigger else "the dataset has none"
        notes.append(f"initial_lora was trained with the trigger {learned!r}, {own}")
    if (base := facts.get("dopsd_base_model")) and base_model and base != base_model:
        notes.append(f"initial_lora was trained on {base}, this MODEL is {base_model}")
    return notes
