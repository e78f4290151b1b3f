"""A live ComfyUI server killed at a moment of a training, started again over the same folders, the same graph queued:
each run ends with the bits of the one that nothing interrupted.

    python -m benchmarks.reliability server-kills --count 10
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.journal import Journal, Progress
from benchmarks.reliability_server import MOMENTS, QUICK, Server, arm, booted, new_home, result_of, run_folder, training
from benchmarks.report import Section, counts_table

NAME = "killed"
KILLS_PER_RUN = 4
ONCE = ("before step 1", "in the LoRA's save")
"""Moments that come once in a run."""


def uncut(work: Path) -> dict[str, bytes]:
    """What the run leaves when nothing interrupts it."""
    base = new_home(work / "uncut")
    with booted(base) as server:
        run = server.run(training(NAME, **QUICK))
        if run.status != "success":
            raise RuntimeError(f"the uninterrupted run ended with {run.status}: {run.error}")
        return result_of(run_folder(server, NAME))


def killed_at(server: Server, moment: str, number: int) -> bool:
    """Queues the run with a trap laid; whether the server died of it (or the moment did not come)."""
    arm(server, moment, number, "kill")
    try:
        run = server.run(training(NAME, **QUICK))
    except Exception:  # the connection broke, in whatever way
        return server.process.wait(60) is not None
    if run.status != "success":
        raise RuntimeError(f"the run ended with {run.status}: {run.error}")
    return False


def cut_run(base: Path, moments: Sequence[str], chance: random.Random, expected: dict[str, bytes]) -> dict[str, Any]:
    """One run over a new folder, killed at these moments and then left to end: its row of the journal."""
    kills: list[str] = []
    for moment in moments:
        number = 1 if moment in ONCE else chance.randint(1, 3)
        with booted(base) as server:
            if not killed_at(server, moment, number):
                break
        kills.append(moment)
    with booted(base) as server:
        run = server.run(training(NAME, **QUICK))
        identical = run.status == "success" and result_of(run_folder(server, NAME)) == expected
        return {"kills": kills, "status": run.status, "error": run.error, "identical": identical}


def measure(count: int, seed: int, work: Path, fresh: bool) -> Section:
    """Kills the server until it was killed `count` times."""
    work = work / "server-kills"
    journal = Journal.open(work / "journal.jsonl", fresh=fresh)
    done = sum(len(row["kills"]) for row in journal.rows)
    chance, progress = random.Random(f"{seed}:{len(journal.rows)}"), Progress("server kills", count, done)
    expected = uncut(work) if done < count else {}
    while (left := count - sum(len(row["kills"]) for row in journal.rows)) > 0:
        base = new_home(work / f"home-{len(journal.rows)}")
        first = count - left
        moments = [MOMENTS[turn % len(MOMENTS)] for turn in range(first, first + min(left, KILLS_PER_RUN))]
        row = cut_run(base, moments, chance, expected)
        journal.append(row)
        progress.show(sum(len(row["kills"]) for row in journal.rows))
        if row["identical"]:
            shutil.rmtree(base)
    return summary(journal, seed)


def summary(journal: Journal, seed: int) -> Section:
    """The section of the page."""
    moments = Counter(moment for row in journal.rows for moment in row["kills"])
    wrong = [row for row in journal.rows if not row["identical"]]
    rows: list[tuple[str, object]] = [("SIGKILLs of the server", moments.total())]
    rows += [(f"of them {moment}", moments[moment]) for moment in MOMENTS]
    rows += [
        ("runs", len(journal.rows)),
        ("runs with the bits of the uninterrupted run", len(journal.rows) - len(wrong)),
    ]
    return Section(
        key="server-kills",
        title="SIGKILLs of a ComfyUI server",
        command=f"python -m benchmarks.reliability server-kills --count {moments.total()} --seed {seed}",
        passed=not wrong,
        table=counts_table(rows),
        notes=(
            "After each kill the server is started again over the same folders and the same graph is queued. Compared "
            "bit for bit: the LoRA's tensors, and LoRA, teacher and optimizer of the newest checkpoint.",
            *(f"FAILED: {row['status']}: {row['error']}" for row in wrong),
        ),
    )
