"""A worker process of the fuzzer: reads the inputs given by its argument, a JSON object."""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability_case import Case, Verdict, keep_input, shrink, try_case
from benchmarks.reliability_inputs import KINDS, Kind
from benchmarks.reliability_mutators import Chance

MEMORY_BYTES = 4 * 2**30
"""What an input may make a worker ask for; a MemoryError is an undocumented error."""

CHUNK = 100
"""Inputs per row of the journal."""


def all_kinds() -> tuple[Kind, ...]:
    """All kinds; those of ComfyUI boot it when the first input of theirs is made."""
    from benchmarks.reliability_inputs_comfyui import COMFYUI_KINDS

    return (*KINDS, *COMFYUI_KINDS)


def run_worker(kinds: Sequence[Kind], spec: dict[str, Any]) -> None:
    """Reads the inputs of a task, and prints a row per chunk. spec: kind, seed, start, stop, skip, work."""
    import torch

    torch.set_num_threads(1)
    (kind,) = (kind for kind in kinds if kind.name == spec["kind"])
    kind.make(Chance(0))  # what is loaded for it takes memory too
    limit = _virtual_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    work, skip = Path(spec["work"]), set(spec["skip"])
    for start in range(spec["start"], spec["stop"], CHUNK):
        numbers = [number for number in range(start, min(start + CHUNK, spec["stop"])) if number not in skip]
        row = _read_chunk(kind, spec["seed"], numbers, work)
        print(json.dumps({"kind": kind.name, "start": start, **row}), flush=True)


def _read_chunk(kind: Kind, seed: int, numbers: Iterable[int], work: Path) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    failures, slowest, worst = [], 0.0, -1
    for number in numbers:
        (work / "current").write_text(str(number))
        faulthandler.dump_traceback_later(kind.hang_seconds, exit=True)  # its thread ends a hang inside C code too
        began = time.perf_counter()
        case = Case(kind, seed, number)
        verdict = try_case(case, work)
        seconds = time.perf_counter() - began
        faulthandler.cancel_dump_traceback_later()
        slowest, worst = max((slowest, worst), (seconds, number))
        outcomes[verdict.outcome] += 1
        if verdict.failure:
            failures.append({"number": number, **_kept_failure(case, verdict, work)})
    return {"outcomes": dict(outcomes), "failures": failures, "slowest": slowest, "slowest_number": worst}


def _kept_failure(case: Case, verdict: Verdict, work: Path) -> dict[str, Any]:
    """Keeps the smallest input with this failure, and says what it is."""
    small = shrink(case, verdict.failure, work)
    again = try_case(small, work)
    keep_input(work, case.kind.name, case.number, again.trace or again.failure)
    return {"failure": verdict.failure, "mutations": list(small.mutations())}


def _virtual_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    return int(pages) * resource.getpagesize()


def main() -> None:
    """Reads the task's inputs and prints what came of them."""
    spec = json.loads(sys.argv[1])
    run_worker(all_kinds(), spec)


if __name__ == "__main__":
    main()
