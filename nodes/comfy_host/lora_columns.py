"""The columns of Compare LoRA: one LoRA at several strengths, or the LoRAs that a run kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import comfy.utils
from torch import Tensor

from ...dopsd_core.training.own_files import is_changed
from .lora_header import concepts_in, trigger_of
from .lora_use import apply_lora, header_of, used_line
from .run_folders import existing_run, loras_of_run

MAX_COLUMNS = 12

T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """A column of the grid.

    Attributes:
        title: above it.
        with_lora: the MODEL with the LoRA; called when the column is drawn, so that one LoRA is in memory at a time.
    """

    title: str
    with_lora: Callable[[], Any]


@dataclass(frozen=True)
class Grid:
    """What is drawn besides the untouched model.

    Attributes:
        name: of the LoRA or the run.
        columns: from left to right.
        notes: for the user, one line each.
        trigger: what `[V]` in the prompts stands for; "" if the LoRA does not say.
        concepts: the triggers of a LoRA with several concepts; empty for others.
    """

    name: str
    columns: tuple[Column, ...]
    notes: tuple[str, ...]
    trigger: str = ""
    concepts: tuple[str, ...] = ()

    def named(self, facts: Mapping[str, str]) -> Grid:
        """The grid with what the header of its LoRA says of triggers."""
        return replace(self, trigger=trigger_of(facts), concepts=concepts_in(facts))


def strength_columns(model: Any, name: str, tensors: Mapping[str, Tensor], strengths: Sequence[float]) -> Grid:
    """One column per strength of a LoRA, of tensors such as lora_A [rank, in] and lora_B [out, rank].

    Raises:
        ValueError: it does not fit the MODEL.
    """
    titles = [f"strength {strength}".removesuffix(".0") for strength in strengths]
    columns = [
        Column(title, partial(apply_lora, model, tensors, strength))
        for title, strength in zip(titles, strengths, strict=True)
    ]
    return Grid(name, tuple(columns), (used_line(name, model, tensors),))


def run_columns(model: Any, run_folder: str, strengths: Sequence[float]) -> Grid:
    """One column per LoRA that a run kept, by step; for several strengths one for each of them.

    Raises:
        ValueError: there is no such run, it kept none, or they do not fit the MODEL.
    """
    saves, folder = loras_of_run(run_folder), existing_run(run_folder)
    shown = evenly(saves, max(1, MAX_COLUMNS // len(strengths)))
    titled = [(f", strength {strength:g}" if len(strengths) > 1 else "", strength) for strength in strengths]
    columns = [
        Column(f"step {saved.step}{ending}", partial(_with_file, model, saved.path, strength))
        for saved in shown
        for ending, strength in titled
    ]
    notes = [used_line(saves[-1].path.name, model, comfy.utils.load_torch_file(str(saves[-1].path), safe_load=True))]
    for saved in shown:
        if is_changed(saved.path, saved.step):
            notes.append(f"{saved.path.name} is not as the run wrote it: its column is not that step of the run")
    if len(shown) < len(saves):
        notes.append(f"of {len(saves)} LoRAs of the run {len(shown)} are shown, the first and the last among them")
    return Grid(folder.name, tuple(columns), tuple(notes)).named(header_of(saves[-1].path))


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` (at least 1) of the items at even distances, the last one always, and the first one if there is
    room for two."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def _with_file(model: Any, path: Path, strength: float) -> Any:
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    used_line(path.name, model, tensors)  # refuses what does not fit
    return apply_lora(model, tensors, strength)
