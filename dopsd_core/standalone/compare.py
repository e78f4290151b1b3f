"""The demo's comparison on one concept: D-OPSD, SFT and DreamBooth at equal steps, with several seeds.

SFT gets the best of several learning rates, DreamBooth the one that was best on other concepts. `comparison/` compares
any methods on many concepts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..config import TrainConfig
from ..demo.concept import Concept
from ..demo.settings import SAMPLE_STEPS
from ..demo.world import TRIGGER, render
from ..files.atomic import write_atomic
from ..image_grid import Row, contact_sheet
from ..objectives import SFT, DreamBooth
from ..training.log import LOG_NAME, read_log
from .curves import save_curves
from .evaluate import TITLES, Samples, Scores, frechet_floor, gap_closed, summarise
from .jobs import Job, JobRunner
from .judge import Judge

SFT_RATES = (3e-4, 1e-3)
"""Lower ones do not learn a concept in 60 steps (1e-4: a concept error of .38)."""
DREAMBOOTH_RATE = 1e-3
METHODS = {
    "base": "untouched", "teacher": "its teacher", "dopsd": "D-OPSD", "sft": "SFT", "dreambooth": "DreamBooth"
}  # fmt: skip
"""Titles of the methods by their key in report.json."""

_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Comparison:
    """The results of all runs.

    Attributes:
        runs: scores of every run by method.
        shown: images of the first run by method.
        sft_rates: scores of SFT with seed 0 by learning rate.
        sft_rate: the best of these rates.
        config: the configuration of D-OPSD.
        lora: the file of D-OPSD's first run.
        peak_rss_mb: peak memory of all processes together.
    """

    runs: Mapping[str, Sequence[Scores]]
    shown: Mapping[str, Samples]
    sft_rates: Mapping[float, Scores]
    sft_rate: float
    config: TrainConfig
    lora: Path
    peak_rss_mb: float

    def methods(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and standard deviation of every score by method."""
        return {name: summarise(runs) for name, runs in self.runs.items()}


def plan(config: TrainConfig, num_seeds: int) -> list[Job]:
    """The jobs that need no other's result: for every seed the untouched model, DreamBooth and D-OPSD, in this order;
    then SFT with every learning rate, for the first seed. The long ones are first, so that no core is idle at the end.
    """
    seeds = range(num_seeds)
    untouched = [Job(seed) for seed in seeds]
    dreambooth = [dreambooth_job(config, seed) for seed in seeds]
    dopsd = [Job(seed, config.replace(seed=seed), "dopsd") for seed in seeds]
    return [*untouched, *dreambooth, *dopsd, *(sft_job(config, rate, 0) for rate in SFT_RATES)]


def sft_job(config: TrainConfig, rate: float, seed: int) -> Job:
    """The same run with supervised fine-tuning: equal steps, batch size, LoRA and seed."""
    optimizer = config.optimizer.replace(lr=rate)
    return Job(seed, config.replace(objective=SFT(), optimizer=optimizer, seed=seed), f"sft-lr{rate:g}")


def dreambooth_job(config: TrainConfig, seed: int) -> Job:
    """The same run with DreamBooth: equal steps, batch size, LoRA and seed."""
    optimizer = config.optimizer.replace(lr=DREAMBOOTH_RATE)
    return Job(seed, config.replace(objective=DreamBooth(), optimizer=optimizer, seed=seed), "dreambooth")


def compare(
    runner: JobRunner, config: TrainConfig, num_seeds: int, on_teacher: Callable[[Samples, Samples], None]
) -> Comparison:
    """Trains and scores all methods. Every method is sampled with the same noise.

    `on_teacher` is called, as soon as they are there, with the images of the untouched model and of its teacher: the
    teacher limits what can be learned.
    """
    results = runner.run(plan(config, num_seeds))
    base = list(islice(results, num_seeds))
    teacher = [done.taught for done in base if done.taught is not None]
    on_teacher(base[0].samples, teacher[0][1])
    dreambooth, dopsd = list(islice(results, num_seeds)), list(islice(results, num_seeds))
    tried = dict(zip(SFT_RATES, results, strict=True))
    rate = best_rate({rate: done.scores for rate, done in tried.items()}, dopsd[0].scores)
    sft = [tried[rate], *runner.run([sft_job(config, rate, seed) for seed in range(1, num_seeds)])]
    trained = {"base": base, "dopsd": dopsd, "sft": sft, "dreambooth": dreambooth}
    found = {name: [(done.scores, done.samples) for done in runs] for name, runs in trained.items()}
    found["teacher"] = teacher
    lora = dopsd[0].lora
    if lora is None:
        raise RuntimeError("a training job returned no LoRA")
    return Comparison(
        runs={name: [scores for scores, _ in found[name]] for name in METHODS},
        shown={name: found[name][0][1] for name in METHODS},
        sft_rates={rate: done.scores for rate, done in tried.items()},
        sft_rate=rate,
        config=config,
        lora=lora,
        peak_rss_mb=sum(runner.peaks.values()),
    )


def best_rate(tried: Mapping[float, Scores], dopsd: Scores) -> float:
    """SFT's best learning rate: the least forgetting among those that learn the concept as well as D-OPSD (within
    0.05); if there is none, the one that learns it best."""
    good = [rate for rate, scores in tried.items() if scores.concept_error <= dopsd.concept_error + 0.05]
    if good:
        return min(good, key=lambda rate: tried[rate].frechet_prior)
    return min(tried, key=lambda rate: tried[rate].concept_error)


def write_results(
    output: Path, concept: Concept, judge: Judge, result: Comparison, wall_seconds: float, peak_rss_mb: float
) -> dict[str, Any]:
    """The LoRA, overview.png, contact_sheet.png, curves.png and report.json into the folder; returns the report."""
    shutil.copyfile(result.lora, output / "lora.safetensors")
    draw_sheet(concept, result).save(output / "contact_sheet.png")
    draw_overview(concept, result).save(output / "overview.png")
    logs = {title: read_log(output / "runs" / name / LOG_NAME) for title, name in curve_runs(result).items()}
    save_curves(output / "curves.png", logs)
    methods = result.methods()
    report = {
        "methods": methods,
        "gap_closed": gap_closed(methods),
        "wall_seconds": wall_seconds,
        "peak_rss_mb": peak_rss_mb,
        "config": json.loads(result.config.to_json()),
        "concept": {"seed": concept.seed, "looks": concept.words},
        "sft": {"rate": result.sft_rate, "tried": {f"{r:g}": asdict(s) for r, s in result.sft_rates.items()}},
        "dreambooth": {"rate": DREAMBOOTH_RATE},
        "frechet_floor": frechet_floor(judge, 3 * len(concept.generic.texts)),
    }
    write_atomic(output / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    return report


def curve_runs(result: Comparison) -> dict[str, str]:
    """Title -> name of the first run of each method that trains."""
    jobs = {
        METHODS["dopsd"]: Job(0, result.config, "dopsd"),
        f"{METHODS['sft']}, lr {result.sft_rate:g}": sft_job(result.config, result.sft_rate, 0),
        METHODS["dreambooth"]: dreambooth_job(result.config, 0),
    }
    return {title: job.name for title, job in jobs.items()}


def draw_teacher_sheet(concept: Concept, base: Samples, teacher: Samples) -> Image.Image:
    """Draws the targets, the untouched student and its teacher on unseen prompts, before training."""
    pick, words = _shown_prompts(concept)
    return contact_sheet(
        f"Before training: {concept.words} = {TRIGGER}",
        [
            Row("targets", "the training images", render(concept.targets)),
            Row("student", "text only", base.trigger[pick], words),
            Row("teacher", "sees a target", teacher.trigger[pick]),
        ],
    )


def _shown_prompts(concept: Concept) -> tuple[list[int], list[str]]:
    count = len(concept.unseen.texts)
    pick = list(range(0, count, max(1, count // _SHOWN)))[:_SHOWN]
    texts = [concept.unseen.texts[i].removeprefix(f"a {TRIGGER} badge, ") for i in pick]
    return pick, [text.replace(", on a ", ", ").removesuffix(" background") for text in texts]


def draw_sheet(concept: Concept, result: Comparison) -> Image.Image:
    """Draws the targets; untouched model, teacher and trained ones on unseen prompts; then prior prompts."""
    n = _SHOWN
    pick, words = _shown_prompts(concept)
    prior = [text.removeprefix("a ").split(" badge")[0] for text in concept.described.texts[:n]]
    rows = [Row("targets", "the four training images;\nnew to the model", render(concept.targets))]
    alone = f"{SAMPLE_STEPS} steps, text only"
    remarks = {
        "teacher": "before training, sees a\ntarget: the upper bound",
        "sft": f"{alone};\nbest of {len(SFT_RATES)} rates",
    }
    for name, title in METHODS.items():
        images = result.shown[name].trigger[pick]
        rows.append(Row(title, remarks.get(name, alone), images, words if name == "base" else ()))
    rows.append(
        Row("expected", "other prompts, no [V]:\nrenders of the prompts", render(concept.described.scenes[:n]), prior)
    )
    own = {name: title for name, title in METHODS.items() if name != "teacher"}
    rows += [Row(f"prior, {title}", "", result.shown[name].described[:n]) for name, title in own.items()]
    remark = '"a badge, ...": the concept\nshould not show here'
    rows += [Row(f"no words, {title}", remark, result.shown[name].generic[:n]) for name, title in own.items()]
    return contact_sheet(f"Concept {concept.seed}: {concept.words} = {TRIGGER}", rows)


def draw_overview(concept: Concept, result: Comparison, each: int = 2) -> Image.Image:
    """Two rows, `each` images per method: prompts with [V], and prompts that name no concept, where it must not show.

    All methods draw the same prompts from the same noise.
    """
    titles = {name: METHODS[name] for name in ("base", "sft", "dreambooth", "dopsd")}
    titles["teacher"] = "teacher (sees a target)"
    pick, _ = _shown_prompts(concept)
    words = [title if i == 0 else "" for title in titles.values() for i in range(each)]
    trigger = torch.cat([result.shown[name].trigger[pick[:each]] for name in titles])
    generic = torch.cat([result.shown[name].generic[:each] for name in titles])
    rows = [
        Row(f'"a {TRIGGER} badge, ..."', "should show the concept", trigger, words),
        Row('"a badge, ..."', "should not show it", generic),
    ]
    return contact_sheet(f"{TRIGGER} = {concept.words}, learned from four images; drawn in {SAMPLE_STEPS} steps", rows)


def _mean_and_std(cell: Mapping[str, float]) -> str:
    return f"{cell['mean']:.3f}" + (f" ±{cell['std']:5.3f}" if "std" in cell else "")


def table(report: Mapping[str, Any]) -> str:
    """The report as a table for the terminal."""
    head = f"{'':11}" + "".join(f"{title:>18}" for title in TITLES.values())
    lines = [head, "-" * len(head)]
    for name, title in METHODS.items():
        cells = [report["methods"][name][figure] for figure in TITLES]
        lines.append(f"{title:11}" + "".join(f"{_mean_and_std(cell):>18}" for cell in cells))
    prior = {name: report["methods"][name]["frechet_prior"]["mean"] for name in METHODS}
    lines.append("")
    lines.append(f"D-OPSD closed {report['gap_closed']:.0%} of the gap between the untouched model and its teacher.")
    lines.append(
        f"{TITLES['frechet_prior']}, over the untouched model's: D-OPSD x{prior['dopsd'] / prior['base']:.2f}, "
        f"SFT x{prior['sft'] / prior['base']:.2f} (lr {report['sft']['rate']:g}, the best of those tried), "
        f"DreamBooth x{prior['dreambooth'] / prior['base']:.2f}."
    )
    lines.append(f"{report['wall_seconds']:.0f} s, peak memory {report['peak_rss_mb']:.0f} MB.")
    return "\n".join(lines)
