"""From files to a training set: every caption encoded once, from the cache the second time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.conditioning.encode import Condition, encode_dataset
from dopsd_core.conditioning.teachers import EDIT, EDIT_TARGET, TEACHER_VIEWS, VLM, WORDS, TeacherView, choose_teacher
from dopsd_core.data.dataset import Pair, read_dataset
from dopsd_core.data.encoding_plan import Example
from dopsd_core.data.images import ImageError
from dopsd_core.families import FAMILIES, FLUX2_KLEIN, Z_IMAGE
from dopsd_core.training.anchors import Anchor, weighted
from dopsd_core.training.shown_images import TeacherImage, encode_request
from dopsd_core.training.trainer import train
from dopsd_core.training.training_set import TrainingSet, build_training_set
from tests.tiny import CHANNELS, FEATURES, TinyDenoiser, make_config, make_data, make_pair


class TinyEncoder:
    """Features that are functions of caption and image; counts its calls."""

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
    with pytest.raises(ValueError, match="'a sks dog, a' is in the dataset"):
        build_training_set(report.pairs, first, trigger="sks", heldout_caption="a [V] dog, a")


def test_the_fingerprint_sees_every_change() -> None:
    data = make_data(3, anchors=[make_pair(8).student], heldout=make_pair(9))
    others = [
        make_data(2, anchors=[make_pair(8).student], heldout=make_pair(9)),
        make_data(3, anchors=[make_pair(7).student], heldout=make_pair(9)),
        make_data(3, heldout=make_pair(9)),
        make_data(3, anchors=[make_pair(8).student] * 2, heldout=make_pair(9)),
        TrainingSet(data.pairs[::-1], data.anchors, data.heldout),
        TrainingSet([replace(data.pairs[0], key="another image"), *data.pairs[1:]], data.anchors, data.heldout),
        TrainingSet(data.pairs, data.anchors, data.heldout, [Example((0,), repeats=2), Example((1,)), Example((2,))]),
    ]
    assert len({item.fingerprint() for item in [data, *others]}) == len(others) + 1


def test_the_held_out_pair_trains_nothing_and_does_not_count() -> None:
    data = make_data(3, anchors=[make_pair(8).student], heldout=make_pair(9))
    for heldout in (None, make_pair(10), make_pair(10, shape=(4, 4))):
        assert TrainingSet(data.pairs, data.anchors, heldout).fingerprint() == data.fingerprint()


def test_an_image_that_changes_while_it_is_encoded_is_not_kept(tmp_path: Path) -> None:
    """Its digest is of what it was before."""
    (pair, *_) = read_dataset(folder(tmp_path), pixel_budget=4096, multiple=16).pairs
    request = encode_request(pair, "a dog")
    Image.new("RGB", (64, 64), (0, 99, 0)).save(pair.image_path)
    with pytest.raises(ImageError, match=r"a\.png was changed while the dataset was being encoded: run again"):
        encode_dataset([request], TinyEncoder(), None)


def test_the_grid_is_that_of_the_image() -> None:
    assert Z_IMAGE.grid(4, (16, 8, 8)) == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    assert FLUX2_KLEIN.grid(4, (128, 64, 64))[1:4] == pytest.approx((0.967384, 0.908144, 0.767200), abs=1e-6)
    assert FLUX2_KLEIN.grid(4, (128, 56, 72))[1:4] == pytest.approx((0.967212, 0.907690, 0.766229), abs=1e-6)


def test_captions_without_the_name_are_three_quarters_of_the_anchors() -> None:
    dog, cat, prompts = Anchor("a dog"), Anchor("a cat"), [Anchor(text) for text in "abcdefgh"]
    assert weighted((dog, cat), ()) == [dog, cat] and weighted((), prompts[:1]) == prompts[:1]
    several = weighted((dog, cat), prompts)
    assert several.count(dog) == several.count(cat) == 12 and len(several) == 32 and set(prompts) < set(several)


# -- teachers ----------------------------------------------------------------------------------------------------------


def pairs_of_colours(tmp_path: Path, count: int) -> tuple[Pair, ...]:
    for number in range(count):
        Image.new("RGB", (64, 64), (40 * number + 5, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"a [V] dog, {number}")
    return read_dataset(tmp_path, pixel_budget=4096, multiple=16).pairs


def with_sources(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """Every image an edit of the one before it."""
    return tuple(replace(pair, source_images=(pairs[i - 1].image_path,)) for i, pair in enumerate(pairs))


def test_anchors_of_edits_have_source_images_and_prompts_are_anchors_alone_too(tmp_path: Path) -> None:
    """Three edits: each instruction without the name with its own source, a prompt with those in turn."""
    pairs = with_sources(pairs_of_colours(tmp_path, 3))
    encoder, prompts = TinyEncoder(), ["a cat", "a fox", "a cow", "a hen"]
    data = build_training_set(pairs, encoder, teacher=EDIT_TARGET, trigger="[V]", anchors=True, anchor_prompts=prompts)
    places = [pair.student.reference_latents[0] for pair in data.pairs]
    found = [
        (float(anchor.features[0, 0]), [next(i for i, p in enumerate(places) if torch.equal(p, latent))
                                        for latent in anchor.reference_latents])
        for anchor in data.anchors
    ]  # fmt: skip
    own, cat = float(len("a dog, 0")), float(len("a cat"))
    repeats = len(data.anchors) - 8
    assert repeats == 24 and [number for length, (number,) in found[:repeats]] == [0, 1, 2] * 8
    assert all(length == own for length, _ in found[:repeats])
    assert found[repeats:] == [(cat, [])] * 4 + [(cat, [0]), (cat, [1]), (cat, [2]), (cat, [0])]
    other = replace(data, anchors=[*data.anchors[:-1], replace(data.anchors[-1], reference_latents=(places[1],))])
    assert other.fingerprint() != data.fingerprint()
    images = 2 * FLUX2_KLEIN.image_tokens(*data.shapes()[0][-2:])
    assert data.most_tokens(FLUX2_KLEIN).student[0] == images
    result = train(make_config(anchor_probability=0.5, steps=3), TinyDenoiser(), data, tmp_path / "run")
    assert result.step == 3


def reference(condition: Condition, index: int = -1) -> float:
    return float(condition.reference_latents[index].mean())


def test_another_image_means_never_the_own_and_each_of_the_others_in_turn(tmp_path: Path) -> None:
    pairs = pairs_of_colours(tmp_path, 5)
    own = build_training_set(pairs, TinyEncoder(), teacher=EDIT, caption_dropout=True, heldout_caption="a cat")
    other = build_training_set(
        pairs, TinyEncoder(), teacher=EDIT, teacher_image="other", caption_dropout=True, heldout_caption="a cat"
    )
    shades = [float(pair.target_latent.mean()) for pair in own.pairs[::2] if pair.target_latent is not None]
    assert len(set(shades)) == 5
    for index, example in enumerate(other.examples):
        drawn = [other.pairs[variant] for variant in example.variants]
        assert {reference(pair.teacher) for pair in drawn} == {shades[(index + step) % 5] for step in (1, 2, 3)}
        assert example.dropped is not None and other.pairs[example.dropped].caption == ""
        for pair in (*drawn, other.pairs[example.dropped]):
            assert pair.target_latent is not None and float(pair.target_latent.mean()) == shades[index]
            assert reference(pair.teacher) != shades[index]
    assert own.heldout is not None and reference(own.heldout.teacher) == shades[0]
    assert other.heldout is not None and reference(other.heldout.teacher) == shades[1]
    assert len({*own.pairs, *other.pairs}) == 10 + 30 and own.fingerprint() != other.fingerprint()


def test_an_edit_starts_from_its_source(tmp_path: Path) -> None:
    pairs = pairs_of_colours(tmp_path, 3)
    data = build_training_set(with_sources(pairs), TinyEncoder(), teacher=EDIT_TARGET)
    shades = [float(pair.target_latent.mean()) for pair in data.pairs if pair.target_latent is not None]
    for index, pair in enumerate(data.pairs):
        assert [reference(pair.student, i) for i in range(len(pair.student.reference_latents))] == [shades[index - 1]]
        assert [reference(pair.teacher, i) for i in range(2)] == [shades[index - 1], shades[index]]


def test_data_that_does_not_fit_the_teacher_is_refused_before_any_encoding(tmp_path: Path) -> None:
    pairs = pairs_of_colours(tmp_path, 2)
    encoder = TinyEncoder()
    cases: list[tuple[tuple[Pair, ...], TeacherView, TeacherImage, str]] = [
        (pairs, EDIT_TARGET, "own", "2 of 2 images have no source: use a folder with source/ and target/"),
        ((*with_sources(pairs)[:1], pairs[1]), EDIT_TARGET, "own", "1 of 2 images have no source"),
        (with_sources(pairs), EDIT, "own", "which the teacher edit does not use: choose edit_target"),
        (with_sources(pairs), EDIT_TARGET, "other", "set teacher_image to own"),
        (pairs[:1], EDIT, "other", "needs at least two images"),
    ]
    for data, teacher, teacher_image, message in cases:
        with pytest.raises(ValueError, match=message):
            build_training_set(data, encoder, teacher=teacher, teacher_image=teacher_image)
    assert encoder.seen == []


def test_a_slider_needs_its_words_in_every_caption(tmp_path: Path) -> None:
    pairs = read_dataset(folder(tmp_path), pixel_budget=4096, multiple=16, trigger="sks").pairs
    cases: list[tuple[str, Any, str]] = [
        ("dog, a -> cat", {}, "the caption 'a sks dog, b' does not contain 'dog, a'"),
        ("dog -> cat", {"heldout_caption": "a horse"}, "the held-out caption 'a horse' does not contain 'dog'"),
        ("dog -> cat", {"teacher_image": "other"}, "the teacher words sees no image: set teacher_image to own"),
        ("dog -> cat", {"caption_dropout": True}, "an empty caption has no words that the teacher words replaces"),
    ]
    encoder = TinyEncoder()
    for sentence, options, message in cases:
        with pytest.raises(ValueError, match=message):
            build_training_set(pairs, encoder, teacher=WORDS.with_sentence(sentence), trigger="sks", **options)
    assert encoder.seen == []
    data = build_training_set(pairs, encoder, teacher=WORDS.with_sentence("dog -> old dog"), trigger="sks")
    assert len(data.pairs) == 2 and encoder.seen[-2:] == ["text a sks old dog, b", "text a sks dog, b"]
    build_training_set(pairs, encoder, teacher=WORDS.with_sentence("old"), trigger="sks", caption_dropout=True)
    assert {"text old", "text "} < set(encoder.seen), "words that are added are also read after an empty caption"
    assert train(make_config(steps=2, anchor_probability=0.0), TinyDenoiser(), data, tmp_path / "run").step == 2


def test_the_mode_names_the_teacher_and_auto_goes_by_model_and_data() -> None:
    klein, z_image = FAMILIES["flux2_klein"].teachers, FAMILIES["z_image"].teachers
    assert (choose_teacher(klein, "auto", edits=False), choose_teacher(klein, "auto", edits=True)) == (
        EDIT,
        EDIT_TARGET,
    )
    assert choose_teacher(z_image, "auto", edits=False) is VLM
    assert choose_teacher(klein, "vlm", edits=False) is VLM
    assert all(choose_teacher(family.teachers, "words", edits=False) is WORDS for family in FAMILIES.values())
    with pytest.raises(ValueError, match="no teacher 'edit'; choose one of: auto, vlm"):
        choose_teacher(z_image, "edit", edits=False)
    with pytest.raises(ValueError, match="no teacher for images with sources: load only the folder of the targets"):
        choose_teacher(z_image, "auto", edits=True)
    assert all(name in TEACHER_VIEWS for family in FAMILIES.values() for name in family.teachers)


def test_every_given_text_shares_the_rule_of_captions(tmp_path: Path) -> None:
    report = read_dataset(folder(tmp_path), pixel_budget=4096, multiple=16, trigger="sks")
    encoder = TinyEncoder()
    build_training_set(
        report.pairs, encoder, trigger="sks", anchors=True, anchor_prompts=["a [v] cat"], heldout_caption="a [v] bird"
    )
    assert {"text a sks cat", "text a sks bird"} <= set(encoder.seen)
    assert not [seen for seen in encoder.seen if "[v]" in seen]


def test_an_image_that_has_gone_bad_since_is_named(tmp_path: Path) -> None:
    report = read_dataset(folder(tmp_path), pixel_budget=4096, multiple=16)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError, match=r"b\.png: not a PNG"):
        build_training_set(report.pairs, TinyEncoder())
