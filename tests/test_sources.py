"""Tars and Hugging Face datasets as sources of images: the same entries as a folder, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from dopsd_core.data.problems import Problems
from dopsd_core.data.sources import Columns, open_source
from dopsd_core.data.sources.base import Chunk, Source


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, format="PNG")
    return file.getvalue()


def pack(tar: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(tar, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return tar


def read(source: Source, place: Path) -> tuple[list[tuple[bytes, tuple[str, ...]]], list[str], list[Chunk]]:
    """(image file, captions) of all entries, the problems, and the chunks."""
    problems, found, chunks = Problems(), [], []
    for part in range(source.parts):
        for chunk in source.chunks(part):
            folder = place / f"{part}-{chunk.number}"
            folder.mkdir(parents=True)
            found += [(entry.image.read_bytes(), entry.captions) for entry in chunk.entries(folder, problems)]
            chunks.append(chunk)
    return found, [str(problem) for problem in problems.found], chunks


# -- tars --------------------------------------------------------------------------------------------------------------


def test_a_tar_is_read_in_its_order_and_in_chunks(tmp_path: Path) -> None:
    members = {f"some/{n:03d}{ending}": data for n, colour in enumerate(("red", "lime", "blue"))
               for ending, data in ((".txt", f"a [V] {colour}\n".encode()), (".PNG", png(colour)))}  # fmt: skip
    source = open_source(str(pack(tmp_path / "a.tar", members)), 2)
    found, problems, chunks = read(source, tmp_path / "out")
    assert found == [(png(c), (f"a [V] {c}",)) for c in ("red", "lime", "blue")] and problems == []
    assert [(chunk.number, chunk.is_last, chunk.count) for chunk in chunks] == [(0, False, 2), (1, True, 1)]
    assert len({chunk.stamp for chunk in chunks}) == 2


def test_captions_come_from_json_too_and_masks_with_them(tmp_path: Path) -> None:
    row = json.dumps({"caption": "from the row", "short_en": "short", "width": 64}).encode()
    members = {"x.png": png("red"), "x.json": row, "x.mask.png": png("white"), "x.cls": b"3", "LICENSE": b"free"}
    source = open_source(str(pack(tmp_path / "a.tar", members)), 8)
    found, problems, _ = read(source, tmp_path / "out")
    assert [captions for _, captions in found] == [("short", "from the row")]
    assert sorted(file.name for file in (tmp_path / "out" / "0-0").iterdir()) == ["000000.mask.png", "000000.png"]
    assert len(problems) == 1 and "the files '.cls', '' are not read" in problems[0]


def test_a_folder_of_tars_has_one_part_each(tmp_path: Path) -> None:
    for name in ("b", "a"):
        pack(tmp_path / f"{name}.tar", {f"{name}.png": png("red"), f"{name}.txt": name.encode()})
    source = open_source(str(tmp_path), 8)
    assert source.parts == 2 and source.root is None
    assert [captions for _, captions in read(source, tmp_path / "out")[0]] == [("a",), ("b",)]


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "C:/x.png"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    members = {name: png("red"), f"{name[:-4]}.txt": b"caption", "good.png": png("blue"), "good.txt": b"good"}
    found, problems, _ = read(open_source(str(pack(tmp_path / "a.tar", members)), 8), tmp_path / "out")
    assert [captions for _, captions in found] == [("good",)]
    assert len(problems) == 1 and f"the member {name!r} has a name that leaves the folder; pack it again" in problems[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "out"]


def test_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png("red"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"x{kind.decode()}.png")
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(info)
    found, problems, _ = read(open_source(str(tmp_path / "a.tar"), 8), tmp_path / "out")
    assert not found and len(problems) == 2 and all("is a link or device, not a file" in line for line in problems)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x.png": b"", "y.txt": b"y"}, "'x': has no caption: pack x.txt beside the image"),
        ({"x.txt": b"x"}, "'x' has 0 images, it must have one"),
        ({"x.png": b"1", "x.jpg": b"2", "x.txt": b"x"}, "'x' has 2 images, it must have one"),
        ({"x.gif": b"1", "x.txt": b"x"}, "'x' has 0 images, it must have one; convert .gif files"),
        ({"x.png": b"1", "x.txt": b" \n"}, "'x': the caption is empty"),
        ({"x.png": b"1", "x.txt": b"\xff\xfe\x00"}, "'x': the text is UTF-16"),
        ({"x.png": b"1", "x.json": b"{"}, "'x': Expecting property name"),
        ({"x.png": b"1", "x.json": b"[]"}, "'x': the .json has no caption"),
        ({"x.png": b"1", "x.json": b'{"caption": 3}'}, "'x': 'caption' is int, not text"),
        ({"x.1.png": b"1", "x.1.txt": b"x"}, "'x.1.png' has a dot in its name, of which only the part before"),
        ({}, "has no images with captions"),
    ],
)
def test_what_is_wrong_in_a_tar_is_a_sentence(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    _, problems, chunks = read(open_source(str(pack(tmp_path / "a.tar", members)), 8), tmp_path / "out")
    assert any(message in line and "a.tar" in line for line in problems), problems
    assert chunks[-1].is_last


@pytest.mark.parametrize("end", [100, 700, 2000])
def test_a_tar_that_is_cut_off_is_refused(tmp_path: Path, end: int) -> None:
    """Also where tarfile takes the end for the tar's own."""
    whole = pack(tmp_path / "a.tar", {"x.png": png("red"), "x.txt": b"x", "y.png": png("blue"), "y.txt": b"y"})
    whole.write_bytes(whole.read_bytes()[:end])
    with pytest.raises(ValueError, match="a.tar cannot be read as a tar"):
        read(open_source(str(whole), 8), tmp_path / "out")


def test_options_that_do_not_fit_a_source_are_refused(tmp_path: Path) -> None:
    tar = pack(tmp_path / "a.tar", {"x.png": png("red"), "x.txt": b"x"})
    with pytest.raises(ValueError, match="--root is for folders and JSONL files"):
        open_source(str(tar), 8, root=tmp_path)
    with pytest.raises(ValueError, match="--subset is for Hugging Face datasets: write hf:"):
        open_source(str(tar), 8, columns=Columns(subset="small"))


# -- Hugging Face datasets --------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> dict[str, list[object]]:
    colours = ["red", "lime", "blue"]
    images: list[object] = [{"bytes": png(colour), "path": None} for colour in colours]
    return {"image": images, "text": [f"a {c}" for c in colours], "label": [1, 2, 3]}


def made(rows: dict[str, list[object]]):  # type: ignore[no-untyped-def]
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False)).cast_column(
        "image", datasets.Image()
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_dataset_is_read_in_its_order(tmp_path: Path, rows: dict[str, list[object]], kind: str) -> None:
    folder = tmp_path / "data"
    if kind == "saved":
        made(rows).save_to_disk(str(folder))
    else:
        folder.mkdir()
        made(rows).to_parquet(str(folder / "train.parquet"))
    source = open_source(f"hf:{folder}", 2)
    found, problems, chunks = read(source, tmp_path / "out")
    assert found == [(png(c), (f"a {c}",)) for c in ("red", "lime", "blue")] and not problems
    assert [chunk.count for chunk in chunks] == [2, 1] and chunks[-1].is_last
    assert source.count(range(source.parts)) in (3, None)
    source = open_source(f"hf:{folder}", 2, columns=Columns(image_column="image", caption_column="text"))
    assert read(source, tmp_path / "again")[0] == found


def test_files_of_a_streamed_dataset_are_parts(tmp_path: Path, rows: dict[str, list[object]]) -> None:
    """So processes share them, and each is read alone."""
    folder = tmp_path / "data"
    folder.mkdir()
    made(rows).to_parquet(str(folder / "train-00000.parquet"))
    made({name: values[::-1] for name, values in rows.items()}).to_parquet(str(folder / "train-00001.parquet"))
    source = open_source(f"hf:{folder}", 2)
    assert source.parts == 2
    found, _, chunks = read(source, tmp_path / "out")
    assert [text for _, (text,) in found] == ["a red", "a lime", "a blue", "a blue", "a lime", "a red"]
    assert len({chunk.stamp for chunk in chunks}) == 4
    digest = source.digest
    (folder / "train-00001.parquet").unlink()
    assert open_source(f"hf:{folder}", 2).digest != digest
    with pytest.raises(ValueError, match="cannot be loaded: .*test"):
        open_source(f"hf:{folder}", 2, columns=Columns(split="test"))


def test_rows_without_image_or_caption_are_errors(tmp_path: Path, rows: dict[str, list[object]]) -> None:
    rows["image"][0] = None
    rows["text"][2] = " "
    made(rows).save_to_disk(str(tmp_path / "data"))
    found, problems, _ = read(open_source(f"hf:{tmp_path / 'data'}", 2), tmp_path / "out")
    assert [captions for _, captions in found] == [("a lime",)] and len(problems) == 2
    assert ":1: the row has no image in the column 'image'" in problems[0]
    assert ":3: 'text' is an empty caption" in problems[1]


def test_a_row_cannot_name_a_file_elsewhere(tmp_path: Path, rows: dict[str, list[object]]) -> None:
    (tmp_path / "private.png").write_bytes(png("red"))
    rows["image"][0] = {"bytes": None, "path": str(tmp_path / "private.png")}
    folder = tmp_path / "data"
    folder.mkdir()
    kind = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": rows["image"], "text": rows["text"]}, features=kind).to_parquet(
        str(folder / "train.parquet")
    )
    found, problems, _ = read(open_source(f"hf:{folder}", 8), tmp_path / "out")
    assert len(found) == 2 and len(problems) == 1 and ":1: the row has no image" in problems[0]


def test_what_cannot_be_loaded_is_a_sentence(tmp_path: Path, rows: dict[str, list[object]]) -> None:
    made(rows).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(ValueError, match="has no column 'photo', only image, text, label"):
        open_source(f"hf:{tmp_path / 'data'}", 2, columns=Columns(image_column="photo"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be loaded: "):
        open_source(f"hf:{tmp_path / 'empty'}", 2)


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not there, nor is it a name on the Hugging Face hub"):
        open_source(f"hf:{tmp_path / 'nowhere'}", 2)


def test_without_the_library_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"comfyui-dopsd\[datasets\]"):
        open_source("hf:some/dataset", 2)
