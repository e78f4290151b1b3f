"""Digests of weights that are a mapped file are remembered by the file's size and times, and no others are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inprocess import ComfyUI
from loaded import identities
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

ROWS, COLUMNS = 700, 512  # 1.4 MB: more than is read whole


@pytest.fixture
def weights(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """nodes/comfy_host/weights.py, with `read`: how many tensors were read for more than a glance."""
    module = comfyui.module("nodes.comfy_host.weights")
    counted = SimpleNamespace(read=0, module=module, store=comfyui.module("nodes.comfy_host.paths").known_weights())
    real = module.digest_tensors

    def digest_tensors(contents: Any, glance: bool = False) -> Any:
        counted.read += 0 if glance else len(contents)
        return real(contents, glance)

    monkeypatch.setattr(module, "digest_tensors", digest_tensors)
    counted.store.unlink(missing_ok=True)
    yield counted
    counted.store.unlink(missing_ok=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    values = {"large": torch.randn(ROWS, COLUMNS, generator=generator), "small": torch.ones(3)}
    save_file(values, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def model_of(path: Path, is_mapped: bool = True) -> Any:
    """A ModelPatcher over the file's tensors, marked as ComfyUI's loader under dynamic VRAM marks them."""
    import comfy.model_patcher

    network = nn.Module()
    with safe_open(path, "pt") as file:
        for name in ("large", "small"):
            tensor = file.get_tensor(name) if is_mapped else file.get_tensor(name).clone()
            if is_mapped:
                tensor.untyped_storage()._comfy_tensor_file_slice = (path, 0)  # type: ignore[attr-defined]
            network.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)
    patcher.cached_patcher_init = (model_of, ([str(path)], {"option": "x"}))
    return patcher


@pytest.fixture
def who(comfyui: ComfyUI) -> Callable[..., str]:
    return identities(comfyui)


def change_a_row(path: Path, keep_time: bool) -> None:
    """In place, so that even its number in the file system stays."""
    facts, values = path.stat(), load_file(path)
    values["large"][3] += 1
    save_file(values, path.with_suffix(".new"))
    path.write_bytes(path.with_suffix(".new").read_bytes())
    if keep_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert path.stat().st_size == facts.st_size


def test_a_mapped_file_is_read_once(weights: Any, path: Path, who: Any) -> None:
    first = who(model_of(path))
    assert weights.read == 2
    assert who(model_of(path)) == first and weights.read == 2
    assert weights.store.is_file(), "over restarts too"


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_file_that_was_written_to_is_read_again(weights: Any, path: Path, who: Any, keep_time: bool) -> None:
    first = who(model_of(path))
    change_a_row(path, keep_time)
    assert who(model_of(path)) != first and weights.read == 4


def test_weights_in_ram_are_read_each_time(weights: Any, path: Path, who: Any) -> None:
    """Anything may write to them."""
    model = model_of(path, is_mapped=False)
    first = who(model)
    model.model.large.data[3] += 1
    assert who(model) != first and weights.read == 4
    assert not weights.store.exists()
    assert who(model_of(path)) == first, "mapped or not, they are the same"


def test_what_was_remembered_is_not_believed_for_other_weights(weights: Any, path: Path, who: Any) -> None:
    """Loaded from the file as it was before: what is in memory counts."""
    held = model_of(path)
    values = load_file(path)
    values["large"] *= 2
    save_file(values, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    now = who(model_of(path))
    assert who(held) != now and weights.read == 4


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"a": {"b": 1}}', b"\xff\xfe"])
def test_a_damaged_store_is_no_store(weights: Any, path: Path, who: Any, damage: bytes) -> None:
    first = who(model_of(path))
    weights.store.write_bytes(damage)
    assert who(model_of(path)) == first and weights.read == 4
    assert who(model_of(path)) == first and weights.read == 4


def test_a_store_that_cannot_be_written_costs_time_only(
    weights: Any, path: Path, who: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.module, "write_atomic", full)
    assert who(model_of(path)) == who(model_of(path)) and weights.read == 4
    assert "cannot be written" in caplog.text


def test_the_oldest_are_forgotten(weights: Any, path: Path, who: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.module, "_MOST_REMEMBERED", 2)
    for factor in (1.0, 2.0, 3.0):
        values = load_file(path)
        values["large"] *= factor
        save_file(values, path)
        who(model_of(path))
    assert len(weights.module._DigestCache.load()) == 2
