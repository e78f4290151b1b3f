"""`--model` with files that do not belong together: one sentence before anything is loaded, encoded or trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dopsd_core.families import KREA2
from dopsd_core.standalone.hosts import parts
from dopsd_core.standalone.hosts.model import DiffusersModel, load_model
from dopsd_core.standalone.model_options import ModelOptions

pytest.importorskip("diffusers.models.transformers.transformer_qwenimage21")
from tests.own_tower_folders import FAMILIES  # noqa: E402

OTHER = {"krea2": "qwen_image21", "qwen_image21": "krea2"}
LAYER = {"krea2": "transformer_blocks.1.ff.down.weight", "qwen_image21": "transformer_blocks.1.img_mlp.out.weight"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("models")
    return {name: make(place / name).folder for name, make in FAMILIES.items()}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def refused(sentence: str, model: Path, **changes: Any) -> None:
    """The sentence, from loading no part of the model."""
    options = ModelOptions(**{"model": str(model), "dtype": "fp32", "device": "cpu", **changes})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=sentence) as caught:
        patch.setattr(parts, "_loaded", lambda *args, **kwargs: pytest.fail("a part was loaded"))
        load_model(options, sees=True)
    assert "\n" not in str(caught.value)


def changed(folder: Path, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def weights(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def without(folder: Path, part: str, word: str) -> None:
    file = weights(folder, part)
    save_file({name: value for name, value in load_file(file).items() if word not in name}, file, {"format": "pt"})


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("transformer", r"transformer is a \w+Transformer2DModel, and this model needs a \w+Transformer2DModel"),
        ("text_encoder", "text_encoder is .* wide with .* layers, and the transformer needs one .* wide with at least"),
    ],
)
def test_a_part_of_the_other_family(
    folders: Mapping[str, Path], family: str, tmp_path: Path, part: str, sentence: str
) -> None:
    def swap(folder: Path) -> None:
        shutil.rmtree(folder / part)
        shutil.copytree(folders[OTHER[family]] / part, folder / part)

    refused(sentence, changed(folders[family], tmp_path, swap))


def test_a_text_encoder_without_its_vision_tower(folders: Mapping[str, Path], family: str, tmp_path: Path) -> None:
    """transformers would fill it with random numbers, and the teacher would see through these."""
    folder = changed(folders[family], tmp_path, lambda folder: without(folder, "text_encoder", "visual"))
    refused("text_encoder has no vision tower, which the teacher sees with: use a whole Qwen3-VL", folder)


def test_a_text_encoder_of_another_kind(folders: Mapping[str, Path], family: str, tmp_path: Path) -> None:
    def rename(folder: Path) -> None:
        file = folder / "text_encoder" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "qwen3"}), encoding="utf-8")

    refused("text_encoder is a qwen3, and this model needs Qwen3-VL", changed(folders[family], tmp_path, rename))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_half_a_file(folders: Mapping[str, Path], family: str, tmp_path: Path, part: str) -> None:
    def cut(folder: Path) -> None:
        file = weights(folder, part)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    folder = changed(folders[family], tmp_path, cut)
    refused(rf"{part}/\w+\.safetensors cannot be read as a safetensors file: download it again", folder)


def test_a_transformer_that_lacks_a_layer(folders: Mapping[str, Path], family: str, tmp_path: Path) -> None:
    folder = changed(folders[family], tmp_path, lambda folder: without(folder, "transformer", LAYER[family]))
    refused(rf"transformer lacks 1 of \d+ tensors, such as {LAYER[family]}: it is incomplete", folder)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "transformer/config.json is not JSON"), ('{"num_layers": "two"}', "describes no .*2DModel: download")],
)
def test_a_damaged_configuration(
    folders: Mapping[str, Path], family: str, tmp_path: Path, text: str, sentence: str
) -> None:
    def damage(folder: Path) -> None:
        (folder / "transformer" / "config.json").write_text(text, encoding="utf-8")

    refused(sentence, changed(folders[family], tmp_path, damage))


def test_quantisation_that_is_not_installed(folders: Mapping[str, Path], family: str) -> None:
    refused("--quantise bnb-nf4 needs", folders[family], quantise="bnb-nf4")


def test_a_quantised_folder_is_left_to_its_loader(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Its tensors have other names and shapes than the configuration says."""

    def pack(folder: Path) -> None:
        file = folder / "transformer" / "config.json"
        packed = {**json.loads(file.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}}
        file.write_text(json.dumps(packed), encoding="utf-8")
        without(folder, "transformer", LAYER["krea2"])

    options = ModelOptions(model=str(changed(folders["krea2"], tmp_path, pack)), dtype="fp32", device="cpu")
    assert isinstance(load_model(options, sees=True), DiffusersModel)


# -- single files ------------------------------------------------------------------------------------------------------


def single(folders: Mapping[str, Path], tmp_path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Krea 2 as ComfyUI has it, changed."""
    assert KREA2.single_file is not None
    state = KREA2.single_file.from_diffusers(load_file(weights(folders["krea2"], "transformer")))
    state = change(state) or state
    file = tmp_path / "krea2_turbo_bf16.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    return file


def narrowed(state: dict[str, Tensor]) -> None:
    state["blocks.0.attn.wq.weight"] = state["blocks.0.attn.wq.weight"][:, 2:]


def in_8_bits(state: dict[str, Tensor]) -> None:
    state["blocks.0.attn.wq.weight"] = state["blocks.0.attn.wq.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda state: {f"net.{name}": value for name, value in state.items()},
            r"is of another model, or has its tensors under other names, such as net\.",
        ),
        (
            lambda state: {n: v for n, v in state.items() if n != "blocks.1.mlp.down.weight"},
            "lacks 1 of .* tensors, such as transformer_blocks.1.ff.down.weight",
        ),
        (narrowed, r"transformer_blocks.0.attn.to_q.weight has the shape \[256, 254\] instead of \[256, 256\]"),
        (in_8_bits, "is quantised to torch.int8: use a bf16 or fp8 file"),
    ],
    ids=["odd prefix", "a layer is missing", "another width", "int8"],
)
def test_a_single_file_that_does_not_fit(
    folders: Mapping[str, Path], tmp_path: Path, change: Any, sentence: str
) -> None:
    refused(sentence, single(folders, tmp_path, change), base=str(folders["krea2"]))


def test_a_single_file_with_the_prefix_of_whole_checkpoints(folders: Mapping[str, Path], tmp_path: Path) -> None:
    file = single(folders, tmp_path, lambda state: {f"model.diffusion_model.{n}": v for n, v in state.items()})
    options = ModelOptions(model=str(file), base=str(folders["krea2"]), dtype="fp32", device="cpu")
    model = load_model(options, sees=True)
    got: Any = model.denoiser
    wanted = load_file(weights(folders["krea2"], "transformer"))
    assert all(torch.equal(value, wanted[name]) for name, value in got.transformer.state_dict().items())


def test_diffusers_own_file_alone(folders: Mapping[str, Path]) -> None:
    file = weights(folders["krea2"], "transformer")
    refused("of one in diffusers' layout give the whole folder", file, base=str(folders["krea2"]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: {n: v for n, v in state.items() if "visual" not in n}, "has no vision tower"),
        (lambda state: {n: v for n, v in state.items() if ".3.mlp.up" not in n}, "lacks 1 of .* tensors"),
    ],
)
def test_a_single_file_of_a_text_encoder(
    folders: Mapping[str, Path], family: str, tmp_path: Path, change: Any, sentence: str
) -> None:
    state = load_file(weights(folders[family], "text_encoder"))
    named = {f"model.{name.removeprefix('model.')}": value for name, value in state.items()}
    file = tmp_path / "qwen3vl.safetensors"
    save_file(change(named), file)
    refused(sentence, folders[family], text_encoder=file)
