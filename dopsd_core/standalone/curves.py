"""Plots the curves of the demo's runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..training.log import StepReport, curve


def save_curves(path: Path, runs: Mapping[str, Sequence[StepReport]]) -> None:
    """Plots loss, relative gap to the teacher (training and held-out captions) and cosine over the steps.

    Loss and cosine exclude steps with prior anchors, which have a different target.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, gap, cosine) = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    for colour, (name, reports) in zip(("tab:blue", "tab:orange", "tab:green"), runs.items(), strict=False):
        loss.plot(*curve(reports, lambda r: None if r.anchors else r.loss), color=colour, label=name)
        gap.plot(*curve(reports, lambda r: r.relative_gap), color=colour, label=f"{name}, trained captions")
        gap.plot(*curve(reports, lambda r: r.heldout_relative_gap), "--", color=colour, label=f"{name}, unseen caption")
        cosine.plot(*curve(reports, lambda r: None if r.anchors else r.metrics.get("cosine")), color=colour, label=name)
    loss.set(title="loss (each method's own)", xlabel="step", yscale="log")
    gap.set(title="gap to the teacher (1 = before training)", xlabel="step", ylim=(0, None))
    cosine.set(title="cosine of student's and target's velocity", xlabel="step")
    for axis in (loss, gap, cosine):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
