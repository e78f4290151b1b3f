"""The command `python -m dopsd_core evaluate`: a report card on the demo model, or the images of a benchmark."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..adapters.lora_file import read_safetensors
from ..data.captions import PLACEHOLDER, check_prompts
from ..data.dataset import read_dataset
from ..data.images import read_image, to_tensor
from ..demo.concept import make_concept
from ..demo.model_files import JUDGE_FILE, WEIGHTS
from ..demo.settings import SAMPLE_STEPS
from ..demo.world import IMAGE_SIZE, TRIGGER
from ..families import Z_IMAGE
from ..files.atomic import write_atomic
from ..metrics.arguments import WEIGHTS as METRICS
from ..metrics.evaluation import count_scores, evaluate
from ..metrics.layouts import read_prompts, write_layout
from ..metrics.loading import load_metrics
from ..metrics.measures import measures_of
from ..metrics.protocol import Shot, all_shots
from ..metrics.report_card import draw_report_card, summary_lines, to_json
from ..rollout import sample
from ..sharing.model_spec import trigger_of
from ..text import printable
from .evaluate import judge_measures
from .hosts.demo import DemoModel, load_demo_model, with_lora
from .judge import load_judge

CARD, REPORT = "report_card.png", "report_card.json"
_BATCH = 32
_TESTS, _DESCRIBED, _GENERIC = 8, 6, 6


def run_evaluate(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code.

    Raises:
        ValueError: an argument is missing or invalid, or a metric is not available.
        OSError: a file cannot be read or written.
    """
    if args.lora is not None and not args.lora.exists():
        raise FileNotFoundError(f"{args.lora} does not exist; give a LoRA file that training wrote")
    if args.layout is not None:
        return _write_benchmark(args)
    if args.lora is None:
        raise ValueError("there is no LoRA to evaluate: give --lora")
    if wrong := [strength for strength in args.strengths if not strength > 0]:
        raise ValueError(f"--strengths: {wrong[0]:g} is not above 0; the untouched model is always drawn beside them")
    return _write_report_card(args)


@dataclass(frozen=True)
class DemoPainter:
    """Draws images of the demo model, with or without a LoRA; `on_image` is called after each.

    Attributes:
        model: the demo model.
        lora: the LoRA file; None to draw without.
        steps: Euler steps.
        on_image: called with the number of images that were drawn.
    """

    model: DemoModel
    lora: Path | None
    steps: int
    on_image: Callable[[int], object] = lambda count: None

    def draw(self, strength: float, shots: Sequence[Shot]) -> list[Tensor]:
        """One image [3, H, W] in [0, 1] per shot, with the LoRA at a strength; without it at 0."""
        applied = self.lora is not None and strength != 0
        images: dict[int, Tensor] = {}
        with with_lora(self.model.denoiser, self.lora, strength) if self.lora and applied else nullcontext():
            for size in dict.fromkeys((shot.width, shot.height) for shot in shots):
                places = [i for i, shot in enumerate(shots) if (shot.width, shot.height) == size]
                for start in range(0, len(places), _BATCH):
                    some = places[start : start + _BATCH]
                    images.update(zip(some, self._draw([shots[i] for i in some], *size), strict=True))
                    self.on_image(len(some))
        return [images[i] for i in range(len(shots))]

    def _draw(self, shots: Sequence[Shot], width: int, height: int) -> Tensor:
        shape, encoder = Z_IMAGE.latent_shape(width, height), self.model.encoder
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(shot.seed)) for shot in shots]
        conditions = [encoder.encode_text(shot.prompt) for shot in shots]
        sigmas = Z_IMAGE.sigmas(self.steps, width, height)
        return encoder.decode(sample(self.model.denoiser, conditions, torch.stack(noise), sigmas))


def _write_report_card(args: argparse.Namespace) -> int:
    side = args.resolution or IMAGE_SIZE
    multiple = Z_IMAGE.pixel_multiple
    trigger = args.trigger or trigger_of(read_safetensors(args.lora)[1])
    report = read_dataset(args.source, pixel_budget=side**2, multiple=multiple, trigger=trigger)
    report.raise_for_errors()
    if any(pair.source_images for pair in report.pairs):
        raise ValueError(f"{args.source} contains edits, which cannot be evaluated: use images with captions")
    if len(report.concepts) > 1:
        raise ValueError(f"{args.source} has the concepts {', '.join(report.concepts)}: give the folder of one of them")
    prompts = args.prompts or _demo_prompts()
    for warning in check_prompts(prompts, "prompt", trigger):
        _say(f"warning: {warning}")
    metrics = load_metrics(
        {name: getattr(args, name) for name in METRICS}, vlm_kind=args.vlm_kind, device=args.device,
        download=args.download,
    )  # fmt: skip
    shots = all_shots(
        report.pairs, prompts, trigger, args.class_name, seed=args.seed, num_seeds=args.seeds, area=side**2,
        multiple=multiple,
    )  # fmt: skip
    sources = [to_tensor(read_image(pair.image_path)) for pair in report.pairs]
    measures = [*judge_measures(load_judge(WEIGHTS / JUDGE_FILE), sources), *measures_of(metrics)]
    strengths = list(dict.fromkeys(args.strengths))
    work = len(shots) * (len(strengths) + 2) + count_scores(shots, len(strengths), measures)
    with tqdm(total=work, unit="image") as bar:
        painter = DemoPainter(load_demo_model(), args.lora, args.steps or SAMPLE_STEPS, bar.update)
        evaluation = evaluate(
            args.lora.name, shots, sources, strengths, painter.draw, measures, lambda: bar.update(1),
            ["The demo's judge, a classifier of renders, stands in for metrics whose weights are not given."],
        )  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    card = io.BytesIO()
    draw_report_card(evaluation, tile=128).save(card, format="PNG")
    write_atomic(args.output / CARD, card.getvalue())
    write_atomic(args.output / REPORT, to_json(evaluation).encode())
    _say("\n".join([*summary_lines(evaluation), "", str(args.output / CARD), str(args.output / REPORT)]))
    return 0


def _write_benchmark(args: argparse.Namespace) -> int:
    prompts, side = read_prompts(args.layout, args.source), args.resolution or IMAGE_SIZE
    painter = DemoPainter(load_demo_model(), args.lora, args.steps or SAMPLE_STEPS)
    strength = args.strengths[0]

    def draw(prompt: str, seeds: Sequence[int]) -> list[Tensor]:
        return painter.draw(strength, [Shot("ordinary", prompt, prompt, seed, side, side) for seed in seeds])

    with tqdm(total=len(prompts), unit="prompt") as bar:
        write_layout(args.layout, prompts, draw, args.output, args.seed, lambda done, total: bar.update(done - bar.n))
    _say(f"{len(prompts)} prompts: {args.output}, for the scorer of {args.layout}")
    return 0


def _demo_prompts() -> list[str]:
    """Prompts of the demo's world: with the trigger, describing an appearance, without any."""
    concept = make_concept(0)
    tests = [text.replace(TRIGGER, PLACEHOLDER) for text in concept.unseen.texts[:_TESTS]]
    return [*tests, *concept.described.texts[:_DESCRIBED], *concept.generic.texts[:_GENERIC]]


def _say(text: str) -> None:
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()
