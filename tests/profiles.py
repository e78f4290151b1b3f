"""Colour profiles and EXIF written byte by byte, and the colours that they mean by arithmetic of their own."""

import struct
from collections.abc import Sequence

import torch

P3_D50 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
"""XYZ of Display P3's red, green and blue, adapted to D50."""

ADOBE_D50 = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB_D50 = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def in_srgb(colour: Sequence[int], primaries: Sequence[Sequence[float]], gamma: float) -> tuple[int, ...]:
    """What a viewer shows for a colour of a space with these primaries (XYZ at D50) and this gamma."""
    linear = (torch.tensor(colour).double() / 255) ** gamma
    to_xyz, from_xyz = torch.tensor(primaries).double().T, torch.linalg.inv(torch.tensor(SRGB_D50).double().T)
    shown = (from_xyz @ to_xyz @ linear).clamp(0, 1)
    coded = torch.where(shown <= 0.0031308, 12.92 * shown, 1.055 * shown ** (1 / 2.4) - 0.055)
    return tuple(coded.mul(255).round().int().tolist())


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data.ljust(-(-len(data) // 4) * 4, b"\0")
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"", 0x02400000, kind, space, pcs) + bytes(12)
    head += b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(primaries: Sequence[Sequence[float]] = P3_D50, gamma: float = 2.2) -> bytes:
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
    for letter, values in zip("rgb", primaries, strict=True):
        tags[f"{letter}XYZ".encode()] = b"XYZ \0\0\0\0" + fixed(*values)
        tags[f"{letter}TRC".encode()] = curve(gamma)
    return profile(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249), b"kTRC": curve(gamma)})


def cmyk_profile() -> bytes:
    """Inks that are all grey: L* is 100 without any, 0 under full black, and a third less for each full other ink."""
    clut = bytearray()
    for corner in range(16):
        cyan, magenta, yellow, black = (corner >> place & 1 for place in (3, 2, 1, 0))
        lightness = (1 - black) * (1 - (cyan + magenta + yellow) / 3)
        clut += bytes((round(255 * lightness), 128, 128))
    table = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + table * 4 + bytes(clut) + table * 3
    return profile(b"CMYK", {b"A2B0": lut}, b"prtr", b"Lab ")


def exif(orientation: int = 1, space: int | None = None, index: str = "") -> bytes:
    """EXIF with an orientation, a colour space and an index of interoperability."""

    def directory(entries: Sequence[tuple[int, int, int, bytes]]) -> bytes:
        body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
        return struct.pack("<H", len(entries)) + body + bytes(4)

    inner_at = 8 + 2 + 2 * 12 + 4
    inner = [] if space is None else [(0xA001, 3, 1, struct.pack("<H", space))]
    index_at = inner_at + 2 + (len(inner) + 1) * 12 + 4
    outer = [(0x0112, 3, 1, struct.pack("<H", orientation)), (0x8769, 4, 1, struct.pack("<I", inner_at))]
    inner.append((0xA005, 4, 1, struct.pack("<I", index_at)))
    last = [(1, 2, 4, index.encode())] if index else []
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory(outer) + directory(inner) + directory(last)
