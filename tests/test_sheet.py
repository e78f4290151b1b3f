"""Image grids: sizes, pixels, and text of any kind that stays in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageFont

from dopsd_core import image_grid as sheet
from dopsd_core.image_grid import Row, contact_sheet, fit_tile, thumbnails, to_images, to_pixels

AWKWARD = (
    "", "\n\n", "日本語のとても長い説明文" * 40, "שלום עולם", "emoji 🎉👩‍👩‍👧", "\x00\x07\u202e", "\ud800 lone",
    "x" * 100_000, "a b " * 5_000, "été – naïve ×2", "e" + "\u0301" * 500,
)  # fmt: skip


def plain(colour: tuple[int, int, int], width: int, height: int) -> torch.Tensor:
    return torch.tensor(colour).div(255).view(1, 3, 1, 1).expand(1, 3, height, width)


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return dict((value, n) for n, value in image.getcolors(1 << 24) or ()).get(colour, 0)


def test_small_images_grow_without_new_colours() -> None:
    image = to_images(torch.rand(1, 3, 8, 8))[0]
    grown = fit_tile(image, 100)
    assert grown.size == (100, 100)
    assert {value for _, value in grown.getcolors() or ()} == {value for _, value in image.getcolors() or ()}


@pytest.mark.parametrize(
    ("size", "fitted"), [((1024, 512), (128, 64)), ((576, 1344), (55, 128)), ((4000, 1), (128, 1))]
)
def test_large_images_shrink_whole(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit_tile(Image.new("RGB", size), 128).size == fitted


def test_every_image_of_every_row_is_there_in_full() -> None:
    red, blue = (200, 10, 10), (10, 10, 200)
    rows = [Row("a", "", plain(red, 64, 64).expand(3, -1, -1, -1)), Row("b", "", plain(blue, 1344, 576), ("wide",))]
    image = contact_sheet("title", rows, tile=128)
    assert count(image, red) == 3 * 128 * 128
    assert count(image, blue) == 128 * 55


def test_images_of_one_row_may_differ_in_size() -> None:
    red, blue = (200, 10, 10), (10, 10, 200)
    image = contact_sheet("", [Row("", "", [plain(red, 64, 64)[0], plain(blue, 300, 100)[0]])], tile=90)
    assert count(image, red) == 90 * 90 and count(image, blue) == 90 * 30


def test_pixels_and_images_are_each_others_inverse() -> None:
    pixels = torch.randint(0, 256, (1, 5, 7, 3)).float() / 255
    assert torch.equal(to_pixels(to_images(pixels.permute(0, 3, 1, 2))[0]), pixels)


def test_what_is_no_number_does_not_spoil_the_sheet() -> None:
    image = torch.full((1, 3, 4, 4), float("nan"))
    assert to_images(image)[0].getcolors() == [(16, (0, 0, 0))]


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: ascii(text[:12]))
def test_text_of_any_kind_stays_in_its_place(text: str) -> None:
    block = sheet._wrap(text, 12, 100, 3, (0, 0, 0))
    assert len(block.lines) <= 3
    assert all(block.font.getlength(line) <= 100 for line in block.lines)
    red = (200, 10, 10)
    for image in (
        contact_sheet(text, [Row(text, text, plain(red, 64, 64).expand(2, -1, -1, -1), (text, text))]),
        thumbnails([(to_images(plain(red, 64, 64))[0], text)], text, tile=112),
    ):
        assert count(image, red) in (112 * 112, 2 * 112 * 112), "text over an image"
    rows = [Row("", "", plain(red, 9, 9))]
    assert contact_sheet(text, rows).size == contact_sheet("", rows).size


def test_a_pillow_without_freetype_still_draws(monkeypatch) -> None:
    bitmap = ImageFont.load_default_imagefont()
    monkeypatch.setattr(sheet, "_default_font", lambda size: bitmap)
    monkeypatch.setattr(sheet, "_system_font", lambda name, size: None)
    image = contact_sheet("日本 é", [Row("日本", "é", plain((200, 10, 10), 64, 64))])
    assert ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox() is not None


def test_long_text_ends_in_an_ellipsis() -> None:
    assert sheet._wrap("word " * 50, 12, 100, 2, (0, 0, 0)).lines[-1].endswith("...")
    assert sheet._wrap("two words", 12, 100, 2, (0, 0, 0)).lines == ("two words",)


def test_thumbnails_read_files_and_name_what_they_cannot_read(tmp_path: Path) -> None:
    Image.new("RGB", (900, 600), (200, 10, 10)).save(tmp_path / "a.png")
    Image.new("CMYK", (900, 600)).save(tmp_path / "b.jpg")
    (tmp_path / "c.png").write_bytes(b"no image")
    items = [(tmp_path / name, name) for name in ("a.png", "b.jpg", "c.png", "missing.png")]
    image = thumbnails(items, "error: c.png: damaged\nwarning: b.jpg: small", tile=150)
    assert count(image, (200, 10, 10)) == 150 * 100
    assert count(image, sheet._COLOURS["error"]) > 20 and count(image, sheet._COLOURS["warning"]) > 20


def test_an_edit_is_one_strip_its_target_last_behind_an_arrow() -> None:
    red, green, blue = (200, 10, 10), (10, 200, 10), (10, 10, 200)
    squares = [Image.new("RGB", (30, 20), colour) for colour in (red, green, blue)]
    image = thumbnails([((squares[0], squares[2]), "make it blue"), (squares[:1], "as it is")], tile=60)
    assert (count(image, red), count(image, blue)) == (2 * 60 * 40, 60 * 40)
    strip = image.crop((sheet._PAD, sheet._PAD, sheet._PAD + 2 * 60 + sheet._ARROW, sheet._PAD + 40))
    middle = [strip.getpixel((x, 20)) for x in range(strip.width)]
    assert middle[:60] == [red] * 60 and middle[-60:] == [blue] * 60
    assert sheet._FAINT in middle[60:-60] and sheet._MAT in middle[60:-60]
    many = thumbnails([((*squares, *squares, squares[2]), "of six"), ((squares[0], squares[1]), "of one")], tile=60)
    assert many.width == 3 * 60 + 2 * sheet._ARROW + 2 * sheet._PAD, "the strip of six leaves its cell"
    assert count(many, green) > 60 * 40 and 0 < count(many, blue) < 60 * 40


def test_many_thumbnails_are_counted_not_drawn() -> None:
    small = Image.new("RGB", (20, 20), (200, 10, 10))
    image = thumbnails([(small, "x")] * 50, "\n".join(["error: y"] * 99), tile=40, limit=30)
    assert count(image, (200, 10, 10)) == 30 * 40 * 40 and image.width < 300


def test_nothing_to_show_is_still_an_image() -> None:
    assert min(thumbnails([]).size) > 0 and min(contact_sheet("", []).size) > 0
