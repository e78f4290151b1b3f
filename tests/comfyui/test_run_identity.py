"""Which run a graph takes up: each input of its nodes is changed alone, by the table of `comfy_host.identity_table`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from graphs import training
from inprocess import ComfyUI
from loras import demo_lora, give
from PIL import Image
from runs import Run

NODES = {"data": "DOPSD_LoadDataset", "conditions": "DOPSD_BuildTeacherCondition", "train": "DOPSD_TrainLoRA"}
QUICK = {"preset": "standard", "steps": 2, "warmup": 0, "preview_every": 0, "probe_every": 0, "rollout_steps": 2}
FOLDER = "identity_images"

INPUTS: dict[str, tuple[str, Any]] = {
    # of which node, and the other value; without it a change of its own below
    "folder": ("data", "identity_copies"),
    "trigger": ("data", "ohwx"),
    "resolution": ("data", 80),
    "resolutions": ("data", "48, 64"),
    "repeats": ("data", 2),
    "caption_dropout": ("data", 0.5),
    "teacher_image": ("conditions", "other"),
    "teacher_background": ("conditions", "grey"),
    "anchor_prompts": ("conditions", "a badge, top, on a sand background"),
    "preview_prompts": ("conditions", "a [V] badge, middle, on a navy background\na badge"),
    "run_name": ("train", "another"),
    "steps": ("train", 3),
    "preview_every": ("train", 1),
    "checkpoint_every": ("train", 7),
    "probe_every": ("train", 1),
    "preset": ("train", "demo model"),
    "seed": ("train", 1),
    "learning_rate": ("train", 1e-3),
    "rank": ("train", 5),
    "alpha": ("train", 3.0),
    "batch_size": ("train", 2),
    "grad_accumulation": ("train", 2),
    "warmup": ("train", 1),
    "rollout_steps": ("train", 3),
    "grad_steps": ("train", 1),
    "loss": ("train", "velocity"),
    "teacher": ("train", "frozen"),
    "ema_decay": ("train", 0.5),
    "anchor_probability": ("train", 0.25),
    "objective": ("train", "sft"),
    "schedule": ("train", "cosine"),
    "targets": ("train", "layers.*.attention.*"),
    "deterministic": ("train", True),
}
OWN = {"images", "texts", "clip", "vae", "vision", "model", "initial_lora", "regularisation"}
"""Changed in tests of their own."""
ELSEWHERE = {
    "mode": "tests/test_conditioning.py",
    "teacher_sentence": "tests/test_conditioning.py",
    "memory": "test_memory.py",
    "optimizer": "bitsandbytes needs a GPU; tests/test_config.py",
    "dataset": "a link to what is changed here",
    "conditions": "a link to what is changed here",
    "settings": "test_training_settings.py",
}
OFTEN = ("learning_rate", "loss", "preset", "resolution", "run_name", "seed", "steps", "teacher")
"""Those that are tried without `make test-all` too."""


@pytest.fixture(scope="module")
def folders(comfyui: ComfyUI) -> Iterator[None]:
    """Two folders of the same images and captions."""
    for name in (FOLDER, "identity_copies"):
        folder = comfyui.input / name
        folder.mkdir()
        for number, colour in enumerate(("red", "blue")):
            Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
            Image.new("L", (64, 64), 255).transform(
                (64, 64), Image.Transform.AFFINE, (1, 0, 32, 0, 1, 0), fillcolor=0
            ).save(folder / f"{number}.mask.png")
            (folder / f"{number}.txt").write_text(f"a [V] badge, {number}", encoding="utf-8")
    yield
    for name in (FOLDER, "identity_copies"):
        shutil.rmtree(comfyui.input / name)


def graph(**changes: Any) -> dict:
    """changes: of inputs, by their names."""
    whole = training("identity", **QUICK, batch_size=1)
    whole["data"]["inputs"]["folder"] = FOLDER
    whole["conditions"]["inputs"]["preview_prompts"] = "a [V] badge, left, on a white background"
    for name, value in changes.items():
        whole[INPUTS[name][0]]["inputs"][name] = value
    return whole


@pytest.fixture(scope="module")
def taken(comfyui: ComfyUI, folders: None) -> Callable[..., str]:
    """taken(graph): the digest of the run's settings, model and data, which its folder's name ends with."""

    def digest(graph: dict, keep_cache: bool = True) -> str:
        run: Run = comfyui.execute(graph, keep_cache=keep_cache)
        assert run.status == "success", run.error
        return Path(run.value("train", 2)).name.rpartition("-")[2]

    return digest


@pytest.fixture(scope="module")
def usual(taken: Callable[..., str]) -> str:
    return taken(graph())


def test_the_table_has_a_row_for_each_input_of_the_nodes(comfyui: ComfyUI) -> None:
    rows = {row.what for row in comfyui.module("nodes.comfy_host.identity").TABLE["run"]}
    inputs = {entry.id for kind in NODES.values() for entry in comfyui.pack_nodes[kind].define_schema().inputs}
    assert rows == inputs == INPUTS.keys() | OWN | ELSEWHERE.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in OFTEN)) for name in INPUTS]
)
def test_a_change_of_an_input_alone(comfyui: ComfyUI, taken: Callable[..., str], usual: str, name: str) -> None:
    (counts,) = [row.counts for row in comfyui.module("nodes.comfy_host.identity").TABLE["run"] if row.what == name]
    changed = graph(**{"run_name": f"with {name}", name: INPUTS[name][1]})
    assert (taken(changed) != usual) == counts
    assert taken(graph()) == usual


@pytest.mark.parametrize("file", ["0.png", "1.txt"])
def test_bytes_of_images_and_captions_count(comfyui: ComfyUI, taken: Any, usual: str, file: str) -> None:
    """One pixel that is another, one letter; and their times alone do not count."""
    path = comfyui.input / FOLDER / file
    before = path.read_bytes()
    try:
        if path.suffix == ".png":
            image = Image.open(path).convert("RGB")
            image.putpixel((3, 3), (254, 0, 0))
            image.save(path)
        else:
            path.write_text("a [V] Badge, 1", encoding="utf-8")
        assert taken(graph()) != usual
    finally:
        path.write_bytes(before)
    assert taken(graph()) == usual


@pytest.mark.long
def test_the_models_count(comfyui: ComfyUI, taken: Any, usual: str) -> None:
    """MODEL, CLIP, VAE and vision of the data, each with something else in it; the VAE of previews does not."""
    demo = comfyui.module("nodes.comfy_host.demo_models")
    model, clip, vae, vision = (getattr(demo, f"load_{kind}") for kind in ("model", "clip", "vae", "vision"))
    seen = {usual}
    for node, name, make in (
        ("train", "model", model), ("conditions", "clip", clip), ("conditions", "vae", vae),
        ("conditions", "vision", vision), ("train", "vae", vae),
    ):  # fmt: skip
        other = comfyui.call(make)
        patcher = getattr(other, "patcher", other)
        weight = max(patcher.model.parameters(), key=lambda value: value.ndim)
        weight.data = weight.data * 1.5
        kind = {"model": "MODEL", "clip": "CLIP", "vae": "VAE", "vision": "DOPSD_VISION"}[name]
        changed = graph()
        changed["other"] = _given(comfyui, kind, other)
        changed[node]["inputs"][name] = ["other", 0]
        found = taken(changed, keep_cache=False)
        assert (found not in seen) == ((node, name) != ("train", "vae")), (node, name)
        seen.add(found)


def _given(comfyui: ComfyUI, kind: str, value: Any) -> dict:
    from loras import give_values

    return give_values(comfyui, (kind,), (value,))


@pytest.mark.long
def test_the_lora_that_it_starts_from_counts(comfyui: ComfyUI, taken: Any, usual: str) -> None:
    found = set()
    for seed in (1, 2, 1):
        changed = graph()
        changed["first"] = give(comfyui, demo_lora(comfyui, seed=seed))
        changed["train"]["inputs"]["initial_lora"] = ["first", 0]
        found.add(taken(changed, keep_cache=False))
    assert len(found) == 2 and usual not in found


@pytest.mark.long
def test_regularisation_images_and_their_captions_count(comfyui: ComfyUI, taken: Any, usual: str) -> None:
    import torch
    from loras import give_values

    found = []
    for shade, text in ((0.2, "a lamp"), (0.2, "a red lamp"), (0.3, "a lamp"), (0.2, "a lamp")):
        changed = graph()
        changed["given"] = give_values(comfyui, ("IMAGE", "STRING"), (torch.full((1, 64, 64, 3), shade), text))
        inputs = {**changed["data"]["inputs"], "images": ["given", 0], "texts": ["given", 1]}
        changed["ordinary"] = {"class_type": "DOPSD_LoadDataset", "inputs": inputs}
        changed["conditions"]["inputs"]["regularisation"] = ["ordinary", 0]
        found.append(taken(changed, keep_cache=False))
    assert len({usual, *found}) == 4 and found[0] == found[3]


@pytest.mark.long
def test_connected_images_and_texts_count(comfyui: ComfyUI, taken: Any) -> None:
    import torch
    from loras import give_values

    found = []
    for shade, text in ((0.2, "a [V] badge"), (0.2, "a [V] cat"), (0.3, "a [V] badge"), (0.2, "a [V] badge")):
        changed = graph()
        changed["given"] = give_values(comfyui, ("IMAGE", "STRING"), (torch.full((1, 64, 64, 3), shade), text))
        changed["data"]["inputs"] |= {"images": ["given", 0], "texts": ["given", 1]}
        found.append(taken(changed, keep_cache=False))
    assert len(set(found)) == 3 and found[0] == found[3]


@pytest.mark.long
def test_another_preview_prompt_resumes_and_measures_against_its_own_start(comfyui: ComfyUI, folders: None) -> None:
    """The gap of the unseen prompt is what it would be if the run were begun with it."""

    def run(name: str, steps: int, prompt: str) -> Run:
        changed = graph(steps=steps, run_name=name, preview_prompts=prompt, probe_every=2)
        done = comfyui.execute(changed, keep_cache=True)
        assert done.status == "success", done.error
        return done

    first, second = "a [V] badge, left, on a white background", "a [V] badge, top, on a sand background"
    run("cut", 2, first)
    resumed, whole, other = run("cut", 4, second), run("whole", 4, second), run("other", 4, first)
    gaps = [json.loads(log_of(done)[-1])["heldout_relative_gap"] for done in (resumed, whole, other)]
    assert gaps[0] == gaps[1] != gaps[2]
    assert resumed.value("train").keys() == whole.value("train").keys()
    assert all((resumed.value("train")[key] == value).all() for key, value in whole.value("train").items())


@pytest.mark.long
def test_a_run_whose_warmup_was_cut_to_its_steps_resumes_with_more_steps(comfyui: ComfyUI, folders: None) -> None:
    """The warm-up that a run really has is in its folder's name, and becomes longer with its steps."""

    def run(steps: int, warmup: int, name: str = "raised") -> Run:
        done = comfyui.execute(graph(run_name=name, steps=steps, warmup=warmup), keep_cache=True)
        assert done.status == "success", done.error
        return done

    short, longer, whole, again = run(2, 4), run(3, 4), run(6, 4), run(6, 4)
    assert len({done.value("train", 2) for done in (short, longer, whole, again)}) == 1
    assert "resumed at step 2" in longer.texts("train")[-1] and "resumed at step 3" in whole.texts("train")[-1]
    assert [json.loads(line)["step"] for line in log_of(again)] == [1, 2, 3, 4, 5, 6]
    assert run(6, 2).value("train", 2) != whole.value("train", 2), "another warm-up that was asked for is another run"
    asked = run(6, 1, "asked")
    assert run(6, 3, "asked").value("train", 2) != asked.value("train", 2)


def log_of(run: Run) -> list[str]:
    return (Path(run.value("train", 2)) / "train.jsonl").read_text(encoding="utf-8").splitlines()
