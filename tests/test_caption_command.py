"""`python -m dopsd_core caption`: what it writes, prints and returns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dopsd_core.__main__ import main
from dopsd_core.metrics.vlm import TransformersVlm


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for shade, name in enumerate("ab"):
        Image.new("RGB", (64, 48), (200 * shade, 30, 90)).save(folder / f"{name}.png")
    (folder / "b.txt").write_text("a red [V] badge", encoding="utf-8")
    return folder


def test_checking_needs_no_model(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["caption", str(photos), "--check", "--class-word", "badge", "--sheet", str(tmp_path / "sheets" / "a.png")]
    assert main(words) == 1  # a.png has no caption
    shown = capsys.readouterr().out
    assert "2 images, 1 already there, 1 without caption" in shown and "a.png (missing)" in shown
    assert "b.png: says 'red' of the concept itself" in shown
    assert Image.open(tmp_path / "sheets" / "a.png").width > 400 and not (photos / "a.txt").exists()


def test_captions_are_written_with_the_options(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, asked = [], []

    def answer(images, question: str) -> str:
        asked.append((images, question))
        return "A watercolour cat."

    def load(weights, device, download, *, needs, max_new_tokens):
        loaded.append((weights, device, download, needs.metric, max_new_tokens))
        return answer

    monkeypatch.setattr(TransformersVlm, "load", load)
    words = [
        "--aim",
        "style",
        "--max-words",
        "10",
        "--instruction",
        "Name the place.",
        "--vlm",
        "vlm",
        "--device",
        "cpu",
    ]
    assert main(["caption", str(photos), *words]) == 0
    assert (photos / "a.txt").read_text(encoding="utf-8") == "A watercolour cat, in the style of [V]\n"
    assert loaded == [("vlm", "cpu", False, "captioning", 62)]
    ((images, question),) = asked
    (image,) = images
    assert 512**2 <= image[0].numel() <= 768**2 and torch.allclose(image[:, 5, 5] * 255, torch.tensor([0.0, 30, 90]))
    assert "Name the place." in question and "Do not describe the style" in question
    assert "a.png: says 'watercolour' of the style" in capsys.readouterr().out
    assert main(["caption", str(photos), "--vlm", "vlm"]) == 0  # nothing is missing any more
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max-words", "2", "--aim", "face"], "max_words is 2; set it to a value from 5 to 200"),
        (["--vlm", "some/where-else"], "captioning: the weights some/where-else are not on this machine"),
        (["--vlm", "no/such/folder"], "captioning: there are no weights at no/such/folder"),
    ],
)
def test_mistakes_are_one_sentence(
    photos: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(photos.iterdir())
    assert main(["caption", str(photos), *words]) == 1
    assert sentence in capsys.readouterr().err and sorted(photos.iterdir()) == before


def test_a_longer_answer_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from . import metric_weights as weights

    folder = weights.qwen3_vl(tmp_path / "vlm")
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    short, long = (TransformersVlm.load(folder, max_new_tokens=count)([image], "What?") for count in (2, 40))
    assert long.startswith(short[:1]) and len(long) > len(short)
