"""Ten optimizer steps of our nodes inside ComfyUI against the authors' step, written down here once more.

The other side is diffusers' transformer, transformers' Qwen3-VL with its language weights swapped for those of the text
encoder, peft's two adapters, one backward over all K graphs. Of ours it takes the pictures' buckets and, so that both
can be compared, what is drawn by chance: the order of the pictures, the noise and the LoRA's start.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import toy
import twins
from inprocess import ComfyUI
from loras import give_values
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

STEPS, PER_STEP, RANK, SEED = 10, 2, 2, 3
SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "depth": 4, "deepstack_visual_indexes": [0, 1, 2], "num_heads": 2,
    "num_position_embeddings": 36, "out_hidden_size": TEXT["hidden_size"],
}  # fmt: skip
# (width, height) and caption; none of the sizes is one that Qwen3-VL would look at as it is
PICTURES = {
    (96, 96): "a [V] badge on a sand background",
    (112, 80): "a photo of [V], seen from above",
    (80, 112): "[V]",
}


# -- what both sides start from ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(comfyui: ComfyUI) -> dict[str, Any]:
    """MODEL, CLIP, VAE and VISION as loader nodes leave them, and the networks of the other libraries."""
    return comfyui.call(make_models, comfyui)


def make_models(comfyui: ComfyUI) -> dict[str, Any]:
    import comfy.ops
    import comfy.sd
    from comfy.supported_models_base import ClipTarget
    from comfy.text_encoders import z_image

    vision = comfyui.module("nodes.vision")
    transformer = twins.diffusers_z_image(text_width=TEXT["hidden_size"])
    with torch.inference_mode():
        target = ClipTarget(z_image.ZImageTokenizer, z_image.te())
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, "qwen3_4b_model_config": TEXT})
        toy.fill(clip.cond_stage_model, seed=1)
    real = vision.qwen3vl_4b()
    config = type(real.lm_config)(**TEXT)
    spec = vision.VisionSpec("tiny", {**real.tower, **VISION}, config, real.min_pixels, real.max_pixels)
    encoder, reader = transformers_twins(clip.cond_stage_model.qwen3_4b.transformer.model.state_dict(), spec)
    with torch.inference_mode():
        tower = vision.new_vision(reader.visual.state_dict(), spec, comfy.ops.manual_cast, torch.float32)
        vae = comfyui.module("nodes.demo_models").load_vae()
    return {
        "model": twins.as_model(transformer), "clip": clip, "vae": vae, "vision": tower,
        "transformer": transformer, "encoder": encoder, "reader": reader,
    }  # fmt: skip


def transformers_twins(language: dict[str, Tensor], spec: Any) -> tuple[Any, Any]:
    """transformers' Qwen3, and its Qwen3-VL, whose own language weights are exchanged for those of Qwen3."""
    from transformers import Qwen3Config, Qwen3Model, Qwen3VLConfig, Qwen3VLModel

    shape: dict[str, Any] = {**TEXT, "vocab_size": 151936, "head_dim": 128}
    encoder = Qwen3Model(Qwen3Config(**shape, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    encoder.load_state_dict(language)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    reader = Qwen3VLModel(Qwen3VLConfig(text_config={**shape, "rope_parameters": rope}, vision_config=dict(spec.tower)))
    toy.fill(reader.visual, seed=2)
    reader.language_model.load_state_dict(encoder.state_dict())
    return encoder.eval().requires_grad_(False), reader.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(comfyui: ComfyUI) -> Path:
    """Pictures of the buckets' own sizes: cropping has its own tests."""
    folder = comfyui.input / "authors"
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    for number, ((width, height), caption) in enumerate(PICTURES.items()):
        coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        array = pixels.mul(255).byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(array).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


# -- our side ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(comfyui: ComfyUI, models: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Our nodes in the executor; raw fp32 weights of student and teacher from the last checkpoint."""
    names = ("model", "clip", "vae", "vision")
    kinds = ("MODEL", "CLIP", "VAE", "DOPSD_VISION")
    graph = {
        "models": give_values(comfyui, kinds, [models[name] for name in names]),
        "data": {
            "class_type": "DOPSD_LoadDataset",
            "inputs": {
                "folder": folder.name, "resolution": 96, "trigger": "ohwx", "repeats": 1, "caption_dropout": 0.0,
            },
        },
        "conditions": {
            "class_type": "DOPSD_BuildTeacherCondition",
            "inputs": {
                "dataset": ["data", 0], "clip": ["models", 1], "vae": ["models", 2], "vision": ["models", 3],
                "mode": "vlm", "preview_prompts": "", "anchor_prompts": "",
            },
        },
        "train": {
            "class_type": "DOPSD_TrainLoRA",
            "inputs": {
                "model": ["models", 0], "conditions": ["conditions", 0], "run_name": "authors", "preset": "paper",
                "steps": STEPS, "seed": SEED, "preview_every": 0, "learning_rate": 1e-4, "rank": RANK, "alpha": 0.0,
                "batch_size": 1, "grad_accumulation": PER_STEP, "warmup": 0, "rollout_steps": 4, "grad_steps": 0,
                "loss": "x0", "teacher": "ema", "ema_decay": 0.9999, "anchor_probability": 0.0, "objective": "dopsd",
                "schedule": "constant", "optimizer": "adamw", "checkpoint_every": 100, "probe_every": 0,
                "memory": "auto",
            },
        },
    }  # fmt: skip
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    place = Path(run.value("train", 2))
    last = place / "checkpoints" / f"step-{STEPS:06d}"
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    return {
        "data": run.value("conditions").data,
        "student": load_file(last / "lora.safetensors"),
        "teacher": load_file(last / "teacher.safetensors"),
        "losses": [row["loss"] for row in rows],
        "norms": [row["grad_norm"] for row in rows],
    }


# -- the authors' side -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(models: dict[str, Any], folder: Path) -> list[tuple[Tensor, Tensor]]:
    """(student's, teacher's) features [L, D] of every picture, in the order of the files."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    tokenizer = models["clip"].tokenizer.qwen3_4b.tokenizer
    processor = Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=512 * 512, max_pixels=768 * 768
    )
    found = []
    for number, caption in enumerate(PICTURES.values()):
        caption = caption.replace("[V]", "ohwx")
        text = tokenizer(f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
        pixels = numpy.asarray(Image.open(folder / f"{number}.png").convert("RGB"))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        seen = processor(images=image, do_rescale=False, do_convert_rgb=False, return_tensors="pt")
        marks = "<|image_pad|>" * int(seen["image_grid_thw"].prod() // 4)
        whole = tokenizer(
            f"<|im_start|>user\n<|vision_start|>{marks}<|vision_end|>{caption}<|im_end|>\n<|im_start|>assistant\n",
            return_tensors="pt",
        )
        ids = whole["input_ids"]
        with torch.no_grad():
            student = models["encoder"](**text, output_hidden_states=True).hidden_states[-2][0]
            teacher = models["reader"](
                **whole, **seen, mm_token_type_ids=(ids == 151655).long(), output_hidden_states=True
            ).hidden_states[-2][0, :1024]
        found.append((student, teacher))
    return found


def authors_training(
    comfyui: ComfyUI, transformer: Any, features: list[tuple[Tensor, Tensor]], data: Any, start: dict[str, Tensor]
) -> dict[str, Any]:
    """Their loop: K = 4 steps of the student, x0 loss against the EMA teacher, one backward, clip 1, AdamW, EMA."""
    from peft import LoraConfig

    draws = comfyui.core("draws")
    names = sorted({key.rsplit(".lora_", 1)[0] for key in start})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, init_lora_weights="gaussian")
    weights = {}
    for role in ("student", "teacher"):
        transformer.add_adapter(config, role)
        own = {key: p for key, p in transformer.named_parameters() if f".{role}." in key}
        weights[role] = {key.replace(f".{role}.", "."): p for key, p in own.items()}
        with torch.no_grad():
            for key, parameter in weights[role].items():
                parameter.copy_(start[key])
    parameters = [weights["student"][key] for key in start]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    order = draws.DataOrder(data.shapes(), (1,) * len(data.examples), 1, SEED)

    def predict(role: str, x: Tensor, sigma: float, text: Tensor) -> Tensor:
        transformer.set_adapter(role)
        return twins.velocity(transformer, x, sigma, [text])

    losses, norms, gradients = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        of_step = []
        for sample in range(PER_STEP):
            (number,) = order.batch(step * PER_STEP + sample)
            student, teacher = features[number]
            x = draws.draw_noise(SEED, step, sample, [data.shapes()[number]])
            of_rollout = []
            for sigma, following in pairwise(SIGMAS):
                with torch.no_grad():
                    x0_teacher = x - sigma * predict("teacher", x, sigma, teacher)
                v = predict("student", x, sigma, student)
                of_rollout.append(torch.nn.functional.mse_loss(x - sigma * v, x0_teacher))
                x = (x + (following - sigma) * v).detach()
            of_step.append(torch.stack(of_rollout).mean())
        loss = torch.stack(of_step).mean()
        for parameter in parameters:  # peft switches this off with the adapter
            parameter.requires_grad_(True)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        gradients.append({key: weights["student"][key].grad.clone() for key in start})
        optimizer.step()
        with torch.no_grad():
            for key, average in weights["teacher"].items():
                average.mul_(0.9999).add_(weights["student"][key], alpha=0.0001)
        losses.append(float(loss))
    result = {role: {key: p.detach().clone() for key, p in own.items()} for role, own in weights.items()}
    transformer.delete_adapters(["student", "teacher"])
    return {**result, "losses": losses, "norms": norms, "gradients": gradients}


@pytest.fixture(scope="module")
def theirs(comfyui: ComfyUI, models: dict[str, Any], features: Any, ours: dict[str, Any]) -> dict[str, Any]:
    start = lora_start(comfyui, models["model"])
    return {**authors_training(comfyui, models["transformer"], features, ours["data"], start), "start": start}


def lora_start(comfyui: ComfyUI, model: Any) -> dict[str, Tensor]:
    denoiser = comfyui.module("nodes.host").ComfyDenoiser(model)
    config = denoiser.family.lora_config(RANK, 2.0 * RANK)
    return comfyui.core("adapters").AdapterSet(denoiser.sites(), config, seed=SEED).state()


# -- the same ----------------------------------------------------------------------------------------------------------


def test_conditions(ours: dict[str, Any], features: list[tuple[Tensor, Tensor]]) -> None:
    pairs = ours["data"].pairs
    assert len(pairs) == len(features) == len(PICTURES)
    for pair, (student, teacher) in zip(pairs, features, strict=True):
        assert twins.relative(pair.student.features, student) < 1e-3
        assert twins.relative(pair.teacher.features, teacher) < 1e-3


def test_losses_and_gradient_norms_of_every_step(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """AdamW would hide a factor on the loss or on all gradients."""
    assert len(ours["losses"]) == STEPS
    for kind in ("losses", "norms"):
        assert torch.tensor(ours[kind]).allclose(torch.tensor(theirs[kind]), rtol=1e-4), kind
    assert min(theirs["norms"]) < 1 < max(theirs["norms"])  # some steps are clipped, some are not


def test_weights_after_ten_steps(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """To 1e-3: all of the student's and the teacher's weights; and each tensor's way from the start.

    Adam's first step is g / |g|: where a gradient is a hundred thousand times smaller than its neighbours, it is
    rounding, and the step may point anywhere. Such elements (one in thousands) count in the first comparison and are
    left out of the second, where a single one of them would be more than 1e-3 of its tensor.
    """
    for role in ("student", "teacher"):
        assert ours[role].keys() == theirs[role].keys() and len(ours[role]) == 2 * 7 * 4
        for kind in (".lora_A.", ".lora_B."):
            assert twins.relative(together(ours[role], kind), together(theirs[role], kind)) < 1e-3, (role, kind)
    left_out = total = 0
    for key, end in theirs["student"].items():
        certain = is_certain([step[key] for step in theirs["gradients"]])
        total, left_out = total + certain.numel(), left_out + int((~certain).sum())
        start = theirs["start"][key]
        assert (end - start).norm() > 1e-5 * end.numel() ** 0.5
        ways = [(weights["student"][key] - start)[certain] for weights in (ours, theirs)]
        assert twins.relative(*ways) < 1e-3, key
        if ".lora_B." in key:  # a step of the teacher's A, 1e-8, is less than fp32 resolves; its B grows from 0
            assert twins.relative(*(weights["teacher"][key][certain] for weights in (ours, theirs))) < 1e-3, key
    assert left_out < 2e-3 * total


def together(weights: dict[str, Tensor], kind: str) -> Tensor:
    return torch.cat([weights[key].flatten() for key in sorted(weights) if kind in key])


def is_certain(gradients: list[Tensor]) -> Tensor:
    """Where no step's gradient is made of rounding. A's first one is exactly zero, B being zero, and moves nothing."""
    return torch.stack([(g == 0).all() | (g.abs() > 1e-5 * g.abs().median()) for g in gradients]).all(0)
