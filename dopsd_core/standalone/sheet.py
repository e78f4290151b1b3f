"""The pictures that the demo leaves: a labelled contact sheet, and the curves of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..progress import StepReport, curve
from .concept import to_images

_TILE, _PAD, _LABEL = 112, 6, 210
_INK, _PAPER, _FAINT = (20, 20, 24), (255, 255, 255), (110, 110, 118)


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the sheet: a label, a remark under it, pictures [n, 3, H, W], and a word over each or none."""

    label: str
    remark: str
    pictures: Tensor
    captions: Sequence[str] = ()


def contact_sheet(title: str, rows: Sequence[Row]) -> Image.Image:
    """All rows under a title; pictures enlarged without smoothing, so that every pixel is the model's own."""
    columns = max(len(row.pictures) for row in rows)
    width = _LABEL + columns * (_TILE + _PAD) + _PAD
    heights = [_TILE + _PAD + (18 if row.captions else 0) for row in rows]
    sheet = Image.new("RGB", (width, 44 + sum(heights) + _PAD), _PAPER)
    draw, big, small = ImageDraw.Draw(sheet), ImageFont.load_default(17), ImageFont.load_default(12)
    draw.text((_PAD + 2, 12), title, fill=_INK, font=big)
    top = 44
    for row, height in zip(rows, heights, strict=True):
        y = top + (18 if row.captions else 0)
        draw.text((_PAD + 2, y + 32), row.label, fill=_INK, font=ImageFont.load_default(15))
        draw.multiline_text((_PAD + 2, y + 54), row.remark, fill=_FAINT, font=small)
        for i, picture in enumerate(to_images(row.pictures)):
            x = _LABEL + i * (_TILE + _PAD)
            sheet.paste(picture.resize((_TILE, _TILE), Image.Resampling.NEAREST), (x, y))
            if row.captions:
                draw.text((x, top + 2), row.captions[i], fill=_FAINT, font=ImageFont.load_default(10))
        top += height
    return sheet


def save_curves(path: Path, runs: dict[str, Sequence[StepReport]]) -> None:
    """Loss, gap to the teacher relative to the start (training and held-out caption), and cosine, against the step.

    Steps that were prior anchors are left out of loss and cosine: their target is another one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, gap, cosine) = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    for colour, (name, reports) in zip(("tab:blue", "tab:orange", "tab:green"), runs.items(), strict=False):
        loss.plot(*curve(reports, lambda r: None if r.anchors else r.loss), color=colour, label=name)
        gap.plot(*curve(reports, lambda r: r.relative_gap), color=colour, label=f"{name}, trained captions")
        gap.plot(*curve(reports, lambda r: r.heldout_relative_gap), "--", color=colour, label=f"{name}, unseen caption")
        cosine.plot(*curve(reports, lambda r: None if r.anchors else r.cosine), color=colour, label=name)
    loss.set(title="loss (each method's own)", xlabel="step", yscale="log")
    gap.set(title="gap to the teacher (1 = before training)", xlabel="step", ylim=(0, None))
    cosine.set(title="cosine of student's and target's velocity", xlabel="step")
    for axis in (loss, gap, cosine):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
