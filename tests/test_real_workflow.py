"""benchmarks/real_workflow.py: what it takes from the driver, with a driver that tells what the test says.

The workflows themselves are run by it: the shipped ones, on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import networks, real_workflow

OURS = 7


class Driver:
    """pynvml, as far as it is asked: `held` by process, None where the driver does not tell."""

    def __init__(self) -> None:
        self.held: dict[int, int | None] = {}
        self.used = 0
        self.looks = 0

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, card: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, card: int) -> list[Any]:  # noqa: N802
        self.looks += 1
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.held.items()]

    def look(self) -> None:
        """Waits until it was asked twice more: all of one look lies between."""
        wanted = self.looks + 2
        while self.looks < wanted:
            time.sleep(0.005)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


def test_the_most_that_the_process_held_not_what_others_did(driver: Driver) -> None:
    driver.held = {8: 9000, OURS: 300}
    with real_workflow.watched(OURS) as seen:
        driver.look()
        driver.held[OURS] = 500
        driver.look()
        driver.held[OURS] = 100
        driver.look()
    assert seen.peak == 500


def test_a_workflow_does_not_inherit_the_peak_of_the_one_before(driver: Driver) -> None:
    driver.held = {OURS: 500}
    with real_workflow.watched(OURS) as seen:
        driver.look()
        driver.held[OURS] = 100
        driver.look()
        seen.restart()
        driver.look()
    assert seen.peak == 100


@pytest.mark.parametrize("held", [{}, {OURS: None}])
def test_a_driver_that_does_not_tell_gives_what_came_on_the_card(driver: Driver, held: dict[int, int | None]) -> None:
    """As in a container: the process is not listed, or without its memory."""
    driver.held, driver.used = held, 1000
    with real_workflow.watched(OURS) as seen:
        driver.used = 1400
        driver.look()
        driver.used = 1000
        driver.look()
    assert seen.peak == 400


def test_it_stops_looking(driver: Driver) -> None:
    with real_workflow.watched(OURS):
        driver.look()
    looks = driver.looks
    time.sleep(0.1)
    assert driver.looks == looks


def test_its_servers_run_on_the_gpu() -> None:
    code = "from benchmarks import real_workflow as w; w.use_servers_on_gpu(); import inprocess; print(inprocess.FLAGS)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DOPSD_TEST")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=networks.ROOT
    )
    assert done.stdout.strip() == "()", done.stderr


def test_a_smaller_card_is_what_is_left_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30_000, 80_000))
    assert real_workflow.occupied(torch.device("cpu"), 10_000).nbytes == 20_000
    with pytest.raises(SystemExit, match="0.0 GB free, less than 1.0"):
        real_workflow.occupied(torch.device("cpu"), 10**9)
