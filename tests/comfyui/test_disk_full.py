"""A full disk, through the node: refused before the model is loaded, and nothing lost if it fills up later."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from graphs import training
from inprocess import ComfyUI
from PIL import Image
from safetensors import safe_open


def graph(name: str, **settings: Any) -> dict:
    return training(name, probe_every=0, **{"preview_every": 0, **settings})


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """full(part): no file whose path holds `part` can be written any more; full(""): all can again."""
    real, refused = os.fsync, [""]

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}") if os.path.isdir("/proc/self/fd") else ""
        if refused[0] and refused[0] in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("which file it is can be seen on Linux only")
    monkeypatch.setattr(os, "fsync", fsync)
    return lambda part: refused.__setitem__(0, part)


def test_a_run_without_room_is_refused_before_the_model_is_loaded(
    comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser, "load", loaded)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    run = comfyui.execute(graph("no_room"))
    assert run.status == "error" and "\n" not in run.error
    assert "dopsd/no_room-" in run.error and " free there: free up " in run.error
    assert not list((comfyui.output / "dopsd").glob("no_room-*"))


@pytest.mark.long
def test_previews_are_counted_with_the_vae_alone(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    check = comfyui.module("nodes.comfy_host.training").check_run
    monkeypatch.setattr(
        comfyui.module("nodes.comfy_host.training"), "check_run", lambda *args: (asked.append(args[-1]), check(*args))
    )
    with_vae = graph("counted", steps=2, preview_every=1)
    without = graph("counted", steps=2, preview_every=1)
    del without["train"]["inputs"]["vae"]
    for prompt in (with_vae, without):
        run = comfyui.execute(prompt)
        assert run.status == "success", run.error
        previews = Path(run.value("train", 2)) / "previews"
    assert asked[0] > sum(file.stat().st_size for file in previews.iterdir()) and asked[1] == 0


@pytest.mark.long
def test_a_checkpoint_that_does_not_fit_leaves_the_lora(comfyui: ComfyUI, full: Callable[[str], None]) -> None:
    full("/checkpoints/")
    run = comfyui.execute(graph("lora_alone", checkpoint_every=2, steps=3))
    assert run.status == "error" and "\n" not in run.error
    assert "checkpoints/step-000002 could not be written: No space left on device" in run.error
    assert "free up some space there; no step is saved, and the LoRA of step 2 is in " in run.error
    path = Path(run.error.rpartition(" is in ")[2])
    with safe_open(path, "pt") as file:
        assert file.metadata()["dopsd_step"] == "2"
    full("")
    again = comfyui.execute(graph("lora_alone", checkpoint_every=2, steps=3))
    assert again.status == "success" and Path(again.value("train", 2)) == path.parent


@pytest.mark.long
def test_a_preview_that_does_not_fit_is_no_half_file(comfyui: ComfyUI, full: Callable[[str], None]) -> None:
    def on_event(event: Any) -> None:
        if event.kind == "progress" and event.data["node"] == "train" and event.data["value"] == 1:
            full("/previews/")

    run = comfyui.execute(graph("no_preview", preview_every=2, steps=3), on_event=on_event)
    assert run.status == "error" and "previews/step-000002.png could not be written: No space" in run.error
    assert run.error.endswith("; the run resumes at step 2")
    full("")
    again = comfyui.execute(graph("no_preview", preview_every=2, steps=3))
    assert again.status == "success", again.error
    for path in (Path(again.value("train", 2)) / "previews").iterdir():
        Image.open(path).load()


def test_a_cancel_on_a_full_disk_says_what_is_kept(comfyui: ComfyUI, full: Callable[[str], None]) -> None:
    def on_event(event: Any) -> None:
        if event.kind == "progress" and event.data["node"] == "train" and event.data["value"] == 3:
            full("dopsd/")
            comfyui.interrupt()

    run = comfyui.execute(graph("cancelled", checkpoint_every=2), on_event=on_event)
    assert run.status == "interrupted"
    assert "stopped, 2 steps are saved in output/dopsd/cancelled-" in run.texts("train")[-1]
    full("")
    again = comfyui.execute(graph("cancelled", checkpoint_every=2))
    assert again.status == "success", again.error
