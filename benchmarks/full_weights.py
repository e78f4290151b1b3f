"""Full weights on a domain of the demo world, the paper's second experiment scaled down, for docs/results.md.

    python -m benchmarks.full_weights --output build/full-weights --jobs 2
    python -m benchmarks.full_weights --output build/smoke --steps 2 --images 8 --prompts 8 --domains 1 --seeds 1 --dry

A domain is a style over everything: 320 renders with one center and texture, in captions that do not say so, so that it has to become the model's default. D-OPSD, SFT and PSO train all weights from the same data for the same number of steps, each at the learning rate of a grid that came closest to a development domain, and are scored on other domains. What is done is not done again: the same command continues after a stop.
"""  # noqa: E501

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.full_weights_domain import Domain, Scores, anchor_prompts, make_domain, score, write_domain
from benchmarks.report import RESULTS, Section, Table, measured_here, record
from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.conditioning.encode import Condition
from dopsd_core.config import TrainConfig
from dopsd_core.data.dataset import read_dataset
from dopsd_core.demo.model_files import JUDGE_FILE, MODEL_FILE, WEIGHTS
from dopsd_core.demo.settings import SAMPLE_STEPS, demo_config
from dopsd_core.demo.world import IMAGE_SIZE, render
from dopsd_core.families import Z_IMAGE
from dopsd_core.files.atomic import write_atomic
from dopsd_core.image_grid import Row, contact_sheet
from dopsd_core.options import changed
from dopsd_core.rollout import sample
from dopsd_core.standalone.hosts.demo import DemoModel, StandaloneDenoiser, load_demo_model
from dopsd_core.standalone.hosts.demo_weight_files import load_transformer
from dopsd_core.standalone.workers import end_with_parent
from dopsd_core.training.rng import make_generator
from dopsd_core.training.run_folder import CHECKPOINTS_NAME, CLASS_IMAGES_NAME
from dopsd_core.training.trainer import train
from dopsd_core.training.training_set import build_training_set

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
DEVELOPMENT = 1000
"""The domain on which learning rates are found; none of those that are reported."""

_BATCH, _SHOWN = 32, 8


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: unique; names files.
        title: in the table.
        options: by flat name, over the demo's settings.
    """

    name: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS = (
    Method("dopsd", "D-OPSD, no anchor (the paper's)", {"anchor_probability": 0.0}),
    Method("dopsd_anchor", "D-OPSD with our anchor", {"anchor_probability": 0.5}),
    Method("sft", "SFT", {"objective": "sft"}),
    Method("pso", "PSO", {"objective": "pso"}),
)
UNTOUCHED, TEACHER, RENDERS = "untouched", "teacher", "renders"
_OF_RENDERS = ("frechet_domain", "sharpness", "frechet_prior")
"""The scores that mean something for renders of other scenes: what a finite sample leaves of a distance."""
REFERENCES = {UNTOUCHED: "untouched", TEACHER: "its teacher", RENDERS: "other real renders"}


@dataclass(frozen=True)
class Size:
    """How much is trained and scored.

    Attributes:
        steps: optimizer steps.
        images: training images.
        prompts: prompts of each kind that are scored.
    """

    steps: int
    images: int
    prompts: int


@dataclass(frozen=True)
class Trial:
    """What to run: a method at a rate on a domain, or a reference.

    Attributes:
        method: its name, or one of REFERENCES.
        rate: learning rate; 0 for a reference.
        domain: seed of the domain.
        seed: of training and images.
        size: how much.
    """

    method: str
    rate: float
    domain: int
    seed: int
    size: Size

    @property
    def name(self) -> str:
        """Names its files."""
        return f"{self.method}-lr{self.rate:g}-domain{self.domain}-seed{self.seed}"

    def config(self) -> TrainConfig:
        """The configuration of its run."""
        base, steps = demo_config(seed=self.seed), self.size.steps
        base = base.replace(steps=steps, schedule=base.schedule.replace(warmup=min(base.schedule.warmup, steps - 1)))
        options = next(method.options for method in METHODS if method.name == self.method)
        run = {"adapter": "full", "lr": self.rate, "probe_every": 0, "checkpoint_every": steps, "keep_checkpoints": 1}
        return changed(base, {**run, **options})

    def digest(self) -> str:
        """Changes with everything that decides the scores."""
        files = [hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() for name in (MODEL_FILE, JUDGE_FILE)]
        config = None if self.method in REFERENCES else json.loads(self.config().to_json())
        return hashlib.sha256(json.dumps([asdict(self), files, config], sort_keys=True).encode()).hexdigest()


# -- one trial ---------------------------------------------------------------------------------------------------------


@cache
def _model() -> DemoModel:
    torch.set_num_threads(1)
    return load_demo_model()


@cache
def _text(prompt: str) -> Condition:
    return _model().encoder.encode_text(prompt)


def run_trial(trial: Trial, output: Path) -> Scores:
    """The scores of a trial: those of an earlier call, or trained and scored now."""
    path, digest = output / "outcomes" / f"{trial.name}.json", trial.digest()
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["digest"] == digest:
            return Scores(**found["scores"])
    domain = make_domain(trial.domain, trial.size.images, trial.size.prompts)
    images = _images(trial, domain, output)
    scores = score(domain, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps({"digest": digest, "scores": asdict(scores)}, indent=2) + "\n").encode())
    _write_sheet(output / "sheets" / f"{trial.name}.png", trial, domain, images)
    return scores


def _images(trial: Trial, domain: Domain, output: Path) -> dict[str, Tensor]:
    """Images [n, 3, 64, 64] of "test", "described" and "named" prompts."""
    kinds = ("test", "described", "named")
    if trial.method == RENDERS:
        again = make_domain(trial.domain, trial.size.images + 1 + trial.seed, trial.size.prompts)  # other draws
        return {kind: render(getattr(again, kind)) for kind in kinds}
    denoiser = _model().denoiser
    if trial.method not in REFERENCES:
        denoiser = _trained(trial, output)
    conditions = {kind: [_text(text) for text in domain.texts(kind)] for kind in kinds}
    if trial.method == TEACHER:
        shown, encode = render(domain.test), _model().encoder.encode_image_text  # its own image, as in training
        conditions["test"] = [encode(i, text) for i, text in zip(shown, domain.texts("test"), strict=True)]
    seeds = {kind: 1000 * number + trial.seed for number, kind in enumerate(kinds)}
    return {kind: draw(denoiser, conditions[kind], seeds[kind]) for kind in kinds}


def _dataset(trial: Trial, output: Path) -> Path:
    return output / f"domain{trial.domain}-{trial.size.images}"


def _trained(trial: Trial, output: Path) -> StandaloneDenoiser:
    """The model after training, from the file that the run wrote."""
    model, folder = _model(), output / "runs" / trial.name
    report = read_dataset(_dataset(trial, output), pixel_budget=IMAGE_SIZE**2, multiple=Z_IMAGE.pixel_multiple)
    report.raise_for_errors()
    data = build_training_set(
        report.pairs, model.encoder, ConditionCache(output / "cache"), anchors=True,
        anchor_prompts=anchor_prompts(trial.domain),
    )  # fmt: skip
    facts = {"dopsd_base_fingerprint": model.fingerprint}
    result = train(trial.config(), model.denoiser, data, folder, facts=facts, sample_steps=SAMPLE_STEPS)
    for name in (CHECKPOINTS_NAME, CLASS_IMAGES_NAME):
        shutil.rmtree(folder / name, ignore_errors=True)
    denoiser = StandaloneDenoiser(load_transformer(result.lora_path))
    result.lora_path.unlink()  # 13 MB of each trial
    return denoiser


def draw(denoiser: StandaloneDenoiser, conditions: Sequence[Condition], seed: int) -> Tensor:
    """One image per condition in the model's own few steps, [n, 3, 64, 64] in [0, 1]; equal seeds have equal noise."""
    shape = Z_IMAGE.latent_shape(IMAGE_SIZE, IMAGE_SIZE)
    noise = torch.randn(len(conditions), *shape, generator=make_generator(seed, "demo domain, samples"))
    sigmas = Z_IMAGE.sigmas(SAMPLE_STEPS, IMAGE_SIZE, IMAGE_SIZE)
    starts = range(0, len(conditions), _BATCH)
    parts = [sample(denoiser, conditions[i : i + _BATCH], noise[i : i + _BATCH], sigmas) for i in starts]
    return _model().encoder.decode(torch.cat(parts))


def _write_sheet(path: Path, trial: Trial, domain: Domain, images: Mapping[str, Tensor]) -> None:
    rows = [Row("domain", "renders of the prompts", render(domain.test[:_SHOWN]))]
    remarks = {"test": "the domain's prompts", "described": "another appearance", "named": "bound names"}
    rows += [Row(trial.method, remark, images[kind][:_SHOWN]) for kind, remark in remarks.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(trial.name, rows).save(path)


# -- all trials --------------------------------------------------------------------------------------------------------


def run_all(trials: Sequence[Trial], output: Path, jobs: int) -> list[Scores]:
    """The scores of the trials, in order, computed in `jobs` processes of one thread."""
    for folder, trial in {_dataset(trial, output): trial for trial in trials}.items():
        write_domain(make_domain(trial.domain, trial.size.images, trial.size.prompts), folder)
    if jobs == 1:
        return [run_trial(trial, output) for trial in trials]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        return list(pool.map(run_trial, trials, [output] * len(trials)))


def best_rates(rates: Sequence[float], size: Size, output: Path, jobs: int) -> dict[str, float]:
    """For each method the rate whose images are closest to the development domain."""
    trials = [Trial(method.name, rate, DEVELOPMENT, 0, size) for method in METHODS for rate in rates]
    found = dict(zip(trials, run_all(trials, output, jobs), strict=True))
    return {
        method.name: min(
            (trial for trial in trials if trial.method == method.name), key=lambda t: found[t].frechet_domain
        ).rate
        for method in METHODS
    }


def to_section(
    found: Mapping[Trial, Scores], rates: Mapping[str, float], tried: Sequence[float], command: str, size: Size
) -> Section:
    """A row per method: mean and standard deviation over domains and seeds."""
    titles = {**REFERENCES, **{m.name: f"{m.title}, lr {rates[m.name]:g}" for m in METHODS}}
    columns = ("method", "Fréchet, domain", "its style", "following", "sharpness", "prior error", "Fréchet, prior",
               "names wrong")  # fmt: skip
    rows = []
    for name, title in titles.items():
        scores = [scores for trial, scores in found.items() if trial.method == name]
        values = {column.name: [getattr(one, column.name) for one in scores] for column in fields(Scores)}
        rows.append((title, *(_cell(v) if name != RENDERS or key in _OF_RENDERS else "" for key, v in values.items())))
    domains = {trial.domain for trial in found}
    notes = (
        f"Mean and standard deviation over {len(domains)} domains with {len(found) // len(domains) // len(titles)} "
        f"seeds each: {size.images} renders with one center and texture, {size.steps} steps of all weights, "
        f"{SAMPLE_STEPS} sampling steps, {size.prompts} prompts of each kind. Each method has the rate of "
        f"{', '.join(f'{rate:g}' for rate in tried)} that came closest to the renders of another domain.",
        "The captions do not say the style. Its prompts are new captions of the same form; the prior is prompts that "
        "describe another appearance in full, and those with a bound name.",
    )
    title = "Full weights on a domain: D-OPSD, SFT and PSO"
    return Section("full-weights", title, command, None, Table(columns, tuple(rows)), notes)


def _cell(values: Sequence[float]) -> str:
    return f"{mean(values):.3g} ± {pstdev(values):.2g}"


def main(argv: Sequence[str] | None = None) -> None:
    """Finds the rates, runs all trials and writes the section."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for what is done so far")
    for name, default in (("steps", 100), ("images", 320), ("prompts", 256), ("domains", 3), ("seeds", 2), ("jobs", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to choose from")
    parser.add_argument("--dry", action="store_true", help="print the table instead of writing docs/results.md")
    args = parser.parse_args(argv)
    size = Size(args.steps, args.images, args.prompts)
    rates = best_rates(args.rates, size, args.output, args.jobs)
    pairs = [(domain, seed) for domain in range(args.domains) for seed in range(args.seeds)]
    chosen = {**dict.fromkeys(REFERENCES, 0.0), **rates}
    trials = [Trial(name, rate, domain, seed, size) for name, rate in chosen.items() for domain, seed in pairs]
    found = dict(zip(trials, run_all(trials, args.output, args.jobs), strict=True))
    words = (f"--{name} {getattr(args, name)}" for name in ("steps", "images", "prompts", "domains", "seeds"))
    section = to_section(found, rates, args.rates, f"python -m benchmarks.full_weights {' '.join(words)}", size)
    if args.dry:
        print(section.table.to_markdown())
        return
    record(measured_here(section, f"{args.jobs} jobs"), RESULTS)


if __name__ == "__main__":
    main()
