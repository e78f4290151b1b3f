"""What the user watches: a report per step, a real distance to the teacher, and a log that survives a kill.

The loss of supervised training says nothing about quality. Self-distillation has a distance that does: how far the
student's velocities are from its teacher's along the student's own rollout, on noise that never changes, relative to
the distance before training. 1 is untrained, 0 is the teacher reached.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ..files.atomic import write_atomic
from ..files.disk import writing

LOG_NAME = "train.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step, or with `step` 0 the state before training (then without loss).

    Attributes:
        step: optimizer steps done.
        loss: the objective's, mean over the training batches. Batches of the prior anchor count only when there were
            no others.
        metrics: the objective's further figures by name, of the same batches. Of those that compare velocities: "gap",
            the rms distance of the student's to the target's, "cosine", and "norm_ratio", the student's norm over the
            target's.
        relative_gap: gap to the teacher on fixed noise over the one before training; None where not measured.
        heldout_relative_gap: the same on the held-out caption.
        lr, grad_norm: learning rate of this step, and norm of its gradient before clipping.
        anchors: batches of this step that were prior anchors.
        loss_scale, overflows: where the network computes in fp16: what the losses were multiplied by, and how often the
            step was repeated with half of it because a gradient overflowed. None elsewhere.
        seconds: wall time of this step, probe and checkpoint not counted.
    """

    step: int
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    relative_gap: float | None = None
    heldout_relative_gap: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    anchors: int = 0
    loss_scale: float | None = None
    overflows: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if taken := sorted(self.metrics.keys() & _FIELDS):
            raise ValueError(f"an objective's metric may not be called {taken[0]}, which the log has a meaning for")

    def to_row(self) -> str:
        """A line of JSON without what was not measured; the metrics stand in it under their own names."""
        values: dict[str, object] = {name: getattr(self, name) for name in _FIELDS}
        row = {"step": self.step, "loss": self.loss, **self.metrics, **values}
        return json.dumps({name: value for name, value in row.items() if _is_logged(value)}) + "\n"

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> StepReport:
        """The report of a line. Numbers of other names are metrics; what else is unknown is ignored.

        Raises:
            TypeError: there is no step.
        """
        known: dict[str, Any] = {name: value for name, value in row.items() if name in _FIELDS}
        others = {name: float(value) for name, value in row.items() if name not in _FIELDS and _is_number(value)}
        return cls(**known, metrics=others)


_FIELDS = tuple(name for name in StepReport.__dataclass_fields__ if name != "metrics")


@dataclass(frozen=True)
class Gaps:
    """Gaps to the teacher on the fixed noise: rms distance of velocities, on training pairs and the held-out one."""

    train: float
    heldout: float | None

    def relative_to(self, start: Gaps) -> tuple[float | None, float | None]:
        """Both gaps over those at the start; None where there is none to compare with."""
        return _ratio(self.train, start.train), _ratio(self.heldout, start.heldout)


class RunLog:
    """A JSONL of step reports that holds exactly the steps up to the state of the run.

    Opened at the step of a checkpoint, it drops the lines beyond it, and a line that a kill cut in two.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Opens the log of a run that stands at `step`; -1 empties it."""
        self.path = path
        kept = [report for report in read_log(path) if report.step <= step]
        write_atomic(path, "".join(report.to_row() for report in kept).encode())
        with writing(path):
            self._file = path.open("ab", buffering=0)  # a buffer would try again to write when it is closed

    def append(self, report: StepReport) -> None:
        """Adds a line; it is out of this process when the call returns.

        Raises:
            DiskError: it could not be written, or not whole.
        """
        row = report.to_row().encode()
        with writing(self.path, len(row)):
            if self._file.write(row) != len(row):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Makes the lines so far survive a power cut; called before a checkpoint that counts on them."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_log(path: Path) -> list[StepReport]:
    """The reports of a log in order of their steps, as far as they are whole; an absent file has none.

    A line that cannot be read ends the log there.
    """
    if not path.exists():
        return []
    reports: list[StepReport] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            report = StepReport.from_row(json.loads(line))
        except (ValueError, TypeError, AttributeError):
            break
        if not isinstance(report.step, int) or (reports and report.step <= reports[-1].step):
            break
        reports.append(report)
    return reports


def curve(reports: Sequence[StepReport], value: Callable[[StepReport], float | None]) -> tuple[list[int], list[float]]:
    """(steps, values) of one figure where it was measured: `curve(read_log(path), lambda r: r.relative_gap)`."""
    points = [(report.step, number) for report in reports if (number := value(report)) is not None]
    return [step for step, _ in points], [number for _, number in points]


def mean_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the batches that have it."""
    names = dict.fromkeys(name for batch in metrics for name in batch)
    known = {name: [batch[name] for batch in metrics if name in batch] for name in names}
    return {name: sum(values) / len(values) for name, values in known.items()}


def _ratio(now: float | None, start: float | None) -> float | None:
    return now / start if now is not None and start is not None and start > 0 else None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_logged(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
