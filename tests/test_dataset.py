"""Every problem of a dataset is found on real files, all at once, and named by file and line."""

import os
import struct
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from PIL import Image

from dopsd_core.data.buckets import Bucket
from dopsd_core.data.checks import shares_drive
from dopsd_core.data.dataset import DatasetError
from dopsd_core.data.encoding_plan import plan_encoding

from .written import image_file, only, pair, read, rows


def bomb(path: Path, side: int = 50_000) -> Path:
    """A PNG of a few bytes that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)))
    return path


def test_a_good_folder_has_no_problems(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.JPEG", "d.webp", "e.bmp"):
        pair(tmp_path, name, f"a [V] emblem called {name}\n")
    report = read(tmp_path, trigger="ohwx")
    assert report.problems == ()
    assert [item.image_path.name for item in report.pairs] == ["a.png", "b.jpg", "c.JPEG", "d.webp", "e.bmp"]
    assert report.pairs[0].captions == ("a ohwx emblem called a.png",)
    assert {item.bucket for item in report.pairs} == {Bucket(64, 64)}
    assert "5 in bucket 64x64" in report.describe()
    report.raise_for_errors()


def test_images_go_to_the_bucket_of_their_shape(tmp_path: Path) -> None:
    pair(tmp_path, "wide.png", size=(160, 100))
    pair(tmp_path, "tall.png", size=(100, 160))
    by_name = {item.image_path.stem: item for item in read(tmp_path).pairs}
    assert by_name["wide"].bucket == Bucket(80, 48) and by_name["tall"].bucket == Bucket(48, 80)
    assert (by_name["wide"].width, by_name["wide"].height) == (160, 100)


def test_exif_rotation_decides_the_bucket(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    pair(tmp_path, "a.jpg", size=(160, 100), exif=exif)
    assert read(tmp_path).pairs[0].bucket == Bucket(48, 80)


def test_sub_folders_repeat_by_their_name(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    pair(tmp_path / "10_dog", "b.png")
    pair(tmp_path / ".thumbs", "c.png")
    report = read(tmp_path, repeats=2)
    assert {item.image_path.stem: item.repeats for item in report.pairs} == {"a": 2, "b": 20}
    assert "22 visits per epoch" in report.describe()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_a_truncated_image(tmp_path: Path, suffix: str) -> None:
    path = pair(tmp_path, "a" + suffix, size=(200, 200))
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    noise.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    only(read(tmp_path).errors, path, None, "truncated")
    assert read(tmp_path).pairs == ()


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"not an image", b"GIF89a" + bytes(40)])
def test_files_that_are_no_images(tmp_path: Path, content: bytes) -> None:
    path = pair(tmp_path, "a.png")
    path.write_bytes(content)
    assert len(read(tmp_path).errors) == 1 and read(tmp_path).errors[0].file == path


def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bomb(pair(tmp_path, "a.png"))
    only(read(tmp_path).errors, path, None, "decompression bomb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # another part of the process switched Pillow's own guard off
    only(read(tmp_path).errors, path, None, "decompression bomb", "50000x50000")


def test_missing_and_empty_captions(tmp_path: Path) -> None:
    missing = image_file(tmp_path / "a.png")
    empty = pair(tmp_path, "b.png", " \n\t")
    report = read(tmp_path)
    assert [problem.file for problem in report.errors] == [missing, empty.with_suffix(".txt")]
    assert "a.txt" in report.errors[0].message and "empty" in report.errors[1].message


def test_captions_in_other_encodings(tmp_path: Path) -> None:
    good = pair(tmp_path, "a.png")
    good.with_suffix(".txt").write_bytes("\ufeffa [V] café".encode())
    assert read(tmp_path).pairs[0].captions == ("a [V] café",)
    good.with_suffix(".txt").write_bytes(b"fine\na [V] caf\xe9")
    only(read(tmp_path).errors, good.with_suffix(".txt"), 2, "UTF-8")
    good.with_suffix(".txt").write_bytes("a [V]".encode("utf-16"))
    only(read(tmp_path).errors, good.with_suffix(".txt"), 1, "UTF-16")


def test_duplicates_are_found_by_their_pixels(tmp_path: Path) -> None:
    first = pair(tmp_path, "a.png", colour=(1, 2, 3))
    second = pair(tmp_path, "b.bmp", colour=(1, 2, 3))
    only(read(tmp_path).errors, second, None, "duplicate", str(first))


def test_small_images_and_lossy_crops_are_warnings(tmp_path: Path) -> None:
    small = pair(tmp_path, "a.png", size=(63, 64))
    report = read(tmp_path)
    only(report.warnings, small, None, "63x64", "64x64", "upsampled")
    assert len(report.pairs) == 1 and report.errors == ()
    small.unlink()
    panorama = pair(tmp_path, "a.png", size=(800, 100))
    only(read(tmp_path).warnings, panorama, None, "79% is cropped")


def test_animated_and_unread_images_are_warnings(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (0, 90, 200)]
    path = pair(tmp_path, "a.webp")
    frames[0].save(path, save_all=True, append_images=frames[1:])
    only(read(tmp_path).warnings, path, None, "first of 3 frames")
    path.unlink()
    pair(tmp_path, "b.png")
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    (tmp_path / "d.heic").write_bytes(b"x")
    warnings = {problem.file.name: problem.message for problem in read(tmp_path).warnings}
    assert "without an image" in warnings["c.txt"] and "convert .heic" in warnings["d.heic"]


def test_no_images(tmp_path: Path) -> None:
    only(read(tmp_path).errors, tmp_path, None, "no images")
    only(read(rows(tmp_path / "a.jsonl", "")).errors, tmp_path / "a.jsonl", None, "no images")
    only(read(tmp_path / "gone").errors, tmp_path / "gone", None, "not there")
    (tmp_path / "a.csv").write_text("x")
    only(read(tmp_path / "a.csv").errors, tmp_path / "a.csv", None, "jsonl")


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    outside = image_file(tmp_path / "outside" / "a.png")
    folder = tmp_path / "data"
    pair(folder, "z.png")
    (folder / "a.png").symlink_to(outside)
    (folder / "a.txt").write_text("a [V]")
    (folder / "more").symlink_to(tmp_path / "outside", target_is_directory=True)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "loop.txt").write_text("a [V]")
    errors = {problem.file.name: problem.message for problem in read(folder).errors}
    assert "is outside of the folder" in errors["a.png"] and "links out of the folder" in errors["more"]
    assert "loop.png" in errors and len(errors) == 3
    assert [item.image_path.name for item in read(folder).pairs] == ["z.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_caption_that_is_a_link_in_a_circle_is_an_error(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").symlink_to("a.txt")
    only(read(tmp_path).errors, tmp_path / "a.txt", None, "cannot be read")


def test_a_jsonl_does_not_tell_what_exists_outside(tmp_path: Path) -> None:
    image_file(tmp_path / "there.png")
    (tmp_path / "data").mkdir()
    names = ("there.png", "gone.png", "gone/deep.png", "there.png/under.png", "x" * 3000)
    spellings = [f"../{name}" for name in names] + [str(tmp_path / name) for name in names]
    file = rows(tmp_path / "data" / "rows.jsonl", *({"path": path, "text": "[V]"} for path in spellings))
    said = {problem.message.rpartition(": it ")[2] for problem in read(file).errors}
    assert len(said) == 1 and said.pop().startswith("is outside of the folder")
    assert len(read(file).errors) == len(spellings)


def test_a_network_share_is_not_even_asked() -> None:
    roots = (PureWindowsPath("C:\\data"), PureWindowsPath("\\\\nas\\sets\\data"))
    for path in ("c:\\x\\a.png", "C:\\data\\a.png", "\\\\NAS\\sets\\a.png"):
        assert shares_drive(PureWindowsPath(path), roots)
    for path in ("\\\\server\\share\\a.png", "//server/share/a.png", "D:\\a.png", "\\\\nas\\other\\a.png"):
        assert not shares_drive(PureWindowsPath(path), roots)
    assert shares_drive(PurePosixPath("/a"), [PurePosixPath("/b")])


def test_paths_out_of_the_folder_in_a_jsonl(tmp_path: Path) -> None:
    inside = image_file(tmp_path / "data" / "a.png")
    outside = image_file(tmp_path / "b.png")
    file = tmp_path / "data" / "rows.jsonl"
    rows(
        file,
        {"path": "../b.png", "text": "[V]"},
        {"path": str(outside), "text": "[V]"},
        {"path": str(inside), "text": "[V]"},
    )
    report = read(file)
    assert [problem.line for problem in report.errors] == [1, 2]
    assert all("is outside of the folder" in problem.message for problem in report.errors)
    assert len(report.pairs) == 1
    wider = read(file, root=tmp_path).errors
    only(wider, file, 2, "duplicate")


def test_the_authors_rows(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        image_file(tmp_path / name, size=(80, 48))
    kinds = ("short", "medium", "detailed", "user_prompt")
    everything = {f"{kind}_{language}": f"a [V] {kind} {language}" for kind in kinds for language in ("en", "zh")}
    file = rows(
        tmp_path / "rows.jsonl",
        {"local_path_list": ["a.png"], "h*w": "48*80", "class_name": "dog", **everything},
        "",
        {"image_path": "b.png", "w*h": "80*48", "short_zh": "一只[V]狗"},
        {"path": "c.png", "h*w": "80*40", "short_en": "a [V] dog", "medium_en": "", "repeats": 3},
    )
    report = read(file, trigger="ohwx")
    assert set(report.pairs[0].captions) == {text.replace("[V]", "ohwx") for text in everything.values()}
    assert report.pairs[1].captions == ("一只ohwx狗",) and report.pairs[1].caption_line == 3
    assert report.pairs[2].repeats == 3 and report.errors == ()
    assert [(problem.line, problem.file) for problem in report.warnings] == [(4, file), (4, file)]
    assert "'medium_en' is an empty caption" in report.warnings[0].message
    assert "is 80x48, but the row says 40x80" in report.warnings[1].message


def test_every_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    file = rows(
        tmp_path / "rows.jsonl",
        '{"path": "a.png", "text": "a [V]"',
        "[1]",
        {"text": "a [V]"},
        {"path": 7, "text": "a [V]"},
        {"path": "a.png"},
        {"path": "gone.png", "text": "a [V]"},
        {"path": "a\0.png", "text": "a [V]"},
        {"path": "a.png", "text": 5},
        {"path": "a.png", "text": "a [V]", "repeats": 0, "h*w": "wide"},
        {"path": [], "text": "a [V]"},
        "[" * 100_000,
    )
    report = read(file)
    said: dict[int | None, str] = {}
    for problem in report.errors:
        said[problem.line] = said.get(problem.line, "") + problem.message
    expected = {1: "JSON", 2: "list", 3: "no image", 4: "'path' is 7", 5: "no caption", 6: "no such file", 7: "null"}
    expected |= {8: "'text' is int", 9: "'repeats' is 0", 10: "'path' is []", 11: "JSON"}
    assert set(said) == set(expected)
    for line, words in expected.items():
        assert words in said[line], said[line]
    assert "'h*w' is 'wide'" in report.warnings[0].message
    with pytest.raises(DatasetError) as caught:
        report.raise_for_errors()
    assert all(str(problem) in str(caught.value) for problem in report.errors)


def test_several_paths_are_said_to_be_cut_to_the_first(tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    file = rows(tmp_path / "rows.jsonl", {"image_paths": ["a.png", "b.png"], "caption": "a [V]"})
    only(read(file).warnings, file, 1, "2 paths")


def test_captions_without_the_trigger_are_warnings(tmp_path: Path) -> None:
    pair(tmp_path, "a.png", "a [V] dog")
    plain = pair(tmp_path, "b.png", "a dog").with_suffix(".txt")
    only(read(tmp_path).warnings, plain, 1, "lacks [V]")
    only(read(tmp_path, trigger="sks").warnings, plain, 1, "'sks'")
    plain.write_text("a SKS dog")
    assert read(tmp_path, trigger="sks").warnings == ()
    (tmp_path / "a.txt").write_text("a dog")
    plain.write_text("a cat")
    assert read(tmp_path).warnings == ()  # a style without a name is no mistake


def test_a_folder_with_a_jsonl_points_to_it(tmp_path: Path) -> None:
    path = image_file(tmp_path / "a.png")
    rows(tmp_path / "rows.jsonl", {"path": "a.png", "text": "x"})
    only(read(tmp_path).errors, path, None, "rows.jsonl")


def test_odd_files_do_not_stop_the_reader(tmp_path: Path) -> None:
    path = pair(tmp_path, "a.png")
    path.with_suffix(".txt").unlink()
    os.mkfifo(path.with_suffix(".txt"))
    only(read(tmp_path).errors, path.with_suffix(".txt"), 1, "is not a file")


def test_the_plan_encodes_each_different_caption_once(tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    image_file(tmp_path / "b.png")
    file = rows(
        tmp_path / "rows.jsonl",
        {"path": "a.png", "short_en": "a [V] dog", "medium_en": "a [V] dog", "detailed_en": "a  [V]\nred dog"},
        {"path": "b.png", "text": "a dog", "repeats": 2},
    )
    report = read(file, trigger="sks")
    plan = plan_encoding(report.pairs, trigger="sks", caption_dropout=True)
    assert [text for _, text in plan.requests] == ["a sks dog", "a  sks\nred dog", "", "a dog", ""]
    assert [(item.variants, item.dropped, item.repeats) for item in plan.examples] == [((0, 0, 1), 2, 1), ((3,), 4, 2)]
    assert plan.anchors == ("a dog", "a red dog")
    assert plan_encoding(report.pairs).examples[0].dropped is None


def test_captions_that_do_not_name_the_concept_give_no_anchor(tmp_path: Path) -> None:
    image_file(tmp_path / "a.png")
    file = rows(tmp_path / "rows.jsonl", {"path": "a.png", "short_en": "a photo of a dog"})
    assert plan_encoding(read(file, trigger="sks").pairs, trigger="sks").anchors == ()
