"""Krea 2 and Qwen-Image 2.1 by `--model`: small models in the layouts of the real ones, whose text encoder holds the
vision tower. Files give what the given parts of a pipeline give, which other tests compare with diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dopsd_core.__main__ import main
from dopsd_core.adapters.lora_file import load_lora
from dopsd_core.conditioning.encode import Condition, ReadsReferences
from dopsd_core.denoiser import Denoiser
from dopsd_core.standalone.hosts import parts
from dopsd_core.standalone.hosts.model import DiffusersModel, load_model
from dopsd_core.standalone.hosts.source import KNOWN_MODELS, find_family
from dopsd_core.standalone.model_options import ModelOptions
from tests.toy_denoiser import assert_near

pytest.importorskip("diffusers.models.transformers.transformer_qwenimage21")
from tests.own_tower_folders import FAMILIES, Made, make_qwen_image21  # noqa: E402

TEXT = "a [V] badge, top"
KNOWN = {known.family: known for known in KNOWN_MODELS}


@pytest.fixture(scope="module", params=list(FAMILIES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def load(made: Made, **changes: Any) -> DiffusersModel:
    given: dict[str, Any] = {"model": str(made.folder), "dtype": "fp32", "device": "cpu", **changes}
    model = load_model(ModelOptions(**given), sees=True)
    assert isinstance(model, DiffusersModel) and model.family is made.encoder.family
    return model


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def example(made: Made) -> tuple[Tensor, Condition]:
    """(x [1, C, h, w], a condition)."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, *made.encoder.family.latent_shape(64, 96), generator=generator)
    return x, made.encoder.encode_text(TEXT)


# -- the same as in memory ---------------------------------------------------------------------------------------------


def test_texts_images_and_latents(made: Made) -> None:
    """The teacher sees without a vision file."""
    model, image = load(made), drawn(3, 64, 96)
    encoder: Any = model.encoder
    for got, wanted in (
        (encoder.encode_text(TEXT).features, made.encoder.encode_text(TEXT).features),
        (encoder.encode_image_text(image, TEXT).features, made.encoder.encode_image_text(image, TEXT).features),
        (encoder.encode_latent(image), made.encoder.encode_latent(image)),
    ):
        assert torch.equal(got, wanted) and float(wanted.std()) > 0
    latent = made.encoder.encode_latent(image)[None]
    assert torch.equal(encoder.decode(latent), made.encoder.decode(latent))
    assert isinstance(encoder, ReadsReferences) is isinstance(made.encoder, ReadsReferences)
    assert isinstance(encoder, ReadsReferences) is ("edit" in model.teachers)


def test_predictions(made: Made) -> None:
    model = load(made)
    denoiser: Denoiser = model.denoiser
    x, condition = example(made)
    with torch.no_grad():
        assert_near(denoiser.predict_x0(x, 0.7, [condition]), made.denoiser.predict_x0(x, 0.7, [condition]), 1e-5)


def test_the_outline_has_names_and_sizes_and_no_values(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(made)
    monkeypatch.setattr(parts, "_loaded", lambda *args, **kwargs: pytest.fail("a part was loaded"))
    ours, theirs = ([(s.name, s.in_features, s.parts) for s in d.sites()] for d in (model.outline, made.denoiser))
    assert ours == theirs and model.outline.device.type == "meta"


def test_identities_change_with_the_files(made: Made, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made.folder, other)
    file = next((other / "transformer").glob("*.safetensors"))
    state = load_file(file)
    save_file({name: value + 1 for name, value in state.items()}, file, {"format": "pt"})
    same, changed = load(made), load(made, model=str(other))
    assert same.fingerprint == load(made).fingerprint != changed.fingerprint
    assert same.encoder.identity == changed.encoder.identity != load(made, dtype="bf16").encoder.identity


def test_one_model_at_a_time_is_on_the_device(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from dopsd_core.standalone.hosts.qwen3vl_encoder import FileParts

    encoder: Any = load(made).encoder
    parts: FileParts = encoder._parts
    places: dict[int, str] = {}

    def to(module: nn.Module, device: Any) -> None:
        places[id(module)] = str(device)
        assert list(places.values()).count("cuda") <= 1

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(parts, "_device", torch.device("cuda"))
    for module in (parts.model, parts.vae, parts.vae, parts.model):
        assert isinstance(module, nn.Module)
    assert list(places.values()) == ["cuda", "cpu"]
    encoder.release()
    assert set(places.values()) == {"cpu"}


@pytest.mark.parametrize("seen", [False, True], ids=["text", "with an image"])
def test_a_caption_with_a_place_for_an_image_is_one_sentence(made: Made, seen: bool) -> None:
    words, image = "see <|image_pad|>, a badge", drawn(3, 64, 64)
    with pytest.raises(
        ValueError, match=r"^the caption 'see .*' has a place for an image: write it without <\|image_pad"
    ):
        made.encoder.encode_image_text(image, words) if seen else made.encoder.encode_text(words)


def test_a_tokenizer_of_another_model_is_one_sentence(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(made.folder, folder)
    for file in (folder / KNOWN[made.encoder.family.name].tokenizer).iterdir():
        file.write_text(file.read_text(encoding="utf-8").replace("image_pad", "other_pad"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|image_pad\|>: it is another model's"):
        load(made, model=str(folder)).encoder.encode_text(TEXT)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_single_file_of_the_text_encoder(made: Made, tmp_path: Path) -> None:
    """Under Hugging Face's names, as ComfyUI's files have them."""
    state = made.encoder._parts.model.state_dict()
    file = tmp_path / "qwen3vl.safetensors"
    save_file({f"model.{name}": value.contiguous() for name, value in state.items()}, file)
    single = load(made, text_encoder=file)
    assert torch.equal(single.encoder.encode_text(TEXT).features, made.encoder.encode_text(TEXT).features)
    assert single.encoder.identity != load(made).encoder.identity


@pytest.mark.parametrize("fused", [False, True], ids=["as in diffusers", "as in ComfyUI"])
def test_a_single_file_of_qwen_image21(tmp_path: Path, fused: bool) -> None:
    made = make_qwen_image21(tmp_path / "model")
    state = dict(made.denoiser.transformer.state_dict())
    if fused:  # the gate first
        for name in [name for name in state if name.endswith("gate_layer.weight")]:
            pair = state.pop(name), state.pop(name.replace("gate_layer", "proj"))
            state[name.replace("gate_layer", "gate_up")] = torch.cat(pair)
    file = tmp_path / "qwen_image_2.1_turbo_bf16.safetensors"
    save_file({f"model.diffusion_model.{name}": value.contiguous() for name, value in state.items()}, file)
    single = load(made, model=str(file), base=str(made.folder))
    x, condition = example(made)
    with torch.no_grad():
        assert_near(
            single.denoiser.predict_x0(x, 0.7, [condition]), made.denoiser.predict_x0(x, 0.7, [condition]), 1e-5
        )
    with pytest.raises(ValueError, match="cannot be read for this model: leave --vae out"):
        load(made, vae=file)


@pytest.mark.parametrize(
    ("name", "mark"), [("krea2", "txtfusion.projector.weight"), ("qwen_image21", "txt_in.text_norm.weight")]
)
def test_single_files_are_recognised_by_a_name(tmp_path: Path, name: str, mark: str) -> None:
    file = tmp_path / "some.safetensors"
    save_file({f"model.diffusion_model.{mark}": torch.zeros(1)}, file)
    known = find_family(ModelOptions(model=str(file)))
    assert known.family == name and known in KNOWN_MODELS


def test_a_folder_without_its_tokenizer_is_one_sentence(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(made.folder, folder)
    name = "processor" if (folder / "processor").is_dir() else "tokenizer"
    shutil.rmtree(folder / name)
    with pytest.raises(FileNotFoundError, match=rf"incomplete: {name}/tokenizer.json is missing"):
        load(made, model=str(folder))


@pytest.mark.parametrize(("stated", "count"), [(None, 0), (True, 0), (False, 1)])
def test_an_undistilled_folder_is_recognised(made: Made, tmp_path: Path, stated: bool | None, count: int) -> None:
    """Krea-2-Raw's index says so; others say nothing."""
    folder = tmp_path / "raw"
    shutil.copytree(made.folder, folder)
    index = {**json.loads((folder / "model_index.json").read_text()), "is_distilled": stated}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    found = load(made, model=str(folder)).doubts([])
    assert len(found) == count and all("was not distilled for few steps" in line for line in found)


# -- the command line --------------------------------------------------------------------------------------------------


def test_train_and_sample(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From images to a LoRA and an image, with the family's own teacher."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, colour in (("a", "red"), ("b", "navy")):
        image = Image.new("RGB", (64, 64), colour)
        image.paste("white", (10, 20, 40, 50))
        image.save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(f"a [V] badge, {name}", encoding="utf-8")
    model = ["--model", str(made.folder), "--dtype", "fp32", "--device", "cpu"]
    words = ["train", str(photos), "--output", str(tmp_path / "run"), "--trigger", "ohwx", "--resolution", "64"]
    short = ["--rank", "2", "--steps", "2", "--rollout-steps", "2", "--probe-every", "0", "--preview-every", "0"]
    assert main([*words, *short, *model]) == 0, capsys.readouterr().err
    tensors, header = load_lora(tmp_path / "run" / "lora.safetensors")
    family = made.encoder.family
    assert header["dopsd_family"] == family.name and header["dopsd_teacher_sees"] == family.teachers[0]
    assert {key.rsplit(".lora_", 1)[0] for key in tensors} == family.lora_config().chosen(made.denoiser.sites())
    images = tmp_path / "images"
    lora = ["--lora", str(tmp_path / "run" / "lora.safetensors"), "--size", "64", "96"]
    assert main(["sample", "a ohwx badge", *lora, "--output", str(images), *model]) == 0, capsys.readouterr().err
    assert Image.open(images / "01_seed0.png").size == (64, 96)


def test_sample_names_the_teachers_image_that_cannot_be_read(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", TEXT, "--teacher-image", str(tmp_path / "none.png"), "--model", str(made.folder)]
    assert main([*words, "--dtype", "fp32", "--device", "cpu", "--size", "64", "64"]) == 1
    assert f"error: {tmp_path / 'none.png'} cannot be read: No such file" in capsys.readouterr().err
