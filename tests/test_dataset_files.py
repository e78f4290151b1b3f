"""Whatever lies in a dataset's folder is used or named: near misses of names, counts in them, unread files."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_core.data.caption_files import folded
from dopsd_core.data.repeats import MAX_REPEATS

from .written import image_file, only, pair, read, require_case

NFC, NFD = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")


def messages(problems: tuple) -> dict[str, str]:
    """By the name of the file."""
    return {problem.file.name: problem.message for problem in problems}


# -- names of captions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image", "text"), [(NFC, NFD), (NFD, NFC)])
def test_composed_and_decomposed_names_are_equal(tmp_path: Path, image: str, text: str) -> None:
    pair(tmp_path, f"{image}.png").with_suffix(".txt").rename(tmp_path / f"{text}.txt")
    report = read(tmp_path)
    assert report.problems == () and len(report.pairs) == 1
    image_file(tmp_path / "edits" / "source" / f"{text}.png", colour=(1, 2, 3))
    pair(tmp_path / "edits" / "target", f"{image}.png")
    assert read(tmp_path / "edits").problems == ()


def test_another_case_of_letters_is_used_and_named(tmp_path: Path) -> None:
    pair(tmp_path, "Photo.PNG").with_suffix(".txt").rename(tmp_path / "photo.TXT")
    report = read(tmp_path)
    only(report.problems, tmp_path / "photo.TXT", None, "used as the caption of Photo.PNG", "make them equal")
    assert report.errors == () and report.pairs[0].captions == ("a [V] emblem",)


def test_names_that_differ_in_case_alone_are_two_where_both_are_there(tmp_path: Path) -> None:
    require_case(tmp_path)
    pair(tmp_path, "a.png", "a [V] one")
    pair(tmp_path, "A.png", "a [V] two")
    report = read(tmp_path)
    assert report.problems == ()
    assert {item.image_path.name: item.captions[0][-3:] for item in report.pairs} == {"a.png": "one", "A.png": "two"}
    (tmp_path / "A.txt").unlink()
    only(
        read(tmp_path).errors, tmp_path / "A.png", None, "no caption", "there is a.txt, which belongs to another image"
    )


@pytest.mark.parametrize("second", ["a.TXT", "A.txt"])
def test_two_captions_of_one_image(tmp_path: Path, second: str) -> None:
    require_case(tmp_path)
    path = pair(tmp_path, "a.png")
    (tmp_path / second).write_text("another [V]")
    only(read(tmp_path).problems, path, None, "2 captions with its name", second, "a.txt", "keep one")
    assert read(tmp_path).pairs == ()


def test_two_images_of_one_caption(tmp_path: Path) -> None:
    pair(tmp_path, "a.png", colour=(9, 9, 9))
    first = image_file(tmp_path / "a.jpg", colour=(200, 9, 9))
    report = read(tmp_path)
    only(report.problems, first, None, "a.jpg and a.png share the caption a.txt")
    assert report.errors == () and len(report.pairs) == 2


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("a.caption", "there is a.caption: rename it to a.txt"),
        ("a.png.txt", "there is a.png.txt: rename it to a.txt"),
        ("a.jpg.txt", "there is a.jpg.txt: rename it to a.txt"),
        ("a.txt.txt", "there is a.txt.txt: rename it to a.txt"),
        ("A.PNG.TXT", "there is A.PNG.TXT: rename it to a.txt"),
        ("a.text", "there is a.text: rename it to a.txt"),
        ("a .txt", "there is a .txt: rename it to a.txt"),
        ("a.txt ", "there is a.txt : rename it to a.txt"),
        ("a_caption.txt", "there is a_caption.txt: rename it to a.txt"),
        ("a", "there is a: rename it to a.txt"),
        ("a.json", "there is a.json: only .txt is read, write its caption to a.txt"),
        ("captions/a.txt", "there is captions/a.txt: move it beside the image"),
        ("captions/A.txt", "there is captions/A.txt: move it beside the image"),
    ],
)
def test_near_misses_are_named_once(tmp_path: Path, name: str, reported: str) -> None:
    path = image_file(tmp_path / "a.png")
    pair(tmp_path, "b.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a [V]")
    report = read(tmp_path)
    assert [problem.file for problem in report.problems] == [path]
    assert f"no caption: write it to a.txt beside it ({reported})" in report.errors[0].message.replace("\\", "/")


def test_captions_of_other_images_are_no_near_misses(tmp_path: Path) -> None:
    path = image_file(tmp_path / "a.png")
    pair(tmp_path / "more", "a.png", colour=(5, 5, 5))
    assert read(tmp_path).errors[0].message == "no caption: write it to a.txt beside it"
    mask = image_file(tmp_path / "more" / "a-mask.png", colour=(7, 7, 7))
    assert "a mask of a.png? rename it to a.mask.png, or move it out" in messages(read(tmp_path).errors)[mask.name]
    assert path.name in messages(read(tmp_path).errors)


def test_a_text_beside_another_file_of_its_name_is_named(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    (tmp_path / "b.txt").write_text("a [V]")
    (tmp_path / "b.json").write_text("{}")
    assert messages(read(tmp_path).warnings)["b.txt"] == "a caption without an image of the same name"


def test_instructions_have_near_misses_too(tmp_path: Path) -> None:
    image_file(tmp_path / "source" / "a.png", colour=(1, 2, 3))
    target = image_file(tmp_path / "target" / "a.png")
    (tmp_path / "target" / "a.caption").write_text("make it winter")
    only(read(tmp_path).problems, target, None, "no instruction", "there is a.caption: rename it to a.txt")


# -- counts in names of folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["2024_summer", "1999_trip", "2030_", "20240512_walk", "0512_walk", "0001_first", "24_05_12_walk",
     "12_5_2024_x"],
)  # fmt: skip
def test_years_and_dates_are_asked_about(tmp_path: Path, name: str) -> None:
    pair(tmp_path / name, "a.png")
    pair(tmp_path / name, "b.png")
    only(read(tmp_path).problems, tmp_path / name, None, "looks like a date", f"rename the folder, to 1_{name}")
    (tmp_path / name).rename(tmp_path / f"1_{name}")
    report = read(tmp_path)
    assert report.problems == () and {item.repeats for item in report.pairs} == {1}


@pytest.mark.parametrize("name", ["1001_dogs", "5000_dogs", "0_dogs", "240512_walk", "9" * 200 + "_x"])
def test_counts_out_of_bounds(tmp_path: Path, name: str) -> None:
    pair(tmp_path / name, "a.png")
    only(read(tmp_path).problems, tmp_path / name, None, f"requests {name.split('_')[0]} repeats; 1 to 1000 are")


@pytest.mark.parametrize(
    ("name", "count"),
    [("10_dog", 10), ("1000_dog", 1000), ("1_3_4_view", 1), ("dog_10", 1), ("10 dog", 1), ("٣_dog", 1)],
)
def test_counts_that_are_read(tmp_path: Path, name: str, count: int) -> None:
    pair(tmp_path / name, "a.png")
    pair(tmp_path / name / "closer", "b.png")
    report = read(tmp_path, repeats=2)
    assert report.problems == () and [item.repeats for item in report.pairs] == [2 * count] * 2
    assert [item.repeats for item in read(tmp_path / name).pairs] == [1, 1]


@pytest.mark.parametrize(("name", "count"), [("05_near", 5), ("3_4_view", 3), ("12_2024", 12), ("12_2024_trip", 12)])
def test_the_nearest_count_holds_and_numbering_is_a_warning(tmp_path: Path, name: str, count: int) -> None:
    pair(tmp_path / "2_all" / name, "a.png")
    report = read(tmp_path)
    only(report.problems, tmp_path / "2_all" / name, None, f"is read as {count} repeats", f"1_{name} for 1 repeat")
    assert report.errors == () and report.pairs[0].repeats == count


def test_the_users_repeats_have_the_same_bound(tmp_path: Path) -> None:
    pair(tmp_path / "1000_x", "a.png")
    assert read(tmp_path, repeats=MAX_REPEATS).pairs[0].repeats == 1_000_000
    for repeats in (0, MAX_REPEATS + 1):
        with pytest.raises(ValueError, match="must be from 1 to 1000"):
            read(tmp_path, repeats=repeats)


# -- files that are not read -------------------------------------------------------------------------------------------


def test_unread_files_of_a_kind_are_one_warning(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        pair(tmp_path / "1_x", name)
    for name in ("a.json", "b.json", "c.JSON", "a.npz", "a.caption", "rows.jsonl", "notes", "a.heic", "b.heic"):
        (tmp_path / "1_x" / name).write_bytes(b"x")
    for name in ("README.md", "LICENSE", "Thumbs.db", "desktop.ini", ".DS_Store", "._a.png", "classes.txt"):
        (tmp_path / "1_x" / name).write_bytes(b"x")
    report = read(tmp_path)
    assert len(report.pairs) == 3 and report.errors == ()
    assert messages(report.warnings) == {
        "a.json": "not read, like 2 more .json files: only images and .txt captions are read from a folder",
        "a.npz": "not read: only images and .txt captions are read from a folder",
        "a.caption": "not read: only images and .txt captions are read from a folder",
        "notes": "not read: only images and .txt captions are read from a folder",
        "rows.jsonl": "not read: to read it, give its path instead of the folder's",
        "a.heic": "not read, like 1 more .heic file: convert .heic files to PNG, JPEG, WebP or BMP",
    }


def test_an_image_may_be_called_license(tmp_path: Path) -> None:
    for name in ("license.png", "classes.jpg", "readme.png"):
        pair(tmp_path, name)
    (tmp_path / "requirements.txt").write_text("torch")
    report = read(tmp_path)
    assert [one.image_path.name for one in report.pairs] == ["classes.jpg", "license.png", "readme.png"]
    assert report.problems == ()


names = st.sampled_from(["a", "A", "b", NFC, NFD, "a.png", "a-mask"])
suffixes = st.sampled_from([".png", ".jpg", ".txt", ".TXT", ".caption", ".json", ".heic", ".jsonl", "", ".txt.txt"])
folders = st.sampled_from(["", "10_x", "2024_x", "captions", "source", "target", "0_x/y"])
contents = st.sampled_from(
    [b"a [V] dog", b"a [v]", b"[ V ]", b"", b"\xff", b"a\0", "ä".encode("utf-16-le"), b'{"a":1}']
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.tuples(folders, names, suffixes), contents, max_size=9))
def test_a_folder_of_any_files_is_used_or_named_and_left_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, files: dict[tuple[str, str, str], bytes]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for number, ((parent, name, suffix), content) in enumerate(files.items()):
        path = folder / parent / (name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix in (".png", ".jpg") and content != b"\xff":
            image_file(path, colour=(number, 40, 9))
        else:
            path.write_bytes(content)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = read(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    used = {path for item in report.pairs for path in (item.image_path, *item.source_images)}
    named = {folded(problem.file.stem) for problem in report.problems}
    for path in before:
        if path.suffix in (".png", ".jpg") and path not in used:
            assert path.name in report.describe() or folded(path.stem) in named, path
    assert bool(report.errors) or bool(report.pairs)
