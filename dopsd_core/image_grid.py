"""Labelled grids of images: comparison sheets and dataset thumbnails.

Small images are upsampled without smoothing, so that every pixel is the model's own; large ones are downsampled. Text
is wrapped, and ends in an ellipsis if it is too long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .data.images import ImageError, decode, to_rgb, to_tensor

_PAD, _LABEL, _ARROW = 6, 210, 18
_INK, _PAPER, _FAINT, _MAT = (20, 20, 24), (255, 255, 255), (110, 110, 118), (232, 232, 236)
_COLOURS = {"error": (176, 0, 32), "warning": (150, 90, 0)}
_PROBLEM_LINES = 14
_LONGEST = 2000
"""Maximum number of characters of a text that are processed; longer texts do not fit."""

_FALLBACK_FONTS = (
    "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "wqy-zenhei.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf",
    "arial.ttf",
)  # fmt: skip
"""Common system fonts for characters that Pillow's default font (little more than ASCII) lacks."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

Shown = Path | Image.Image | Sequence[Path | Image.Image]
"""An image, or the images of an edit: its sources, then its target."""


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a sheet.

    Attributes:
        label: text on the left.
        remark: smaller text below the label.
        images: [n, 3, H, W], or a sequence of [3, H, W], in [0, 1].
        captions: texts above the images, or none.
    """

    label: str
    remark: str
    images: Tensor | Sequence[Tensor]
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class _Block:
    """Wrapped lines of a text with font and colour; `width` and `step` are the size of a line in pixels."""

    lines: tuple[str, ...]
    font: Font
    width: int
    step: int
    colour: tuple[int, int, int]

    @property
    def height(self) -> int:
        return len(self.lines) * self.step

    def draw(self, draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        for i, line in enumerate(self.lines):
            room = Image.new("L", (self.width, self.step))  # clips stacked accents
            ImageDraw.Draw(room).text((0, 0), line, fill=255, font=self.font)
            draw.bitmap((x, y + i * self.step), room, fill=self.colour)


def contact_sheet(title: str, rows: Sequence[Row], tile: int = 112) -> Image.Image:
    """Draws all rows below a title, with labels on the left; images are at most tile x tile pixels."""
    images = [[fit_tile(image, tile) for image in to_images(row.images)] for row in rows]
    zoom = min(2.0, max(1.0, tile / 160))
    label_width, head = round(_LABEL * zoom), round(44 * zoom)
    cell = max((image.width for line in images for image in line), default=tile)
    width = label_width + max(map(len, images), default=1) * (cell + _PAD) + _PAD
    words = [[_wrap(text, round(10 * zoom), cell, 2, _FAINT) for text in row.captions] for row in rows]
    above = [max((block.height for block in line), default=-4) + 4 for line in words]
    tall = [max((image.height for image in line), default=tile) for line in images]
    sheet = Image.new("RGB", (width, head + sum(above) + sum(tall) + len(rows) * _PAD + _PAD), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _wrap(title, round(17 * zoom), width - 2 * _PAD, 1, _INK).draw(draw, _PAD + 2, round(12 * zoom))
    top = head
    for row, line, texts, over, height in zip(rows, images, words, above, tall, strict=True):
        _draw_label(draw, row, label_width, top + over, height, zoom)
        for i, image in enumerate(line):
            x = label_width + i * (cell + _PAD)
            _paste(sheet, image, (x, top + over, cell, height))
            if i < len(texts):
                texts[i].draw(draw, x, top)
        top += over + height + _PAD
    return sheet


def _paste(sheet: Image.Image, image: Image.Image, place: tuple[int, int, int, int]) -> None:
    """Centers the image in its place (x, y, width, height) on grey."""
    x, y, width, height = place
    sheet.paste(_MAT, (x, y, x + width, y + height))
    sheet.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))


def _draw_label(draw: ImageDraw.ImageDraw, row: Row, width: int, top: int, height: int, zoom: float) -> None:
    """Draws label and remark, vertically centered in the row."""
    room = width - 3 * _PAD
    remark = _wrap(row.remark, round(12 * zoom), room, max(0, round((height / zoom - 26) / 15)), _FAINT)
    size = round(15 * zoom)
    lines = max(1, int((height - remark.height) / (size * 1.3)))
    label = _wrap(row.label, size, room, lines, _INK)
    y = top + max(0, (height - label.height - remark.height) // 2)
    label.draw(draw, _PAD + 2, y)
    remark.draw(draw, _PAD + 2, y + label.height + 2)


def thumbnails(
    items: Sequence[tuple[Shown, str]], problems: str = "", tile: int = 160, limit: int = 24, text_lines: int = 3
) -> Image.Image:
    """Draws images with captions of at most `text_lines` lines, then the list of problems, with errors in red.

    An unreadable image gives an empty tile. Items beyond `limit` are only counted.
    """
    shown = [((what,) if isinstance(what, Path | Image.Image) else tuple(what), text) for what, text in items[:limit]]
    across = min(3, max((len(images) for images, _ in shown), default=1))
    columns = max(3, min(6, round((across * len(shown)) ** 0.5 + 0.49)))
    columns, cell = -(-columns // across), across * tile + (across - 1) * _ARROW
    width = columns * (cell + _PAD) + _PAD
    size = min(13, max(11, tile // 12))
    cells = [(_strip(images, tile, cell), _wrap(text, size, cell, text_lines, _INK)) for images, text in shown]
    lines = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    tall = [max(image.height for image, _ in line) for line in lines]
    heights = [high + max(text.height for _, text in line) + 2 * _PAD for high, line in zip(tall, lines, strict=True)]
    notes = _notes(problems, len(items) - len(shown), width - 2 * _PAD)
    total = sum(heights) + sum(block.height for block in notes) + 2 * _PAD
    sheet = Image.new("RGB", (width, max(total, 2 * _PAD + 16)), _PAPER)
    draw, top = ImageDraw.Draw(sheet), _PAD
    for line, high, height in zip(lines, tall, heights, strict=True):
        for i, (image, text) in enumerate(line):
            x = _PAD + i * (cell + _PAD)
            _paste(sheet, image, (x, top, cell, high))
            text.draw(draw, x, top + high + 2)
        top += height
    for block in notes:
        block.draw(draw, _PAD, top)
        top += block.height
    return sheet


def _notes(problems: str, hidden: int, width: int) -> list[_Block]:
    """The lines below the thumbnails, at most `_PROBLEM_LINES` problems."""
    found = [line for line in problems.splitlines() if line.strip()]
    texts = [f"and {hidden} more"] * (hidden > 0) + found[:_PROBLEM_LINES]
    if len(found) > _PROBLEM_LINES:
        texts.append(f"and {len(found) - _PROBLEM_LINES} more lines")
    return [_wrap(text, 13, width, 3, _COLOURS.get(text.split(":")[0], _FAINT)) for text in texts]


def to_images(images: Tensor | Sequence[Tensor]) -> list[Image.Image]:
    """Images, each [3, H, W] in [0, 1] -> PIL images; NaN becomes black."""
    bytes_of = [(image.detach().float().nan_to_num().clamp(0, 1) * 255).round().byte() for image in images]
    return [Image.fromarray(rearrange(image, "c h w -> h w c").cpu().numpy()) for image in bytes_of]


def to_pixels(image: Image.Image) -> Tensor:
    """An image as ComfyUI's IMAGE: [1, H, W, 3] fp32 in [0, 1]."""
    return rearrange(to_tensor(image.convert("RGB")), "c h w -> 1 h w c")


def fit_tile(image: Image.Image, tile: int) -> Image.Image:
    """Resizes the image so that its longer side has `tile` pixels; upsamples without smoothing."""
    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def _strip(images: Sequence[Path | Image.Image], tile: int, width: int) -> Image.Image:
    """The images of an edit side by side with an arrow before the last; or a single image."""
    if len(images) == 1:
        return _thumbnail(images[0], tile)
    gaps = len(images) - 1
    room = min(tile, (width - gaps * _ARROW) // len(images))
    parts = [_thumbnail(image, room) for image in images]
    height = max(part.height for part in parts)
    strip = Image.new("RGB", (sum(part.width for part in parts) + gaps * _ARROW, height), _MAT)
    x = 0
    for part in parts:
        strip.paste(part, (x, (height - part.height) // 2))
        x += part.width + _ARROW
    tip, middle = strip.width - parts[-1].width - 5, height // 2
    ImageDraw.Draw(strip).polygon([(tip - 8, middle - 7), (tip - 8, middle + 7), (tip, middle)], fill=_FAINT)
    return strip


def _thumbnail(image: Path | Image.Image, tile: int) -> Image.Image:
    if isinstance(image, Image.Image):
        return fit_tile(to_rgb(image), tile)
    try:
        return fit_tile(decode(image, draft=2 * tile).image, tile)
    except ImageError:  # already reported by the dataset reader
        empty = Image.new("RGB", (tile, tile), _MAT)
        _wrap("cannot be read", 12, tile, 1, _FAINT).draw(ImageDraw.Draw(empty), _PAD, tile // 2 - 8)
        return empty


# -- text --------------------------------------------------------------------------------------------------------------


def _wrap(text: str, size: int, width: int, max_lines: int, colour: tuple[int, int, int]) -> _Block:
    """Wraps the text into lines of at most `width` pixels, at spaces if possible."""
    text = "\n".join(" ".join(_printable(line).split()) for line in text[:_LONGEST].split("\n")).strip()
    font = _font_for(text, size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        text = text.encode("latin-1", "replace").decode("latin-1")  # Pillow's bitmap font has no more
    lines = [line for paragraph in text.split("\n") for line in _break(paragraph, font, width)]
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        if lines:
            last = lines[-1]
            while last and font.getlength(last + "...") > width:
                last = last[:-1]
            lines[-1] = last.rstrip(" ,.;") + "..."
    return _Block(tuple(lines), font, width, round(size * 1.3), colour)


def _break(text: str, font: Font, width: int) -> Iterator[str]:
    while text:
        end = _fitting(text, font, width)
        if end < len(text):
            space = text.rfind(" ", 0, end + 1)
            end = space if space > 0 else end
        yield text[:end].rstrip()
        text = text[end:].lstrip()


def _fitting(text: str, font: Font, width: int) -> int:
    """Number of characters that fit, at least one."""
    low, high = 1, min(len(text), width)  # no character is narrower than a pixel
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _printable(text: str) -> str:
    """Replaces control characters and lone surrogates, which fonts cannot draw."""
    return "".join(character if character.isprintable() else " " for character in text)


def _font_for(text: str, size: int) -> Font:
    """The first font with all characters of the text, or else the one that lacks the fewest."""
    characters = set(re.sub(r"\s", "", text))
    best, fewest = _default_font(size), len(characters) + 1
    for font in _fonts(size):
        missing = sum(not _has(font, character) for character in characters)
        if missing < fewest:
            best, fewest = font, missing
        if not missing:
            break
    return best


def _fonts(size: int) -> Iterator[Font]:
    yield _default_font(size)
    for name in _FALLBACK_FONTS:
        font = _system_font(name, size)
        if font is not None:
            yield font


@lru_cache(maxsize=32)
def _default_font(size: int) -> Font:
    try:
        return ImageFont.load_default(size)
    except ImportError:  # a Pillow without FreeType
        return ImageFont.load_default()


@lru_cache(maxsize=256)
def _system_font(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except (OSError, ImportError):
        return None


@lru_cache(maxsize=4096)
def _has(font: Font, character: str) -> bool:
    if not isinstance(font, ImageFont.FreeTypeFont):
        return ord(character) < 256
    return _drawn(font, character) != _drawn(font, "\uffff")  # a missing character is drawn as the placeholder box


def _drawn(font: Font, character: str) -> bytes:
    glyph = Image.new("L", (48, 64))
    ImageDraw.Draw(glyph).text((8, 8), character, fill=255, font=font)
    return glyph.tobytes()
