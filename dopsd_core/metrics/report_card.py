"""The report card of a LoRA: one image that a person can read, and the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..image_grid import Row, contact_sheet
from .evaluation import GROUPS, Evaluation, Group, Measured, Verdict
from .intervals import Interval, bootstrap
from .protocol import Shot

_INK, _PAPER, _FAINT, _LINE = (20, 20, 24), (255, 255, 255), (110, 110, 118), (222, 222, 228)
_GOOD, _BAD, _OPEN = (22, 120, 60), (176, 0, 32), (150, 90, 0)
_COLOURS = {
    "better": _GOOD, "kept": _GOOD, "sharp": _GOOD, "worse": _BAD, "changed": _BAD, "blurry": _BAD,
    "over-sharp": _BAD, "partly kept": _OPEN, "no clear change": _FAINT,
}  # fmt: skip
_QUESTIONS: dict[Group, str] = {
    "concept": "CONCEPT: is it in the images?",
    "following": "FOLLOWING: do images show what the prompt says?",
    "few steps": "FEW STEPS: are the images as good as before?",
    "retention": "RETENTION: do ordinary prompts look as before?",
}
_BETTER = {
    "lower": "lower is better", "higher": "higher is better", "near 1": "near 1 is best",
    "unchanged": "0: the same image",
}  # fmt: skip
_TITLE_WIDTH, _COLUMN, _PAD, _STEP = 300, 220, 14, 21
_SHOWN = {"rewrite": 2, "test": 2, "ordinary": 3}
"""How many prompts of each kind the image shows."""


def draw_report_card(evaluation: Evaluation, tile: int = 192) -> Image.Image:
    """The table of all measures above images of some prompts, from the same noise along a row."""
    table, sheet = _draw_table(evaluation), _draw_images(evaluation, tile)
    card = Image.new("RGB", (max(table.width, sheet.width), table.height + sheet.height), _PAPER)
    card.paste(sheet, (0, 0))
    card.paste(table, (0, sheet.height))
    return card


def to_json(evaluation: Evaluation) -> str:
    """Every value, with means, intervals, noise floors and conclusions."""
    report = {
        "title": evaluation.title,
        "strengths": list(evaluation.strengths),
        "notes": list(evaluation.notes),
        "images": [vars(shot) for shot in evaluation.shots],
        "measures": {measured.name: _measured_json(measured) for measured in evaluation.measured},
    }
    return json.dumps(_finite(report), indent=2, ensure_ascii=False) + "\n"


def summary_lines(evaluation: Evaluation) -> list[str]:
    """One line per measure and strength, as text."""
    lines = []
    for measured in evaluation.measured:
        before = _number(bootstrap(measured.untouched).mean)
        for strength in evaluation.strengths:
            verdict = measured.verdict(strength)
            what = f"{measured.group}: {measured.title}, strength {_text(strength)}"
            start = "" if measured.better == "unchanged" else f"{before} -> "
            lines.append(f"{what}: {start}{_cell(measured, verdict)} ({verdict.word})")
    return [*lines, *evaluation.notes]


def _measured_json(measured: Measured) -> dict[str, Any]:
    return {
        "title": measured.title,
        "group": measured.group,
        "better": measured.better,
        "prompts": list(measured.prompts),
        "noise_floor": measured.floor,
        "untouched": {"mean": vars(bootstrap(measured.untouched)), "values": list(measured.untouched)},
        "other_noise": list(measured.other_noise),
        "strengths": {
            _text(strength): {**_verdict_json(measured.verdict(strength)), "values": list(values)}
            for strength, values in measured.strengths.items()
        },
    }


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "mean": vars(verdict.mean),
        "change": vars(verdict.change),
        "share_of_floor": verdict.share_of_floor,
        "conclusion": verdict.word,
    }


def _finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- the table ---------------------------------------------------------------------------------------------------------


def _draw_table(evaluation: Evaluation) -> Image.Image:
    groups: list[tuple[Group, list[Measured]]]
    groups = [(group, [m for m in evaluation.measured if m.group == group]) for group in GROUPS]
    groups = [(group, measured) for group, measured in groups if measured]
    width = _TITLE_WIDTH + (1 + len(evaluation.strengths)) * _COLUMN + 2 * _PAD
    lines = sum(1.6 + 2.2 * len(measured) for _, measured in groups) + 1.5 + len(evaluation.notes) + 2.5
    table = Image.new("RGB", (width, round(lines * _STEP) + 2 * _PAD), _PAPER)
    draw, y = ImageDraw.Draw(table), float(_PAD)
    _write(draw, (_TITLE_WIDTH, y), "untouched", _FAINT, 13)
    for column, strength in enumerate(evaluation.strengths, 1):
        _write(draw, (_TITLE_WIDTH + column * _COLUMN, y), f"strength {_text(strength)}", _FAINT, 13)
    y += 1.3 * _STEP
    for group, measured in groups:
        draw.line((_PAD, y, width - _PAD, y), fill=_LINE)
        _write(draw, (_PAD, y + 6), _QUESTIONS[group], _INK, 15)
        y += 1.6 * _STEP
        for one in measured:
            _draw_measured(draw, y, one, evaluation.strengths)
            y += 2.2 * _STEP
    draw.line((_PAD, y, width - _PAD, y), fill=_LINE)
    legend = "± half of a 95% interval over prompts. Noise floor: what other noise alone changes."
    for line in (legend, *evaluation.notes):
        _write(draw, (_PAD, y + 6), line, _FAINT, 12, width - 2 * _PAD)
        y += _STEP
    return table


def _draw_measured(draw: ImageDraw.ImageDraw, y: float, measured: Measured, strengths: Sequence[float]) -> None:
    """Two lines: the values, below them what is good and the conclusions."""
    _write(draw, (_PAD + 10, y), measured.title, _INK, 14, _TITLE_WIDTH - _PAD)
    floor = "" if measured.floor is None else f"noise floor {_number(measured.floor)}"
    _write(draw, (_PAD + 10, y + 18), _BETTER[measured.better], _FAINT, 12)
    before = "-" if measured.better == "unchanged" else _with_interval(bootstrap(measured.untouched))
    _write(draw, (_TITLE_WIDTH, y), before, _INK, 14)
    _write(draw, (_TITLE_WIDTH, y + 18), floor, _FAINT, 12)
    for column, strength in enumerate(strengths, 1):
        verdict, x = measured.verdict(strength), _TITLE_WIDTH + column * _COLUMN
        _write(draw, (x, y), _cell(measured, verdict), _INK, 14)
        _write(draw, (x, y + 18), verdict.word, _COLOURS[verdict.word], 13)


def _cell(measured: Measured, verdict: Verdict) -> str:
    if measured.better == "unchanged":
        share = "" if verdict.share_of_floor is None else f", {verdict.share_of_floor:.0%} of floor"
        return f"{_number(verdict.mean.mean)}{share}"
    if measured.better == "near 1":
        return _with_interval(verdict.mean)
    sign = "+" if verdict.change.mean >= 0 else "-"
    half = (verdict.change.high - verdict.change.low) / 2
    return f"{_number(verdict.mean.mean)} ({sign}{_number(abs(verdict.change.mean))} ± {_number(half)})"


def _with_interval(interval: Interval) -> str:
    return f"{_number(interval.mean)} ± {_number((interval.high - interval.low) / 2)}"


def _text(strength: float) -> str:
    """A strength with all of its digits: two may differ in the last."""
    return str(strength).removesuffix(".0")


def _number(value: float) -> str:
    """Three significant digits, never as 1e-05."""
    if not math.isfinite(value):
        return "?"
    digits = max(0, min(4, 2 - math.floor(math.log10(abs(value))))) if value else 0
    return f"{value:.{digits}f}"


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: tuple[int, int, int], size: int,
    width: int | None = None,
) -> None:  # fmt: skip
    """Writes one line; with `width`, what does not fit is cut."""
    font = _font(size)
    while width is not None and text and draw.textlength(text, font) > width:
        text = text[:-4].rstrip() + "..." if len(text) > 4 else ""
    draw.text(at, text, fill=colour, font=font)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except ImportError:  # a Pillow without FreeType
        return ImageFont.load_default()


# -- the images --------------------------------------------------------------------------------------------------------


def _draw_images(evaluation: Evaluation, tile: int) -> Image.Image:
    """A row per prompt: source, untouched model, the same from other noise, every strength."""
    rows = []
    for index in _shown(evaluation.shots):
        shot = evaluation.shots[index]
        images: list[Tensor] = [] if shot.row is None else [evaluation.sources[shot.row]]
        images += [evaluation.images[0.0][index], evaluation.other_noise[index]]
        images += [evaluation.images[strength][index] for strength in evaluation.strengths]
        names = [] if shot.row is None else ["source"]
        names += ["untouched", "untouched, other noise", *(f"strength {_text(s)}" for s in evaluation.strengths)]
        remark = {"rewrite": "describes the source", "test": "another scene", "ordinary": "no trigger"}[shot.kind]
        rows.append(Row(shot.prompt, remark, images, names))
    return contact_sheet(f"Report card: {evaluation.title}", rows, tile)


def _shown(shots: Sequence[Shot]) -> list[int]:
    found: list[int] = []
    for kind, most in _SHOWN.items():
        found += [i for i, shot in enumerate(shots) if shot.kind == kind][:most]
    return found
