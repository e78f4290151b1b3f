"""The chart of a run: where its lines are, what it leaves out, and that it can be drawn of anything."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from PIL import Image

from dopsd_core import run_chart
from dopsd_core.run_chart import HEIGHT, WIDTH, below, draw_run
from dopsd_core.training.log import StepReport

STEPS = 100


def places(chart: Image.Image, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """(x, y) of the pixels of a colour, left to right, without those of a panel's title."""
    pixels = chart.load()
    found = [(x, y) for x in range(chart.width) for y in range(26, chart.height) if pixels[x, y] == colour]  # type: ignore[index]
    return sorted(found)


def losses(values: Sequence[float], anchors: int = 0) -> list[StepReport]:
    return [StepReport(step=step, loss=loss, anchors=anchors) for step, loss in enumerate(values, 1)]


def test_the_gap_falls_from_1_along_the_steps() -> None:
    reports = [
        StepReport(step=step, relative_gap=1 - step / 100, heldout_relative_gap=1.0) for step in range(0, 51, 10)
    ]
    chart = draw_run(reports, STEPS)
    assert chart.size == (WIDTH, HEIGHT)
    trained, unseen = places(chart, run_chart._TRAINED), places(chart, run_chart._UNSEEN)
    first, last = trained[0], trained[-1]
    left, right = WIDTH // 2 + 44, WIDTH - 12
    assert abs(first[0] - left) <= 3 and abs(last[0] - (left + right) / 2) <= 3  # half of the steps are done
    middle = (26 + HEIGHT - 22) / 2
    assert abs(first[1] - 26) <= 3 and abs(last[1] - middle) <= 4  # from 1 to a half, on a scale from 0 to 1
    assert max(y for _, y in unseen) <= 30  # stays at the top


def test_the_loss_is_on_a_logarithmic_scale() -> None:
    chart = draw_run(losses([1.0, 0.1, 0.01]), 3)
    line = places(chart, run_chart._LOSS)
    top, bottom = 26, HEIGHT - 22
    heights = [min(y for x, y in line if abs(x - at) <= 1) for at in (line[0][0] + 2, line[-1][0] - 2)]
    assert abs(heights[0] - top) <= 4 and abs(heights[1] - bottom) <= 4
    two_thirds = 44 + (WIDTH - 12 - 44) * 2 / 3
    (y, *_) = [y for x, y in line if abs(x - two_thirds) <= 1]
    assert abs(y - (top + bottom) / 2) <= 4  # 0.1 is halfway between 1 and 0.01


def test_anchor_steps_do_not_count_beside_others() -> None:
    mixed = [*losses([1.0, 0.9]), StepReport(step=3, loss=1e-6, anchors=1)]
    assert draw_run(mixed, STEPS).tobytes() == draw_run(losses([1.0, 0.9]), STEPS).tobytes()
    alone = draw_run(losses([1.0, 0.5], anchors=1), STEPS)
    assert places(alone, run_chart._LOSS)


def test_thousands_of_steps_give_the_same_line_as_their_means() -> None:
    points = [(float(step), float(step % 2)) for step in range(10_000)]
    thin = run_chart._thinned(points, 100)
    assert len(thin) == 100 and all(value == pytest.approx(0.5) for _, value in thin)
    assert run_chart._thinned([(1.0, 3.0)], 100) == [(1.0, 3.0)] and run_chart._thinned([], 100) == []


@pytest.mark.parametrize(
    "reports",
    [
        [],
        [StepReport(step=0, relative_gap=1.0)],
        [StepReport(step=1, loss=0.3)],
        [StepReport(step=1, loss=0.0), StepReport(step=2, loss=float("inf"), relative_gap=float("nan"))],
        [StepReport(step=900, loss=0.3, relative_gap=7.5)],
    ],
)
def test_any_run_can_be_drawn(reports: list[StepReport]) -> None:
    assert draw_run(reports, STEPS, 900).size == (900, HEIGHT)


def test_the_chart_is_below_the_sheet() -> None:
    sheet, chart = Image.new("RGB", (700, 50), (1, 2, 3)), draw_run([], STEPS, 700)
    whole = below(sheet, chart)
    assert whole.size == (700, 50 + HEIGHT)
    assert whole.crop((0, 0, 700, 50)).tobytes() == sheet.tobytes()
    assert whole.crop((0, 50, 700, 50 + HEIGHT)).tobytes() == chart.tobytes()
    assert below(None, chart) is chart
