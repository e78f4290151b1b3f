"""The processes of a pool end when the process that started them was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_POOL = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from dopsd_core.standalone.workers import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        waits = [pool.submit(time.sleep, 0.2) for _ in range(2)]
        [wait.result() for wait in waits]
        print(*pool._processes, flush=True)
        time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(_POOL, encoding="utf-8")
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(_runs, workers))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    until = time.monotonic() + 60
    while any(map(_runs, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(_runs, workers))


def _runs(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8") if Path("/proc").is_dir() else ""
        os.kill(process, 0)
    except (OSError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[:1] != ["Z"]
