"""Edits, (source, instruction, target): both forms on disk, with every problem of either image."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dopsd_core.__main__ import main
from dopsd_core.data import checks as dataset_checks
from dopsd_core.data.buckets import Bucket
from dopsd_core.data.encoding_plan import plan_encoding
from dopsd_core.data.images import load_image

from .written import image_file, only, pair, read, require_case, rows


def edit(folder: Path, name: str, instruction: str = "make it winter", source: str = "", **kwargs: object) -> Path:
    """A target with its instruction, and its source of another look; gives the target."""
    image_file(folder / "source" / (source or name), colour=(len(name), 9, len(source)))
    return pair(folder / "target", name, instruction, **kwargs)


def edit_row(target: str, sources: object, **more: object) -> dict[str, object]:
    return {"ref_img": sources, "target_img": target, "user_prompt_en": "make it winter", **more}


def messages(problems: tuple) -> dict[str, str]:
    """The messages by the path below the dataset."""
    return {f"{problem.file.parent.name}/{problem.file.name}": problem.message for problem in problems}


# -- folders -----------------------------------------------------------------------------------------------------------


def test_targets_meet_the_sources_of_their_names(tmp_path: Path) -> None:
    edit(tmp_path, "b.png", "make it summer", source="b.jpg")
    edit(tmp_path, "a.v2.png")
    edit(tmp_path, "10_hats/c.webp", "put on a hat")
    report = read(tmp_path, repeats=2)
    assert report.problems == ()
    assert [(item.image_path, item.source_images, item.captions, item.repeats) for item in report.pairs] == [
        (
            tmp_path / "target" / target,
            (tmp_path / "source" / source,),
            (instruction,),
            repeats,
        )
        for target, source, instruction, repeats in (
            ("a.v2.png", "a.v2.png", "make it winter", 2),
            ("b.png", "b.jpg", "make it summer", 2),
            ("10_hats/c.webp", "10_hats/c.webp", "put on a hat", 20),
        )
    ]
    assert "3 usable edit pairs\n" in report.describe() and "3 source images" in report.describe()


def test_both_sub_folders_make_edits_in_any_case_and_one_alone_does_not(tmp_path: Path) -> None:
    pair(tmp_path / "target", "a.png")
    assert [item.source_images for item in read(tmp_path).pairs] == [()]
    assert "1 usable image\n" in read(tmp_path).describe()
    source = image_file(tmp_path / "Source" / "a.png", colour=(1, 2, 3))
    (tmp_path / "target").rename(tmp_path / "TARGET")
    assert [item.source_images for item in read(tmp_path).pairs] == [(source,)]


def test_what_lacks_its_other_half_is_named(tmp_path: Path) -> None:
    edit(tmp_path, "good.png")
    pair(tmp_path / "target" / "more", "alone.png")
    image_file(tmp_path / "source" / "more" / "left.png")
    report = read(tmp_path)
    assert messages(report.errors).keys() == {"more/alone.png"} and len(report.pairs) == 1
    assert str(Path("source/more/alone.png")) in report.errors[0].message
    only(report.warnings, tmp_path / "source/more/left.png", None, "without a target", str(Path("target/more/left.*")))


def test_two_sources_of_one_name(tmp_path: Path) -> None:
    edit(tmp_path, "a.png")
    image_file(tmp_path / "source" / "a.jpg", colour=(5, 5, 5))
    only(read(tmp_path).errors, tmp_path / "source/a.jpg", None, "2 sources with the same name: a.jpg, a.png")
    assert read(tmp_path).pairs == ()


def test_names_of_sources_in_another_case(tmp_path: Path) -> None:
    require_case(tmp_path)
    edit(tmp_path, "a.png", source="A.PNG")
    report = read(tmp_path)
    only(report.problems, tmp_path / "source/A.PNG", None, "used as the source of a: the names differ in upper and")
    assert [item.source_images for item in report.pairs] == [(tmp_path / "source/A.PNG",)]
    edit(tmp_path, "A.png", source="a.jpg")  # now each has its own
    report = read(tmp_path)
    assert report.problems == ()
    assert {item.image_path.name: item.source_images[0].name for item in report.pairs} == {
        "a.png": "a.jpg",
        "A.png": "A.PNG",
    }


def test_the_instruction_stands_beside_the_target(tmp_path: Path) -> None:
    target = edit(tmp_path, "a.png")
    (tmp_path / "source" / "a.txt").write_text("a house in summer")
    only(read(tmp_path).warnings, tmp_path / "source/a.txt", None, "not read", "target/")
    assert read(tmp_path).pairs[0].captions == ("make it winter",)
    target.with_suffix(".txt").unlink()
    where = str(Path("source/a.txt"))
    only(read(tmp_path).errors, target, None, "no instruction: write it to a.txt", f"there is {where}: move it")
    assert read(tmp_path).pairs == ()
    (tmp_path / "source" / "a.txt").unlink()
    rows(tmp_path / "rows.jsonl", edit_row("target/a.png", "source/a.png"))
    only(read(tmp_path).errors, target, None, "rows.jsonl: to read that file")
    target.with_suffix(".txt").write_text("  ")
    only(read(tmp_path).errors, target.with_suffix(".txt"), 1, "instruction is empty; write what is to change")


def test_images_beside_the_two_folders_are_errors(tmp_path: Path) -> None:
    edit(tmp_path, "a.png")
    strays = [pair(tmp_path, "b.png"), pair(tmp_path / "others", "c.png")]
    report = read(tmp_path)
    assert [problem.file for problem in report.errors] == strays and len(report.pairs) == 1
    assert all("outside of source/ and target/" in problem.message for problem in report.errors)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c.d", "x/a", "10_x/a", "é"]), st.sets(st.sampled_from(["source", "target", "text"]))
    )
)
def test_every_file_is_used_or_named(given_files: Mapping[str, set[str]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for half in ("source", "target"):
            (folder / half).mkdir()
        for number, (stem, parts) in enumerate(given_files.items()):
            for part, suffix in (("source", ".bmp"), ("target", ".png"), ("text", ".txt")):
                path = folder / ("source" if part == "source" else "target") / (stem + suffix)
                if part not in parts:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                if part == "text":
                    path.write_text("change it")
                else:
                    image_file(path, colour=(number, 0, part == "source"))
        report = read(folder)
        named = {problem.file for problem in report.problems}
        used = {path for item in report.pairs for path in (item.image_path, *item.source_images, item.caption_file)}
        left_over = {path for path in folder.rglob("*.*") if path.is_file()} - named - used
        whole = sorted(stem for stem, parts in given_files.items() if len(parts) == 3)
        targets = [item.image_path.relative_to(folder / "target").with_suffix("") for item in report.pairs]
        assert sorted(path.as_posix() for path in targets) == whole
        for path in left_over:  # its target is what is named
            assert any(path.stem == other.stem and "target" in other.parts for other in named), path


# -- rows --------------------------------------------------------------------------------------------------------------


def test_the_authors_edit_rows(tmp_path: Path) -> None:
    for name in ("room.png", "chair.png", "after.png", "winter.png"):
        image_file(tmp_path / name, size=(80, 48))
    file = rows(
        tmp_path / "rows.jsonl",
        edit_row("after.png", ["room.png", "chair.png"], short_zh="放一把椅子", **{"h*w": ["1*1", "1*1", "48*80"]}),
        edit_row("winter.png", "room.png", repeats=3, path=None, **{"w*h": "80*40"}),
    )
    report = read(file)
    assert [(item.image_path.name, [path.name for path in item.source_images]) for item in report.pairs] == [
        ("after.png", ["room.png", "chair.png"]),
        ("winter.png", ["room.png"]),
    ]
    assert set(report.pairs[0].captions) == {"make it winter", "放一把椅子"} and report.pairs[1].repeats == 3
    assert "3 source" not in report.describe() and "2 source images" in report.describe()
    only(report.problems, file, 2, "winter.png: is 80x48, but the row says 80x40")


def test_bad_edit_rows_are_named_by_their_lines(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        image_file(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    expected = {
        json.dumps({"ref_img": "a.png", "text": "x"}): "has 'ref_img' but no 'target_img'",
        json.dumps({"target_img": "a.png", "path": "a.png", "text": "x"}): "has 'target_img' but no 'ref_img'",
        json.dumps(edit_row("b.png", [])): "'ref_img' is []",
        json.dumps(edit_row("b.png", ["a.png", 3])): "'ref_img' is ['a.png', 3]",
        json.dumps(edit_row("b.png", ["a.png", "gone.png"])): "gone.png: no such file",
        json.dumps(edit_row("b.png", "broken.png")): "broken.png: ",
        json.dumps({**edit_row("b.png", "a.png"), "target_img": ["a.png", "b.png"]}): "2 paths: an edit has one target",
        json.dumps({"ref_img": "a.png", "target_img": "b.png"}): "no caption",
        json.dumps(edit_row("b.png", "../a.png")): "a.png: no such file",
    }
    file = rows(tmp_path / "rows.jsonl", *expected)
    report = read(file)
    said = {problem.line: problem.message for problem in report.errors}
    assert len(report.errors) == len(said) == len(expected)
    for line, words in enumerate(expected.values(), 1):
        assert words in said[line]
    assert report.pairs == ()


def test_edits_and_plain_images_do_not_share_a_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        image_file(tmp_path / name)
    plain, edited = {"path": "c.png", "text": "x"}, edit_row("b.png", "a.png")
    file = rows(tmp_path / "rows.jsonl", edited, plain)
    only(read(file).errors, file, 1, "row 1 is of edits, the other 1 of plain images", "a separate file")
    file = rows(file, edited, *[plain] * 12, *[edited] * 11)
    mixture = [problem for problem in read(file).errors if "a separate file" in problem.message]
    only(tuple(mixture), file, 1, "rows 1, 14, 15, 16, 17, 18, 19, 20 and 4 more are of edits, the other 12 of plain")
    only(read(rows(file, {**edited, "path": "c.png"})).problems, file, None, "the key 'path' is not read")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["a.png", "b.png", "/", ".."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(source=json_values, target=json_values, size=json_values)
def test_a_row_of_any_values_is_used_or_named(source: object, target: object, size: object) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file in ("a.png", "b.png"):
            image_file(Path(name) / file, size=(16, 16))
        file = rows(Path(name) / "rows.jsonl", edit_row(target, source, **{"h*w": size}))  # type: ignore[arg-type]
        report = read(file)
        assert bool(report.pairs) != bool(report.errors)
        assert all((problem.file, problem.line) == (file, 1) for problem in report.problems)
        for item in report.pairs:
            assert item.image_path not in item.source_images and item.source_images


# -- images ----------------------------------------------------------------------------------------------------------


def test_broken_sources_are_named_and_their_edits_not_used(tmp_path: Path) -> None:
    outside = image_file(tmp_path / "outside.png")
    folder = tmp_path / "data"
    for name in ("damaged.png", "link.png", "moving.webp", "good.png"):
        edit(folder, name)
    damaged, moving = folder / "source" / "damaged.png", folder / "source" / "moving.webp"
    damaged.write_bytes(damaged.read_bytes()[:60])
    (folder / "source" / "link.png").unlink()
    (folder / "source" / "link.png").symlink_to(outside)
    frames = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (0, 90)]
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    report = read(folder)
    assert "truncated" in messages(report.errors)["source/damaged.png"]
    assert "is outside of the folder" in messages(report.errors)["source/link.png"] and len(report.errors) == 2
    only(report.warnings, moving, None, "first of 2 frames")
    assert [item.image_path.name for item in report.pairs] == ["good.png", "moving.webp"]


def test_targets_are_checked_where_sources_are_broken(tmp_path: Path) -> None:
    for file in (edit(tmp_path, "a.png"), tmp_path / "source" / "a.png"):
        file.write_bytes(b"no image")
    assert messages(read(tmp_path).errors).keys() == {"source/a.png", "target/a.png"}


def test_a_source_serves_many_edits_and_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, decoded = dataset_checks.decode, []
    monkeypatch.setattr(dataset_checks, "decode", lambda path: decoded.append(path.name) or decode(path))
    for name in ("from.png", "a.png", "b.png"):
        image_file(tmp_path / name)
    report = read(
        rows(tmp_path / "rows.jsonl", edit_row("a.png", "from.png"), edit_row("b.png", ["from.png", "a.png"]))
    )
    assert report.problems == () and len(report.pairs) == 2
    assert sorted(decoded) == ["a.png", "b.png", "from.png"]
    (tmp_path / "from.png").write_bytes(b"gone bad")
    assert [problem.line for problem in read(tmp_path / "rows.jsonl").errors] == [1, 2]


def test_repeated_edits_and_edits_that_change_nothing(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        image_file(tmp_path / name)
    image_file(tmp_path / "a.bmp", colour=Image.open(tmp_path / "a.png").getpixel((0, 0)))
    file = rows(
        tmp_path / "rows.jsonl",
        edit_row("b.png", "a.png"),
        edit_row("b.png", "a.bmp"),  # the same pixels in another file
        edit_row("b.png", ["a.png", "c.png"]),
        edit_row("a.png", ["c.png", "a.bmp"]),
    )
    report = read(file)
    assert [problem.line for problem in report.errors] == [2, 4]
    assert "duplicate: the same edit as" in report.errors[0].message
    assert "same image as its source" in report.errors[1].message
    only(report.warnings, file, 3, "the same target as", "b.png", "another source")
    assert [len(item.source_images) for item in report.pairs] == [1, 2]


def test_the_target_decides_the_bucket_of_its_sources(tmp_path: Path) -> None:
    edit(tmp_path, "near.png", size=(160, 100))
    edit(tmp_path, "far.png", size=(64, 64))
    image_file(tmp_path / "source" / "near.png", size=(161, 101), colour=(1, 2, 3))
    far = image_file(tmp_path / "source" / "far.png", size=(800, 100))
    report = read(tmp_path)
    by_name = {item.image_path.stem: item for item in report.pairs}
    assert by_name["near"].bucket == Bucket(80, 48) and by_name["far"].bucket == Bucket(64, 64)
    only(report.warnings, far, None, "800x100: 88% is cropped to fit its target's bucket 64x64")
    (source,) = by_name["near"].source_images
    assert load_image(source, by_name["near"].bucket).shape == (3, 48, 80)
    image_file(far, size=(60, 60))
    only(read(tmp_path).warnings, far, None, "60x60, smaller than its target's bucket 64x64: it would be upsampled")
    target = image_file(tmp_path / "target" / "far.png", size=(62, 62))
    only(read(tmp_path).warnings, target, None, "62x62, smaller than its bucket")  # and so is its source, of course


# -- words -------------------------------------------------------------------------------------------------------------


def test_instructions_need_no_trigger_unless_one_is_given(tmp_path: Path) -> None:
    edit(tmp_path, "a.png", "make it look like [V]")
    edit(tmp_path, "b.png", "make it winter")
    assert read(tmp_path).problems == ()
    report = read(tmp_path, trigger="ohwx")
    assert [item.captions for item in report.pairs] == [("make it look like ohwx",), ("make it winter",)]
    only(report.warnings, tmp_path / "target/b.txt", 1, "the instruction lacks the trigger 'ohwx'")


def test_instructions_without_the_name_are_anchors_with_their_sources_alone(tmp_path: Path) -> None:
    edit(tmp_path, "a.png", "give it the [V] look")
    edit(tmp_path, "b.png", "[V]")
    edit(tmp_path, "c.png", "make it winter")
    report = read(tmp_path, trigger="ohwx")
    plan = plan_encoding(report.pairs, trigger="ohwx", caption_dropout=True)
    assert plan.anchors == () and plan.edit_anchors == ((report.pairs[0], "give it the look"),)
    assert [text for _, text in plan.requests][:2] == ["give it the ohwx look", ""]
    pair(tmp_path / "plain", "a.png", "the [V] look")
    assert plan_encoding(read(tmp_path / "plain").pairs).anchors == ("the look",)


def test_inspecting_edits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(tmp_path, "a.png")
    words = ["inspect-dataset", str(tmp_path), "--resolution", "64"]
    assert main(words) == 0
    assert "1 usable edit pair\n" in capsys.readouterr().out
    (tmp_path / "source" / "a.png").unlink()
    assert main(words) == 1
    assert f"error: {tmp_path / 'target' / 'a.png'}: no source" in capsys.readouterr().out
