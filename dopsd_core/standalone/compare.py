"""D-OPSD against SFT on one concept: equal steps, several seeds, SFT at the best of several rates; report and
pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..atomic import write_atomic
from ..config import TrainConfig
from ..progress import LOG_NAME, read_log
from .demo import Demo
from .evaluate import Samples, Scores, frechet_floor, gap_closed, summarise
from .sheet import Row, contact_sheet, save_curves
from .world import caption, render

SFT_RATES = (3e-4, 1e-3, 3e-3)
METHODS = ("base", "teacher", "dopsd", "sft")
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Comparison:
    """Scores of every run, and the first run's pictures of each method. `sft_rates`: scores of seed 0 at each rate
    tried."""

    runs: Mapping[str, Sequence[Scores]]
    shown: Mapping[str, Samples]
    sft_rates: Mapping[float, Scores]
    sft_rate: float
    config: TrainConfig
    lora: Path

    def methods(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and standard deviation of every figure of every method."""
        return {name: summarise(runs) for name, runs in self.runs.items()}


def compare(demo: Demo, config: TrainConfig, num_seeds: int) -> Comparison:
    """Trains and scores everything. Every method is sampled with the same noise."""
    seeds = range(num_seeds)
    shown = {"base": demo.samples(0), "teacher": demo.samples(0, taught=True)}
    runs: dict[str, list[Scores]] = {
        name: [demo.score(shown[name] if s == 0 else demo.samples(s, taught=name == "teacher")) for s in seeds]
        for name in ("base", "teacher")
    }
    runs["dopsd"], runs["sft"] = [], []
    loras = []
    for seed in seeds:
        loras.append(demo.train(f"dopsd-seed{seed}", replace(config, seed=seed)))
        samples = demo.samples(seed, loras[-1])
        shown.setdefault("dopsd", samples)
        runs["dopsd"].append(demo.score(samples))
    sft = replace(config, objective="sft", anchor_probability=0.0)
    tried: dict[float, tuple[Scores, Samples]] = {}
    for rate in SFT_RATES:
        samples = demo.samples(0, demo.train(f"sft-lr{rate:g}-seed0", replace(sft, lr=rate, seed=0)))
        tried[rate] = demo.score(samples), samples
    rate = best_rate({rate: scores for rate, (scores, _) in tried.items()}, runs["dopsd"][0])
    shown["sft"] = tried[rate][1]
    runs["sft"].append(tried[rate][0])
    for seed in list(seeds)[1:]:
        lora = demo.train(f"sft-lr{rate:g}-seed{seed}", replace(sft, lr=rate, seed=seed))
        runs["sft"].append(demo.score(demo.samples(seed, lora)))
    return Comparison(runs, shown, {rate: scores for rate, (scores, _) in tried.items()}, rate, config, loras[0])


def best_rate(tried: Mapping[float, Scores], dopsd: Scores) -> float:
    """SFT's best rate: of those that learn the concept as well as D-OPSD did (within 0.05), the one that keeps the
    prior best; if none does, the one that learns it best."""
    good = [rate for rate, scores in tried.items() if scores.concept_error <= dopsd.concept_error + 0.05]
    if good:
        return min(good, key=lambda rate: tried[rate].frechet_prior)
    return min(tried, key=lambda rate: tried[rate].concept_error)


def write_results(demo: Demo, result: Comparison, wall_seconds: float, peak_rss_mb: float) -> dict[str, Any]:
    """lora.safetensors, contact_sheet.png, curves.png and report.json into the output folder; returns the report."""
    shutil.copyfile(result.lora, demo.output / "lora.safetensors")
    draw_sheet(demo, result).save(demo.output / "contact_sheet.png")
    logs = {"D-OPSD": "dopsd-seed0", f"SFT, lr {result.sft_rate:g}": f"sft-lr{result.sft_rate:g}-seed0"}
    save_curves(
        demo.output / "curves.png", {name: read_log(demo.run_folder(run) / LOG_NAME) for name, run in logs.items()}
    )
    methods = result.methods()
    report = {
        "methods": methods,
        "gap_closed": gap_closed(methods),
        "wall_seconds": wall_seconds,
        "peak_rss_mb": peak_rss_mb,
        "config": json.loads(result.config.to_json()),
        "concept": {"seed": demo.concept.seed, "looks": demo.concept.words},
        "sft": {"rate": result.sft_rate, "tried": {f"{r:g}": asdict(s) for r, s in result.sft_rates.items()}},
        "frechet_floor": frechet_floor(demo.judge, 2 * len(demo.concept.generic.texts)),
    }
    write_atomic(demo.output / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    return report


def draw_sheet(demo: Demo, result: Comparison):
    """Targets; before, teacher, after on unseen prompts; prior prompts before and after."""
    concept, n = demo.concept, _SHOWN
    pick = list(range(0, len(concept.unseen.texts), max(1, len(concept.unseen.texts) // n)))[:n]
    words = [caption(concept.unseen.scenes, i, name="[V]").removeprefix("a ").replace(" background", "") for i in pick]
    prior = [text.removeprefix("a ").split(",")[0][:19] for text in concept.described.texts[:n]]
    rows = [Row("targets", "the four training pictures;\nnever seen in the making", render(concept.targets))]
    remarks = {
        "base": ("before", "4 steps, text alone"),
        "teacher": ("teacher", "before training, shown a\ntarget: what can be reached"),
        "dopsd": ("D-OPSD", "4 steps, text alone"),
        "sft": ("SFT", f"4 steps, text alone;\nbest of {len(SFT_RATES)} rates"),
    }
    for name, (label, remark) in remarks.items():
        rows.append(Row(label, remark, result.shown[name].trigger[pick], words if name == "base" else ()))
    rows.append(
        Row("asked for", "other prompts, no [V]:\nrenders of the prompts", render(concept.described.scenes[:n]), prior)
    )
    for name, label in (("base", "prior before"), ("dopsd", "prior, D-OPSD"), ("sft", "prior, SFT")):
        rows.append(Row(label, "", result.shown[name].described[:n]))
    for name, label in (("base", "no words, before"), ("dopsd", "no words, D-OPSD"), ("sft", "no words, SFT")):
        rows.append(Row(label, '"a badge, ...": the concept\nshould not show here', result.shown[name].generic[:n]))
    return contact_sheet(f"Concept {concept.seed}: {concept.words} = [V]", rows)


def table(report: Mapping[str, Any]) -> str:
    """The report's figures for a terminal."""
    columns = {
        "concept_error": "concept error", "prompt_following": "prompt following", "sharpness": "sharpness",
        "frechet_trigger": "Frechet [V]", "frechet_prior": "Frechet prior", "prior_error": "prior error",
        "leak": "leak",
    }  # fmt: skip
    head = f"{'':9}" + "".join(f"{title:>18}" for title in columns.values())
    lines = [head, "-" * len(head)]
    for name in METHODS:
        cells = [report["methods"][name][column] for column in columns]
        lines.append(f"{name:9}" + "".join(f"{c['mean']:>11.3f} ±{c['std']:5.3f}" for c in cells))
    prior = {name: report["methods"][name]["frechet_prior"]["mean"] for name in METHODS}
    lines.append("")
    lines.append(f"D-OPSD closed {report['gap_closed']:.0%} of the gap between base and teacher.")
    lines.append(
        f"Frechet distance of prior prompts against the base's: D-OPSD x{prior['dopsd'] / prior['base']:.2f}, "
        f"SFT x{prior['sft'] / prior['base']:.2f} (lr {report['sft']['rate']:g}, the best of those tried)."
    )
    lines.append(f"{report['wall_seconds']:.0f} s, {report['peak_rss_mb']:.0f} MB at most.")
    return "\n".join(lines)
