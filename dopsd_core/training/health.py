"""A run that watches itself: each function judges step reports, and `Monitor` says each thing once.

The functions return a sentence with the usual causes, or None. Thresholds are such that a run as it should be is not
mentioned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median

from ..config import TrainConfig
from .log import StepReport
from .unseen_gap import NO_BETTER, UNTRAINED, BestStep, best_step, is_plateau, measured, overfitting_since

_WARM_UP = 2
"""Steps that take longer in every run: memory is allocated, kernels are chosen."""

_FIRST_SECONDS, _WINDOW, _SLOW = 180.0, 20, 1.5
"""A run's own pace: its first minutes, at least a window of steps. Slow: a median so many times as long."""

_BURN = 1.05
"""Norm of the student's velocity over the target's, above which images become oversaturated."""

_GROWN, _LEAST_GB, _STILL = 1.1, 0.5, 0.25
"""Memory grows: by this factor and size since the start, and a quarter of it in the later half of the steps."""


def slow_down(reports: Sequence[StepReport]) -> str | None:
    """Steps take longer than in the first minutes.

    reports: of steps in this process, in order.
    """
    seconds = [report.seconds for report in reports if report.seconds is not None][_WARM_UP:]
    count = _first_minutes(seconds)
    if len(seconds) < count + _WINDOW:
        return None
    first, now = median(seconds[:count]), median(seconds[-_WINDOW:])
    if now < first * _SLOW:
        return None
    return (
        f"slow-down: a step takes {now:.3g} s, in the first minutes it took {first:.3g} s; usual causes: another "
        "program on the GPU, full GPU memory (weights are streamed), a hot GPU; stop and run again to resume with free "
        "memory"
    )


def burning(reports: Sequence[StepReport], batches: int = 1) -> str | None:
    """The student's velocities are larger than their target's.

    Args:
        reports: in the order of their steps.
        batches: per optimizer step; steps of prior anchors alone do not count.
    """
    on_images = [report.metrics for report in reports[-8 * _WINDOW :] if report.anchors < batches]
    ratios = [metrics["norm_ratio"] for metrics in on_images if "norm_ratio" in metrics][-_WINDOW:]
    if len(ratios) < _WINDOW or fmean(ratios) <= _BURN:
        return None
    return (
        f"burn: the student's velocities are {fmean(ratios):.2f} times as large as their targets, which oversaturates "
        "images; use an earlier LoRA or a lower strength, and in the next run a lower lr"
    )


def overfitting(reports: Sequence[StepReport], best: BestStep | None, after: int = 0) -> str | None:
    """The gap on the unseen prompt rises while that on the training images falls.

    Args:
        reports: in the order of their steps.
        best: the step that is offered; None for none.
        after: only gaps after this step; earlier ones are of another unseen prompt.
    """
    since = overfitting_since(reports, after)
    if since is None:
        return None
    gaps = dict(measured(reports, after))
    offer = "set save_every to keep LoRA files along the way"
    if gaps[since] >= UNTRAINED:
        offer = NO_BETTER
    elif best is not None and best.path is not None:
        offer = f"the best LoRA that is kept is {best.path.parent.name}/{best.path.name}"
    return (
        f"overfitting: since step {since} the gap on the unseen prompt rises ({gaps[since]:.3f}, now "
        f"{gaps[max(gaps)]:.3f}) while that on the training images falls; {offer}"
    )


def growing_memory(reports: Sequence[StepReport]) -> str | None:
    """GPU memory or RAM keeps growing.

    reports: of steps in this process, in order.
    """
    kinds: Sequence[tuple[str, Callable[[StepReport], float | None]]] = (
        ("GPU memory", lambda report: report.gpu_gb),
        ("RAM", lambda report: report.ram_gb),
    )
    for name, of in kinds:
        values = [value for report in reports if (value := of(report)) is not None][_WINDOW:]
        if len(values) < 3 * _WINDOW:
            continue
        middle = (len(values) - _WINDOW) // 2
        first, half, now = (median(values[at : at + _WINDOW]) for at in (0, middle, len(values) - _WINDOW))
        grown = now - first
        if now >= first * _GROWN and grown >= _LEAST_GB and now - half >= grown * _STILL:
            return (
                f"memory grows: {name} in use was {first:.1f} GB at first and is {now:.1f} GB; stop and run again to "
                "resume with free memory, and report it with train.jsonl"
            )
    return None


def plateau_line(reports: Sequence[StepReport], config: TrainConfig, after: int = 0) -> str | None:
    """The gap on the unseen prompt has not become smaller in `stop_at_plateau` measurements; after: as above."""
    best, count = best_step(reports, after=after), config.stop_at_plateau
    if best is None or not is_plateau(reports, count, after, config.schedule.warmup):
        return None
    last = "the last measurement" if count == 1 else f"each of the last {count} measurements"
    step, gap = best
    smallest = NO_BETTER if gap >= UNTRAINED else f"the smallest is {gap:.3f} at step {step}"
    return (
        f"stopped at step {reports[-1].step} of {config.steps}: {last} has lowered the gap on the unseen prompt by "
        f"less than 1 %; {smallest}; to continue this run, raise stop_at_plateau or set it to 0"
    )


def plateau_remark(config: TrainConfig, has_unseen: bool) -> str | None:
    """Why the run cannot stop at a plateau; None if it can, or is not asked to."""
    if not config.stop_at_plateau or (has_unseen and config.probe_every):
        return None
    why = "there is no unseen prompt" if config.probe_every else "probe_every is 0"
    return f"stop_at_plateau {config.stop_at_plateau} is not used: {why}"


class Monitor:
    """Watches a run.

    Args:
        config: of the run.
        earlier: the reports of the steps so far, in order.
        after: only gaps after this step are of the present unseen prompt.
    """

    def __init__(self, config: TrainConfig, earlier: Sequence[StepReport], after: int = 0) -> None:
        self._config, self._after = config, after
        self._reports, self._here = list(earlier), list[StepReport]()
        self._said = set[str]()

    def add(self, report: StepReport) -> None:
        """Takes the report of the next step."""
        self._reports.append(report)
        self._here.append(report)

    def plateau(self) -> str | None:
        """Why the run ends here; None if it does not."""
        return plateau_line(self._reports, self._config, self._after)

    def new_lines(self, best: BestStep | None) -> list[str]:
        """What there is to say now, each kind once; best: as for `overfitting`."""
        found: dict[str, Callable[[], str | None]] = {
            "pace": lambda: slow_down(self._here),
            "burn": lambda: burning(self._reports, self._config.grad_accumulation),
            "memory": lambda: growing_memory(self._here),
        }
        if self._reports and self._reports[-1].heldout_relative_gap is not None:
            found["overfitting"] = lambda: overfitting(self._reports, best, self._after)
        lines = {name: line for name, judge in found.items() if name not in self._said and (line := judge())}
        self._said.update(lines)
        return list(lines.values())


def _first_minutes(seconds: Sequence[float]) -> int:
    """The number of steps in the first minutes, at least a window."""
    total = 0.0
    for count, step in enumerate(seconds, 1):
        total += step
        if total >= _FIRST_SECONDS and count >= _WINDOW:
            return count
    return max(len(seconds), _WINDOW)
