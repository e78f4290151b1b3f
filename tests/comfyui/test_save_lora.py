"""Save LoRA: the file loads in ComfyUI's own loader with every key used, and tells where it came from."""

from __future__ import annotations

import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import training
from loras import demo_lora, give, give_values
from safetensors import safe_open
from safetensors.torch import save_file

FACTS = {"dopsd_family": "z_image", "dopsd_step": "12", "dopsd_config": "{}", "dopsd_base_model": "demo"}


@pytest.fixture(scope="module")
def tensors(comfyui) -> dict[str, torch.Tensor]:
    return demo_lora(comfyui)


@pytest.fixture
def save(comfyui, tensors):
    """save(lora, **inputs) -> the run; node "1" is Save LoRA."""

    def save(lora: Any = None, prefix: str = "loras/dopsd", dtype: str = "bf16", peft_folder: bool = False) -> Any:
        given = comfyui.module("nodes.comfy_host.sockets").TrainedLora(tensors, FACTS) if lora is None else lora
        inputs = {"lora": ["0", 0], "filename_prefix": prefix, "dtype": dtype, "peft_folder": peft_folder}
        graph = {"0": give(comfyui, given), "1": {"class_type": "DOPSD_SaveLoRA", "inputs": inputs}}
        return comfyui.execute(graph)

    return save


def read(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118  no dict


def patches(model: Any) -> int:
    return sum(len(entries) for entries in model.patches.values())


def test_comfyuis_own_loader_uses_every_key(comfyui, save, tensors, caplog) -> None:
    run = save(prefix="loras/all_keys")
    assert run.status == "success", run.error
    assert run.value("1") == str(comfyui.output / "loras" / "all_keys_00001_.safetensors")
    graph = {
        "1": {"class_type": "DOPSD_LoadDemoModels", "inputs": {}},
        "2": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["1", 0], "lora_name": "all_keys_00001_.safetensors", "strength_model": 1.0},
        },
        "3": {
            "class_type": "DOPSD_FewStepSampler",
            "inputs": {
                "model": ["2", 0], "positive": ["4", 0], "seed": 0, "steps": 0, "width": 64, "height": 64,
                "batch_size": 1, "sampler": "euler",
            },
        },
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a badge"}},
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        loaded = comfyui.execute(graph)
    assert loaded.status == "success", loaded.error
    assert "not loaded" not in caplog.text.lower()
    assert patches(loaded.value("2")) == len(tensors) / 2 > 20


def test_the_file_holds_what_it_says(comfyui, save, tensors) -> None:
    run = save(dtype="fp32")
    stored, header = read(run.value("1"))
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[key], tensors[key]) for key in tensors)
    assert header["modelspec.architecture"] == "z_image/lora" and header["modelspec.title"].startswith("dopsd_0")
    assert header["dopsd_version"] == comfyui.module("dopsd_core").__version__ and FACTS.items() <= header.items()
    assert not [key for key in stored if key.endswith(".alpha")] and "lora_adapter_metadata" not in header
    half, _ = read(save(dtype="bf16").value("1"))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert "tensors" in run.texts("1")[-1] and "output/loras/dopsd_" in run.texts("1")[-1]


def test_numbers_go_up_and_nothing_is_overwritten(comfyui, save) -> None:
    names = [Path(save(prefix="many/x").value("1")).name for _ in range(3)]
    assert names == ["x_00001_.safetensors", "x_00002_.safetensors", "x_00003_.safetensors"]
    assert not list((comfyui.output / "many").glob("*.tmp"))


def test_a_peft_folder_beside_it(comfyui, save, tensors) -> None:
    peft = pytest.importorskip("peft")
    run = save(prefix="loras/with_peft", dtype="fp32", peft_folder=True)
    folder = comfyui.output / "loras" / "with_peft_00001_peft"
    assert str(folder.name) in run.texts("1")[-1]
    config = peft.PeftConfig.from_pretrained(str(folder))
    assert config.r == config.lora_alpha == 4
    stored, _ = read(folder / "adapter_model.safetensors")
    assert {key.replace("base_model.model.", "transformer.") for key in stored} == set(tensors)


def test_peft_missing_is_one_sentence(comfyui, save, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    run = save(prefix="loras/no_peft", peft_folder=True)
    assert run.status == "error" and "pip install peft" in run.error


@pytest.mark.parametrize("missing", [True, False])
def test_a_peft_folder_that_cannot_be_is_refused_before_any_file(comfyui, save, tensors, monkeypatch, missing) -> None:
    """Also of a DoRA, whose run the retry would not repeat but whose file it would number anew."""
    lora = dict(tensors)
    if missing:
        monkeypatch.setitem(sys.modules, "peft", None)
    else:
        key = next(key for key in lora if key.endswith(".lora_B.weight"))
        lora[key.replace(".lora_B.weight", ".lora_magnitude_vector")] = torch.ones(len(lora[key]))
    run = save(lora, prefix=f"loras/refused_{missing}", peft_folder=True)
    assert run.status == "error" and "switch peft_folder off" in run.error
    assert not list(comfyui.output.rglob(f"*refused_{missing}*"))


def test_another_trainers_lora_is_saved_as_it_is(save) -> None:
    foreign = {
        "diffusion_model.layers.0.attention.qkv.lora_up.weight": torch.ones(6, 2),
        "diffusion_model.layers.0.attention.qkv.lora_down.weight": torch.ones(2, 4),
        "diffusion_model.layers.0.attention.qkv.alpha": torch.tensor(2.0),
    }
    stored, header = read(save(foreign).value("1"))
    assert stored.keys() == foreign.keys() and header["modelspec.architecture"] == "unknown/lora"
    assert "modelspec.implementation" not in header and not [key for key in header if key.startswith("dopsd_")]
    run = save(foreign, peft_folder=True)
    assert run.status == "error" and "switch peft_folder off" in run.error


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({}, "there is no LoRA to save"),
        ({"transformer.x.lora_A.weight": torch.tensor([[float("nan")]])}, "transformer.x.lora_A.weight is not finite"),
        ({"transformer.x.lora_A.weight": torch.tensor([[float("inf")]])}, "is not finite; the LoRA is not saved"),
    ],
    ids=["empty", "nan", "inf"],
)
def test_what_is_no_lora_is_not_saved(comfyui, save, lora: dict, sentence: str) -> None:
    run = save(lora, prefix="refused/x")
    assert run.status == "error" and sentence in run.error
    assert not list((comfyui.output / "refused").glob("*"))


# -- for others --------------------------------------------------------------------------------------------------------


def test_what_is_said_of_it_is_in_the_file_and_in_the_folder_for_the_hub(comfyui, tensors) -> None:
    facts = FACTS | {"dopsd_base_model": "z_image_turbo_bf16.safetensors", "dopsd_trigger": "ohwx"}
    lora = comfyui.module("nodes.comfy_host.sockets").TrainedLora(tensors, facts)
    said = {"title": "My Lamp", "description": "A lamp.", "author": "Jo", "license": "cc-by-4.0"}
    graph = {
        "given": give_values(comfyui, ("LORA_MODEL", "IMAGE"), [lora, torch.rand(2, 40, 30, 3)]),
        "save": {
            "class_type": "DOPSD_SaveLoRA",
            "inputs": {
                "lora": ["given", 0], "filename_prefix": "loras/shared", "hub_folder": True, "thumbnail": ["given", 1],
                **said,
            },
        },
    }  # fmt: skip
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    path = Path(run.value("save"))
    folder = path.with_name("shared_00001_hub")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "shared_00001.safetensors", "thumbnail.jpg"]
    assert f"output/loras/{folder.name}/" in run.texts("save")[-1]
    for file in (path, folder / "shared_00001.safetensors"):
        stored, header = read(file)
        assert stored.keys() == tensors.keys()
        assert {name: header[f"modelspec.{name}"] for name in said} == said
        assert header["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
        assert header["modelspec.base_model"] == "Tongyi-MAI/Z-Image-Turbo" and header["trained_words"] == '["ohwx"]'
        assert len(header["modelspec.hash_sha256"]) == 66
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "# My Lamp" in card and 'base_model: "Tongyi-MAI/Z-Image-Turbo"' in card and "<Gallery />" in card


def test_comfyuis_assets_read_base_and_trigger(comfyui, save, tensors) -> None:
    extract = pytest.importorskip("app.assets.services.metadata_extract")
    facts = FACTS | {"dopsd_trigger": "ohwx", "dopsd_base_model": "flux-2-klein-4b.safetensors"}
    lora = comfyui.module("nodes.comfy_host.sockets").TrainedLora(tensors, facts | {"dopsd_family": "flux2_klein"})
    path = save(lora).value("1")
    found = extract.extract_file_metadata(path)
    assert (found.base_model, found.trained_words) == ("black-forest-labs/FLUX.2-klein-4B", ["ohwx"])


def test_a_run_says_the_size_of_its_images(comfyui) -> None:
    run = comfyui.execute(training("sized", steps=1, preview_every=0))
    assert run.status == "success", run.error
    assert run.value("train").facts["dopsd_resolution"] == "64x64"


# -- from file to file -------------------------------------------------------------------------------------------------

KOHYA = {
    "ss_network_dim": "2",
    "ss_tag_frequency": '{"cat": {"zwx cat": 12}}',
    "modelspec.architecture": "z-image/lora",
    "modelspec.implementation": "https://github.com/kohya-ss/musubi-tuner",
    "modelspec.title": "Whiskers",
    "modelspec.author": "Jo Łąka",
    "modelspec.date": "2025-12-24T18:00:00",
    "modelspec.license": "CC-BY-4.0",
    "modelspec.trigger_phrase": "zwx",
}
HASHES = {"modelspec.hash_sha256": "0xabc", "sshs_model_hash": "def"}


def load_and_save(comfyui, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> tuple[Any, Path]:
    """A file through Load LoRA and Save LoRA; nodes "load" and "save"."""
    (comfyui.output / "loras").mkdir(exist_ok=True)
    save_file(tensors, comfyui.output / "loras" / "given.safetensors", metadata=header)
    graph = {
        "load": {"class_type": "DOPSD_LoadLoRA", "inputs": {"lora_name": "given.safetensors"}},
        "save": {
            "class_type": "DOPSD_SaveLoRA",
            "inputs": {"lora": ["load", 0], "filename_prefix": "loras/kept", "dtype": "fp32"},
        },
    }
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    return run, Path(run.value("save"))


def test_another_trainers_header_is_kept(comfyui) -> None:
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(6, 2)}
    run, path = load_and_save(comfyui, tensors, KOHYA | HASHES)
    stored, header = read(path)
    assert all(torch.equal(stored[key], tensors[key]) for key in tensors)
    assert header.items() >= KOHYA.items() and "sshs_model_hash" not in header
    assert len(header["modelspec.hash_sha256"]) == 66  # of the new file
    assert "trigger: zwx" in run.texts("load")[-1] and "trigger: zwx" in run.texts("save")[-1]
    assert "modelspec.hash_sha256, sshs_model_hash" in run.texts("load")[-1]


def test_our_own_header_is_kept_and_the_trigger_is_given_to_all(comfyui, tensors) -> None:
    facts = FACTS | {"dopsd_trigger": "ohwx", "dopsd_version": "0.1.0"}
    _, path = load_and_save(comfyui, tensors, facts)
    header = read(path)[1]
    assert header.items() >= facts.items() and header["modelspec.trigger_phrase"] == "ohwx"
    assert header["modelspec.implementation"] == "diffusers"
    assert header["modelspec.architecture"] == "z_image/lora"


def test_diffusers_alpha_is_folded_once(comfyui) -> None:
    """Its header would have diffusers apply alpha a second time; the rest of the header stays."""
    tensors = {"transformer.x.lora_A.weight": torch.ones(2, 4), "transformer.x.lora_B.weight": torch.ones(6, 2)}
    metadata = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 6}', "author": "me"}
    run, path = load_and_save(comfyui, tensors, metadata)
    stored, header = read(path)
    assert torch.equal(stored["transformer.x.lora_B.weight"], torch.full((6, 2), 3.0))
    assert "lora_adapter_metadata" not in header and header["author"] == "me"
    assert "lora_adapter_metadata is not kept: its alpha is folded into the tensors" in run.texts("load")[-1]


@pytest.mark.parametrize("prefix", ["../x", "/tmp/x", "", "loras/con", "C:\\x"])
def test_a_bad_name_is_one_sentence(comfyui, save, prefix: str) -> None:
    run = save(prefix=prefix)
    assert run.status == "refused" and "\n" not in run.error
    assert run.error.startswith("filename_prefix - the filename_prefix ")


def test_a_lora_in_8_bits_is_saved(comfyui, save, tensors) -> None:
    narrow = {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}
    run = save(narrow, prefix="loras/narrow", dtype="fp32")
    assert run.status == "success", run.error
    saved, _ = read(run.value("1"))
    assert saved.keys() == narrow.keys()
    assert all(torch.equal(saved[key], narrow[key].float()) for key in narrow)
    first = next(iter(narrow))
    run = save({**narrow, first: torch.full((4, 4), torch.nan).to(torch.float8_e4m3fn)})
    assert run.status == "error" and f"{first} is not finite" in run.error


def test_a_file_in_the_place_of_the_folder_is_named(comfyui, save) -> None:
    (comfyui.output / "a_file").write_text("x")
    run = save(prefix="a_file/mine")
    assert run.status == "error" and "a_file" in run.error and run.error.endswith("check the disk and the folder")


def test_two_that_save_at_once_get_a_file_each(comfyui, tensors, monkeypatch) -> None:
    """Two servers on one output folder: the second would find the first one's number free, and replace its LoRA."""
    module = comfyui.module("nodes.save_lora")
    write = module.write_lora

    def slowly(*given: Any) -> Any:
        time.sleep(0.3)
        return write(*given)

    monkeypatch.setattr(module, "write_lora", slowly)
    how = (torch.float32, module.Description(), False, False)
    with ThreadPoolExecutor(3) as threads:
        found = [threads.submit(module.saved, "loras/at_once", tensors, *how) for _ in range(3)]
        paths = {str(each.result()[0]) for each in found}
    assert len(paths) == 3 == len(list((comfyui.output / "loras").glob("at_once_*.safetensors")))
