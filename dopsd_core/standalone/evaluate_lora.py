"""The command `python -m dopsd_core evaluate`: a report card of a LoRA, or the images of a benchmark."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence

from torch import Tensor
from tqdm import tqdm

from ..adapters.lora_file import read_safetensors
from ..data.captions import PLACEHOLDER, check_prompts
from ..data.dataset import read_dataset
from ..data.images import read_image, to_tensor
from ..demo.concept import make_concept
from ..demo.model_files import JUDGE_FILE, WEIGHTS
from ..demo.world import TRIGGER
from ..files.atomic import write_atomic
from ..metrics.arguments import WEIGHTS as METRICS
from ..metrics.evaluation import count_scores, evaluate
from ..metrics.layouts import read_prompts, write_layout
from ..metrics.loading import load_metrics
from ..metrics.measures import measures_of
from ..metrics.protocol import Shot, all_shots, split_prompts
from ..metrics.report_card import draw_report_card, summary_lines, to_json
from ..sharing.model_spec import trigger_of
from .chosen import family_of, require_family
from .datasets import require_images, side_of
from .evaluate import judge_measures
from .hosts.model import load_model
from .judge import load_judge
from .lora_painter import LoraPainter
from .model_options import ModelOptions
from .texts import say, warn

CARD, REPORT = "report_card.png", "report_card.json"
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
        return _write_benchmark(args, ModelOptions.of(args))
    if args.lora is None:
        raise ValueError("there is no LoRA to evaluate: give --lora")
    if wrong := [strength for strength in args.strengths if not strength > 0]:
        raise ValueError(f"--strengths: {wrong[0]:g} is not above 0; the untouched model is always drawn beside them")
    return _write_report_card(args, ModelOptions.of(args))


def _write_report_card(args: argparse.Namespace, options: ModelOptions) -> int:
    family, facts = family_of(options), read_safetensors(args.lora)[1]
    require_family(args.lora, facts, family, options)
    side, trigger = side_of(args, family, options), args.trigger or trigger_of(facts)
    require_images(args.source)
    report = read_dataset(args.source, pixel_budget=side**2, multiple=family.pixel_multiple, trigger=trigger)
    report.raise_for_errors()
    if any(pair.source_images for pair in report.pairs):
        raise ValueError(f"{args.source} contains edits, which cannot be evaluated: use images with captions")
    if len(report.concepts) > 1:
        raise ValueError(f"{args.source} has the concepts {', '.join(report.concepts)}: give the folder of one of them")
    prompts = args.prompts or (_demo_prompts() if options.is_demo else [])
    warn(check_prompts(prompts, "prompt", trigger))
    metrics = load_metrics(
        {name: getattr(args, name) for name in METRICS}, vlm_kind=args.vlm_kind, device=_device_of_metrics(args),
        download=args.download,
    )  # fmt: skip
    shots = all_shots(
        report.pairs, prompts, trigger, args.class_name, seed=args.seed, num_seeds=args.seeds, area=side**2,
        multiple=family.pixel_multiple,
    )  # fmt: skip
    sources = [to_tensor(read_image(pair.image_path)) for pair in report.pairs]
    judged = judge_measures(load_judge(WEIGHTS / JUDGE_FILE), sources) if options.is_demo else []
    measures = [*judged, *measures_of(metrics)]
    strengths = list(dict.fromkeys(args.strengths))
    work = len(shots) * (len(strengths) + 2) + count_scores(shots, len(strengths), measures)
    model = load_model(options, sees=False)
    with tqdm(total=work, unit="image") as bar:
        painter = LoraPainter.of(model, [shot.prompt for shot in shots], args.lora, args.steps, bar.update)
        evaluation = evaluate(
            args.lora.name, shots, sources, strengths, painter.draw, measures, lambda: bar.update(1),
            _notes(options, prompts, trigger),
        )  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    card = io.BytesIO()
    draw_report_card(evaluation, tile=128 if options.is_demo else 256).save(card, format="PNG")
    write_atomic(args.output / CARD, card.getvalue())
    write_atomic(args.output / REPORT, to_json(evaluation).encode())
    say("\n".join([*summary_lines(evaluation), "", str(args.output / CARD), str(args.output / REPORT)]))
    return 0


def _device_of_metrics(args: argparse.Namespace) -> str:
    return args.metrics_device or ("cpu" if args.device == "auto" else args.device)


def _notes(options: ModelOptions, prompts: Sequence[str], trigger: str) -> list[str]:
    if options.is_demo:
        return ["The demo's judge, a classifier of renders, stands in for metrics whose weights are not given."]
    if not split_prompts(prompts, trigger)[1]:
        return ["No ordinary prompts were given, so retention was not measured: give some with --prompts."]
    return []


def _write_benchmark(args: argparse.Namespace, options: ModelOptions) -> int:
    family = family_of(options)
    if args.lora is not None:
        require_family(args.lora, read_safetensors(args.lora)[1], family, options)
    prompts, side = read_prompts(args.layout, args.source), side_of(args, family, options)
    model = load_model(options, sees=False)
    painter = LoraPainter.of(model, [prompt.text for prompt in prompts], args.lora, args.steps)
    strength = args.strengths[0]

    def draw(prompt: str, seeds: Sequence[int]) -> list[Tensor]:
        return painter.draw(strength, [Shot("ordinary", prompt, prompt, seed, side, side) for seed in seeds])

    with tqdm(total=len(prompts), unit="prompt") as bar:
        write_layout(args.layout, prompts, draw, args.output, args.seed, lambda done, total: bar.update(done - bar.n))
    say(f"{len(prompts)} prompts: {args.output}, for the scorer of {args.layout}")
    return 0


def _demo_prompts() -> list[str]:
    """Prompts of the demo's world: with the trigger, describing an appearance, without any."""
    concept = make_concept(0)
    tests = [text.replace(TRIGGER, PLACEHOLDER) for text in concept.unseen.texts[:_TESTS]]
    return [*tests, *concept.described.texts[:_DESCRIBED], *concept.generic.texts[:_GENERIC]]
