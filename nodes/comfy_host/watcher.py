"""What the node shows during a run: progress, loss, gap, previews and the final summary."""

from __future__ import annotations

import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import comfy.utils
from PIL import Image
from torch import Tensor

from ...dopsd_core.config import TrainConfig
from ...dopsd_core.files.atomic import write_atomic
from ...dopsd_core.files.disk import writing
from ...dopsd_core.image_grid import to_images
from ...dopsd_core.run_chart import below, draw_run
from ...dopsd_core.trainable import Trainable
from ...dopsd_core.training.log import LOG_NAME, StepReport, gaps_by_concept, read_log
from ...dopsd_core.training.trainer import NoCallbacks, TrainResult
from ...dopsd_core.training.unseen_gap import BestStep
from .denoiser import send_text
from .paths import shown
from .previews import TrainingPreview
from .report import Notes, RunReport, State, best_line, concept_lines, gap_line
from .targets import size_text

PREVIEWS_NAME = "previews"
_TEXT_INTERVAL = 0.3  # seconds between two texts on the node
_CHART_INTERVAL = 10.0
"""Seconds between two charts of a run whose gap is not measured; others have a new one with each measurement."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run before its first step.

    Attributes:
        folder: the run's folder.
        config: the configuration, with the memory plan's changes.
        modules: as in `RunReport`.
        parameters: as in `RunReport`.
        base_model: as in `RunReport`.
        trigger: as in `RunReport`.
        teacher: as in `RunReport`.
        memory: as in `RunReport`.
    """

    folder: Path
    config: TrainConfig
    modules: int
    parameters: int
    base_model: str
    trigger: str
    teacher: str
    memory: str


class LiveChart:
    """The chart of loss and gaps below the latest preview sheet.

    Attributes:
        sheet: the latest preview sheet; None before the first.
    """

    def __init__(self, config: TrainConfig, log: Path, has_previews: bool) -> None:
        """log: of the run, whose steps so far a resumed run starts with."""
        self._config, self._log, self._has_previews = config, log, has_previews
        self._reports: list[StepReport] | None = None
        self._drawn_at = 0.0
        self.sheet: Image.Image | None = None

    def add(self, report: StepReport, now: float) -> bool:
        """Adds a step, at a time in seconds; returns whether a new chart is due that no preview is about to show."""
        if self._reports is None:
            self._reports = [earlier for earlier in read_log(self._log) if earlier.step < report.step]
        self._reports.append(report)
        is_measured = report.relative_gap is not None
        is_late = not self._config.probe_every and now - self._drawn_at >= _CHART_INTERVAL
        return (is_measured or is_late) and not self._comes_with_preview(report.step)

    def draw(self, now: float) -> Image.Image:
        """The latest sheet with the chart below it."""
        self._drawn_at = now
        chart = draw_run(self._reports or (), self._config.steps, self.sheet.width if self.sheet else 0)
        return below(self.sheet, chart)

    def _comes_with_preview(self, step: int) -> bool:
        every = self._config.preview_every if self._has_previews else 0
        return bool(every) and (step % every == 0 or step == self._config.steps)


def chart_of_run(folder: Path, steps: int, sheets: Tensor) -> Image.Image:
    """The chart of a whole run below its last preview sheet, as the node shows it at the end.

    Args:
        folder: the run's folder.
        steps: of its configuration.
        sheets: as `load_sheets` gives them, [n, H, W, 3] in [0, 1].
    """
    (sheet,) = to_images(sheets[-1:].movedim(-1, 1)) if sheets.shape[1] > 1 else (None,)
    return below(sheet, draw_run(read_log(folder / LOG_NAME), steps, sheet.width if sheet else 0))


class Watcher(NoCallbacks):
    """Progress bar with preview and chart, text with loss, gap and time left on the training node, the final report."""

    def __init__(self, node: Any, facts: RunFacts, notes: Notes, preview: TrainingPreview | None) -> None:
        self._node, self._facts, self._notes, self._preview = node, facts, notes, preview
        self._steps = facts.config.steps
        self._chart = LiveChart(facts.config, facts.folder / LOG_NAME, preview is not None)
        self._bar = comfy.utils.ProgressBar(self._steps)
        self._first: tuple[int, float] | None = None
        self._text_at = 0.0
        self._has_begun = False
        self._gaps: tuple[float | None, float | None] = (None, None)
        self._of_concepts: dict[str, float] = {}
        self._best: BestStep | None = None
        self._drawn = 0
        self.step = 0

    def on_class_image(self, done: int, total: int) -> None:
        """Shows how many class images are drawn."""
        self._drawn = done
        now = time.monotonic()
        if done and now - self._text_at < _TEXT_INTERVAL:
            return
        self._text_at = now
        lines = [f"the untouched model draws class images: {done} of {total}", *self._notes.lines]
        send_text(self._node, "\n".join(lines))

    def on_step(self, report: StepReport) -> None:
        """Updates the progress bar and the text."""
        self._note_resumed(report.step)
        self.step = report.step
        now = time.monotonic()
        is_due = self._chart.add(report, now)
        self._bar.update_absolute(report.step, preview=("JPEG", self._chart.draw(now), None) if is_due else None)
        self._first = self._first or (report.step, now)
        if report.relative_gap is not None:
            self._gaps = (report.relative_gap, report.heldout_relative_gap)
            self._of_concepts = gaps_by_concept(report.metrics)
        if now - self._text_at >= _TEXT_INTERVAL or report.step == self._steps:
            self._text_at = now
            send_text(self._node, self._text(report, now))

    def on_best(self, best: BestStep) -> None:
        """Remembers the step, for the summary and the report."""
        self._best = best

    def on_preview(self, step: int, adapters: Trainable) -> None:
        """Draws the preview sheet, saves it in the run folder and shows it on the node, with the chart below it."""
        if self._preview is None:
            return
        folder = self._facts.folder
        sheet = self._preview.sheet(f"{folder.name}: step {step} of {self._steps}", adapters)
        path = folder / PREVIEWS_NAME / f"step-{step:06d}.png"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        file = BytesIO()
        sheet.save(file, "PNG")
        write_atomic(path, file.getvalue())
        self._chart.sheet = sheet
        self._bar.update_absolute(step, preview=("JPEG", self._chart.draw(time.monotonic()), None))

    # -- the end ------------------------------------------------------------------------------------------------------

    def finished(self, result: TrainResult) -> None:
        """Shows the summary on the node and writes the report."""
        if not self._has_begun and not result.at_plateau:
            self._notes.add(
                f"all {result.step} steps were already done: nothing was trained, and the existing LoRA is used"
            )
        self.step = result.step
        if result.start_gaps and result.end_gaps:
            self._gaps = result.end_gaps.relative_to(result.start_gaps)
        self._close("finished", f"{result.step} steps done")

    def interrupted(self) -> None:
        """Shows where the run is saved and how to resume it."""
        self._close("interrupted", f"stopped, {self.kept()}; run again with the same settings to resume")

    def failed(self, error: str) -> None:
        """Shows the error and what is saved."""
        self._close("failed", f"failed, {self.kept()}: {error}", error)

    def kept(self) -> str:
        """The number of saved steps and their folder, as text."""
        saved = [path.name for path in (self._facts.folder / "checkpoints").glob("step-*")]
        steps = [int(digits) for name in saved if (digits := name.removeprefix("step-")).isdigit()]
        if steps:
            return f"{max(steps)} steps are saved in {shown(self._facts.folder)}"
        return "no steps are saved" + (f", {self._drawn} class images are kept" if self._drawn else "")

    def _close(self, state: State, headline: str, error: str = "") -> None:
        facts, (gap, heldout) = self._facts, self._gaps
        if self._has_begun or state == "finished":  # otherwise the folder may belong to another run, or not exist
            self._report(state, error).write(facts.folder)
        lines = [headline, *([gap_line(gap, heldout)] if gap is not None else []), *concept_lines(self._of_concepts)]
        lines += [line for line in [best_line(self._best, self.step) if self._best else ""] if line]
        lines += [size_text(facts.modules, facts.parameters), shown(facts.folder), *self._notes.lines]
        send_text(self._node, "\n".join(lines))

    def _report(self, state: State, error: str) -> RunReport:
        facts, (gap, heldout), best = self._facts, self._gaps, self._best
        return RunReport(
            state=state,
            error=error,
            step=self.step,
            steps=self._steps,
            relative_gap=gap,
            heldout_relative_gap=heldout,
            relative_gap_by_concept=self._of_concepts,
            best_step=best.step if best else None,
            best_heldout_relative_gap=best.gap if best else None,
            best_lora=best.path.relative_to(facts.folder).as_posix() if best and best.path else "",
            modules=facts.modules,
            parameters=facts.parameters,
            base_model=facts.base_model,
            trigger=facts.trigger,
            teacher=facts.teacher,
            memory=facts.memory,
            notes=self._notes.lines,
        )

    # -- while it runs ------------------------------------------------------------------------------------------------

    def _note_resumed(self, step: int) -> None:
        if not self._has_begun and step > 1:
            self._notes.add(f"resumed at step {step - 1}")
        self._has_begun = True

    def _text(self, report: StepReport, now: float) -> str:
        lines = [f"step {report.step} of {self._steps}"]
        done = report.step - self._first[0] if self._first else 0
        if done and self._first:
            each = (now - self._first[1]) / done
            left = each * (self._steps - report.step)
            lines[0] += f"  ·  {each:.2f} s each  ·  {_duration(left)} left"
        if report.loss is not None:
            lines.append(f"loss {report.loss:.4g}")
        if self._gaps[0] is not None:
            lines += [gap_line(self._gaps[0], self._gaps[1]), *concept_lines(self._of_concepts)]
        lines += [size_text(self._facts.modules, self._facts.parameters), *self._notes.lines]
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
