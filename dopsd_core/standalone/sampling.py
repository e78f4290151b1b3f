"""The commands sample and teacher-preview, on any model of the standalone host."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.lora_file import read_safetensors
from ..conditioning.cache import digest_bytes
from ..conditioning.encode import Condition, EncodeRequest, ImageInput, encode_dataset
from ..conditioning.teachers import TeacherView, choose_teacher
from ..data.buckets import Bucket
from ..data.captions import check_prompts, put_trigger
from ..data.images import ImageError, decode, load_image, to_tensor
from ..families import Family
from ..image_grid import Row, contact_sheet, to_images
from ..rollout import sample
from ..training.prompt_remarks import equal_rows_remarks
from ..training.rng import make_generator
from ..training.saved_loras import SavedLora, saved_loras
from ..training.shown_images import mask_remarks, seen_images
from .chosen import family_of, require_family, view_of
from .datasets import read_images
from .hosts.demo import with_lora
from .hosts.model import HostModel, load_model, sees_images
from .model_options import ModelOptions
from .previews import MAX_PROMPTS, TILE, Painter, encode_shown, teacher_sheet
from .texts import say, warn


def run_sample(args: argparse.Namespace) -> int:
    """Samples a model in its few steps, optionally with a LoRA or with the teacher's condition."""
    options = ModelOptions.of(args)
    family = family_of(options)
    view = choose_teacher(("vlm",) if options.is_demo else family.teachers, args.teacher_view, edits=False)
    if args.lora and not args.lora.exists():
        raise FileNotFoundError(f"{args.lora} does not exist; give a LoRA file that training wrote, or a run's folder")
    saves = _saves_of(args.lora) if args.lora and args.lora.is_dir() else []
    if lora := saves[0].path if saves else args.lora:
        require_family(lora, read_safetensors(lora)[1], family, options)
    model = load_model(options, sees_images(view) and args.teacher_image is not None)
    width, height = args.size or (model.side, model.side)
    shape = family.latent_shape(width, height)
    prompts = [put_trigger(prompt, "") for prompt in args.prompts]
    warn(check_prompts(prompts, "prompt"))
    conditions = _conditions(args, model, view, prompts, (width, height))
    args.output.mkdir(parents=True, exist_ok=True)
    denoiser = model.denoiser
    if saves:
        draw = partial(_draw_all, args, model, conditions, (width, height))
        return _write_strip(args.output / "strip.png", prompts, args.lora.name, saves, draw)
    sigmas = family.sigmas(args.steps or model.sample_steps, width, height)
    for number, (prompt, condition) in enumerate(zip(prompts, conditions, strict=True), 1):
        seeds = range(args.seed, args.seed + args.count)
        noise = torch.stack([torch.randn(shape, generator=make_generator(seed, "sample")) for seed in seeds])
        here = [condition.to(denoiser.device)] * args.count
        with with_lora(denoiser, args.lora, args.strength) if args.lora else nullcontext():
            latents = sample(denoiser, here, noise.to(denoiser.device), sigmas)
        for seed, drawn in zip(seeds, to_images(model.encoder.decode(latents)), strict=True):
            path = args.output / f"{number:02d}_seed{seed}.png"
            drawn.save(path)
            say(f"{path}  {prompt}")
    return 0


def _saves_of(run: Path) -> list[SavedLora]:
    if saves := saved_loras(run):
        return saves
    raise ValueError(f"{run} has no LoRA files along the way: train with --save-every, or give a LoRA file")


def _draw_all(
    args: argparse.Namespace,
    model: HostModel,
    conditions: Sequence[Condition],
    size: tuple[int, int],
    lora: Path | None,
) -> list[Tensor]:
    """One image [3, H, W] in [0, 1] per condition; each row has noise of its own, the same with every LoRA."""
    denoiser, family = model.denoiser, model.family
    sigmas, shape, images = family.sigmas(args.steps or model.sample_steps, *size), family.latent_shape(*size), []
    with with_lora(denoiser, lora, args.strength) if lora else nullcontext():
        for row, condition in enumerate(conditions):
            noise = torch.randn(1, *shape, generator=make_generator(args.seed + row, "sample")).to(denoiser.device)
            latent = sample(denoiser, [condition.to(denoiser.device)], noise, sigmas)
            images.append(model.encoder.decode(latent)[0])
    return images


def _write_strip(
    path: Path,
    prompts: Sequence[str],
    run: str,
    saves: Sequence[SavedLora],
    draw: Callable[[Path | None], Sequence[Tensor]],
) -> int:
    """Writes a sheet: a row per prompt, a column without a LoRA, then one per LoRA of the run.

    draw: the images [3, H, W] in [0, 1] of all prompts with a LoRA file.
    """
    titles = ["untouched", *(f"step {saved.step}" for saved in saves)]
    columns = [draw(None), *(draw(saved.path) for saved in saves)]
    lines = zip(prompts, zip(*columns, strict=True), strict=True)
    rows = [Row(text, "", images, () if number else titles) for number, (text, images) in enumerate(lines)]
    contact_sheet(run, rows, tile=TILE).save(path)
    say(f"{path}: {len(prompts)} prompts at {len(saves)} steps of {run}")
    return 0


def _conditions(
    args: argparse.Namespace, model: HostModel, view: TeacherView, prompts: Sequence[str], size: tuple[int, int]
) -> list[Condition]:
    if args.teacher_image is None:
        return [model.encoder.encode_text(prompt) for prompt in prompts]
    try:
        decoded = decode(args.teacher_image)
    except ImageError as error:
        raise ValueError(f"{args.teacher_image} {error}") from error
    warn(f"{args.teacher_image}: {remark}" for remark in decoded.remarks)
    if sees_images(view):
        image = to_tensor(decoded.image)
        return [model.encoder.encode_image_text(image, prompt) for prompt in prompts]
    bucket = _bucket(model.family, decoded.image.size)
    shown = ImageInput(digest_bytes(args.teacher_image.read_bytes()), lambda: load_image(args.teacher_image, bucket))
    requests = [EncodeRequest(shown, prompt) for prompt in prompts]
    return [dual.teacher for dual in encode_dataset(requests, model.encoder, None, teacher=view)]


def _bucket(family: Family, size: tuple[int, int]) -> Bucket:
    """About the image's own size, at most the family's, in multiples of the family's."""
    scale = min(1.0, (family.pixel_budget / (size[0] * size[1])) ** 0.5)
    width, height = (max(1, round(side * scale / family.pixel_multiple)) * family.pixel_multiple for side in size)
    return Bucket(width, height)


def run_teacher_preview(args: argparse.Namespace) -> int:
    """Draws what the teacher draws for the first images of a dataset, before any training."""
    options = ModelOptions.of(args)
    family = family_of(options)
    report = read_images(args, family, options)
    view = view_of(args, family, report, options)
    model = load_model(options, sees_images(view))
    pairs = report.pairs[: args.count or MAX_PROMPTS]
    texts = [pair.captions[0] for pair in pairs]
    shown = encode_shown(texts, report.pairs, model, None, view, args.teacher_image)
    painter = Painter(model, args.steps or model.sample_steps, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    warn(mask_remarks(report.pairs, view.background))
    warn(equal_rows_remarks(texts, view))
    seen = seen_images(report.pairs, len(pairs), args.teacher_image, view.background)
    teacher_sheet(painter, shown, pairs, seen, view).save(args.output)
    say(f"{args.output}: the student can only become as good as the row of the teacher")
    return 0
