"""Several resolutions in one run: what is read, which batch has which, that a resumed run is the uninterrupted one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dopsd_core import TrainConfig, train
from dopsd_core.adapters import Lora
from dopsd_core.adapters.lora_file import read_safetensors
from dopsd_core.conditioning.teachers import VLM, WORDS
from dopsd_core.config import changes_that_forbid_resuming
from dopsd_core.data.dataset import DatasetReport, read_dataset
from dopsd_core.data.resolutions import Resolution, every_image, parse_resolutions, scales_of, smaller_budgets
from dopsd_core.objectives import DOPSD
from dopsd_core.optimizers import AdamW, Constant
from dopsd_core.standalone.hosts.demo import load_demo_model
from dopsd_core.standalone.previews import preview_texts
from dopsd_core.training.rng import DataOrder
from dopsd_core.training.scales import BLOCK, ScaledOrder, ScaleShare, ordered
from dopsd_core.training.shown_images import mask_remarks, pair_of_prompt
from dopsd_core.training.training_set import TrainingSet, build_training_set, latent_shape
from tests.written import pair

# -- what is wanted ----------------------------------------------------------------------------------------------------


def test_resolutions_are_read_by_size() -> None:
    assert parse_resolutions("1024, 512:2 768:0.5") == (
        Resolution(512, 2.0),
        Resolution(768, 0.5),
        Resolution(1024, 1.0),
    )
    assert parse_resolutions("") == parse_resolutions("  ") == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("512:2, x", "'x' is not like 512 or 512:2"),
        ("512:", "'512:' is not like 512 or 512:2"),
        ("500", "500 must be a multiple of 16 from 32 to 2048"),
        ("16", "16 must be a multiple of 16 from 32 to 2048"),
        ("512:0", "the share of 512 is 0; set it above 0"),
        ("512:-1", "the share of 512 is -1; set it above 0"),
        ("512, 512:2", "512 is there twice"),
        ("64, 80, 96, 112, 128", "5 are too many; give at most 4"),
    ],
)
def test_what_is_no_list_of_resolutions_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_resolutions(text)


def read(folder: Path, side: int = 64) -> DatasetReport:
    return read_dataset(folder, pixel_budget=side**2, multiple=16, trigger="[V7]")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two images of 96 x 96, a wide one, and one of 48 x 48."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(96, 96), (96, 96), (96, 48), (48, 48)]):
        gradient = Image.linear_gradient("L").resize(size)
        Image.merge("RGB", [gradient, gradient, Image.new("L", size, 60 * number)]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a [V] badge, number {number}", encoding="utf-8")
    return folder


def test_images_are_not_trained_where_they_would_be_upsampled(photos: Path) -> None:
    scales, remarks = scales_of(read(photos), parse_resolutions("64:2 48 96"), 16)
    assert [(scale.side, scale.share, len(scale.pairs)) for scale in scales] == [
        (96, 1.0, 2),
        (64, 2.0, 3),
        (48, 1.0, 4),
    ]
    assert remarks == (
        "2 of 4 images are smaller than 96 and not trained at it",
        "1 of 4 images are smaller than 64 and not trained at it",
    )
    assert [str(pair.bucket) for pair in scales[0].pairs] == ["96x96"] * 2
    assert {pair.bucket.area <= 64 * 64 for pair in scales[1].pairs} == {True}
    with pytest.raises(ValueError, match="no image is as large as 256"):
        scales_of(read(photos), parse_resolutions("64, 256"), 16)
    smallest, _ = scales_of(read(photos), parse_resolutions("128"), 16)
    assert len(smallest[0].pairs) == 4  # at the only resolution all of them, with the dataset's warnings


# -- the order ---------------------------------------------------------------------------------------------------------


def order_of(small_first: int = 0, shares: tuple[float, ...] = (1.0, 2.0, 1.0), seed: int = 3) -> ScaledOrder:
    """Seven examples: three at the largest size, two at each of the others, with two shapes at the middle one."""
    shapes = ("L", "L", "L", "M", "M wide", "S", "S")
    plain = DataOrder(shapes, (1, 1, 2, 1, 1, 1, 1), batch_size=2, seed=seed)
    places = ((0, 3, 300), (3, 5, 200), (5, 7, 100))
    scales = tuple(ScaleShare(share, *place) for share, place in zip(shares, places, strict=True))
    return ScaledOrder(plain, scales, small_first)


def test_every_block_has_the_shares() -> None:
    order = order_of()
    found = [order.scale_of(number)[0] for number in range(6 * BLOCK)]
    for block in range(6):
        assert Counter(found[block * BLOCK : (block + 1) * BLOCK]) == {0: 5, 1: 10, 2: 5}
    assert found[:BLOCK] != found[BLOCK : 2 * BLOCK]
    assert [order_of(seed=4).scale_of(number)[0] for number in range(BLOCK)] != found[:BLOCK]
    rare = order_of(shares=(1000.0, 0.001, 0.001))
    assert Counter(rare.scale_of(number)[0] for number in range(BLOCK)) == {0: 18, 1: 1, 2: 1}


@pytest.mark.parametrize("small_first", [0, 7, 50])
def test_each_resolution_continues_where_its_last_batch_was(small_first: int) -> None:
    order, seen = order_of(small_first), Counter()
    for number in range(130):
        index, turn = order.scale_of(number)
        assert turn == seen[index]
        seen[index] += 1
        scale = order.scales[index]
        batch = order.batch(number)
        assert all(scale.first <= example < scale.end for example in batch)
        assert len({order.order.shapes[example] for example in batch}) == 1
    assert min(seen.values()) > 10


def test_every_image_of_a_resolution_is_visited() -> None:
    order = order_of()
    visits = Counter(example for number in range(400) for example in order.batch(number))
    assert visits.keys() == set(range(7))
    assert visits[2] > 1.5 * visits[0]  # two repeats


def test_larger_resolutions_join_one_after_another() -> None:
    order = order_of(small_first=40)
    found = [order.scale_of(number)[0] for number in range(200)]
    assert set(found[:20]) == {2} and set(found[20:40]) == {1, 2} and set(found[40:60]) == {0, 1, 2}
    assert Counter(found[20:40]) == {1: 13, 2: 7}  # two to one
    assert [order.scale_of(number) for number in reversed(range(200))] == [
        order.scale_of(number) for number in range(200)
    ][::-1]  # no state


def test_one_resolution_keeps_the_order_of_earlier_runs() -> None:
    plain = DataOrder(("a", "a"), (1, 1), 1, 0)
    assert ordered(plain, (), 40) is plain


# -- a run -------------------------------------------------------------------------------------------------------------


def data_of(photos: Path, text: str) -> TrainingSet:
    report, model = read(photos, 96), load_demo_model()
    scales, _ = scales_of(report, parse_resolutions(text), 16)
    return build_training_set(
        scales[0].pairs, model.encoder, trigger="[V7]", anchors=True, heldout_caption="a [V] badge", scales=scales
    )


def test_each_image_is_encoded_at_each_resolution(photos: Path) -> None:
    data = data_of(photos, "48 96:3")
    sides = [latent_shape(data.pairs[example.variants[0]])[1:] for example in data.examples]
    assert sides[:2] == [(12, 12)] * 2 and sides[2:4] == [(6, 6)] * 2 and len(sides) == 6
    assert data.scales == (ScaleShare(3.0, 0, 2, 96**2), ScaleShare(1.0, 2, 6, 48**2))
    one, other = data_of(photos, "96"), data_of(photos, "48 96:2")
    assert one.scales == () and other.fingerprint() != data.fingerprint() != one.fingerprint()
    plain = build_training_set(
        [pair for pair in read(photos, 96).pairs if pair.width * pair.height >= 96 * 96], load_demo_model().encoder,
        trigger="[V7]", anchors=True,
    )  # fmt: skip
    assert [latent_shape(pair) for pair in plain.pairs[:2]] == sides_of(one)[:2]


def sides_of(data: TrainingSet) -> list[tuple[int, ...]]:
    return [latent_shape(data.pairs[example.variants[0]]) for example in data.examples]


def test_a_concept_of_small_images_only_is_one_too(photos: Path) -> None:
    for number, word in enumerate(("ohwx", "ohwx", "ohwx", "sks")):
        folder = photos / word
        folder.mkdir(exist_ok=True)
        (folder / "trigger.txt").write_text(word)
        for ending in ("png", "txt"):
            (photos / f"{number}.{ending}").rename(folder / f"{number}.{ending}")
    (photos / "sks" / "3.txt").write_text("a [V] of another kind")
    scales, _ = scales_of(read(photos, 96), parse_resolutions("48 96"), 16)
    data = build_training_set(scales[0].pairs, load_demo_model().encoder, anchors=True, scales=scales)
    assert [example.concept for example in data.examples] == ["ohwx"] * 5 + ["sks"]
    assert len({anchor.features.shape for anchor in data.anchors}) >= 1 and len(data.anchors) == 4


# -- every image is checked, whichever resolutions it reaches ----------------------------------------------------------


SIDES = parse_resolutions("64 128")


def written(folder: Path, captions: dict[str, tuple[str, int]]) -> DatasetReport:
    """A dataset of square images, each with its (caption, side), read for `SIDES`."""
    for number, (name, (caption, side)) in enumerate(captions.items()):
        pair(folder, f"{name}.png", caption, size=(side, side), colour=(40 * number, 90, 30))
    return report_of(folder)


def report_of(folder: Path) -> DatasetReport:
    budgets = smaller_budgets(SIDES)
    return read_dataset(folder, pixel_budget=128**2, multiple=16, trigger="[V7]", smaller_budgets=budgets)


def trained_on(report: DatasetReport, **options: Any) -> TrainingSet:
    scales, _ = scales_of(report, SIDES, 16)
    return build_training_set(every_image(report.pairs, scales), load_demo_model().encoder, scales=scales, **options)


def test_the_report_has_each_image_at_its_largest_resolution(tmp_path: Path) -> None:
    report = written(tmp_path, {"a": ("a [V] badge", 64), "b": ("a [V] badge, left", 128), "c": ("a [V] badge", 48)})
    assert [(pair.image_path.stem, str(pair.bucket)) for pair in report.pairs] == [
        ("a", "64x64"), ("b", "128x128"), ("c", "64x64"),
    ]  # fmt: skip
    assert [problem.message for problem in report.warnings] == [
        "is 48x48, smaller than its bucket 64x64: it would be upsampled"
    ]
    scales, remarks = scales_of(report, SIDES, 16)
    assert remarks == ("2 of 3 images are smaller than 128 and not trained at it",)
    whole = every_image(report.pairs, scales)
    assert [(pair.image_path.stem, str(pair.bucket)) for pair in whole] == [
        ("b", "128x128"), ("a", "64x64"), ("c", "64x64"),
    ]  # fmt: skip
    assert every_image(report.pairs, ()) == report.pairs


def test_a_sliders_word_is_wanted_in_the_small_images_too(tmp_path: Path) -> None:
    slider = WORDS.with_sentence("face -> smiling face")
    report = written(tmp_path, {"a": ("a face, top", 128), "b": ("a badge, left", 64)})
    with pytest.raises(ValueError, match="the caption 'a badge, left' does not contain 'face'"):
        trained_on(report, teacher=slider)
    (tmp_path / "b.txt").write_text("a face, left")
    assert len(trained_on(report_of(tmp_path), teacher=slider).examples) == 3


def test_other_images_are_wanted_at_each_resolution(tmp_path: Path) -> None:
    report = written(tmp_path, {"a": ("a [V] badge, top", 128), "b": ("a [V] badge, left", 64)})
    with pytest.raises(ValueError, match=r"two images at the resolution 128, and only a\.png is that large: leave 128"):
        trained_on(report, teacher_image="other")
    more = written(tmp_path, {"a": ("a [V] badge, top", 128), "c": ("a [V] badge, right", 128)})
    assert len(trained_on(more, teacher_image="other").examples) == 5
    pair(tmp_path / "cat", "d.png", "a [V] cat", colour=(9, 9, 200))
    (tmp_path / "cat" / "trigger.txt").write_text("sks")
    with pytest.raises(ValueError, match="needs at least two images of sks; add some"):
        trained_on(report_of(tmp_path), teacher_image="other")


def test_a_mask_of_a_small_image_counts(tmp_path: Path) -> None:
    written(tmp_path, {"a": ("a [V] badge, top", 128), "b": ("a [V] badge, left", 64)})
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    mask.save(tmp_path / "b.mask.png")
    report = report_of(tmp_path)
    assert len(trained_on(report, teacher=VLM.with_background("blur")).examples) == 3
    assert mask_remarks(report.pairs, "blur") == ["1 of 2 images have no mask: the teacher sees them whole"]


def test_prompts_know_the_concepts_and_captions_of_small_images(tmp_path: Path) -> None:
    pair(tmp_path / "dog", "a.png", "a [V] badge, top", size=(128, 128))
    pair(tmp_path / "cat", "b.png", "a [V] badge, left", colour=(9, 9, 200))
    for name, word in (("dog", "sks"), ("cat", "zwx")):
        (tmp_path / name / "trigger.txt").write_text(word)
    report = report_of(tmp_path)
    whole = every_image(report.pairs, scales_of(report, SIDES, 16)[0])
    with pytest.raises(ValueError, match=r"preview prompt 1: \[V\] may stand for any of sks, zwx"):
        preview_texts(["a [V] badge"], whole, "")
    assert whole[pair_of_prompt(whole, "a zwx badge", 0)].image_path.name == "b.png"
    with pytest.raises(ValueError, match=r"held-out caption 1: \[V\] may stand for any of sks, zwx"):
        trained_on(report, heldout_caption="a [V] badge")
    with pytest.raises(ValueError, match="'a zwx badge, left' is in the dataset"):
        trained_on(report, heldout_caption="a zwx badge, left")
    heldout = trained_on(report, heldout_caption="a zwx badge, right").heldout
    assert heldout is not None and latent_shape(heldout)[1:] == (8, 8)


def test_a_resumed_run_is_the_uninterrupted_one(photos: Path, tmp_path: Path) -> None:
    data, model = data_of(photos, "48 64 96"), load_demo_model()
    config = TrainConfig(
        steps=4, rollout_steps=1, probe_every=0, small_first=2, adapter=Lora(rank=2), checkpoint_every=2,
        optimizer=AdamW(lr=2e-3), schedule=Constant(warmup=0), objective=DOPSD(anchor_probability=0.0),
    )  # fmt: skip
    whole = train(config, model.denoiser, data, tmp_path / "whole").lora_path
    train(config.replace(steps=2), model.denoiser, data, tmp_path / "parts")
    parts = train(config, model.denoiser, data, tmp_path / "parts").lora_path
    ours, theirs = (read_safetensors(path)[0] for path in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert max(float(value.abs().max()) for name, value in ours.items() if ".lora_B." in name) > 0


def test_the_option_is_of_the_runs_identity_only_where_it_is_set(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig(steps=1)
    assert changes_that_forbid_resuming(config, config.replace(small_first=3))
    assert "small_first" not in config.identity()
    train(
        config.replace(small_first=3, adapter=Lora(rank=2)), load_demo_model().denoiser, data_of(photos, "64"), tmp_path
    )
    assert "small_first 3 is not used: there is only one resolution" in caplog.messages


def test_it_is_said_that_the_largest_resolution_gets_no_step(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser, data = load_demo_model().denoiser, data_of(photos, "48 64")
    config = TrainConfig(steps=1, rollout_steps=1, probe_every=0, adapter=Lora(rank=2), schedule=Constant(warmup=0))
    config = config.replace(objective=DOPSD(anchor_probability=0.0), small_first=1)
    train(config, denoiser, data, tmp_path / "run")
    sentence = "small_first (1) leaves none of the {} steps for the largest resolution: lower it or raise steps"
    assert caplog.messages.count(sentence.format(1)) == 1
    caplog.clear()
    train(config.replace(steps=2), denoiser, data, tmp_path / "run")  # more steps are the remedy, also for this run
    assert not [message for message in caplog.messages if "small_first" in message]
