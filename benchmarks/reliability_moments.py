"""What the user sees after an interruption at a bad time, and what remains of the training.

    python -m benchmarks.reliability moments

Cancels, errors, two runs at once, full and read-only disks, a killed server. After each the same graph is queued once
more and must end with the bits of the run that nothing interrupted. Full and read-only disks are mounted, which needs
root; without it they are reported as not measured.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.journal import Journal, Progress
from benchmarks.reliability_disks import NotHere, fill, mounted, names_full_disk, remount
from benchmarks.reliability_server import (
    MOMENTS,
    QUICK,
    Run,
    Server,
    arm,
    booted,
    drawn,
    new_home,
    result_of,
    run_folder,
    state,
    training,
)
from benchmarks.report import Section, Table

SMALL_DISK = "24m"
NAME = "moment"
STAYS = ("forward overrides", "hooks", "patches", "object patches", "injections", "inference", "in training", "weights")


@dataclass(frozen=True)
class Outcome:
    """What came of a scenario.

    Attributes:
        seen: what the user reads.
        then: what came of the same graph afterwards.
        right: whether both are as they must be.
    """

    seen: str
    then: str
    right: bool


@dataclass(frozen=True)
class Stage:
    """Where a scenario is played.

    Attributes:
        work: a folder to work in.
        expected: what the run leaves when nothing interrupts it: file -> bytes.
    """

    work: Path
    expected: Mapping[str, bytes]

    @contextmanager
    def server(self, name: str = "home") -> Iterator[Server]:
        """A server over a new base folder."""
        base = new_home(self.work / name)
        with booted(base) as server:
            yield server

    def again(self, server: Server, name: str = NAME) -> tuple[str, bool]:
        """Queues the run once more: what came of it, and whether it has the expected bits."""
        run = server.run(graph(name))
        same = run.status == "success" and result_of(run_folder(server, name)) == self.expected
        then = "the same bits as uninterrupted" if same else "OTHER BITS" if run.status == "success" else seen(run)
        return then, same


def graph(name: str = NAME, **changes: Any) -> dict[str, Any]:
    """The run that everything happens to."""
    return training(name, **{**QUICK, **changes})


def seen(run: Run, node: str = "train") -> str:
    """How a run ended, as the user reads it: status, the first line of the error and of the node's last text."""
    error = run.error.splitlines()[0] if run.error else ""
    text = run.texts(node)[-1].splitlines()[0] if run.texts(node) else ""
    is_new = text and (not error or error not in text)
    return "; ".join([run.status, *([error] if error else []), *([f"the node says: {text}"] if is_new else [])])


# -- scenarios ---------------------------------------------------------------------------------------------------------


def cancelled(stage: Stage, moment: str) -> Outcome:
    """Cancel at one kind of moment; then the model is looked at, and the run is queued again."""
    with stage.server() as server:
        before, image = state(server), drawn(server, 0.0)
        arm(server, moment, 1 if "LoRA" in moment or "before" in moment else 2, "interrupt")
        run = server.run(graph())
        after, later = state(server), drawn(server, 1e-12)
        clean = all(before[name] == after[name] for name in STAYS) and image == later
        then, same = stage.again(server)
        return Outcome(seen(run), f"{then}; MODEL, CLIP, VAE {'untouched' if clean else 'CHANGED'}", same and clean)


def failed(stage: Stage) -> Outcome:
    """An error out of nowhere within a step."""
    with stage.server() as server:
        arm(server, "within a step", 20, "fail")
        run = server.run(graph())
        then, same = stage.again(server)
        return Outcome(seen(run), then, same and run.status == "error")


def queued_twice(stage: Stage) -> Outcome:
    """The same graph twice in the queue."""
    with stage.server() as server:
        first = server.post(graph())
        second = server.run(graph())
        ok = finished(server, first) == "success" == second.status
        then, same = stage.again(server)
        return Outcome(f"first: success; second: {seen(second)}", then, ok and same)


def queued_and_cancelled(stage: Stage) -> Outcome:
    """Two runs of other settings; the first is cancelled within a step."""
    with stage.server() as server:
        arm(server, "within a step", 5, "interrupt")
        first = server.post(graph("other", seed=7))
        second = server.run(graph())
        same = second.status == "success" and result_of(run_folder(server, NAME)) == stage.expected
        then = "the second has the same bits as alone" if same else "THE SECOND IS ANOTHER"
        return Outcome(f"first: {finished(server, first)}; second: {seen(second)}", then, same)


def taken_out_of_the_queue(stage: Stage) -> Outcome:
    """The second of two runs is deleted while it waits."""
    with stage.server() as server:
        first, second = server.post(graph()), server.post(graph("never"))
        server.send("/queue", {"delete": [second]})
        ended = finished(server, first)
        time.sleep(2)
        none = not list((server.output / "dopsd").glob("never-*"))
        then, same = stage.again(server)
        return Outcome(f"first: {ended}; the second never began" if none else "THE SECOND BEGAN", then, none and same)


def two_servers(stage: Stage) -> Outcome:
    """The same run in two servers over one output folder at once."""
    with stage.server() as one:
        first = one.post(graph(steps=60))
        while not list((one.output / "dopsd").glob(f"{NAME}-*/train.jsonl")):
            time.sleep(0.2)
        with booted(new_home(stage.work / "home-2"), "--output-directory", str(one.output)) as two:
            second = two.run(graph(steps=60))
        one.interrupt()
        finished(one, first)
        return Outcome(
            f"in the second server: {seen(second)}",
            "the first continued until it was cancelled",
            second.status == "error" and "another run is working" in second.error,
        )


def server_killed(stage: Stage) -> Outcome:
    """A kill within a step; the server is started again over the same folders."""
    base = new_home(stage.work / "home")
    with booted(base) as server:
        arm(server, "within a step", 20, "kill")
        try:
            server.run(graph())
        except Exception:  # the connection broke, in whatever way
            said = "the page loses the server"
        else:
            said = "THE SERVER WAS NOT KILLED"
    with booted(base) as server:
        run = server.run(graph())
        same = run.status == "success" and result_of(run_folder(server, NAME)) == stage.expected
        return Outcome(f"{said}; after the restart: {seen(run)}", "the same bits" if same else "OTHER BITS", same)


def full_disk(stage: Stage, moment: str) -> Outcome:
    """Another program fills the output's disk at one kind of moment; then there is room again."""
    base = new_home(stage.work / "home")
    with mounted(base / "output", SMALL_DISK), booted(base) as server:
        arm(server, moment, 1 if "LoRA" in moment or "before" in moment else 2, "fill disk")
        run = server.run(graph())
        (server.output / "filler").unlink(missing_ok=True)
        then, same = stage.again(server)
        named = names_full_disk(run.error, "output")
        return Outcome(seen(run), f"with room again: {then}", same and run.status == "error" and named)


def no_room_at_all(stage: Stage) -> Outcome:
    """The output's disk is full before anything begins."""
    base = new_home(stage.work / "home")
    with mounted(base / "output", "1m"), booted(base) as server:
        (server.output / "filler").write_bytes(b"\0" * (2**20 - 2**14))
        run = server.run(graph())
        steps = len(list((server.output / "dopsd").glob("*/checkpoints/step-*")))
        named = names_full_disk(run.error, "output")
        return Outcome(seen(run), f"{steps} checkpoints were made", run.status == "error" and named and not steps)


def read_only_output(stage: Stage) -> Outcome:
    """The output folder is mounted read-only; then it can be written."""
    base = new_home(stage.work / "home")
    with mounted(base / "output", SMALL_DISK), booted(base) as server:
        remount(base / "output", "ro")
        run = server.run(graph())
        remount(base / "output", "rw")
        then, same = stage.again(server)
        return Outcome(
            seen(run), f"writable again: {then}", same and run.status == "error" and "output" in run.error.lower()
        )


def read_only_cache(stage: Stage) -> Outcome:
    """The folder of the condition cache is mounted read-only: it costs the cache, not the run, and the node says so."""
    base = new_home(stage.work / "home")
    with mounted(base / "user" / "dopsd", SMALL_DISK), booted(base) as server:
        remount(base / "user" / "dopsd", "ro")
        run = server.run(graph())
        same = run.status == "success" and result_of(run_folder(server, NAME)) == stage.expected
        lines = run.texts("train")[-1].splitlines() if run.texts("train") else []
        note = next((line for line in lines if "conditions cannot be kept" in line), "")
        said = f"{seen(run)}; {note or 'NOTHING OF THE CACHE'}"
        return Outcome(said, "the same bits" if same else "OTHER BITS", same and bool(note))


def save_on_full_disk(stage: Stage) -> Outcome:
    """Save LoRA where there is no room left; nothing half written stays."""
    base = new_home(stage.work / "home")
    with mounted(base / "output", SMALL_DISK), booted(base) as server:
        saving = {"lora": ["train", 0], "filename_prefix": "loras/x", "dtype": "fp32", "peft_folder": False}
        both = graph() | {"save": {"class_type": "DOPSD_SaveLoRA", "inputs": saving}}
        server.run(graph())
        fill(server.output)
        run = server.run(both)
        left = [path.name for path in (server.output / "loras").glob("*")]
        named = names_full_disk(run.error, "loras")
        return Outcome(seen(run, "save"), f"left in output/loras: {left or 'nothing'}", named and not left)


# -- tools -------------------------------------------------------------------------------------------------------------


def finished(server: Server, prompt_id: str | dict[str, Any]) -> str:
    """Waits for a queued prompt: "success", "interrupted" or "error"."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        past = server.get(f"/history/{prompt_id}")
        if isinstance(prompt_id, str) and prompt_id in past:
            status = past[prompt_id]["status"]
            kinds = [kind for kind, _ in status["messages"]]
            return "interrupted" if "execution_interrupted" in kinds else status["status_str"]
        time.sleep(0.2)
    raise RuntimeError(f"{prompt_id} did not end")


# -- the measurement ---------------------------------------------------------------------------------------------------

SCENARIOS: Mapping[str, Callable[[Stage], Outcome]] = {
    **{f"cancel {moment}": partial(cancelled, moment=moment) for moment in MOMENTS},
    "an error within a step": failed,
    "the same graph queued twice": queued_twice,
    "two runs queued, the first cancelled": queued_and_cancelled,
    "two runs queued, the second deleted": taken_out_of_the_queue,
    "the same run in two servers over one output folder": two_servers,
    "server killed within a step, started again": server_killed,
    **{f"disk full {moment}": partial(full_disk, moment=moment) for moment in MOMENTS if "encoding" not in moment},
    "disk full from the start": no_room_at_all,
    "Save LoRA on a full disk": save_on_full_disk,
    "read-only output folder": read_only_output,
    "read-only condition cache": read_only_cache,
}


def uninterrupted(work: Path) -> dict[str, bytes]:
    """What the run leaves when nothing interrupts it."""
    with booted(new_home(work / "reference")) as server:
        run = server.run(graph())
        if run.status != "success":
            raise RuntimeError(f"the uninterrupted run ended with {run.status}: {run.error}")
        return result_of(run_folder(server, NAME))


def measure(only: str, work: Path, fresh: bool) -> Section:
    """Plays every scenario that has not been played yet; only: those whose name begins like this."""
    work = work / "moments"
    journal = Journal.open(work / "journal.jsonl", fresh=fresh)
    done = {row["what"] for row in journal.rows}
    left = [name for name in SCENARIOS if name not in done and name.startswith(only)]
    stage = Stage(work, uninterrupted(work) if left else {})
    progress = Progress("scenarios", len(SCENARIOS), len(done), every=0)
    for name in left:
        try:
            outcome = SCENARIOS[name](stage)
        except NotHere as reason:
            outcome = Outcome(str(reason), "", True)
        seen = {key: _by_base(value, work / "home") for key, value in vars(outcome).items()}
        journal.append({"what": name, **seen})
        progress.show(len(journal.rows), f"{name}: {outcome}")
    shutil.rmtree(work / "home", ignore_errors=True)
    return summary(journal)


def _by_base(value: object, home: Path) -> object:
    """The text without the place of this machine that the scenarios were played in."""
    return value.replace(str(home), "BASE") if isinstance(value, str) else value


def summary(journal: Journal) -> Section:
    """The section of the page, a row per scenario."""
    rows = [(row["what"], row["seen"], row["then"], "yes" if row["right"] else "NO") for row in journal.rows]
    return Section(
        key="moments",
        title="Bad moments, and what the user sees",
        command="python -m benchmarks.reliability moments",
        passed=all(row["right"] for row in journal.rows) and len(journal.rows) >= len(SCENARIOS),
        table=Table(("what happens", "what the user sees", "the same graph again", "right"), tuple(rows)),
        notes=(
            "A run of 6 steps of the demo model with previews and checkpoints every 2, in a real server. BASE is "
            "ComfyUI's base folder.",
        ),
    )
