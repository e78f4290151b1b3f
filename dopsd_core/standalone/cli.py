"""The commands of `python -m dopsd_core` that load a model: demo, train, sample."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from ..arguments import UNDISTILLED
from ..conditioning.cache import ConditionCache
from ..config import TrainConfig
from ..data.captions import check_prompts, put_trigger
from ..data.dataset import read_dataset
from ..data.images import decode, to_tensor
from ..demo.concept import make_concept, write_dataset
from ..demo.model_files import JUDGE_FILE, SAMPLE_STEPS, WEIGHTS
from ..demo.settings import demo_config
from ..demo.world import IMAGE_SIZE
from ..families import Z_IMAGE
from ..image_grid import to_images
from ..objectives import SFT
from ..rollout import sample
from ..text import printable
from ..training.log import StepReport
from ..training.rng import make_generator
from ..training.trainer import NoCallbacks, train
from ..training.training_set import build_training_set
from .compare import compare, draw_teacher_sheet, dreambooth_job, plan, table, write_results
from .evaluate import Samples
from .hosts.demo import load_demo_model, load_undistilled, with_lora
from .jobs import JobRunner
from .judge import load_judge
from .memory import peak_rss_mb

_BAR = "{percentage:3.0f}% {bar} {elapsed} < {remaining}  {postfix}"


def run_demo(args: argparse.Namespace) -> int:
    """Trains on an unseen concept, compares with SFT and DreamBooth, and writes the results to `args.output`."""
    began = time.perf_counter()
    concept, judge = make_concept(args.concept_seed), load_judge(WEIGHTS / JUDGE_FILE)
    config = demo_config() if args.steps is None else demo_config(steps=args.steps)
    _say(f"Concept {concept.seed}: {concept.words}. The model knows the words, but has never seen this combination.")
    _say(f"It will learn it as [V] from four images in {args.output / 'dataset'}, without those words.")
    write_dataset(concept, args.output / "dataset")
    jobs = plan(config, args.seeds)
    work = sum(job.work for part in jobs for job in part) + (args.seeds - 1) * jobs[-1][0].work
    work += args.seeds * dreambooth_job(config, 0).work

    def show_teacher(base: Samples, teacher: Samples) -> None:
        draw_teacher_sheet(concept, base, teacher).save(args.output / "teacher.png")
        tqdm.write(printable(f"Check the teacher before training: {args.output / 'teacher.png'}"))

    with tqdm(total=math.ceil(work), unit="", bar_format=_BAR) as bar:

        def show_progress(what: str, done: float) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update(done)

        with JobRunner(concept.seed, args.output, args.jobs, show_progress) as runner:
            result = compare(runner, config, args.seeds, show_teacher)
    peak = peak_rss_mb() + result.peak_rss_mb
    report = write_results(args.output, concept, judge, result, time.perf_counter() - began, peak)
    _say("\n" + table(report))
    names = ("overview.png", "contact_sheet.png", "curves.png", "report.json", "lora.safetensors")
    _say("\n" + "\n".join(str(args.output / name) for name in names))
    return 0


def run_train(args: argparse.Namespace) -> int:
    """Trains the demo model on a dataset, or resumes the run.

    args.train_config: the configuration from `arguments.config_from_args`.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    config: TrainConfig = args.train_config
    undistilled = args.model == UNDISTILLED
    if undistilled and config.objective.needs_few_steps:
        raise ValueError(
            f"objective {config.objective.name} needs the few steps of the distilled model; choose --objective sft for "
            f"--model {UNDISTILLED}, or --model demo"
        )
    resolution = args.resolution or IMAGE_SIZE
    report = read_dataset(
        args.dataset, pixel_budget=resolution**2, multiple=Z_IMAGE.pixel_multiple, trigger=args.trigger,
        repeats=args.repeats, root=args.root,
    )  # fmt: skip
    report.raise_for_errors()
    if any(pair.source_images for pair in report.pairs):
        raise ValueError(f"{args.dataset} contains edits, but the demo model cannot edit: use images with captions")
    _say(report.describe())
    if args.heldout_caption is not None:
        _warn(check_prompts([args.heldout_caption], "held-out caption", args.trigger))
    model = load_demo_model()
    denoiser, fingerprint = load_undistilled() if undistilled else (model.denoiser, model.fingerprint)
    unknown = model.encoder.unknown_words([caption for pair in report.pairs for caption in pair.captions])
    if unknown:
        _say(f"warning: the demo model was not trained on these words: {', '.join(unknown)}")
    # SFT does not use anchors, but they are part of the fingerprint of saved runs
    anchors = config.objective.wants_anchors or isinstance(config.objective, SFT)
    cache = ConditionCache(args.output / "cache")
    data = build_training_set(
        report.pairs, model.encoder, cache, trigger=args.trigger,
        teacher_image=args.teacher_image, caption_dropout=config.caption_dropout > 0,
        anchors=anchors, heldout_caption=args.heldout_caption,
    )  # fmt: skip
    asked_for = any(name.endswith("anchor_probability") for name in vars(args))
    if config.objective.anchor_share and not data.anchors and not asked_for:
        _say("warning: no caption contains the trigger, so there are no anchors; anchor_probability is set to 0")
        config = config.replace(objective=config.objective.without_anchors())
    facts = {"dopsd_base_fingerprint": fingerprint} | ({"dopsd_undistilled": args.model} if undistilled else {})
    with tqdm(total=config.steps, unit="step") as bar:
        result = train(
            config, denoiser, data, args.output, _TrainBar(bar), resume=not args.fresh, facts=facts,
            sample_steps=SAMPLE_STEPS, cache=cache,
        )  # fmt: skip
    _say(f"{result.step} steps; LoRA: {result.lora_path}")
    if undistilled:
        _say(f"It was trained on {args.model}; use it on the distilled model, as sample --lora does.")
    return 0


def run_sample(args: argparse.Namespace) -> int:
    """Samples the demo model in its few steps, optionally with a LoRA or with the teacher's condition."""
    model = load_demo_model()
    width, height = args.size or (IMAGE_SIZE, IMAGE_SIZE)
    shape = Z_IMAGE.latent_shape(width, height)
    prompts = [put_trigger(prompt, "") for prompt in args.prompts]
    _warn(check_prompts(prompts, "prompt"))
    image = None
    if args.teacher_image:
        decoded = decode(args.teacher_image)
        image = to_tensor(decoded.image)
        _warn(f"{args.teacher_image}: {remark}" for remark in decoded.remarks)
    if args.lora and not args.lora.exists():
        raise FileNotFoundError(f"{args.lora} does not exist; give a LoRA file that training wrote")
    args.output.mkdir(parents=True, exist_ok=True)
    sigmas = Z_IMAGE.sigmas(args.steps or 4, width, height)
    for number, prompt in enumerate(prompts, 1):
        encoder = model.encoder
        condition = encoder.encode_text(prompt) if image is None else encoder.encode_image_text(image, prompt)
        seeds = range(args.seed, args.seed + args.count)
        noise = torch.stack([torch.randn(shape, generator=make_generator(seed, "sample")) for seed in seeds])
        with _maybe_lora(model.denoiser, args.lora, args.strength):
            latents = sample(model.denoiser, [condition] * args.count, noise, sigmas)
        for seed, drawn in zip(seeds, to_images(encoder.decode(latents)), strict=True):
            path = args.output / f"{number:02d}_seed{seed}.png"
            drawn.save(path)
            _say(f"{path}  {prompt}")
    return 0


def _maybe_lora(denoiser, lora: Path | None, strength: float):
    from contextlib import nullcontext

    return with_lora(denoiser, lora, strength) if lora else nullcontext()


def _say(text: str) -> None:
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        _say(f"warning: {message}")


class _TrainBar(NoCallbacks):
    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def on_class_image(self, done: int, total: int) -> None:
        self._bar.set_postfix_str(f"class image {done} of {total}" if done < total else "")

    def on_step(self, report: StepReport) -> None:
        self._bar.update(report.step - self._bar.n)
        if report.relative_gap is not None:
            self._bar.set_postfix_str(f"gap to teacher {report.relative_gap:.3f}")
