"""The initial weights of a run, from a LoRA of any trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..adapters import Lora
from ..adapters.lora_file import read_safetensors
from ..adapters.lora_import import PEFT_WEIGHTS, lora_digest, read_lora
from ..config import TrainConfig
from ..denoiser import LinearSite
from ..sharing.model_spec import trigger_of


@dataclass(frozen=True, eq=False)
class Start:
    """The initial weights of a run.

    Attributes:
        tensors: for `train(initial=...)`, by name: A [rank, in] and B [rows, rank]; None without a LoRA.
        identity: digests that count towards the run's identity.
        notes: for the user, one line each.
    """

    tensors: Mapping[str, Tensor] | None = None
    identity: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def start_of(
    lora: Mapping[str, Tensor] | None,
    facts: Mapping[str, str],
    sites: Sequence[LinearSite],
    config: TrainConfig,
    trigger: str = "",
    base_model: str = "",
) -> Start:
    """The initial weights from the tensors of any trainer's LoRA.

    Args:
        lora: tensors by name, such as lora_A [rank, in] and lora_B [out, rank]; None for no LoRA.
        facts: what its header says.
        sites: the network's.
        config: the configuration.
        trigger: of the run; a note says if the LoRA's differs.
        base_model: of the run; a note says if the LoRA's differs.

    Raises:
        ValueError: it is of another kind than the run's adapter, belongs to another model, has a larger rank or another
            factor than the run, or changes no layer that is trained.
    """
    if lora is None:
        return Start()
    imported = config.adapter.imported(lora, sites)
    if isinstance(config.adapter, Lora):
        config.adapter.check_start(imported.tensors)
    notes = _differences(facts, trigger, base_model)
    if imported.left_out:
        notes.append(f"initial_lora: {imported.describe_left_out()}")
    return Start(imported.tensors, (lora_digest(imported.tensors),), tuple(notes))


def start_from_file(
    path: Path | None, sites: Sequence[LinearSite], config: TrainConfig, trigger: str = "", base_model: str = ""
) -> Start:
    """The same from a file or a peft folder; None for no LoRA.

    Raises:
        ValueError: as `start_of`, or it is no LoRA file.
        FileNotFoundError: it is not there.
    """
    if path is None:
        return Start()
    file = path / PEFT_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give the LoRA file, or the peft folder, to start from")
    tensors, facts = read_lora(path), read_safetensors(file)[1]
    try:
        return start_of(tensors, facts, sites, config, trigger, base_model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _differences(facts: Mapping[str, str], trigger: str, base_model: str) -> list[str]:
    notes = []
    if (own_trigger := trigger_of(facts)) and own_trigger != trigger:
        other = f"the dataset's is {trigger!r}" if trigger else "the dataset has none"
        notes.append(f"initial_lora was trained with the trigger {own_trigger!r}, {other}")
    if (base := facts.get("dopsd_base_model")) and base_model and base != base_model:
        notes.append(f"initial_lora was trained on {base}, this model is {base_model}")
    return notes
