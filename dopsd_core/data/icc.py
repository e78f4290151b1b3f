"""Writes ICC colour profiles from numbers, for images that specify their colours without embedding a profile.

The profiles are minimal: three primaries, a white point and one transfer curve for all channels.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

Chromaticity = tuple[float, float]
"""(x, y) of CIE 1931."""

D65: Chromaticity = (0.3127, 0.3290)

_D50_XYZ = (0.9642, 1.0, 0.8249)
_BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))


@dataclass(frozen=True)
class Primaries:
    """The chromaticities of the primaries and the white point.

    Attributes:
        red: (x, y) of red.
        green: (x, y) of green.
        blue: (x, y) of blue.
        white: (x, y) of white.
    """

    red: Chromaticity
    green: Chromaticity
    blue: Chromaticity
    white: Chromaticity = D65


SRGB = Primaries((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
ADOBE_RGB = Primaries((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
DISPLAY_P3 = Primaries((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
BT_2020 = Primaries((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))

SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
"""The parameters g a b c d of ICC's parametric curve: linear = (a v + b)^g from d on, c v below."""

BT_709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
ADOBE_GAMMA = 563 / 256


def make_profile(primaries: Primaries, curve: float | tuple[float, ...]) -> bytes:
    """The bytes of an RGB profile. curve: a gamma, or five parameters as in `SRGB_CURVE`.

    Raises:
        ValueError: the primaries do not form a triangle, or a chromaticity is invalid.
    """
    columns = _to_d50(primaries).T.tolist()
    trc = b"para\0\0\0\0" + struct.pack(">HH", 3 if isinstance(curve, tuple) else 0, 0)
    trc += b"".join(_fixed(value) for value in (curve if isinstance(curve, tuple) else (curve,)))
    tags = {b"wtpt": _xyz(_D50_XYZ)}
    for letter, column in zip((b"r", b"g", b"b"), columns, strict=True):
        tags |= {letter + b"XYZ": _xyz(column), letter + b"TRC": trc}
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    return _header(offset + len(body)) + table + body


def _to_d50(primaries: Primaries) -> Tensor:
    """[3, 3] fp64: linear RGB -> XYZ, adapted to D50 after Bradford; the columns are the primaries."""
    corners = torch.tensor([_to_xyz(c) for c in (primaries.red, primaries.green, primaries.blue)]).double().T
    white = torch.tensor(_to_xyz(primaries.white)).double()
    try:
        scale = torch.linalg.solve(corners, white)
    except RuntimeError as error:
        raise ValueError("the primaries lie on a line") from error
    bradford = torch.tensor(_BRADFORD).double()
    gain = (bradford @ torch.tensor(_D50_XYZ).double()) / (bradford @ white)
    adapted = torch.linalg.inv(bradford) @ torch.diag(gain) @ bradford @ corners @ torch.diag(scale)
    if not torch.isfinite(adapted).all() or adapted.abs().max() > 100:
        raise ValueError("the primaries lie on a line")
    return adapted


def _to_xyz(chromaticity: Chromaticity) -> tuple[float, float, float]:
    x, y = chromaticity
    if not 0 < y <= 1 or not 0 <= x <= 1:
        raise ValueError(f"({x}, {y}) is not a chromaticity")
    return x / y, 1.0, (1 - x - y) / y


def _header(size: int) -> bytes:
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x04300000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    return (head + b"".join(_fixed(value) for value in _D50_XYZ)).ljust(128, b"\0")


def _xyz(values: tuple[float, ...] | list[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_fixed(value) for value in values)


def _fixed(value: float) -> bytes:
    """ICC's s15Fixed16Number."""
    return struct.pack(">i", round(value * 65536))
