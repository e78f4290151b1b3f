"""Models through diffusers on a CUDA device: the same training as on a CPU; encoders leave before the network comes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dopsd_core.conditioning.teachers import TEACHER_VIEWS
from dopsd_core.config import TrainConfig
from dopsd_core.data.dataset import Pair, read_dataset
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.objectives import DOPSD
from dopsd_core.optimizers import AdamW
from dopsd_core.standalone.hosts.model import load_model
from dopsd_core.standalone.model_options import ModelOptions
from dopsd_core.standalone.previews import Painter
from dopsd_core.training.trainer import train
from dopsd_core.training.training_set import TrainingSet, build_training_set
from tests.model_folders import write_klein, write_vision, write_z_image


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_z_image(folder / "z_image")
    write_klein(folder / "flux2_klein")
    write_vision(folder / "vision")
    write_dataset(make_concept(0), folder / "photos")
    return folder


@pytest.fixture(scope="module")
def pairs(place: Path) -> Sequence[Pair]:
    return read_dataset(place / "photos", pixel_budget=64 * 64, multiple=16).pairs[:2]


def on_device(module: Any) -> bool:
    return any(parameter.device.type == "cuda" for parameter in module.parameters())


def trained(place: Path, pairs: Sequence[Pair], family: str, device: str, folder: Path) -> tuple[Any, torch.Tensor]:
    """The student after three steps, and an image."""
    options = ModelOptions(str(place / family), vision=str(place / "vision"), dtype="fp32", device=device)
    model: Any = load_model(options, family == "z_image")
    view = TEACHER_VIEWS[model.teachers[0]]
    data: TrainingSet = build_training_set(pairs, model.encoder, teacher=view)
    encoders = [model.encoder._text_encoder, model.encoder._vae]
    if device == "cuda":
        assert sum(map(on_device, encoders)) <= 1
    denoiser = model.denoiser
    assert denoiser.device.type == device and not any(map(on_device, encoders))
    config = TrainConfig(
        family=family, steps=3, rollout_steps=2, checkpoint_every=3, adapter=model.family.lora_config(2),
        objective=DOPSD(anchor_probability=0.0), optimizer=AdamW(lr=1e-3),
    )  # fmt: skip
    result = train(config, denoiser, data, folder)
    drawn = Painter(model, 2, 0).draw([data.pairs[0].student], [model.family.latent_shape(64, 64)])
    return load_file(result.checkpoint_path / "lora.safetensors"), drawn[0]


@pytest.mark.parametrize("family", ["z_image", "flux2_klein"])
def test_a_training_is_that_on_the_cpu(place: Path, pairs: Sequence[Pair], tmp_path: Path, family: str) -> None:
    here, image = trained(place, pairs, family, "cuda", tmp_path / "cuda")
    there, expected = trained(place, pairs, family, "cpu", tmp_path / "cpu")
    flat = [torch.cat([value.flatten() for _, value in sorted(state.items())]) for state in (here, there)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 1e-3
    assert torch.allclose(image, expected, atol=1e-3) and image.device.type == "cpu"
