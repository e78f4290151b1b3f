"""Two hundred training runs in one ComfyUI server: constant memory, an unchanged model, and correct LoRAs.

    python -m benchmarks.reliability trainings --count 200

A few settings take turns. Each one's LoRA is compared, bit for bit, with that of a server that has done nothing else.
Now and then a training is cancelled within a step, or fails, before it is run to its end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.journal import Journal, Progress
from benchmarks.reliability_server import (
    QUICK,
    Server,
    arm,
    booted,
    drawn,
    new_home,
    result_of,
    run_folder,
    state,
    tensor_bytes,
    training,
)
from benchmarks.report import Section, counts_table

SHORT = {**QUICK, "steps": 2}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"seed": 0},
    {"seed": 1, "teacher": "frozen"},
    {"seed": 2, "objective": "sft"},
    {"seed": 3, "teacher": "same", "grad_steps": 1, "targets": "layers.*.attention.*"},
    {"seed": 4, "rank": 8, "batch_size": 1, "loss": "velocity"},
)
WARM_UP = 20
"""Trainings that fill caches and the allocator; memory is compared from then on."""

CUT_EVERY = 7
"""Every so many trainings is cancelled or fails before it is run to its end."""

LOOK_EVERY = 10
"""Every so many trainings the probe looks at the server's objects."""

MUST_STAY = (
    "forward overrides", "hooks", "weight functions", "trainable", "gradients", "inference", "patches",
    "object patches", "injections", "pinned", "in training", "weights",
)  # fmt: skip
"""What the probe sees and no training may change."""

MUST_SETTLE = ("threads", "loaded models")
"""What the trainings before the first look may change, and no later one."""

MOST_GROWTH = 0.02
"""Of resident memory and of the number of objects, from the warm-up to the end."""


def references(work: Path) -> dict[int, bytes]:
    """The LoRA of each of the settings, of a server that was booted for it alone; kept in `work`."""
    folder = work / "references"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, settings in enumerate(SETTINGS):
        path = folder / f"{number}.safetensors"
        if not path.exists():
            base = new_home(work / "reference-home")
            with booted(base) as server:
                train_to_end(server, f"reference-{number}", settings)
                shutil.copyfile(run_folder(server, f"reference-{number}") / "lora.safetensors", path)
            shutil.rmtree(base)
        found[number] = tensor_bytes(path)
    return found


def train_to_end(server: Server, name: str, settings: Mapping[str, Any]) -> None:
    """One training.

    Raises:
        RuntimeError: it did not succeed.
    """
    run = server.run(training(name, **{**SHORT, **settings}))
    if run.status != "success":
        raise RuntimeError(f"{name} ended with {run.status}: {run.error}")


def cut_before(server: Server, number: int, name: str, settings: Mapping[str, Any]) -> str:
    """Runs the training until it is cancelled or fails; how it ended."""
    arm(server, "within a step", 2 + number % 8, ("interrupt", "fail")[number // CUT_EVERY % 2])
    return server.run(training(name, **{**SHORT, **settings})).status


def one_training(server: Server, number: int, reference: Mapping[int, bytes]) -> dict[str, Any]:
    """The row of one training: whether its LoRA is right, and the server's memory after it."""
    which = number % len(SETTINGS)
    name, settings = f"load-{number}", SETTINGS[which]
    cut = cut_before(server, number, name, settings) if number % CUT_EVERY == CUT_EVERY - 1 else ""
    train_to_end(server, name, settings)
    folder = run_folder(server, name)
    right = result_of(folder)["lora"] == reference[which]
    shutil.rmtree(folder)
    return {"number": number, "right": right, "cut": cut, "rss": server.rss()}


def measure(count: int, work: Path, fresh: bool) -> Section:
    """Trains `count` times in one server. One server or none: a journal that was cut is begun anew."""
    work = work / "trainings"
    journal = Journal.open(work / "journal.jsonl", fresh=fresh)
    if len(journal.rows) < count:
        journal = Journal.open(work / "journal.jsonl", fresh=True)
        _train_all(count, work, journal)
    return summary(journal)


def _train_all(count: int, work: Path, journal: Journal) -> None:
    reference = references(work)
    progress = Progress("trainings", count)
    os.environ["MALLOC_ARENA_MAX"] = "1"
    with booted(new_home(work / "home")) as server:
        before, image = state(server), drawn(server, 0.0)
        for number in range(count):
            row = one_training(server, number, reference)
            if number % LOOK_EVERY == LOOK_EVERY - 1 or number == count - 1:
                row["state"] = state(server)
                row["changed"] = [name for name in MUST_STAY if row["state"][name] != before[name]]
                row["same image"] = drawn(server, (number + 1) * 1e-12) == image
            journal.append(row)
            progress.show(number + 1, f"{row['rss'] / 2**20:.0f} MB")
    shutil.rmtree(work / "home")


def summary(journal: Journal) -> Section:
    """The section of the page."""
    rows = journal.rows
    looks = [row for row in rows if "state" in row]
    later = [row for row in rows if row["number"] >= min(WARM_UP, len(rows) // 2)]
    late_looks = [row for row in looks if row["number"] >= min(WARM_UP, len(rows) // 2)] or looks
    memory = _growth([row["rss"] for row in later])
    objects = _growth([row["state"]["objects"] for row in late_looks])
    tensors = _growth([row["state"]["tensors"] for row in late_looks])
    files = _growth([row["state"]["files"] for row in late_looks])
    changed = sorted({name for row in looks for name in changed_at(row, looks[0]["state"])})
    wrong = [row["number"] for row in rows if not row["right"]]
    figures: list[tuple[str, object]] = [
        ("trainings in one server process", len(rows)),
        ("of them cancelled within a step first", sum(row["cut"] == "interrupted" for row in rows)),
        ("of them failed within a step first", sum(row["cut"] == "error" for row in rows)),
        ("LoRAs equal, bit for bit, to that of a new server", len(rows) - len(wrong)),
        ("resident memory after the warm-up, MB (median of the first tenth)", f"{memory[0] / 2**20:.0f}"),
        ("resident memory at the end, MB (median of the last tenth)", f"{memory[1] / 2**20:.0f}"),
        ("Python objects after the warm-up, at the end", f"{objects[0]:.0f}, {objects[1]:.0f}"),
        ("tensors after the warm-up, at the end", f"{tensors[0]:.0f}, {tensors[1]:.0f}"),
        ("open files after the warm-up, at the end", f"{files[0]:.0f}, {files[1]:.0f}"),
        ("looks at MODEL, CLIP and VAE", len(looks)),
        ("of them with anything changed", sum(bool(changed_at(row, looks[0]["state"])) for row in looks)),
        ("images of the untouched MODEL that differ", sum(not row["same image"] for row in looks)),
    ]
    flat = all(end <= start * (1 + MOST_GROWTH) for start, end in (memory, objects, tensors))
    right = not wrong and not changed and all(row["same image"] for row in looks)
    cut = all(row["cut"] in ("", "interrupted", "error") for row in rows)
    notes = [
        f"Flat means at most {MOST_GROWTH:.0%} more, of resident memory, objects and tensors. Looked at: "
        f"{', '.join((*MUST_STAY, *MUST_SETTLE))}; of threads, "
        "all but those of asyncio's pool, which starts them when two requests meet. "
        "The C library keeps one malloc arena: another thread's arena would look like a leak of 50 MB.",
        *([f"CHANGED: {', '.join(changed)}"] if changed else []),
    ]
    return Section(
        key="trainings",
        title="Trainings in one server",
        command=f"python -m benchmarks.reliability trainings --count {len(rows)}",
        passed=flat and right and cut,
        table=counts_table(figures),
        notes=tuple(notes),
    )


def changed_at(row: Mapping[str, Any], settled: Mapping[str, Any]) -> set[str]:
    """What a look found changed that must not be; settled: the state at the first look."""
    unsettled = {name for name in MUST_SETTLE if row["state"][name] != settled[name]}
    return {name for name in row["changed"] if name in MUST_STAY} | unsettled


def _growth(values: list[float]) -> tuple[float, float]:
    """(median of the first tenth, median of the last tenth)."""
    tenth = max(len(values) // 10, 1)
    return median(values[:tenth]), median(values[-tenth:])
