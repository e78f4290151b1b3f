"""Full weights through the real commands: the written file and folder are the student, for every host and family."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dopsd_core.__main__ import main
from dopsd_core.arguments import config_from_args, parse_args
from dopsd_core.conditioning.encode import Condition
from dopsd_core.config import TrainConfig
from dopsd_core.demo.settings import demo_config
from dopsd_core.families import FAMILIES, FLUX2_KLEIN, KREA2, Z_IMAGE, Family
from dopsd_core.standalone.settings import family_config
from dopsd_core.training.checkpoint import load_checkpoint
from tests import model_folders
from tests.toy_denoiser import assert_near

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """z_image/, flux2_klein/, vision/ and photos/."""
    folder = tmp_path_factory.mktemp("place")
    model_folders.write_z_image(folder / "z_image")
    model_folders.write_klein(folder / "flux2_klein")
    model_folders.write_vision(folder / "vision")
    model_folders.write_photos(folder / "photos", "a badge")
    return folder


def run(*words: object) -> int:
    torch.set_num_threads(1)
    return main([str(word) for word in words])


def train(place: Path, model: str, output: Path, *words: object) -> int:
    quick = (
        "--steps",
        2,
        "--lr",
        "1e-3",
        "--rollout-steps",
        2,
        "--probe-every",
        0,
        "--anchor-probability",
        0,
        "--track",
        "none",
    )
    chosen = ("--model", place / model, "--vision", place / "vision", "--device", "cpu", "--resolution", 64)
    quick = (*quick, "--anchor-probability", 0)
    return run("train", place / "photos", "--output", output, "--adapter", "full", *quick, *chosen, *words)


def student(folder: Path) -> dict[str, Tensor]:
    checkpoint = load_checkpoint(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 2
    return dict(checkpoint.lora)


def prediction(denoiser: Any, channels: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x, features = torch.randn(1, channels, 4, 6, generator=generator), torch.randn(5, width, generator=generator)
    with torch.no_grad():
        return denoiser.predict_x0(x, 0.7, [Condition(features.to(dtype))])


def denoiser_of(place: Path, name: str, state: dict[str, Tensor]) -> Any:
    """The host's denoiser with these weights, in fp32."""
    from dopsd_core.standalone.hosts.model import DIFFUSERS_FAMILIES

    classes = DIFFUSERS_FAMILIES[name]()
    transformer = classes.transformer.from_pretrained(place / name, subfolder="transformer")
    transformer.load_state_dict(state)
    return classes.denoiser(transformer)


# -- real models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels", "width"), [("z_image", 16, 32), ("flux2_klein", 128, 96)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_file_and_folder_are_the_student(
    place: Path, tmp_path: Path, name: str, channels: int, width: int, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dopsd_core.standalone.hosts.model import DIFFUSERS_FAMILIES, load_model
    from dopsd_core.standalone.model_options import ModelOptions

    folder = tmp_path / "run"
    assert train(place, name, folder, "--dtype", dtype, "--saved-dtype", dtype) == 0
    assert f"model: {folder / 'model.safetensors'}" in (out := capsys.readouterr().out)
    assert f"In diffusers' layout: {folder / 'transformer'}" in out
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} <= {".lock"}, "leftovers"
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    state = {key: value.to(kind).float() for key, value in student(folder).items()}
    wanted = prediction(denoiser_of(place, name, state), channels, width)
    untouched = prediction(load_model(ModelOptions(str(place / name), dtype="fp32"), False).denoiser, channels, width)
    assert (wanted - untouched).norm() > 1e-3 * untouched.norm()

    file = str(folder / "model.safetensors")
    single = load_model(ModelOptions(file, base=str(place / name), dtype="fp32"), False).denoiser
    assert_near(prediction(single, channels, width), wanted)
    classes = DIFFUSERS_FAMILIES[name]()
    loaded = classes.transformer.from_pretrained(folder, subfolder="transformer")
    assert_near(prediction(classes.denoiser(loaded.float()), channels, width), wanted)
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {kind}  # noqa: SIM118
    (in_folder,) = (folder / "transformer").glob("*.safetensors")
    assert {value.dtype for value in load_file(in_folder).values()} == {kind}
    assert facts["dopsd_family"] == name and facts["dopsd_step"] == "2"
    assert json.loads(facts["dopsd_config"])["adapter"] == {"name": "full", "saved_dtype": dtype}


@pytest.mark.long
def test_a_further_run_replaces_the_folder(place: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "old.txt").write_text("of an older run", encoding="utf-8")
    assert train(place, "flux2_klein", tmp_path) == 0
    assert not (tmp_path / "transformer" / "old.txt").exists()
    assert (tmp_path / "transformer" / "config.json").exists()


def test_quantised_weights_are_refused_before_anything_is_loaded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place, "z_image", tmp_path / "run", "--quantise", "quanto-int8") == 1
    assert "which --quantise quanto-int8 packs: leave out --quantise" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- the demo model ----------------------------------------------------------------------------------------------------


def test_of_the_demo_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dopsd_core.demo.model_files import MODEL_FILE, TEXT_WIDTH, WEIGHTS
    from dopsd_core.standalone.hosts.demo import StandaloneDenoiser
    from dopsd_core.standalone.hosts.demo_networks import new_transformer
    from dopsd_core.standalone.hosts.demo_weight_files import load_transformer

    words = ("--steps", 2, "--probe-every", 0, "--anchor-probability", 0, "--track", "none", "--warmup", 0)
    output = ("--output", tmp_path / "run")
    assert run("train", place / "photos", *output, "--adapter", "full", "--saved-dtype", "fp32", *words) == 0
    assert "In diffusers' layout" not in capsys.readouterr().out
    file, network = tmp_path / "run" / "model.safetensors", new_transformer()
    with safe_open(file, "pt") as ours, safe_open(WEIGHTS / MODEL_FILE, "pt") as shipped:
        assert set(ours.keys()) == set(shipped.keys())
        assert all(ours.get_tensor(n).shape == shipped.get_tensor(n).shape for n in ours.keys())  # noqa: SIM118
    network.load_state_dict(student(tmp_path / "run"))
    wanted = prediction(StandaloneDenoiser(network), 16, TEXT_WIDTH)
    assert_near(prediction(StandaloneDenoiser(load_transformer(file)), 16, TEXT_WIDTH), wanted)
    shipped_one = prediction(StandaloneDenoiser(load_transformer(WEIGHTS / MODEL_FILE)), 16, TEXT_WIDTH)
    assert (shipped_one - wanted).norm() > 1e-4 * wanted.norm()


# -- learning rate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "defaults", "rate"),
    [
        ((), demo_config(), 2e-3),
        (("--adapter", "dora"), demo_config(), 2e-3),
        (("--adapter", "full"), demo_config(), 2e-4),
        (("--adapter", "full", "--optimizer", "adafactor"), demo_config(), 2e-4),
        (("--adapter", "full", "--lr", "3e-3"), demo_config(), 3e-3),
        (("--adapter", "full", "--optimizer", "prodigy"), demo_config(), 1.0),
        (("--adapter", "full"), family_config("flux2_klein"), 2e-6),
    ],
)
def test_it_starts_at_a_tenth_of_the_learning_rate(words: tuple[str, ...], defaults: TrainConfig, rate: float) -> None:
    args: argparse.Namespace = parse_args(["train", "images", "--output", "run", *words])
    assert config_from_args(args, defaults).optimizer.lr == pytest.approx(rate)


# -- names in single files ---------------------------------------------------------------------------------------------


def krea2_transformer() -> Any:
    from dopsd_core.standalone.hosts.krea2 import krea2

    sizes = {"text_hidden_dim": 32, "text_intermediate_size": 64}
    heads = {"text_num_attention_heads": 2, "text_num_key_value_heads": 2}
    return model_folders.fill(krea2(2, 2, **sizes, **heads).transformer)


@pytest.mark.parametrize(
    ("family", "make", "converter"),
    [
        (Z_IMAGE, model_folders.z_image_transformer, "convert_z_image_transformer_checkpoint_to_diffusers"),
        (FLUX2_KLEIN, model_folders.klein_transformer, "convert_flux2_transformer_checkpoint_to_diffusers"),
        (KREA2, krea2_transformer, "convert_krea2_transformer_checkpoint_to_diffusers"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_diffusers_reads_the_single_file(family: Family, make: Any, converter: str) -> None:
    import diffusers.loaders.single_file_utils as theirs

    state = make().state_dict()
    assert family.single_file is not None
    written = family.single_file.from_diffusers(state)
    read = getattr(theirs, converter)(dict(written))
    assert read.keys() == state.keys() != written.keys()
    assert all(torch.equal(value, state[name]) for name, value in read.items())


def test_a_family_without_a_single_file_is_not_in_comfyui() -> None:
    """Its model is written under diffusers' names."""
    assert [name for name, family in FAMILIES.items() if family.single_file is None] == ["qwen_image21"]
