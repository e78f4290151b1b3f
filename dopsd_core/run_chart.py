"""A small chart of a run: its loss, and its gaps to the teacher, over the steps. Drawn with Pillow alone.

Loss points are the mean over a pixel's width of steps; the line through them is their running mean. The loss is on a
logarithmic scale, the gap on a linear one from 0, on which 1 is before training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .training.log import StepReport, curve

WIDTH, HEIGHT = 560, 190
"""Smallest width and the height of a chart in pixels."""

_PAPER, _FRAME, _FAINT, _INK = (255, 255, 255), (200, 200, 206), (110, 110, 118), (20, 20, 24)
_LOSS, _TRAINED, _UNSEEN = (130, 80, 160), (31, 119, 180), (230, 110, 20)
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 26, 22
_WINDOW = 0.06
"""Share of the drawn points in the running mean of the loss."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A line of a panel.

    Attributes:
        name: in the panel's title; "" for none.
        colour: RGB.
        points: (step, value), by step.
        is_faint: whether it is drawn as single points.
    """

    name: str
    colour: tuple[int, int, int]
    points: Points
    is_faint: bool = False


@dataclass(frozen=True)
class _Panel:
    """A frame with its scales; `box` is (left, top, right, bottom) in pixels, `bounds` (lowest, highest) value."""

    box: tuple[int, int, int, int]
    steps: int
    bounds: tuple[float, float]
    is_log: bool

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Where a point is drawn; values outside of the bounds are drawn at them."""
        left, top, right, bottom = self.box
        low, high = (self._scaled(bound) for bound in self.bounds)
        share = (self._scaled(min(max(value, self.bounds[0]), self.bounds[1])) - low) / max(high - low, 1e-12)
        return left + (right - left) * step / max(self.steps, 1), bottom - (bottom - top) * share

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.is_log else value


def draw_run(reports: Sequence[StepReport], steps: int, width: int = WIDTH) -> Image.Image:
    """The chart [HEIGHT, max(width, WIDTH)] of a run of `steps` steps so far; one panel if no gap was measured."""
    width = max(width, WIDTH)
    chart = Image.new("RGB", (width, HEIGHT), _PAPER)
    draw, font = ImageDraw.Draw(chart), _font()
    gaps = [curve for curve in _gap_curves(reports) if curve.points]
    half = width // 2 if gaps else width
    _draw_panel(draw, font, (0, half), "loss", _loss_curves(reports, half), steps, is_log=True)
    if gaps:
        _draw_panel(draw, font, (half, width), "gap", gaps, steps, is_log=False)
    return chart


def below(sheet: Image.Image | None, chart: Image.Image) -> Image.Image:
    """A preview sheet with the chart below it; the chart alone without a sheet."""
    if sheet is None:
        return chart
    whole = Image.new("RGB", (max(sheet.width, chart.width), sheet.height + chart.height), _PAPER)
    whole.paste(sheet, (0, 0))
    whole.paste(chart, (0, sheet.height))
    return whole


def _loss_curves(reports: Sequence[StepReport], width: int) -> list[Curve]:
    """The loss without steps of prior anchors, which have another target, if there are others."""
    known = [report for report in reports if report.loss is not None and report.loss > 0]
    points = _pairs([report for report in known if not report.anchors] or known, lambda report: report.loss)
    thin = _thinned(points, width - _LEFT - _RIGHT)
    return [Curve("", _LOSS, thin, is_faint=True), Curve("", _LOSS, _smoothed(thin))] if thin else []


def _gap_curves(reports: Sequence[StepReport]) -> list[Curve]:
    trained = _pairs(reports, lambda report: report.relative_gap)
    unseen = _pairs(reports, lambda report: report.heldout_relative_gap)
    return [Curve("trained", _TRAINED, trained), Curve("unseen", _UNSEEN, unseen)]


def _pairs(reports: Sequence[StepReport], value: Callable[[StepReport], float | None]) -> Points:
    steps, values = curve(reports, value)
    return [(step, number) for step, number in zip(steps, values, strict=True) if math.isfinite(number)]


def _thinned(points: Points, most: int) -> Points:
    """At most `most` points: means of neighbours."""
    size = -(-len(points) // max(most, 1))
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]  # type: ignore[misc]


def _smoothed(points: Points) -> Points:
    """The running mean over the points up to each one."""
    window = max(1, round(_WINDOW * len(points)))
    values = [value for _, value in points]
    means = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    across: tuple[int, int],
    title: str,
    curves: Sequence[Curve],
    steps: int,
    is_log: bool,
) -> None:
    """Draws title, frame, scales and curves between two columns of pixels."""
    left, right = across
    panel = _Panel((left + _LEFT, _TOP, right - _RIGHT, HEIGHT - _BOTTOM), steps, _bounds(curves, is_log), is_log)
    draw.rectangle(panel.box, outline=_FRAME)
    draw.text((left + _LEFT, 7), title, fill=_INK, font=font)
    x = left + _LEFT + draw.textlength(f"{title}  ", font=font)
    for named in filter(lambda line: line.name, curves):
        text = f"{named.name} {named.points[-1][1]:.3g}  "
        draw.text((x, 7), text, fill=named.colour, font=font)
        x += draw.textlength(text, font=font)
    for value in panel.bounds:
        y = panel.place(0, value)[1]
        draw.text((left + _LEFT - 4, y), f"{value:.2g}", fill=_FAINT, font=font, anchor="rm")
    for step, anchor in ((0, "lt"), (steps, "rt")):
        draw.text((panel.place(step, panel.bounds[0])[0], HEIGHT - _BOTTOM + 4), f"{step}", _FAINT, font, anchor)
    for line in curves:
        _draw_curve(draw, panel, line)


def _draw_curve(draw: ImageDraw.ImageDraw, panel: _Panel, line: Curve) -> None:
    places = [panel.place(*point) for point in line.points]
    if line.is_faint:
        colour = tuple((2 * 255 + part) // 3 for part in line.colour)
        for x, y in places:
            draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=colour)
        return
    if len(places) > 1:
        draw.line(places, fill=line.colour, width=2)
    x, y = places[-1]
    draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=line.colour)


def _bounds(curves: Sequence[Curve], is_log: bool) -> tuple[float, float]:
    """(lowest, highest) value of a scale: of the values on a logarithmic one, else from 0 to at least 1."""
    values = [value for line in curves for _, value in line.points]
    if not is_log:
        return 0.0, max([1.0, *values])
    low, high = min(values, default=0.1), max(values, default=1.0)
    return (low, high) if high > 1.2 * low else (low / 1.1, high * 1.1)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(12)
    except ImportError:  # a Pillow without FreeType
        return ImageFont.load_default()
