"""From files to a training set: every caption encoded once, from the cache the second time."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dopsd_core.conditioning import Condition, ConditionCache
from dopsd_core.dataset import Example, read_dataset
from dopsd_core.trainer import train
from dopsd_core.training_set import TrainingSet, _weighted_anchors, build_training_set, grid_of
from tests.tiny import CHANNELS, FEATURES, TinyDenoiser, make_config, make_data, make_pair


class TinyEncoder:
    """Features that are functions of caption and picture; counts its calls."""

    identity = "tiny-1"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode_text(self, caption: str) -> Condition:
        self.seen.append(f"text {caption}")
        return Condition(torch.full((2, FEATURES), float(len(caption))))

    def encode_image_text(self, image: Tensor, caption: str) -> Condition:
        self.seen.append(f"image {caption} {tuple(image.shape)}")
        return Condition(torch.full((3, FEATURES), float(len(caption)) + float(image.mean())))

    def encode_latent(self, image: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(image.mean(0, keepdim=True), 8).expand(CHANNELS, -1, -1)


def folder(tmp_path: Path) -> Path:
    for name, size, shade in (("a", (64, 64), 10), ("b", (100, 60), 200)):
        Image.new("RGB", size, (shade, 0, 0)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a [V] dog, {name}")
    return tmp_path


def test_from_a_folder_to_a_run(tmp_path: Path) -> None:
    report = read_dataset(folder(tmp_path), pixel_budget=4096, multiple=16, trigger="sks")
    cache = ConditionCache(tmp_path / "cache")

    def build(encoder: TinyEncoder) -> TrainingSet:
        return build_training_set(
            report.pairs,
            encoder,
            cache,
            trigger="sks",
            caption_dropout=True,
            anchors=True,
            heldout_caption="a [V] cat",
        )

    first, second = TinyEncoder(), TinyEncoder()
    data = build(first)
    assert [pair.caption for pair in data.pairs] == ["a sks dog, a", "", "a sks dog, b", ""]
    assert data.heldout is not None and data.heldout.caption == "a sks cat"
    assert data.examples == (Example((0,), 1), Example((2,), 3))
    assert data.shapes() == ((CHANNELS, 8, 8), (CHANNELS, 6, 10))
    assert len(data.anchors) == 2 and "text a dog, b" in first.seen and "image a sks dog, b (3, 48, 80)" in first.seen
    assert build(second).fingerprint() == data.fingerprint() and second.seen == []
    result = train(make_config(caption_dropout=0.5, anchor_probability=0.5), TinyDenoiser(), data, tmp_path / "run")
    assert result.step == 12 and result.end_gaps is not None and result.end_gaps.heldout is not None
    with pytest.raises(ValueError, match="'a sks dog, a' is one of the data set"):
        build_training_set(report.pairs, first, trigger="sks", heldout_caption="a [V] dog, a")


def test_the_fingerprint_sees_every_change() -> None:
    data = make_data(3, anchors=[make_pair(8).student], heldout=make_pair(9))
    others = [
        make_data(2, anchors=[make_pair(8).student], heldout=make_pair(9)),
        make_data(3, anchors=[make_pair(7).student], heldout=make_pair(9)),
        make_data(3, anchors=[make_pair(8).student], heldout=make_pair(10)),
        make_data(3, anchors=[make_pair(8).student]),
        TrainingSet(data.pairs[::-1], data.anchors, data.heldout),
        TrainingSet(data.pairs, data.anchors, data.heldout, [Example((0,), repeats=2), Example((1,)), Example((2,))]),
    ]
    assert len({item.fingerprint() for item in [data, *others]}) == 7


def test_the_grid_is_that_of_the_picture() -> None:
    assert grid_of(make_config(), (16, 8, 8)) == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    klein = make_config(family="flux2_klein")
    assert grid_of(klein, (128, 64, 64))[1:4] == pytest.approx((0.967384, 0.908144, 0.767200), abs=1e-6)
    assert grid_of(klein, (128, 56, 72))[1:4] == pytest.approx((0.967212, 0.907690, 0.766229), abs=1e-6)


def test_captions_without_the_name_are_three_quarters_of_the_anchors() -> None:
    assert _weighted_anchors(("a dog", "a cat"), ()) == ["a dog", "a cat"]
    assert _weighted_anchors((), ("x",)) == ["x"]
    weighted = _weighted_anchors(("a dog", "a cat"), tuple("abcdefgh"))
    assert weighted.count("a dog") == weighted.count("a cat") == 12 and len(weighted) == 32
    assert set("abcdefgh") < set(weighted)
