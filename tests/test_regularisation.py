"""Regularisation images: their captions are prior anchors, the images DreamBooth's class images."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dopsd_core.__main__ import main
from dopsd_core.arguments import parse_args
from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.data.dataset import Pair
from dopsd_core.standalone.chosen import family_of
from dopsd_core.standalone.datasets import read_regularisation
from dopsd_core.standalone.model_options import ModelOptions
from dopsd_core.training.batches import on_device
from dopsd_core.training.checkpoint import StateError
from dopsd_core.training.class_images import plan_class_images
from dopsd_core.training.log import read_log
from dopsd_core.training.regularisation import check_regularisation, without_name_warnings
from dopsd_core.training.trainer import NoCallbacks, train
from dopsd_core.training.training_set import TrainingSet, build_training_set
from tests.test_training_set import TinyEncoder
from tests.tiny import make_config, saved_bytes
from tests.toy_denoiser import TinyDenoiser
from tests.written import image_file, pair, read


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def concept(folder: Path) -> tuple[Pair, ...]:
    for name in "ab":
        pair(folder / "concept", f"{name}.png", f"a [V] dog, {name}")
    return read(folder / "concept", trigger="sks").pairs


def ordinary(folder: Path, shade: int = 7) -> tuple[Pair, ...]:
    """Three images of two sizes; one is used twice."""
    place = folder / f"ordinary{shade}"
    pair(place, "1.png", "a dog in a park", colour=(shade, 0, 0))
    pair(place, "2.png", "a cat", colour=(0, shade, 0), size=(96, 48))
    pair(place / "2_times", "3.png", "a dog in a park", colour=(0, 0, shade))
    return read(place).pairs


def built(folder: Path, encoder: TinyEncoder | None = None, shade: int = 7, **options: Any) -> TrainingSet:
    return build_training_set(
        concept(folder), encoder or TinyEncoder(), trigger="sks", anchors=True, regularisation=ordinary(folder, shade),
        **options,
    )  # fmt: skip


def test_captions_are_anchors_and_images_are_kept_with_them(tmp_path: Path) -> None:
    encoder = TinyEncoder()
    data = built(tmp_path, encoder, anchor_prompts=["a lamp"])
    texts = [seen.removeprefix("text ") for seen in encoder.seen if seen.startswith("text ")]
    assert list(dict.fromkeys(texts))[-5:] == ["a dog, a", "a dog, b", "a lamp", "a dog in a park", "a cat"]
    assert not [seen for seen in encoder.seen if seen.startswith("image ") and "sks" not in seen], (
        "no teacher sees them"
    )
    assert [tuple(image.latent.shape[1:]) for image in data.regularisation] == [(8, 8), (6, 10), (8, 8), (8, 8)]
    captions = [float(image.condition.features[0, 0]) for image in data.regularisation]
    assert captions == [len("a dog in a park"), len("a cat"), len("a dog in a park"), len("a dog in a park")]


def test_they_are_encoded_once(tmp_path: Path) -> None:
    cache, second = ConditionCache(tmp_path / "cache"), TinyEncoder()
    options: dict[str, Any] = {"trigger": "sks", "anchors": True, "regularisation": ordinary(tmp_path)}
    first = build_training_set(concept(tmp_path), TinyEncoder(), cache, **options)
    again = build_training_set(concept(tmp_path), second, cache, **options)
    assert second.seen == [] and again.fingerprint() == first.fingerprint()


def test_their_pixels_and_captions_are_part_of_the_run_and_none_is_as_before(tmp_path: Path) -> None:
    usual, other = built(tmp_path), built(tmp_path, shade=200)
    without = replace(usual, regularisation=())
    assert len({data.fingerprint() for data in (usual, other, without)}) == 3
    plain = build_training_set(concept(tmp_path), TinyEncoder(), trigger="sks", anchors=True)
    named = build_training_set(concept(tmp_path), TinyEncoder(), trigger="sks", anchors=True, regularisation=())
    assert plain.fingerprint() == named.fingerprint()


class Watching(NoCallbacks):
    def __init__(self) -> None:
        self.drawn: list[tuple[int, int]] = []

    def on_class_image(self, done: int, total: int) -> None:
        self.drawn.append((done, total))


def test_dreambooth_trains_on_them_and_draws_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, seen = built(tmp_path), Watching()
    config = make_config(objective="dreambooth")
    assert plan_class_images(config, data, "", 4) == ()
    assert len(plan_class_images(config, replace(data, regularisation=()), "", 4)) == 100
    train(config, TinyDenoiser(), data, tmp_path / "run", seen)
    assert seen.drawn == [] and not (tmp_path / "run" / "class_images").exists()
    assert all(report.metrics["prior_loss"] > 0 for report in read_log(tmp_path / "run" / "train.jsonl")[1:])
    assert "the 4 regularisation images are the class images: none are drawn" in caplog.messages


def test_other_images_are_another_run_and_the_same_ones_resume(tmp_path: Path) -> None:
    data, config = built(tmp_path), make_config(objective="dreambooth")
    train(config, TinyDenoiser(), data, tmp_path / "whole")
    train(config.replace(steps=6), TinyDenoiser(), data, tmp_path / "cut")
    with pytest.raises(StateError, match="the dataset"):
        train(config, TinyDenoiser(), built(tmp_path, shade=200), tmp_path / "cut")
    train(config, TinyDenoiser(), data, tmp_path / "cut")
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")


def test_pso_draws_its_losers_all_the_same(tmp_path: Path) -> None:
    """They are what the model should no longer draw, which ordinary images are not."""
    data = built(tmp_path)
    assert len(plan_class_images(make_config(objective="pso", pso_loser_images=4), data, "", 4)) == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"anchor_probability": 0.5},
            "of the 4 regularisation images only the captions are used, as prior anchors: the objective dopsd needs no "
            "class images",
        ),
        ({}, "the 4 regularisation images are not used: the objective is dopsd, without anchors"),
        ({"objective": "sft"}, "the 4 regularisation images are not used: the objective is sft, without anchors"),
    ],
)
def test_it_is_said_what_is_used_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], sentence: str
) -> None:
    with caplog.at_level(logging.WARNING, "dopsd"):
        train(make_config(steps=1, **options), TinyDenoiser(), built(tmp_path), tmp_path / "run")
    assert caplog.messages.count(sentence) == 1


def test_captions_that_work_against_the_training_are_named(tmp_path: Path) -> None:
    trained = concept(tmp_path)
    pair(tmp_path / "bad", "1.png", "a sks dog on grass")
    pair(tmp_path / "bad", "2.png", trained[0].captions[0].replace("sks ", ""))
    pair(tmp_path / "bad", "3.png", "a chair")
    found = check_regularisation(read(tmp_path / "bad").pairs, trained, "sks")
    assert found == [
        "regularisation image 1.png: its caption names the concept, so training would suppress it: remove the name"
    ]
    plain = [replace(one, captions=("a chair",)) for one in trained]
    assert check_regularisation(read(tmp_path / "bad").pairs[2:], plain, "sks") == [
        "regularisation image 3.png: its caption is a training caption too, which pulls both ways: change one of them"
    ]


def test_an_image_that_is_trained_is_named_whatever_its_file_and_caption(tmp_path: Path) -> None:
    trained, place = concept(tmp_path), tmp_path / "again"
    place.mkdir()
    Image.open(trained[0].image_path).save(place / "1.bmp")  # other bytes, the same pixels
    (place / "1.txt").write_text("a dog in a park")
    pair(place, "2.png", "a cat")
    assert check_regularisation(read(place).pairs, trained, "sks") == [
        "regularisation image 1.bmp: it is the training image a.png too, and as a class image teaches the concept for "
        "ordinary words: use another image"
    ]
    assert check_regularisation(ordinary(tmp_path), trained, "sks") == []


def test_captions_without_a_name_are_as_they_should_be(tmp_path: Path) -> None:
    for name, caption in (("1.png", "a [V] dog"), ("2.png", "a dog"), ("tiny.png", "a cat")):
        pair(tmp_path / "ordinary", name, caption, size=(48, 48) if name == "tiny.png" else (64, 64))
    report = read(tmp_path / "ordinary")
    assert sum("lacks [V]" in problem.message for problem in report.warnings) == 2
    (left,) = without_name_warnings(report).warnings
    assert left.message.startswith("is 48x48, smaller than its bucket")
    args = parse_args(["train", "photos", "--output", "run", "--regularisation", str(tmp_path / "ordinary")])
    options = ModelOptions.of(args)
    given = read_regularisation(args, family_of(options), options)
    assert given is not None and given.warnings == (left,)


def test_edits_are_refused(tmp_path: Path) -> None:
    for half in ("source", "target"):
        image_file(tmp_path / "edits" / half / "1.png", colour="red" if half == "source" else "blue")
    (tmp_path / "edits" / "target" / "1.txt").write_text("make it red")
    with pytest.raises(ValueError, match="the regularisation images are edits"):
        check_regularisation(read(tmp_path / "edits").pairs, (), "")


def test_anchors_that_repeat_share_their_features_on_the_device(tmp_path: Path) -> None:
    data = built(tmp_path, anchor_prompts=["a lamp"] * 3)
    moved = on_device(data.anchors, torch.device("cpu"))
    assert [torch.equal(a.features, b.features) for a, b in zip(moved, data.anchors, strict=True)]
    assert len({id(anchor.features) for anchor in moved}) == len({id(anchor.features) for anchor in data.anchors}) == 5


def test_the_command_line_takes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    concept(tmp_path)
    ordinary(tmp_path)
    words = [str(tmp_path / "concept"), "--trigger", "sks", "--output", str(tmp_path / "run"), "--steps", "1"]
    assert parse_args(["train", *words]).regularisation is None
    quick = ["--probe-every", "0", "--batch-size", "1", "--threads", "1", "--warmup", "0", "--rollout-steps", "1"]
    given = ["--regularisation", str(tmp_path / "ordinary7"), "--objective", "dreambooth"]
    assert main(["train", *words, *quick, *given]) == 0
    assert "3 usable images" in capsys.readouterr().out
    assert not (tmp_path / "run" / "class_images").exists()
    (tmp_path / "ordinary7" / "1.txt").unlink()
    assert main(["train", *words, *quick, *given, "--output", str(tmp_path / "other")]) == 1
    assert "1.png: no caption: write it to 1.txt" in capsys.readouterr().err
