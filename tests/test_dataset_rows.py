"""Rows of a JSONL: other trainers' keys are read, and what is not read is named."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_core.data.dataset import DatasetReport

from .written import image_file, only, read, rows

KEYS = (
    "control_path", "control_path_0", "control_path_1", "control_path_10", "control_image", "control_image_2",
    "source_image", "source_image_path", "source", "input", "input_image", "input_images", "edit_image",
    "kontext_images", "original_image", "reference_image", "ref_images", "conditioning_image", "input_file_name",
    "before", "ref_img", "source_path",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        image_file(tmp_path / f"{number}.png", colour=(number, 7, 9))
    return tmp_path


def shape(report: DatasetReport) -> list[tuple[str, list[str], tuple[str, ...], int]]:
    return [
        (item.image_path.name, [path.name for path in item.source_images], item.captions, item.repeats)
        for item in report.pairs
    ]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("target", ["image_path", "file_name", "image", "target_img", "target_image", "output_path"])
def test_sources_under_the_keys_of_other_trainers(folder: Path, key: str, target: str) -> None:
    file = rows(folder / "a.jsonl", {target: "0.png", key: "1.png", "caption": "make it winter"})
    report = read(file)
    assert report.problems == () and shape(report) == [("0.png", ["1.png"], ("make it winter",), 1)]


def test_several_sources_come_in_the_order_of_their_numbers(folder: Path) -> None:
    row = {"control_path_10": "4.png", "image_path": "0.png", "control_path_2": "3.png", "control_path_1": "2.png"}
    report = read(rows(folder / "a.jsonl", {**row, "control_path": "1.png", "instruction": "put all together"}))
    assert report.problems == ()
    assert shape(report) == [("0.png", ["1.png", "2.png", "3.png", "4.png"], ("put all together",), 1)]
    listed = {"image": "0.png", "edit_image": ["2.png", "1.png"], "prompt": "put both together"}
    assert shape(read(rows(folder / "a.jsonl", listed))) == [("0.png", ["2.png", "1.png"], ("put both together",), 1)]


def test_sources_under_two_names_are_an_error(folder: Path) -> None:
    file = rows(folder / "a.jsonl", {"path": "0.png", "control_path": "1.png", "source_image": "2.png", "text": "x"})
    only(read(file).errors, file, 1, "under several keys: 'control_path', 'source_image'; keep one")
    file = rows(
        folder / "a.jsonl", {"target_img": "0.png", "output_image": "3.png", "source_image": "2.png", "text": "x"}
    )
    only(read(file).errors, file, 1, "'target_img' and 'output_image': an edit has one target")


@pytest.mark.parametrize("value", ["flickr", "https", 7, ["a", "b"], {"name": "x.png"}])
def test_a_source_that_is_no_image_is_a_key_that_is_not_read(folder: Path, value: object) -> None:
    file = rows(folder / "a.jsonl", {"path": "0.png", "source": value, "text": "x"})
    report = read(file)
    only(report.problems, file, None, "the key 'source' is not read")
    assert shape(report) == [("0.png", [], ("x",), 1)]


def test_a_broken_source_never_makes_a_plain_image_of_an_edit(folder: Path) -> None:
    for value in ("gone.png", "", 5, ["1.png", None]):
        file = rows(folder / "a.jsonl", {"path": "0.png", "control_path": value, "text": "x"})
        assert read(file).pairs == () and len(read(file).errors) == 1


def test_repeats_under_both_keys(folder: Path) -> None:
    file = rows(
        folder / "a.jsonl",
        {"path": "0.png", "text": "x", "num_repeats": 10},
        {"path": "1.png", "text": "x", "repeats": 1000, "num_repeats": None},
        {"path": "2.png", "text": "x", "repeats": 3, "num_repeats": 3},
    )
    report = read(file, repeats=2)
    assert report.problems == () and [item.repeats for item in report.pairs] == [20, 2000, 6]
    for row in (
        {"num_repeats": 1001},
        {"repeats": 20240512},
        {"num_repeats": "10"},
        {"repeats": 1.5},
        {"repeats": True},
    ):
        rows(file, {"path": "0.png", "text": "x", **row})
        only(read(file).errors, file, 1, f"{next(iter(row))!r} is ", "a whole number from 1 to 1000")
    rows(file, {"path": "0.png", "text": "x", "repeats": 2, "num_repeats": 3})
    only(read(file).errors, file, 1, "'repeats' and 'num_repeats' differ; keep one")


def test_every_other_key_is_named_once(folder: Path) -> None:
    metadata = {"class_name": "dog", "h*w": "64*64", "tags": None, "note": ""}
    file = rows(
        folder / "photos.jsonl",
        {"path": "0.png", "mask_path": "4.png", "text": "x", **metadata},
        {"path": "1.png", "weight": 0.2, "mask_path": "4.png", "text": "x", "file_name": "2.png"},
        {"path": "2.png", "weight": 0, "text": "x"},
    )
    report = read(file)
    only(report.problems, file, None, "the keys 'mask_path', 'weight', 'file_name' are not read")
    assert str(report.problems[0]) == f"warning: {file}: the keys 'mask_path', 'weight', 'file_name' are not read"
    many = {f"key{number}": 1 for number in range(30)} | {"x" * 500: 1}
    only(
        read(rows(file, {"path": "0.png", "text": "x", **many})).problems,
        file,
        None,
        "'key11' and 19 more are not read",
    )


def test_an_instruction_is_read_where_there_is_no_caption(folder: Path) -> None:
    row = {"original_image": "1.png", "edited_image": "0.png", "edit_prompt": "make it winter"}
    file = rows(folder / "a.jsonl", row)
    assert shape(read(file)) == [("0.png", ["1.png"], ("make it winter",), 1)]
    rows(file, {**row, "caption": "a house in winter"})
    only(read(file).problems, file, None, "the key 'edit_prompt' is not read")


def test_addresses_are_no_paths(folder: Path) -> None:
    for address in ("https://example.com/a.png", "file:///a.png", "S3://bucket/a.png", "data:image/png;base64,AAAA"):
        file = rows(folder / "a.jsonl", {"path": address, "text": "x"})
        only(read(file).errors, file, 1, "'path' is the URL", "download it")


# -- lines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n", "\r\r"])
def test_lines_end_in_every_way(folder: Path, end: str) -> None:
    lines = [json.dumps({"path": f"{number}.png", "text": "a\u2028b"}, ensure_ascii=False) for number in range(3)]
    (folder / "a.jsonl").write_bytes(end.join(lines).encode())
    report = read(folder / "a.jsonl")
    assert report.problems == () and len(report.pairs) == 3


def test_joined_files_have_marks_inside(folder: Path) -> None:
    file = rows(
        folder / "a.jsonl", {"path": "0.png", "text": "x"}, "\ufeff" + json.dumps({"path": "1.png", "text": "y"})
    )
    assert read(file).problems == () and len(read(file).pairs) == 2


@pytest.mark.parametrize(
    ("line", "reported"),
    [
        ('{"path": "0.png", "text": "x"},', "a JSONL has no commas between its rows"),
        ('{"path": "0.png", "text": "x", "text": "y"}', "the key 'text' is there twice; keep one"),
        ('{"path": "0.png", "text": "x", "weight": NaN}', "NaN is no JSON value"),
        ('{"path": "0.png", "text": "x", "weight": -Infinity}', "-Infinity is no JSON value"),
        ('{"path": "0.png", "text": "x"}\0\0\0', "NUL characters"),
        ("\0" * 9, "NUL characters"),
        ('{"path": "0.png", "text": "x", "h*w": "' + "9" * 5000 + '*1"}', ""),
        ('{"path": "0.png", "text": "x", "control_path_' + "9" * 5000 + '": "1.png"}', ""),
        ('{"path": "0.png", "text": "x", "repeats": ' + "9" * 5000 + "}", ""),
    ],
)
def test_lines_that_are_no_rows(folder: Path, line: str, reported: str) -> None:
    file = rows(folder / "a.jsonl", {"path": "1.png", "text": "fine"}, line)
    report = read(file)
    assert len(report.problems) == 1 and report.problems[0].line in (2, None) and reported in report.problems[0].message


def test_a_json_file_is_one_error(folder: Path) -> None:
    data = [{"path": f"{number}.png", "text": "x"} for number in range(3)]
    for text in (json.dumps(data), json.dumps(data, indent=1), json.dumps(data[0], indent=1)):
        (folder / "a.jsonl").write_text(text)
        only(
            read(folder / "a.jsonl").errors,
            folder / "a.jsonl",
            None,
            "a JSON file, not a JSONL: write one object per line",
        )
    (folder / "a.jsonl").write_text("\n \n")
    only(read(folder / "a.jsonl").errors, folder / "a.jsonl", None, "no images; the file has no rows")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=4)
    | st.sampled_from(["0.png", "1.png", "..", "/etc/passwd", "a [v] dog", "http://x/y.png"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
keys = st.sampled_from([*KEYS, "path", "text", "caption", "repeats", "num_repeats", "h*w", "target_img", "mask"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(keys | st.text(max_size=4), values, max_size=6), min_size=1, max_size=3), st.text())
def test_rows_of_any_kind_are_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, data: list[dict[str, object]], trigger: str
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for number in range(2):
        image_file(folder / f"{number}.png", colour=(number, 7, 9), size=(16, 16))
    file = rows(folder / "a.jsonl", *[json.dumps(row) for row in data])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    report = read(file, trigger=trigger if trigger.isprintable() else "")
    report.describe().encode()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert all(item.image_path.resolve().is_relative_to(folder.resolve()) for item in report.pairs)
    assert report.errors or report.pairs
