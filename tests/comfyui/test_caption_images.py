"""Caption Images in the real executor: what it writes, what it leaves, which CLIPs write, where it may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inprocess import ComfyUI
from loras import give_values
from PIL import Image
from runs import Run

DEMO = "demo badge (built in)"


@pytest.fixture
def folder(comfyui: ComfyUI, request: pytest.FixtureRequest) -> Path:
    """input/captioned/<test>: a.png without caption, b.png with one."""
    folder = comfyui.input / "captioned" / request.node.name.replace("[", "-").replace("]", "")
    folder.mkdir(parents=True, exist_ok=True)
    for shade, name in enumerate("ab"):
        Image.new("RGB", (96, 64), (200 * shade, 30, 90)).save(folder / f"{name}.png")
    (folder / "b.txt").write_text("a red [V] badge, mine", encoding="utf-8")
    return folder


class Writer:
    """Stands in for a Qwen3-VL: ComfyUI's own tokenizer, and an answer by hand."""

    def __init__(self, answer: str = "A [V] badge on a wall.") -> None:
        from comfy.text_encoders import qwen3vl

        self.tokenizer = qwen3vl.tokenizer("qwen3vl_4b")()
        self.cond_stage_model = SimpleNamespace(generate=self.generate)
        self.answer, self.asked = answer, []

    def tokenize(self, text: str, **more: Any) -> Any:
        self.text = text
        return self.tokenizer.tokenize_with_weights(text, **more)

    def generate(self, tokens: Any, **options: Any) -> list[int]:
        (row,) = next(iter(tokens.values()))
        images = [token[0]["data"] for token in row if isinstance(token[0], dict)]
        self.asked.append({"text": self.text, "images": images, **options})
        return [1]

    def decode(self, ids: list[int]) -> str:
        return self.answer


@pytest.fixture
def run(comfyui: ComfyUI) -> Callable[..., Run]:
    """run(folder, clip=None, **widgets)"""

    def running(folder: Path | str, clip: Any | None = None, **widgets: Any) -> Run:
        name = folder if isinstance(folder, str) else folder.relative_to(comfyui.input).as_posix()
        nodes = {"captions": {"class_type": "DOPSD_CaptionImages", "inputs": {"folder": name, **widgets}}}
        if clip is not None:
            nodes["clip"] = give_values(comfyui, ("CLIP",), (clip,))
            nodes["captions"]["inputs"]["clip"] = ["clip", 0]
        return comfyui.execute(nodes)

    return running


def test_missing_captions_are_written_and_the_others_stay(folder: Path, run, artefacts: Path) -> None:
    clip = Writer()
    done = run(folder, clip, class_word="badge", max_words=10, instruction="Name the wall.")
    assert done.status == "success", done.error
    assert (folder / "a.txt").read_text(encoding="utf-8") == "A [V] badge on a wall.\n"
    assert (folder / "b.txt").read_text(encoding="utf-8") == "a red [V] badge, mine"
    (asked,) = clip.asked
    assert "Write [V] badge for it" in asked["text"] and "Name the wall." in asked["text"]
    assert asked["do_sample"] is False and asked["max_length"] == 62
    (image,) = asked["images"]
    assert image.shape[0] == 1 and 512**2 <= image.shape[1] * image.shape[2] <= 768**2  # as large as a teacher sees it
    assert torch.allclose(image[0, 5, 5], torch.tensor([0, 30, 90]) / 255, atol=1e-3)
    report = done.value("captions", 1)
    assert "2 images, 1 new, 1 already there" in report and "a.png (written): A [V] badge on a wall." in report
    assert "b.png: says 'red' of the concept itself" in report
    assert done.texts("captions")[0] == "caption 1 of 1" and "1 new" in done.texts("captions")[-1]
    assert done.value("captions").shape[0] == 1 and done.outputs["captions"]["images"]
    Image.fromarray((done.value("captions")[0] * 255).byte().numpy()).save(artefacts / "captions.png")


def test_a_second_run_asks_nothing(folder: Path, run) -> None:
    assert run(folder, Writer()).status == "success"
    clip = Writer("something else")
    done = run(folder, clip)
    assert not clip.asked and "2 images, 2 already there" in done.value("captions", 1)


def test_without_a_clip_captions_are_only_checked(folder: Path, run) -> None:
    done = run(folder)
    assert done.status == "success" and not (folder / "a.txt").exists()
    assert "1 already there, 1 without caption" in done.value("captions", 1)
    demo = run(DEMO)
    assert "'badge' is in 4 of 4 captions and says what [V] is" in demo.value("captions", 1)


def test_cancelling_keeps_what_is_written(comfyui: ComfyUI, folder: Path, run) -> None:
    Image.new("RGB", (64, 64), (9, 9, 9)).save(folder / "c.png")
    clip = Writer()
    clip.decode = lambda ids: comfyui.interrupt() or clip.answer  # the user presses cancel during the first
    assert run(folder, clip).status == "interrupted"
    assert (folder / "a.txt").exists() and not (folder / "c.txt").exists()


def test_the_demo_models_clip_cannot_write(comfyui: ComfyUI, folder: Path) -> None:
    nodes = {
        "models": {"class_type": "DOPSD_LoadDemoModels", "inputs": {}},
        "captions": {
            "class_type": "DOPSD_CaptionImages",
            "inputs": {"folder": folder.relative_to(comfyui.input).as_posix(), "clip": ["models", 1]},
        },
    }
    done = comfyui.execute(nodes)
    assert "the CLIP connected to Caption Images cannot write about images: load qwen3vl_4b" in done.error
    assert not (folder / "a.txt").exists()


@pytest.mark.parametrize("place", ["../outside", "/etc", "captioned/nowhere", ""])
def test_only_allowed_folders_are_read_and_written(comfyui: ComfyUI, run, place: str) -> None:
    outside = comfyui.base / "outside"
    outside.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(outside / "a.png")
    clip = Writer()
    done = run(place, clip)
    assert done.status == "refused" and not clip.asked and not (outside / "a.txt").exists()


def test_rows_are_refused(comfyui: ComfyUI, folder: Path, run) -> None:
    (folder / "rows.jsonl").write_text("{}", encoding="utf-8")
    done = run(f"captioned/{folder.name}/rows.jsonl", Writer())
    assert "is no folder: captions are written beside images" in done.error
    choices = comfyui.pack_nodes["DOPSD_CaptionImages"].define_schema().inputs[0].options
    assert f"captioned/{folder.name}" in choices and f"captioned/{folder.name}/rows.jsonl" not in choices


@pytest.mark.parametrize("kind", ["krea2", "lumina2"])
def test_stock_loaders_give_a_clip_that_writes(comfyui: ComfyUI, stock, monkeypatch, kind: str) -> None:
    """The network is small and random: it answers as it does when ComfyUI's own node Generate Text asks."""
    import comfy.utils

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)  # there is no node outside of a graph
    stock("text_encoders/qwen3vl_4b_fp8_scaled")
    name = "qwen3vl_4b_fp8_scaled.safetensors"
    nodes = {
        "clip": {"class_type": "CLIPLoader", "inputs": {"clip_name": name, "type": kind}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["clip", 0]}},
    }
    done = comfyui.execute(nodes)
    assert done.status == "success", done.error
    clip, answers = done.value("clip"), comfyui.module("nodes.comfy_host.clip_answers")
    assert answers.can_answer(clip, 1) and answers.can_answer(clip, 2)
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))

    def both() -> tuple[str, str]:
        with torch.inference_mode():
            tokens = clip.tokenize("What is it?", image=image.movedim(0, -1)[None])
            theirs = clip.decode(clip.generate(tokens, do_sample=False, max_length=6))
            return answers.answer(clip, [image], "What is it?", 6), theirs

    ours, theirs = comfyui.call(both)
    assert ours == theirs and len(ours) > 0
