"""Callbacks that stop a run early."""

from __future__ import annotations

from dopsd_core.training.log import StepReport
from dopsd_core.training.trainer import NoCallbacks


class StopAt(NoCallbacks):
    """Stops after a step."""

    def __init__(self, step: int) -> None:
        self._last, self._done = step, 0

    def on_step(self, report: StepReport) -> None:
        self._done = report.step

    def should_stop(self) -> bool:
        return self._done >= self._last
