"""Filters the chunks of a PNG file: those that affect its pixels are kept for Pillow, the others are dropped.

Pillow rejects files whose text or colour profile inflates to more than 1 MB, such as the workflow that ComfyUI writes
or the history of an editor. Its limits are global settings that other code may rely on, so the text is removed before
Pillow reads the file, and the profile is read here.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_PROFILE = 16 << 20
"""Maximum size of a colour profile in bytes; those of printers have a few MB."""

_MAX_TEXT = 1 << 20
_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"))
_COLOURS = frozenset((b"sRGB", b"gAMA", b"cHRM", b"eXIf"))
_TEXT = frozenset((b"tEXt", b"zTXt", b"iTXt"))
_XMP, _RAW_EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif"
_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)[0-9]')


@dataclass(frozen=True)
class Png:
    """The parts of a PNG file.

    Attributes:
        data: the file without the chunks that affect neither its pixels nor its orientation.
        profile: the colour profile; None if there is none, empty if it is damaged or larger than MAX_PROFILE.
        coding: the four numbers of cICP: primaries, transfer, matrix, full range; None if there is none.
    """

    data: bytes
    profile: bytes | None
    coding: tuple[int, int, int, int] | None


def take_apart(file: bytes) -> Png:
    """The parts of a file that begins with SIGNATURE. Truncated or broken chunks are kept, for Pillow to report."""
    kept: list[bytes | memoryview] = [SIGNATURE]
    profile, coding = None, None
    for name, body, whole in _chunks(file):
        if name == b"iCCP" and profile is None:
            profile = _profile(body)
        elif name == b"cICP" and len(body) == 4:
            coding = (body[0], body[1], body[2], body[3])
        elif name in _TEXT:
            kept.append(_orientation(name, body))
        elif not name or name in _PIXELS or name in _COLOURS:
            kept.append(whole)
    return Png(b"".join(kept), profile, coding)


def _chunks(file: bytes) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """(name, body, whole chunk) of each chunk; the rest after a broken one has an empty name."""
    view, place = memoryview(file), len(SIGNATURE)
    while place < len(view):
        head = bytes(view[place : place + 8])
        length = struct.unpack(">I", head[:4])[0] if len(head) == 8 else len(view)
        end = place + length + 12
        if end > len(view) or not head[4:].isalpha():
            yield b"", view[place:], view[place:]
            return
        yield head[4:], view[place + 8 : end - 4], view[place:end]
        place = end


def _profile(body: memoryview) -> bytes:
    """The inflated profile of iCCP (name, NUL, method 0, deflated data); empty if it is invalid."""
    head, _, rest = bytes(body[:81]).partition(b"\0")
    return _inflate(body[len(head) + 2 :], MAX_PROFILE) if rest[:1] == b"\0" else b""


def _inflate(data: bytes | memoryview, limit: int) -> bytes:
    """Inflated data; empty if it is damaged or longer than `limit` bytes. Never inflates more than that."""
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(data, limit)
        more = b"" if inflater.eof else inflater.decompress(inflater.unconsumed_tail, 1)
    except zlib.error:
        return b""
    return found if inflater.eof and not more else b""


def _orientation(name: bytes, body: memoryview) -> bytes:
    """A chunk for Pillow with the orientation that a text chunk contains; empty if it contains none."""
    key, _, rest = bytes(body[:80]).partition(b"\0")
    start = len(key) + 1
    if key == _RAW_EXIF and name != b"iTXt":
        text = bytes(body[start:]) if name == b"tEXt" else _inflate(body[start + 1 :], _MAX_TEXT)
        return _chunk(b"tEXt", key + b"\0" + text) if 0 < len(text) <= _MAX_TEXT else b""
    if key == _XMP and name == b"iTXt" and len(rest) >= 2:
        parts = bytes(body[start + 2 :]).split(b"\0", 2)  # language, translated key, text
        text = parts[-1] if not rest[0] else _inflate(parts[-1], MAX_PROFILE)
        found = _ORIENTATION.search(text)
        return _chunk(b"iTXt", key + bytes(5) + found.group()) if found else b""
    return b""


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
