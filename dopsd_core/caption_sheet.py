"""A sheet of images with their captions, to look through what was written and what was there."""

from __future__ import annotations

from PIL import Image

from .data.caption_folder import CaptionList
from .image_grid import thumbnails

TILE, TEXT_LINES = 232, 7
MAX_TILES = 60


def caption_sheet(found: CaptionList) -> Image.Image:
    """The images with state and caption below each, new captions first, and everything to look at below them."""
    order = {"failed": 0, "written": 1, "missing": 2, "kept": 3}
    tiles = [found.tiles()[i] for i in sorted(range(len(found.items)), key=lambda i: order[found.items[i].state])]
    return thumbnails(tiles, "\n".join(found.remarks()), tile=TILE, limit=MAX_TILES, text_lines=TEXT_LINES)
