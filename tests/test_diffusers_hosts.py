"""Z-Image and FLUX.2-klein through diffusers, on small models in the layouts of the real ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.conditioning.encode import Condition
from dopsd_core.data.dataset import read_dataset
from dopsd_core.denoiser import Denoiser
from dopsd_core.rollout import sample
from dopsd_core.standalone.hosts import parts, source, teacher_reader
from dopsd_core.standalone.hosts.model import DiffusersModel, load_model
from dopsd_core.standalone.hosts.quantised import quantisation_config
from dopsd_core.standalone.hosts.source import KNOWN_MODELS, fetch, find_family
from dopsd_core.standalone.model_options import QUANTISATIONS, ModelOptions
from dopsd_core.training.training_set import build_training_set
from tests import model_folders
from tests.toy_denoiser import assert_near

TEXT = "a [V] badge, top, on a sand background"
LAYERS = {"z_image": 4, "flux2_klein": 28}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        "z_image": model_folders.write_z_image(place / "z_image"),
        "flux2_klein": model_folders.write_klein(place / "klein"),
        "vision": model_folders.write_vision(place / "vision"),
    }


@pytest.fixture(params=["z_image", "flux2_klein"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def options(folders: dict[str, Path], family: str, **changes: Any) -> ModelOptions:
    given = {"model": str(folders[family]), "vision": str(folders["vision"]), "dtype": "fp32", "device": "cpu"}
    return ModelOptions(**{**given, **changes})


def load(folders: dict[str, Path], family: str, sees: bool = False, **changes: Any) -> DiffusersModel:
    model = load_model(options(folders, family, **changes), sees)
    assert isinstance(model, DiffusersModel)
    return model


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# -- what diffusers' own pipelines do ----------------------------------------------------------------------------------


def test_images_are_those_of_the_pipeline(folders: dict[str, Path], family: str) -> None:
    """Text, grid, velocity and decoding in one: the pipeline draws the same image from the same noise."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler as Scheduler

    model = load(folders, family)
    shape = model.family.latent_shape(96, 64)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    condition = model.encoder.encode_text(TEXT)
    with torch.no_grad():
        latent = sample(model.denoiser, [condition], noise, model.family.sigmas(4, 96, 64))
    encoder: Any = model.encoder
    loaded = (encoder._vae, encoder._text_encoder, encoder._tokenizer, model.denoiser.transformer)  # type: ignore
    common: dict[str, Any] = {"latents": noise.clone(), "width": 96, "height": 64, "output_type": "pt"}
    if family == "z_image":
        pipe: Any = ZImagePipeline(Scheduler(shift=3.0), *loaded)
        expected = pipe(TEXT, num_inference_steps=4, guidance_scale=0.0, **common).images
    else:
        scheduler = Scheduler(use_dynamic_shifting=True, shift=3.0, time_shift_type="exponential")
        pipe = Flux2KleinPipeline(scheduler, *loaded, is_distilled=True)
        expected = pipe(prompt=TEXT, num_inference_steps=4, guidance_scale=1.0, **common).images
    assert float(expected.std()) > 0.02
    assert_near(model.encoder.decode(latent), expected, 1e-3)


def test_latents_come_back_as_images(folders: dict[str, Path], family: str) -> None:
    """Encoding normalises what decoding undoes: the VAE's own mean is what is decoded."""
    model = load(folders, family)
    encoder: Any = model.encoder
    image = drawn(3, 64, 96)
    latent = model.encoder.encode_latent(image)
    assert tuple(latent.shape) == model.family.latent_shape(96, 64) and latent.dtype == torch.float32
    with torch.no_grad():
        expected = encoder._vae.decode(encoder._vae.encode(image[None] * 2 - 1).latent_dist.mode()).sample
    assert_near(model.encoder.decode(latent[None]), expected.add(1).div(2).clamp(0, 1), 1e-4)


def test_the_protocol_is_satisfied_and_shapes_may_differ_in_a_batch(folders: dict[str, Path], family: str) -> None:
    model = load(folders, family)
    denoiser: Denoiser = model.denoiser
    assert isinstance(denoiser, Denoiser) and denoiser.blocks()
    width = 32 if family == "z_image" else 96
    references = () if family == "z_image" else (drawn(128, 4, 4, seed=4),)
    conditions = [
        Condition(drawn(9, width)),
        Condition(drawn(20, width, seed=1), references),
        Condition(drawn(9, width)),
    ]
    x = torch.randn(3, *model.family.latent_shape(64, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together = denoiser.predict_x0(x, 0.6, conditions)
        alone = torch.cat([denoiser.predict_x0(x[i : i + 1], 0.6, [conditions[i]]) for i in range(3)])
    assert_near(together, alone, 1e-4)


# -- the teacher's vision ----------------------------------------------------------------------------------------------


def test_the_teacher_sees_the_image_with_the_models_own_weights(folders: dict[str, Path], family: str) -> None:
    model = load(folders, family, sees=True)
    encoder: Any = model.encoder
    first, second = (model.encoder.encode_image_text(drawn(3, 64, 64, seed=s), TEXT).features for s in (0, 1))
    student = model.encoder.encode_text(TEXT).features
    if family == "z_image":  # 256 image tokens between start and end
        assert len(first) == len(student) + 256 + 2
    assert first.shape == second.shape and not torch.allclose(first, second, atol=1e-3)
    shared = {id(parameter) for parameter in encoder._text_encoder.parameters()}
    assert {id(p) for p in encoder._reader.model.language_model.parameters()} == shared, "no second language model"


def test_of_a_long_caption_the_end_is_cut_and_not_the_templates(folders: dict[str, Path]) -> None:
    ids = [1, 2, teacher_reader.IMAGE_PAD, 3, *range(100, 1100), 7, 8]
    cut = teacher_reader._expanded(ids, 256, ending=2)
    assert len(cut) == teacher_reader.MAX_TOKENS and cut[-2:] == [7, 8]
    assert cut[: 2 + 256 + 1] == [1, 2, *[teacher_reader.IMAGE_PAD] * 256, 3] and cut[-3] == 100 + 1024 - 256 - 5 - 1
    assert teacher_reader._expanded(ids[:10], 4, 2) == [1, 2, *[teacher_reader.IMAGE_PAD] * 4, *ids[3:10]]


def test_another_vision_tower_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = model_folders.write_vision(tmp_path / "wide", width=48)
    model = load(folders, "z_image", sees=True, vision=str(other))
    with pytest.raises(ValueError, match="32 wide and the vision tower was made for one of 48"):
        model.encoder.encode_image_text(drawn(3, 64, 64), TEXT)


# -- files -------------------------------------------------------------------------------------------------------------


def test_single_files_are_the_same_model(folders: dict[str, Path], tmp_path: Path) -> None:
    file = model_folders.write_z_image_file(tmp_path / "z_image_turbo_bf16.safetensors")
    text = model_folders.write_text_encoder_file(tmp_path / "qwen_3_4b.safetensors", LAYERS["z_image"])
    vision = tmp_path / "qwen3vl.safetensors"
    shutil.copy(folders["vision"] / "model.safetensors", vision)
    shutil.copy(folders["vision"] / "config.json", tmp_path / "config.json")
    single = load(
        folders, "z_image", sees=True, model=str(file), base=str(folders["z_image"]), text_encoder=text,
        vision=str(vision),
    )  # fmt: skip
    whole = load(folders, "z_image", sees=True)
    assert single.title == file.name and single.family is whole.family
    for encode in (
        lambda m: m.encoder.encode_text(TEXT),
        lambda m: m.encoder.encode_image_text(drawn(3, 64, 64), TEXT),
    ):
        assert torch.equal(encode(single).features, encode(whole).features)
    x, condition = torch.randn(1, 16, 8, 8), whole.encoder.encode_text(TEXT)
    with torch.no_grad():
        ours, theirs = (m.denoiser.predict_x0(x, 0.7, [condition]) for m in (single, whole))
    assert_near(ours, theirs, 1e-5)


def test_fp8_files_are_multiplied_by_their_scales(folders: dict[str, Path], tmp_path: Path) -> None:
    text = model_folders.write_text_encoder_file(tmp_path / "fp8.safetensors", LAYERS["z_image"], fp8=True)
    rounded = load(folders, "z_image", text_encoder=text).encoder.encode_text(TEXT).features
    exact = load(folders, "z_image").encoder.encode_text(TEXT).features
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 0.1


def test_identities_change_with_weights_dtype_and_vision(folders: dict[str, Path], tmp_path: Path) -> None:
    other = model_folders.write_z_image(tmp_path / "other", seed=9)
    usual, another = load(folders, "z_image"), load({**folders, "z_image": other}, "z_image")
    assert usual.fingerprint == load(folders, "z_image").fingerprint != another.fingerprint
    assert usual.encoder.identity == another.encoder.identity, "their encoders are the same"
    identities = {
        usual.encoder.identity,
        load(folders, "z_image", dtype="bf16").encoder.identity,
        load(folders, "z_image", sees=True).encoder.identity,
        load(folders, "flux2_klein").encoder.identity,
    }
    assert len(identities) == 4


def test_what_is_cached_loads_no_encoder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a [V] badge", encoding="utf-8")
    pairs = read_dataset(tmp_path, pixel_budget=64 * 64, multiple=16).pairs
    cache = ConditionCache(tmp_path / "cache")
    first = build_training_set(pairs, load(folders, "z_image", sees=True).encoder, cache)
    for name in ("text_encoder", "vae", "reader"):
        monkeypatch.setattr(parts.ModelParts, name, lambda *args: pytest.fail("an encoder is loaded"))
    second = build_training_set(pairs, load(folders, "z_image", sees=True).encoder, cache)
    assert first.fingerprint() == second.fingerprint()


def test_encoders_leave_the_device(folders: dict[str, Path]) -> None:
    """One encoder at a time is on the device, and none beside the network."""
    model = load(folders, "z_image")
    encoder: Any = model.encoder
    encoder._device = torch.device("cuda")
    places: dict[str, str] = {}

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def to(self, device: Any) -> None:
            places[self.name] = str(device)
            assert list(places.values()).count("cuda") <= 1

    text, vae = Part("text"), Part("vae")
    for part in (text, vae, vae, text):
        encoder._use(part)
        assert places[part.name] == "cuda"
    encoder.release()
    assert set(places.values()) == {"cpu"}


# -- quantised ---------------------------------------------------------------------------------------------------------


class Rounded(nn.Linear):
    """A Linear whose weight is stored in 8 bits, as quantisation backends have it."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self._whole(), self.bias)

    def _whole(self) -> Tensor:
        scale = self.weight.abs().amax() / 127
        return (self.weight / scale).round() * scale


def test_gradients_go_through_quantised_layers(folders: dict[str, Path]) -> None:
    """The LoRA is the same mechanism: the backward is that of the layer's own class, and not g @ stored weight."""
    model = load(folders, "z_image")
    denoiser: Any = model.denoiser
    for block in denoiser.blocks():
        for module in list(block.modules()):
            if type(module) is nn.Linear:
                module.__class__ = Rounded
    gradients = []
    x, condition = drawn(1, 16, 8, 8), model.encoder.encode_text(TEXT)
    for sites in (denoiser.sites(), None):
        if sites is not None:
            adapters = AdapterSet(sites, model.family.lora_config(2))
            with adapters.attached():
                entering = x.clone().requires_grad_(True)
                denoiser.predict_x0(entering, 0.7, [condition]).square().mean().backward()
        else:
            entering = x.clone().requires_grad_(True)
            denoiser.predict_x0(entering, 0.7, [condition]).square().mean().backward()
        gradients.append(entering.grad)
    assert_near(gradients[0], gradients[1], 1e-4)


@pytest.mark.parametrize(("name", "module"), [("torchao-int8", "torchao"), ("quanto-int8", "optimum.quanto")])
def test_a_quantised_base_is_close_and_trains(folders: dict[str, Path], name: str, module: str) -> None:
    """With the backends themselves, where they are installed."""
    pytest.importorskip(module)
    exact, quantised = load(folders, "z_image", dtype="bf16"), load(folders, "z_image", dtype="bf16", quantise=name)
    x, condition = drawn(1, 16, 8, 8), exact.encoder.encode_text(TEXT)
    found = []
    for model in (exact, quantised):
        adapters = AdapterSet(model.denoiser.sites(), model.family.lora_config(2))
        entering = x.clone().requires_grad_(True)
        with adapters.attached():
            out = model.denoiser.predict_x0(entering, 0.7, [condition])
            out.square().mean().backward()
        assert all(parameter.grad is not None for parameter in adapters.parameters())
        assert entering.grad is not None
        found.append((out.detach() - x, entering.grad))
    for ours, theirs in zip(*found, strict=True):
        assert 1e-4 < float((ours - theirs).norm() / theirs.norm()) < 0.1
    assert quantised.fingerprint != exact.fingerprint


@pytest.mark.parametrize("name", [name for name in QUANTISATIONS if name != "none"])
def test_a_missing_quantisation_backend_is_one_sentence(name: str) -> None:
    package = {"bnb": "bitsandbytes", "torchao": "torchao", "quanto": "optimum-quanto"}[name.partition("-")[0]]
    try:
        quantisation_config(name, torch.bfloat16, has_gpu=False)
    except ValueError as error:
        missing = f"--quantise {name} needs {package}, which is not installed: pip install {package}"
        assert str(error) in (missing, f"--quantise {name} needs a GPU: choose torchao-int8 or quanto-int8 on a CPU")


# -- bad input ---------------------------------------------------------------------------------------------------------


def broken(folders: dict[str, Path], tmp_path: Path, change: Callable[[Path], None]) -> ModelOptions:
    folder = tmp_path / "broken"
    shutil.copytree(folders["z_image"], folder)
    change(folder)
    return options(folders, "z_image", model=str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{", encoding="utf-8"), "is not JSON"),
        (
            lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8"),
            "is a FluxPipeline",
        ),
        (lambda f: shutil.rmtree(f / "vae"), "incomplete: vae/config.json is missing"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "incomplete: tokenizer/tokenizer.json is missing"),
        (lambda f: next((f / "transformer").glob("*.safetensors")).unlink(), "transformer has no safetensors files"),
        (
            lambda f: (f / "text_encoder" / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}), encoding="utf-8"
            ),
            "names model-00001-of-00002.safetensors, which is missing",
        ),
    ],
)
def test_half_a_folder_is_one_sentence(folders: dict[str, Path], tmp_path: Path, change: Any, message: str) -> None:
    chosen = broken(folders, tmp_path, change)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_model(chosen, False)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    def swap(folder: Path) -> None:
        file = next((folder / "transformer").glob("*.safetensors"))
        shutil.copy(next((folders["flux2_klein"] / "transformer").glob("*.safetensors")), file)

    with pytest.raises(
        ValueError, match="transformer is of another model, or has its tensors under other names, such as"
    ):
        load_model(broken(folders, tmp_path, swap), False)


def test_a_text_encoder_that_lacks_a_layer_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""

    def lose(folder: Path) -> None:
        file = next((folder / "text_encoder").glob("*.safetensors"))
        state = {name: value for name, value in load_file(file).items() if ".1.mlp.up_proj" not in name}
        save_file(state, file, {"format": "pt"})

    encoder = load_model(broken(folders, tmp_path, lose), False).encoder
    with pytest.raises(ValueError, match=r"text_encoder cannot be loaded.*: it lacks 1 tensors, such as .*up_proj"):
        encoder.encode_text(TEXT)


@pytest.mark.parametrize("name", ["nowhere", "./photos", "/no/such/file.safetensors"])
def test_a_model_that_does_not_exist(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; --model takes demo, a Hugging Face id"):
        find_family(ModelOptions(model=name))


def test_files_of_other_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "b.safetensors").write_bytes(b"no safetensors")
    text = model_folders.write_text_encoder_file(tmp_path / "c.safetensors", 1)
    for file, message in (
        (tmp_path / "a.gguf", "GGUF"),
        (tmp_path / "b.safetensors", "download it again"),
        (text, "not"),
    ):
        with pytest.raises(ValueError, match=message):
            find_family(ModelOptions(model=str(file)))
    file = model_folders.write_z_image_file(tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match="is a Flux2KleinPipeline, and .* needs a ZImagePipeline: choose --base"):
        load_model(options(folders, "z_image", model=str(file), base=str(folders["flux2_klein"])), False)
    with pytest.raises(FileNotFoundError, match="--text-encoder needs a file"):
        load_model(options(folders, "z_image", text_encoder=tmp_path / "none.safetensors"), False)


def test_errors_of_the_hub_are_one_sentence() -> None:
    from huggingface_hub import errors

    def failing(error: Exception) -> Callable[[Any], Any]:
        def download(hub: Any) -> Any:
            raise error

        return download

    cases = [
        (errors.HFValidationError("bad\nname"), "is not on the Hugging Face hub"),
        (errors.LocalEntryNotFoundError("offline\nhere"), "no connection to huggingface.co"),
        (ConnectionError("reset"), r"cannot be downloaded \(ConnectionError\)"),
    ]
    for error, message in cases:
        with pytest.raises(OSError, match=message) as caught:
            fetch("owner/name", failing(error))
        assert str(caught.value).startswith("owner/name ") and "\n" not in str(caught.value)
    assert (
        source.is_hub_id("Tongyi-MAI/Z-Image-Turbo") and not source.is_hub_id("/a/b") and not source.is_hub_id("a/b/c")
    )


def test_devices_that_do_not_exist_are_one_sentence(folders: dict[str, Path]) -> None:
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"--device {name} cannot be used"):
            load_model(options(folders, "z_image", device=name), False)


def test_every_family_has_its_classes() -> None:
    from dopsd_core.standalone.hosts.model import DIFFUSERS_FAMILIES

    assert {known.family for known in KNOWN_MODELS} == DIFFUSERS_FAMILIES.keys()
    for family in DIFFUSERS_FAMILIES.values():
        assert family().encoder.family.name in DIFFUSERS_FAMILIES
