"""Encoded datasets on disk: the same training set as in memory, and what happens to damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dopsd_core.conditioning.encode import Condition, DualCondition
from dopsd_core.conditioning.teachers import EDIT, EDIT_TARGET, VLM, TeacherView
from dopsd_core.data.dataset import Pair, read_dataset
from dopsd_core.data.encoding_plan import Example
from dopsd_core.families import Z_IMAGE
from dopsd_core.lazy_sequence import Column, Lazy
from dopsd_core.shards import writer
from dopsd_core.shards.encode_images import encode_images
from dopsd_core.shards.encoding import Encoding
from dopsd_core.shards.finish import begin, finish
from dopsd_core.shards.index import INDEX, Index, is_encoded, shard_name
from dopsd_core.shards.reader import OPEN, ShardError, Shards
from dopsd_core.shards.rows import ShardRows
from dopsd_core.shards.streamed_set import StreamedSet, stream
from dopsd_core.shards.writer import EncodedImages, read_rows, write_shard
from dopsd_core.training.rng import DataOrder
from dopsd_core.training.trainer import train
from dopsd_core.training.training_set import TrainingSet, build_training_set
from tests.test_training_set import TinyEncoder
from tests.tiny import killable_config, make_pair, saved_bytes
from tests.toy_denoiser import TinyDenoiser

ENCODING = Encoding("tiny", "z_image", "vlm", "", "keep", "sks", 64, 16)
SHARDS = 6


def images_of(shard: int) -> EncodedImages:
    """Two images: one with two captions and an empty one, visited twice; one of another shape."""
    pairs = [make_pair(10 * shard + n, (2, 3) if n < 3 else (3, 2)) for n in range(4)]
    examples = [Example((0, 1, 0), 2, 2), Example((3,), 3, 1)]
    anchors = [("everywhere", make_pair(7, seed=5).student), (f"here {shard}", make_pair(shard, seed=6).student)]
    return EncodedImages(pairs, examples, anchors, make_pair(99) if shard == 0 else None)


def write(folder: Path, encoding: Encoding = ENCODING) -> Shards:
    begin(folder, encoding, "photos")
    for shard in range(SHARDS):  # two shards in each part
        facts = ShardRows(encoding.digest(), f"stamp {shard}", shard % 2 == 1, images=(f"image {shard // 3}",))
        write_shard(folder, shard_name(shard // 2, shard % 2), images_of(shard), Z_IMAGE, facts)
    finish(folder, encoding, "photos", SHARDS // 2)
    return Shards(folder, Index.read(folder))


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return write(tmp_path / "shards")


def in_memory(prompts: list[Condition] | None = None) -> TrainingSet:
    """What `build_training_set` makes of the same images."""
    every = [images_of(shard) for shard in range(SHARDS)]
    examples = [
        Example(tuple(4 * n + v for v in e.variants), 4 * n + (e.dropped or 0), e.repeats)
        for n, shard in enumerate(every)
        for e in shard.examples
    ]
    stripped = [every[0].anchors[0][1], *(shard.anchors[1][1] for shard in every)]
    anchors = [*stripped, *(prompts or [])]
    return TrainingSet([pair for shard in every for pair in shard.pairs], anchors, make_pair(99), examples)


def assert_equal(ours: DualCondition | None, theirs: DualCondition | None) -> None:
    assert ours is not None and theirs is not None
    assert (ours.key, ours.caption) == (theirs.key, theirs.caption)
    assert ours.target_latent is not None and theirs.target_latent is not None
    assert torch.equal(ours.target_latent, theirs.target_latent)
    for mine, other in ((ours.student, theirs.student), (ours.teacher, theirs.teacher)):
        assert torch.equal(mine.features, other.features) and mine.slots == other.slots
        assert all(map(torch.equal, mine.reference_latents, other.reference_latents))


# -- the same training set ---------------------------------------------------------------------------------------------


def test_every_pair_and_anchor_is_the_one_in_memory(shards: Shards) -> None:
    data, expected = stream(shards, anchors=True), in_memory()
    assert len(data.pairs) == len(expected.pairs) and len(data.anchors) == len(expected.anchors) == SHARDS + 1
    for number in torch.randperm(len(data.pairs), generator=torch.Generator().manual_seed(0)).tolist():
        assert_equal(data.pairs[number], expected.pairs[number])
    assert all(torch.equal(a.features, b.features) for a, b in zip(data.anchors, expected.anchors, strict=True))
    assert_equal(data.heldout, expected.heldout)
    assert list(data.examples) == list(expected.examples)
    assert list(data.shapes()) == list(expected.shapes()) and list(data.repeats()) == list(expected.repeats())
    assert data.fingerprint() == expected.fingerprint()
    assert data.most_tokens(Z_IMAGE) == expected.most_tokens(Z_IMAGE)


def test_the_fingerprint_of_one_example_too(tmp_path: Path) -> None:
    """A tuple of one has a comma of its own."""
    begin(tmp_path, ENCODING, "one")
    facts = ShardRows(ENCODING.digest(), "", True)
    write_shard(tmp_path, shard_name(0, 0), EncodedImages([make_pair(1)], [Example((0,))]), Z_IMAGE, facts)
    finish(tmp_path, ENCODING, "one", 1)
    data = stream(Shards(tmp_path, Index.read(tmp_path)))
    assert data.fingerprint() == TrainingSet([make_pair(1)]).fingerprint()


def test_captions_without_the_name_are_weighted_as_in_memory(shards: Shards) -> None:
    prompts = [make_pair(n, seed=8).student for n in range(12)]
    data = stream(shards, anchors=True, prompts=prompts)
    stripped = in_memory().anchors
    expected = [*list(stripped) * 5, *prompts]  # three quarters of 12 / (1 - 3/4) / 7 captions
    assert len(data.anchors) == len(expected)
    assert all(torch.equal(a.features, b.features) for a, b in zip(data.anchors, expected, strict=True))


def test_repeats_multiply(shards: Shards) -> None:
    assert list(stream(shards, repeats=3).repeats()) == [6, 3] * SHARDS
    assert stream(shards, repeats=3).examples[1].repeats == 3


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    pair = make_pair(0)
    twin = DualCondition(pair.student, make_pair(1).teacher, pair.target_latent, "twin", "key")
    rows = write_shard(tmp_path, "shard", EncodedImages([pair, twin]), Z_IMAGE, ShardRows("", "", True))
    assert len(rows.sums) == 4 and rows.pairs[0].student == rows.pairs[1].student


def test_reference_latents_and_slots_are_kept(tmp_path: Path) -> None:
    latents = tuple(torch.randn(4, 2, n) for n in (2, 3))
    pair = DualCondition(
        Condition(torch.randn(3, 6).bfloat16(), latents[:1], (2,)), Condition(torch.randn(5, 6), latents, (1, 4)),
        torch.randn(4, 2, 2), "make it winter", "key",
    )  # fmt: skip
    begin(tmp_path, ENCODING, "edits")
    facts = ShardRows(ENCODING.digest(), "", True)
    write_shard(tmp_path, shard_name(0, 0), EncodedImages([pair], [Example((0,))]), Z_IMAGE, facts)
    finish(tmp_path, ENCODING, "edits", 1)
    found = Shards(tmp_path, Index.read(tmp_path)).pair(0)
    assert_equal(found, pair)
    assert found.student.features.dtype == torch.bfloat16


def test_few_shards_are_open(shards: Shards) -> None:
    for number in range(shards.num_pairs):
        shards.pair(number)
    assert len(shards._open) == OPEN < SHARDS


def test_a_run_on_shards_has_the_bits_of_one_in_memory(shards: Shards, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = killable_config(8).replace(caption_dropout=0.3)
    train(config, TinyDenoiser(), in_memory(), tmp_path / "memory")
    train(config, TinyDenoiser(), stream(shards, anchors=True), tmp_path / "stream")
    assert saved_bytes(tmp_path / "stream") == saved_bytes(tmp_path / "memory")


def test_a_run_begun_in_memory_resumes_on_shards(shards: Shards, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = killable_config(8)
    train(config, TinyDenoiser(), in_memory(), tmp_path / "memory")
    train(config.replace(steps=4), TinyDenoiser(), in_memory(), tmp_path / "both")
    train(config, TinyDenoiser(), stream(shards, anchors=True), tmp_path / "both")
    ours, theirs = saved_bytes(tmp_path / "both"), saved_bytes(tmp_path / "memory")
    assert ours["lora"] == theirs["lora"]


def test_nothing_is_read_that_is_not_asked_for(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to count the examples nor to plan the order."""
    data = stream(shards, anchors=True)

    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Shards, "_tensor", refuse)
    assert isinstance(data, StreamedSet) and len(list(data.examples)) == 2 * SHARDS
    DataOrder(data.shapes(), data.repeats(), 2, 0).batch(0)
    data.most_tokens(Z_IMAGE)
    list(data._described())


def photos(folder: Path, edits: bool) -> list[Pair]:
    """Three images with a mask each, or three edits; one has two captions."""
    rows = []
    for number, size in enumerate(((64, 64), (96, 48), (48, 96))):
        for half, shade in (("before", 40), ("after", 90)):
            image = Image.new("RGB", size, (shade + number, 0, 0))
            image.paste("white", (8, 8, 30, 30))
            image.save(folder / f"{half}{number}.png")
        mask = Image.new("L", size)
        mask.paste("white", (8, 8, 30, 30))
        mask.save(folder / f"after{number}.mask.png")
        captions = {"short_en": f"a [V] dog, {number}", **({"detailed_en": "a large [V] dog"} if number == 1 else {})}
        images = {"ref_img": f"before{number}.png", "target_img": f"after{number}.png"}
        rows.append({**captions, **(images if edits else {"image": f"after{number}.png"}), "repeats": 1 + number})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    report = read_dataset(folder / "rows.jsonl", pixel_budget=4096, multiple=16, trigger="sks")
    report.raise_for_errors()
    return list(report.pairs)


@pytest.mark.parametrize("view", [VLM, VLM.with_background("blur"), EDIT, EDIT_TARGET], ids=lambda v: v.name)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_images_are_encoded_as_for_a_dataset_in_memory(tmp_path: Path, view: TeacherView, size: int) -> None:
    """Masks, edits with sources, several captions and the empty one, however they are divided into shards."""
    pairs, encoder = photos(tmp_path, view.edits), TinyEncoder()
    encoding = Encoding.of(
        encoder.identity, "z_image", view, trigger="sks", resolution=64, multiple=16, empty_captions=True,
        heldout="a sks star",
    )  # fmt: skip
    folder, parts = tmp_path / "shards", [pairs[first : first + size] for first in range(0, len(pairs), size)]
    begin(folder, encoding, "photos")
    for part, some in enumerate(parts):
        images = encode_images(some, encoder, view, encoding, is_first=part == 0)
        masked = sum(pair.mask is not None for pair in some)
        facts = ShardRows(encoding.digest(), "", True, masked=masked)
        write_shard(folder, shard_name(part, 0), images, Z_IMAGE, facts)
    finish(folder, encoding, "photos", len(parts))
    ours = stream(Shards(folder, Index.read(folder)), anchors=True)
    theirs = build_training_set(
        pairs, encoder, teacher=view, trigger="sks", caption_dropout=True, anchors=True, heldout_caption="a sks star"
    )
    assert ours.fingerprint() == theirs.fingerprint() and list(ours.examples) == list(theirs.examples)
    for mine, other in zip((*ours.pairs, ours.heldout), (*theirs.pairs, theirs.heldout), strict=True):
        assert_equal(mine, other)
    assert encoding.view() == view


# -- what is whole -----------------------------------------------------------------------------------------------------


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_a_damaged_tensor_is_reported(shards: Shards) -> None:
    flip(shards.folder / f"{shard_name(0, 0)}.safetensors", -1)
    with pytest.raises(ShardError, match="shard-00000-00000.safetensors is damaged .*checksum.*: remove it and run"):
        for number in range(4):
            shards.pair(number)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "safetensors is missing: run encode again"),
        (lambda file: file.write_bytes(b"torn"), "safetensors has 4 bytes in place of"),
    ],
)
def test_a_missing_or_torn_shard_is_reported_before_training(shards: Shards, change, message: str) -> None:
    change(shards.folder / f"{shard_name(1, 0)}.safetensors")
    with pytest.raises(ShardError, match=message):
        Shards(shards.folder, shards.index)


def test_rows_that_are_not_those_of_the_index_are_reported(shards: Shards) -> None:
    file = shards.folder / f"{shard_name(1, 1)}.json"
    flip(file, 20)
    with pytest.raises(ShardError, match="shard-00001-00001.json is not the one of the index: run encode again"):
        stream(shards).fingerprint()
    file.unlink()
    with pytest.raises(ShardError, match="shard-00001-00001.json is missing"):
        stream(shards).fingerprint()


def test_a_shard_of_another_encoding_is_reported(shards: Shards, tmp_path: Path) -> None:
    from dataclasses import replace

    other = write(tmp_path / "other", replace(ENCODING, encoder="gone"))
    name = f"{shard_name(0, 1)}.safetensors"
    (shards.folder / name).write_bytes((other.folder / name).read_bytes())
    with pytest.raises(ShardError, match="it belongs to another encoding"):
        shards.pair(5)


@pytest.mark.parametrize("text", ["", "{", '{"format": "dopsd-shards-1"}', '{"format": "dopsd-shards-9"}', "[]"])
def test_a_torn_index_is_one_sentence(shards: Shards, text: str) -> None:
    (shards.folder / INDEX).write_text(text, encoding="utf-8")
    assert is_encoded(shards.folder) or text == "[]"
    with pytest.raises(ValueError, match="index.json is damaged, or of another version: remove it and run encode"):
        Index.read(shards.folder)


def test_a_folder_of_images_with_an_index_of_its_own_is_not_encoded(tmp_path: Path) -> None:
    assert not is_encoded(tmp_path) and not is_encoded(tmp_path / "nowhere")
    (tmp_path / INDEX).write_text(json.dumps({"format": "gallery"}), encoding="utf-8")
    assert not is_encoded(tmp_path)


def test_another_encoding_in_the_folder_is_refused(shards: Shards) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=r"another encoding: .*undo --trigger \('sks', now 'ohwx'\)"):
        begin(shards.folder, replace(ENCODING, trigger="ohwx"), "photos")
    assert Index.read(shards.folder).is_complete


def test_the_index_waits_for_all_shards(shards: Shards) -> None:
    begin(shards.folder, ENCODING, "photos")
    (shards.folder / f"{shard_name(2, 1)}.json").unlink()
    with pytest.raises(ValueError, match="shard-00002-00001.json is missing: all processes need the same --output"):
        finish(shards.folder, ENCODING, "photos", SHARDS // 2)
    assert not Index.read(shards.folder).is_complete


def test_shards_of_a_longer_dataset_are_removed(shards: Shards) -> None:
    done = finish(shards.folder, ENCODING, "photos", 2)
    assert len(done.index.shards) == 4 and len(list(shards.folder.glob("shard-*"))) == 8


def test_images_that_are_the_same_are_counted(shards: Shards) -> None:
    done = finish(shards.folder, ENCODING, "photos", SHARDS // 2)
    assert done.remarks == ("4 images are the same as others of the dataset: remove them, or train with them",)


def test_a_heldout_caption_without_an_image_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    encoding = replace(ENCODING, heldout="a sks star")
    begin(tmp_path, encoding, "photos")
    for part, images in enumerate((EncodedImages(), images_of(1))):
        facts = ShardRows(encoding.digest(), "", True)
        write_shard(tmp_path, shard_name(part, 0), images, Z_IMAGE, facts)
    with pytest.raises(ValueError, match="none of the first shard can be used"):
        finish(tmp_path, encoding, "photos", 2)


def test_a_shard_without_usable_images_is_passed_over(tmp_path: Path) -> None:
    begin(tmp_path, ENCODING, "photos")
    for part, images in enumerate((EncodedImages(), images_of(1), EncodedImages(), images_of(2))):
        facts = ShardRows(ENCODING.digest(), "", True, lost=2 - part % 2)
        write_shard(tmp_path, shard_name(part, 0), images, Z_IMAGE, facts)
    done = finish(tmp_path, ENCODING, "photos", 4)
    assert done.remarks == ("6 images were left out because of errors",)
    data = stream(Shards(tmp_path, done.index), anchors=True)
    assert_equal(data.pairs[4], images_of(2).pairs[0])
    assert data.examples[2].variants == (4, 5, 4) and len(data.anchors) == 3


def test_a_shard_without_rows_is_not_whole(tmp_path: Path) -> None:
    """So a kill between its two files costs the shard alone."""
    write_shard(tmp_path, "shard", images_of(0), Z_IMAGE, ShardRows("", "", True))
    assert read_rows(tmp_path, "shard") is not None
    (tmp_path / "shard.safetensors").write_bytes(b"older")
    assert read_rows(tmp_path, "shard") is None
    (tmp_path / "shard.json").unlink()
    assert read_rows(tmp_path, "shard") is None


def test_a_shard_that_is_written_again_is_not_whole_before_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its former rows would be taken for those of the new tensors, which may have the same size."""
    write_shard(tmp_path, "shard", images_of(0), Z_IMAGE, ShardRows("", "", True))
    real = writer.write_atomic

    def killed(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(writer, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, "shard", images_of(0), Z_IMAGE, ShardRows("", "", True))
    assert read_rows(tmp_path, "shard") is None


# -- sequences ---------------------------------------------------------------------------------------------------------


def test_a_lazy_sequence_behaves_as_a_list() -> None:
    lazy, listed = Lazy(5, lambda n: n * n), [0, 1, 4, 9, 16]
    assert list(lazy) == listed and lazy[-1] == 16 and list(lazy[1:4:2]) == listed[1:4:2] and len(lazy[:2]) == 2
    assert list(lazy.map(str)) == ["0", "1", "4", "9", "16"]
    with pytest.raises(IndexError):
        lazy[5]


def test_columns_are_equal_by_their_values() -> None:
    column, twin = Column([(2, 3), (3, 2), (2, 3)]), Column([(2, 3), (3, 2), (2, 3)])
    assert list(column) == [(2, 3), (3, 2), (2, 3)] and column[1:] == [(3, 2), (2, 3)]
    assert column == twin and hash(column) == hash(twin) and column != Column([(2, 3)])
    assert (3, 2) in column and (1, 1) not in column
