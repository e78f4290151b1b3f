"""Ten optimizer steps of Qwen-Image 2.1 without ComfyUI against a plain restatement of the authors' step, in diffusers,
transformers and peft; and the LoRA file in diffusers' and peft's loaders.

The authors do not train this model. Its grid is the published list of eight sigmas, of which K = 4 takes every second.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dopsd_core.adapters import Lora
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.lora_file import save_lora, save_peft
from dopsd_core.conditioning.encode import EncodeRequest, ImageInput, encode_dataset
from dopsd_core.conditioning.teachers import EDIT, EDIT_TARGET, TeacherView
from dopsd_core.config import TrainConfig
from dopsd_core.families import QWEN_IMAGE21
from dopsd_core.objectives import DOPSD
from dopsd_core.optimizers import AdamW
from dopsd_core.rollout import sample
from dopsd_core.training.rng import DataOrder, draw_noise
from dopsd_core.training.trainer import TrainingSet, train

pytest.importorskip("diffusers.models.transformers.transformer_qwenimage21")
from tests import qwen_image21_twins  # noqa: E402
from tests.plain_step import (  # noqa: E402
    LEARNING_RATE,
    PER_STEP,
    RANK,
    SEED,
    STEPS,
    Draw,
    Pair,
    Trained,
    Velocity,
    assert_same_curves,
    assert_same_weights,
    our_run,
    relative,
    their_run,
)

GRID = (1.0, 0.95418, 0.89508, 0.704534, 0.0)
LAYERS = 2
# (width, height) and caption
IMAGES = {
    (64, 64): "a badge on a sand background",
    (96, 64): "a photo of ohwx, seen from above",
    (64, 96): "ohwx",
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = qwen_image21_twins.pipeline(LAYERS)
    with torch.no_grad():  # so that some gradients are clipped and some are not
        pipe.transformer.proj_out.weight.mul_(6.6)
    return pipe


@pytest.fixture(scope="module")
def host(pipe: Any) -> SimpleNamespace:
    from dopsd_core.standalone.hosts.qwen_image21 import QwenImage21Denoiser, QwenImage21Encoder

    encoder = QwenImage21Encoder(pipe.text_encoder.model, pipe.processor.tokenizer, pipe.vae, "small")
    return SimpleNamespace(denoiser=QwenImage21Denoiser(pipe.transformer), encoder=encoder)


def image(width: int, height: int, seed: int) -> Image.Image:
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return Image.fromarray(pixels.mul(255).byte().permute(1, 2, 0).contiguous().numpy())


def an_input(size: tuple[int, int], seed: int) -> ImageInput:
    def load() -> Tensor:
        drawn = image(*size, seed)
        values = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8)
        return values.view(drawn.height, drawn.width, 3).permute(2, 0, 1).float() / 255

    return ImageInput(digest=f"{size}/{seed}", load=load)


# -- our side ----------------------------------------------------------------------------------------------------------


def our_training(host: SimpleNamespace, view: TeacherView, folder: Path) -> Trained:
    requests = [
        EncodeRequest(an_input(size, 1), caption, (an_input(size, 2),) if view.edits else ())
        for size, caption in IMAGES.items()
    ]
    config = TrainConfig(
        family="qwen_image21", steps=STEPS, grad_accumulation=PER_STEP, seed=SEED, rollout_steps=4, probe_every=0,
        adapter=Lora(rank=RANK, alpha=2.0 * RANK), optimizer=AdamW(lr=LEARNING_RATE),
        objective=DOPSD(loss="x0", anchor_probability=0.0),
    )  # fmt: skip
    data = TrainingSet(encode_dataset(requests, host.encoder, None, teacher=view))
    train(config, host.denoiser, data, folder, checkpointing=1)
    return our_run(folder)


# -- the plain side ----------------------------------------------------------------------------------------------------


def velocity_with(pipe: Any, network: Any, text: str, references: list[Image.Image]) -> Velocity:
    """noise - x0 of [1, 64, h, w] by the pipeline's own calls: its texts, its latents of references, its layout."""
    with torch.no_grad():
        features, _, is_image = pipe.encode_prompt(text, references or None)
        before = [
            pipe._encode_vae_image(
                pipe.image_processor.preprocess(r.convert("RGBA"), width=r.width, height=r.height).unsqueeze(2), None
            )[:, :, 0]
            for r in references
        ]

    def velocity(x: Tensor, sigma: float) -> Tensor:
        images = [*before, x]
        target = is_image.new_ones(1, x.shape[-2] * x.shape[-1] // 4)
        out = network(
            hidden_states=torch.cat([latent.flatten(2).transpose(1, 2) for latent in images], dim=1),
            encoder_hidden_states=features,
            timestep=torch.tensor([sigma]),
            img_shapes=[[(1, *latent.shape[-2:]) for latent in images]],
            img_mask=torch.cat([is_image, target], dim=1),
            return_dict=False,
        )[0]
        return out[:, -x.shape[-2] * x.shape[-1] :].transpose(1, 2).unflatten(2, x.shape[-2:])

    return velocity


def pairs_of(pipe: Any, network: Any, view: TeacherView) -> list[Pair]:
    found = []
    for size, caption in IMAGES.items():
        sources = [image(*size, 2)] if view.edits else []
        student = velocity_with(pipe, network, caption, sources)
        teacher = velocity_with(pipe, network, view.text(caption), [*sources, image(*size, 1)])
        found.append(Pair(student, teacher, GRID))
    return found


def drawn() -> Draw:
    """The images and noise of our run."""
    shapes = tuple(QWEN_IMAGE21.latent_shape(*size) for size in IMAGES)
    order = DataOrder(shapes, (1,) * len(shapes), 1, SEED)

    def draw(step: int, image: int) -> tuple[int, Tensor]:
        (number,) = order.batch(step * PER_STEP + image)
        return number, draw_noise(SEED, step, image, [shapes[number]])

    return draw


# -- the same ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[EDIT, EDIT_TARGET], ids=["a reference", "source and target"])
def trained(
    request: pytest.FixtureRequest, pipe: Any, host: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trained, Trained]:
    """(ours, theirs)."""
    torch.set_num_threads(1)
    start = AdapterSet(host.denoiser.sites(), QWEN_IMAGE21.lora_config(RANK, 2.0 * RANK), seed=SEED).state()
    network = copy.deepcopy(pipe.transformer)  # peft leaves its layers there
    theirs = their_run(network, start, pairs_of(pipe, network, request.param), drawn())
    return our_training(host, request.param, tmp_path_factory.mktemp("run")), theirs


def test_losses_and_gradient_norms_of_every_step(trained: tuple[Trained, Trained]) -> None:
    ours, theirs = trained
    assert_same_curves(ours, theirs)
    assert min(theirs.norms) < 1 < max(theirs.norms)  # some steps are clipped, some are not


def test_weights_after_ten_steps(trained: tuple[Trained, Trained]) -> None:
    assert_same_weights(*trained, parts=7 * LAYERS)


# -- the file in other programs ----------------------------------------------------------------------------------------


@pytest.fixture
def student(host: SimpleNamespace) -> AdapterSet:
    """A LoRA whose every weight does something."""
    adapters = AdapterSet(host.denoiser.sites(), QWEN_IMAGE21.lora_config(RANK, 3.0 * RANK), teacher="frozen")
    generator = torch.Generator().manual_seed(6)
    values = {key: torch.randn(t.shape, generator=generator) * 0.2 for key, t in adapters.state().items()}
    adapters.load_state("student", values)
    return adapters


def assert_the_same_image(pipe: Any, host: SimpleNamespace, student: AdapterSet, network: Any) -> None:
    """The pipeline's latents with this network, which has loaded the LoRA, and those of the student in the trainer."""
    noise = torch.randn(1, *QWEN_IMAGE21.latent_shape(96, 64), generator=torch.Generator().manual_seed(3))
    sigmas, condition = QWEN_IMAGE21.sigmas(8, 96, 64), host.encoder.encode_text("ohwx")
    with torch.no_grad():
        base = sample(host.denoiser, [condition], noise, sigmas)
        with student.attached():
            wanted = sample(host.denoiser, [condition], noise, sigmas)
    own, pipe.transformer = pipe.transformer, network
    try:
        drawn = pipe(
            prompt="ohwx", latents=noise.flatten(2).transpose(1, 2), width=96, height=64, sigmas=list(sigmas[:-1]),
            output_type="latent", use_kv_cache=False,
        ).images  # fmt: skip
    finally:
        pipe.transformer = own
    got = drawn.transpose(1, 2).unflatten(2, noise.shape[-2:])
    assert (wanted - base).norm() > 0.1 * base.norm()
    assert relative(got, wanted) < 1e-4


def test_diffusers_loader_draws_the_same_image(pipe: Any, host: Any, student: AdapterSet, tmp_path: Path) -> None:
    """Every key is one of a module."""
    file, network = tmp_path / "lora.safetensors", copy.deepcopy(pipe.transformer)
    save_lora(file, student.state(), student.config, prefix=QWEN_IMAGE21.key_prefix, dtype=torch.float32)
    keys = {key.removeprefix("transformer.") for key in load_file(file)}
    assert {key.rsplit(".lora_", 1)[0] for key in keys} <= dict(network.named_modules()).keys()
    assert len(keys) == 2 * 7 * LAYERS
    own, pipe.transformer = pipe.transformer, network
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    pipe.transformer = own
    assert_the_same_image(pipe, host, student, network)


def test_pefts_loader_draws_the_same_image(pipe: Any, host: Any, student: AdapterSet, tmp_path: Path) -> None:
    from peft import PeftModel

    save_peft(tmp_path, student.state(), student.config, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(copy.deepcopy(pipe.transformer), str(tmp_path))
    assert_the_same_image(pipe, host, student, loaded.base_model.model)
