"""The vision tower out of files: every layout is transformers' tower, nothing else is read, what is wrong is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import towers
from safetensors.torch import save_file
from torch import Tensor

NODE = "DOPSD_LoadTeacherVision"


@pytest.fixture(scope="module")
def vision_file(comfyui: Any) -> Any:
    return comfyui.module("nodes.comfy_host.vision_file")


@pytest.fixture(scope="module")
def tiny(comfyui: Any) -> Any:
    return towers.tiny(comfyui.module("nodes.comfy_host.vision"))


@pytest.fixture(scope="module")
def reference(tiny: Any) -> Any:
    return towers.reference(tiny)


def look(model: Any) -> list[Tensor]:
    """(merged, *DeepStack) of a seeded image of 6x6 patches."""
    patches, grid = torch.randn(36, 1536, generator=torch.Generator().manual_seed(1)), torch.tensor([[1, 6, 6]])
    with torch.inference_mode():
        out = model(patches, grid)
    merged, deepstack = out if isinstance(out, tuple) else (out.pooler_output, out.deepstack_features)
    return [merged, *deepstack]


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_a_plain_file_is_transformers_tower(vision_file, tiny, reference, tmp_path, prefix):
    model, state = reference
    loaded = vision_file.load_teacher_vision(towers.in_a_file(tmp_path / "vl.safetensors", state, prefix), tiny)
    for theirs, ours in zip(look(model), look(loaded.model), strict=True):
        assert torch.allclose(theirs, ours, atol=1e-4)
    assert (loaded.min_pixels, loaded.max_pixels) == (512 * 512, 768 * 768)
    assert loaded.lm_config.rope_theta == 5e6 and loaded.lm_config.rope_dims == [24, 20, 20]


def test_several_files_are_the_one(comfyui, vision_file, tiny, reference, tmp_path):
    """Whichever of them is chosen, also the one that has nothing of the tower."""
    one = vision_file.load_teacher_vision(towers.in_a_file(tmp_path / "vl.safetensors", reference[1]), tiny)
    expected, clip, image = one.model.state_dict(), towers.clip("z_image"), torch.rand(3, 64, 64)
    read = comfyui.module("nodes.comfy_host.vision").encode_image_text
    features = read(clip, one, "a badge", image)
    for chosen in towers.in_several(tmp_path / "several", reference[1]):
        loaded = vision_file.load_teacher_vision(chosen, tiny)
        found = loaded.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].cpu(), expected[name].cpu()) for name in expected)
        assert torch.equal(read(clip, loaded, "a badge", image), features)


@pytest.mark.parametrize("layout", ["tensors", "header", "headers of several", "older"])
def test_an_fp8_scaled_file_is_its_dequantised_weights(vision_file, tiny, tmp_path, layout):
    model, state = towers.reference(tiny)
    quantised, plain, layers = {}, dict(state), {}
    for name, value in state.items():
        quantised[name] = value
        if name.endswith(".weight") and value.ndim == 2 and name.startswith(("blocks.", "merger.linear", "deepstack")):
            layer, scale = name.removesuffix(".weight"), value.abs().max().float() / 448
            quantised[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            quantised[f"{layer}.{'scale_weight' if layout == 'older' else 'weight_scale'}"] = scale
            plain[name] = (quantised[name].float() * scale).bfloat16()
            layers[layer] = {"format": "float8_e4m3fn"}
    names = [name for name in layers if "norm" not in name]
    assert len(names) == len(layers) >= 4 * 4

    def header(names: list[str]) -> dict[str, str]:
        mine = {f"model.visual.{name}": layers[name] for name in names}
        others = {"model.language_model.layers.0.mlp.up_proj": {"format": "float8_e4m3fn"}}
        return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {**mine, **others}})}

    path, metadata = tmp_path / "fp8.safetensors", {}
    if layout == "tensors":
        text = json.dumps({"format": "float8_e4m3fn"}).encode()
        quantised |= {f"{name}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8) for name in layers}
    elif layout == "older":
        quantised["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    elif layout == "header":
        metadata = header(names)
    if layout == "headers of several":
        path = towers.in_several(tmp_path, quantised, header(names[::2]), header(names[1::2]))[0]
    else:
        towers.in_a_file(path, quantised, **metadata)
    loaded = vision_file.load_teacher_vision(path, tiny)
    assert loaded.model.blocks[0].mlp.linear_fc1.quant_format == "float8_e4m3fn"
    model.load_state_dict({name: value.float() for name, value in plain.items()})
    for theirs, ours in zip(look(model), look(loaded.model), strict=True):
        assert (theirs - ours).norm() < 0.01 * theirs.norm()


# -- what is read -----------------------------------------------------------------------------------------------------


class Recorder:
    """`safe_open` that tells what was asked of it."""

    def __init__(self, real: Any) -> None:
        self.real, self.opened, self.read = real, [], []

    def __call__(self, path: Path, framework: str) -> Recorder:
        self.opened.append(path.name)
        self.file = self.real(path, framework)
        return self

    def __enter__(self) -> Any:
        file, read = self.file.__enter__(), self.read

        class File:
            keys, metadata, get_slice = file.keys, file.metadata, file.get_slice

            def get_tensor(self, name: str) -> Tensor:
                read.append(name)
                return file.get_tensor(name)

        return File()

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)


@pytest.fixture
def recorder(vision_file: Any, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(vision_file.safe_open)
    monkeypatch.setattr(vision_file, "safe_open", recorder)
    return recorder


def test_of_a_file_the_tower_is_read_and_nothing_else(vision_file, tiny, reference, tmp_path, recorder):
    """A file of the real size is ten times its tower, and whoever loads it may have less memory than that."""
    vision_file.load_teacher_vision(towers.in_a_file(tmp_path / "vl.safetensors", reference[1]), tiny)
    assert sorted(recorder.read) == sorted(f"model.visual.{name}" for name in reference[1])


def test_of_several_files_those_of_the_tower_are_opened(vision_file, tiny, reference, tmp_path, recorder):
    paths = towers.in_several(tmp_path, reference[1])
    paths[2].write_bytes(b"no safetensors file")
    vision_file.load_teacher_vision(paths[2], tiny)
    assert recorder.opened == [paths[0].name, paths[1].name]
    assert sorted(recorder.read) == sorted(f"model.visual.{name}" for name in reference[1])


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["layers with weights", "layers without weights before a load"])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under dynamic VRAM ComfyUI makes layers without weights: on Windows, newer versions everywhere."""
    import comfy.memory_management
    import comfy.model_management

    if "without" in request.param:
        monkeypatch.setattr(comfy.model_management, "WINDOWS", True)
        monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)


def test_wrong_files_are_refused_with_what_was_found(vision_file, tiny, reference, tmp_path, layers):
    path, whole = tmp_path / "wrong.safetensors", {f"visual.{name}": value for name, value in reference[1].items()}
    cases = {
        "no vision tower": {"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)},
        "another kind .Qwen2.5-VL": {"visual.merger.mlp.0.weight": torch.zeros(2, 2)},
        "output 64": whole | {"visual.merger.linear_fc2.weight": torch.zeros(64, 2)},
        "0 DeepStack mergers": {name: value for name, value in whole.items() if "deepstack" not in name},
        "5 blocks": whole | {"visual.blocks.4.norm1.weight": torch.zeros(64)},
        "only a part.*visual.merger.norm.bias": {k: v for k, v in whole.items() if k != "visual.merger.norm.bias"},
        "only a part.*visual.blocks.1.attn.qkv.weight": {
            name: value for name, value in whole.items() if name != "visual.blocks.1.attn.qkv.weight"
        },
        "size mismatch of visual.blocks.1.mlp.linear_fc1.bias": whole
        | {"visual.blocks.1.mlp.linear_fc1.bias": torch.zeros(7)},
        "size mismatch of visual.pos_embed.weight": whole | {"visual.pos_embed.weight": torch.zeros(9, 64)},
    }
    for found, tensors in cases.items():
        save_file({name: value.clone() for name, value in tensors.items()}, path)
        with pytest.raises(ValueError, match=found) as error:
            vision_file.load_teacher_vision(path, tiny)
        assert "wrong.safetensors" in str(error.value) and "Qwen3-VL-4B" in str(error.value)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="wrong.safetensors cannot be read"):
        vision_file.load_teacher_vision(path, tiny)


def test_a_tower_of_single_numbers_is_of_another_kind(vision_file, tiny, tmp_path):
    names = ("visual.pos_embed.weight", "visual.merger.linear_fc2.weight")
    save_file({name: torch.tensor(1.0) for name in names}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="found a vision tower of another kind"):
        vision_file.load_teacher_vision(tmp_path / "wrong.safetensors", tiny)


@pytest.mark.parametrize(
    "content", ["no JSON", "[1]", "{}", '{"layers": 1}', "[" * 100_000], ids=lambda content: content[:9]
)
def test_a_header_that_is_damaged_inside_is_named(vision_file, tiny, reference, tmp_path, content):
    whole = {f"visual.{name}": value for name, value in reference[1].items()}
    save_file(whole, tmp_path / "wrong.safetensors", {"_quantization_metadata": content})
    with pytest.raises(ValueError, match="header of wrong.safetensors holds .* cannot be read: download"):
        vision_file.load_teacher_vision(tmp_path / "wrong.safetensors", tiny)


@pytest.mark.parametrize("content", [b"no JSON", b"[1]", b"[" * 100_000], ids=lambda content: content[:9].decode())
def test_an_index_that_is_none_is_named(vision_file, tiny, reference, tmp_path, content):
    paths = towers.in_several(tmp_path, reference[1])
    (index,) = tmp_path.glob("*.index.json")
    index.write_bytes(content)
    with pytest.raises(ValueError, match="is not an index of safetensors files: download it again"):
        vision_file.load_teacher_vision(paths[0], tiny)


def test_a_file_whose_name_is_too_long_is_not_there(vision_file, tiny, reference, tmp_path):
    paths = towers.in_several(tmp_path, reference[1])
    (index,) = tmp_path.glob("*.index.json")
    index.write_text(index.read_text().replace(paths[0].name, "x" * 5000 + ".safetensors"))
    with pytest.raises(ValueError, match=f"the vision tower is in x+ by {index.name}, and .* not beside it") as error:
        vision_file.load_teacher_vision(paths[0], tiny)
    assert len(str(error.value)) < 500


def test_the_8b_is_distinguished_from_the_4b(vision_file, tmp_path):
    tensors = {"visual.pos_embed.weight": torch.zeros(1, 1152), "visual.merger.linear_fc2.weight": torch.zeros(4096, 1)}
    tensors |= {f"visual.blocks.{i}.norm1.bias": torch.zeros(1) for i in range(27)}
    tensors |= {f"visual.deepstack_merger_list.{i}.norm.bias": torch.zeros(1) for i in range(3)}
    save_file(tensors, tmp_path / "qwen3vl_8b.safetensors")
    expected = "width 1024, 24 blocks, 3 DeepStack mergers, output 2560"
    found = "found width 1152, 27 blocks, 3 DeepStack mergers, output 4096"
    with pytest.raises(ValueError, match=f"{expected}.*{found}"):
        vision_file.load_teacher_vision(tmp_path / "qwen3vl_8b.safetensors")


def test_a_file_that_is_missing_or_broken_is_named(vision_file, tiny, reference, tmp_path):
    paths = towers.in_several(tmp_path, reference[1])
    paths[1].write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=f"{paths[1].name} cannot be read as a safetensors file, download it again"):
        vision_file.load_teacher_vision(paths[0], tiny)
    paths[1].unlink()
    with pytest.raises(ValueError, match=f"tower is in {paths[1].name} by model.*index.json, and that file is not"):
        vision_file.load_teacher_vision(paths[0], tiny)


def test_an_index_that_is_missing_or_broken_is_named(vision_file, tiny, reference, tmp_path):
    paths = towers.in_several(tmp_path, reference[1])
    index = tmp_path / "model.safetensors.index.json"
    for text in (b"no JSON", b"\xff\xfe", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": 3}'):
        index.write_bytes(text)
        with pytest.raises(ValueError, match=f"{index.name} beside {paths[2].name} is not an index.*download it again"):
            vision_file.load_teacher_vision(paths[2], tiny)
    index.write_text('{"weight_map": {"model.layers.0.mlp.up_proj.weight": "model-00003-of-00003.safetensors"}}')
    with pytest.raises(ValueError, match="no vision tower at all"):
        vision_file.load_teacher_vision(paths[2], tiny)
    index.unlink()
    wanted = f"{paths[2].name} is one of several files, and .*{index.name} is not beside it"
    with pytest.raises(ValueError, match=wanted):
        vision_file.load_teacher_vision(paths[2], tiny)


def test_one_of_one_needs_no_index(vision_file, tiny, reference, tmp_path):
    path = towers.in_a_file(tmp_path / "model-00001-of-00001.safetensors", reference[1])
    assert vision_file.load_teacher_vision(path, tiny).model.pos_embed.weight.shape == (36, 64)


@pytest.mark.parametrize("way", ["../", "inside/", "..\\", "{}/", "C:", ""])
def test_an_index_leads_nowhere_but_to_its_own_folder(vision_file, tiny, reference, tmp_path, way):
    """Also not to a file that is there and is the right one. An index comes from a stranger."""
    folder = tmp_path / "model"
    outside = towers.in_a_file(tmp_path / "tower.safetensors", reference[1])
    chosen = towers.in_several(folder, reference[1])[0]
    (folder / "inside").mkdir()
    os.link(outside, folder / "inside" / outside.name)
    name = way.format(tmp_path) + outside.name if way else "model.safetensors.index.json"
    index = {"weight_map": {f"model.visual.{tensor}": name for tensor in reference[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no file of its own folder"):
        vision_file.load_teacher_vision(chosen, tiny)


# -- the node ---------------------------------------------------------------------------------------------------------


def load(comfyui: Any, name: str) -> Any:
    """A run of Load Teacher Vision, in a ComfyUI that remembers the last one."""
    graph = {
        "load": {"class_type": NODE, "inputs": {"vision_name": name}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}},
    }
    return comfyui.execute(graph, keep_cache=True)


@pytest.fixture
def text_encoders(comfyui: Any) -> Path:
    folder = comfyui.base / "models" / "text_encoders"
    folder.mkdir(exist_ok=True)
    return folder


def test_load_teacher_vision_takes_a_text_encoder_file(comfyui, text_encoders):
    """By its name; and the user reads the sentence."""
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, text_encoders / "text_only.safetensors")
    run = load(comfyui, "text_only.safetensors")
    assert run.status == "error" and "no vision tower" in run.error, run.error


def test_several_files_are_read_again_where_one_of_the_towers_has_changed(
    comfyui, vision_file, tiny, reference, text_encoders, monkeypatch
):
    monkeypatch.setattr(vision_file, "qwen3vl_4b", lambda: tiny)
    paths = towers.in_several(text_encoders / "Qwen3-VL-4B", reference[1])
    name = os.path.join("Qwen3-VL-4B", paths[2].name)

    def loaded() -> Any:
        run = load(comfyui, name)
        assert run.status == "success", run.error
        return run.value("load")

    first = loaded()
    assert loaded() is first
    os.utime(paths[2], ns=(1, 1))  # nothing of the tower is in there
    assert loaded() is first
    for path in paths[:2]:
        os.utime(path, ns=(1, 1))
        again = loaded()
        assert again is not first
        first = again
    paths[0].unlink()
    run = load(comfyui, name)
    assert run.status == "error" and paths[0].name in run.error
