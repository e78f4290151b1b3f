"""Mutations of valid files: bytes, text, JSON, safetensors headers, PNG chunks, names and folders.

Every function is a function of its arguments and of `chance` alone, so that an input is made again from its numbers.
"""

from __future__ import annotations

import json
import math
import random
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Chance = random.Random

NONSENSE = (
    "", " ", "\0", "a\0b", "\ufeff", "\u200b\u200d", "\u202e[V]\u202c", "e\u0301", "\u00e9", "\ud800", "\uffff",
    "\U0001f436" * 9, "[v]", "[ V ]", "\\[V\\]", "[V][V]", "\u4e00" * 40, "\r", "\r\n", "\n\n\n", "\t", "\x1b[31m",
    "%s%n{0}", "<|im_start|>", "../../etc/passwd", "C:\\x", "\\\\host\\share", "file:///etc/passwd", "~", "$HOME",
    "NaN", "-0", "1e309", "9" * 400, "0x10", "\u0661\u0662", "\u00b2", "true", "null", "{", "}", '"', "'", "`",
    "[" * 3000, "a" * 5000, "\ufdfd", "\u0130", "\u1e9e", "\u2028", "\x85", "\U000e0001", "(" * 99, "*", "re:(",
    "re:(a+)+$",
)  # fmt: skip
"""Texts that programs trip over."""

NUMBERS = (
    0, -1, 1, 2, 255, 256, -(2**31), 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**64), 10**30, 10**400, 0.1, -0.0,
    1e-320, 1e308, float("inf"), float("-inf"), float("nan"), 1.5,
)  # fmt: skip
"""Numbers at the edges of the types that hold them."""

ENCODINGS = (
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "utf-8-sig",
    "latin-1",
    "cp1252",
    "utf-7",
    "shift_jis",
    "gbk",
)


# -- bytes and text ----------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, chance: Chance, others: Sequence[bytes] = ()) -> bytes:
    """`data` with one thing wrong: bits, length, order, or a piece of another file in it."""
    start = chance.randrange(len(data) + 1)
    stop = min(len(data), start + chance.choice((1, 2, 4, 8, 64, 1024)))
    other = chance.choice(others) if others else data
    cut = chance.randrange(len(other) + 1)
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: _flip(data, chance),
        lambda: _flip(data, chance),
        lambda: data[:start],
        lambda: data[start:],
        lambda: data[:start] + data[stop:],
        lambda: data[:stop] + data[start:],
        lambda: data[:start] + chance.randbytes(stop - start) + data[stop:],
        lambda: data[:start] + bytes([chance.choice((0, 0x7F, 0x80, 0xFF))]) * (stop - start) + data[stop:],
        lambda: data[:start] + other[cut:],
        lambda: data[:start] + other[cut : cut + 64] + data[start:],
        lambda: data[:start] + chance.choice((b"\0", b"\r", b"\xff\xfe", b"\xef\xbb\xbf", b"\n")) + data[start:],
    )
    return chance.choice(ways)()


def _flip(data: bytes, chance: Chance) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def mutate_text(text: str, chance: Chance) -> str:
    """`text` with nonsense in it, cut, repeated, or written in another form of Unicode."""
    at, nonsense = chance.randrange(len(text) + 1), chance.choice(NONSENSE)
    ways: tuple[Callable[[], str], ...] = (
        lambda: text[:at] + nonsense + text[at:],
        lambda: text[:at] + nonsense + text[at:],
        lambda: nonsense,
        lambda: text[:at],
        lambda: text * chance.choice((2, 50)),
        lambda: unicodedata.normalize(chance.choice(("NFC", "NFD", "NFKC", "NFKD")), text),
        lambda: chance.choice((text.upper, text.lower, text.swapcase, text.title))(),
        lambda: text[:at] + chr(chance.choice((chance.randrange(0x20), chance.randrange(0x110000)))) + text[at:],
        lambda: "".join(reversed(text)),
    )
    return chance.choice(ways)()


def encode_text(text: str, chance: Chance) -> bytes:
    """UTF-8 mostly; otherwise what some editor writes. Lone surrogates come out as their three bytes."""
    if chance.random() < 0.85:
        return text.encode("utf-8", "surrogatepass")
    return text.encode(chance.choice(ENCODINGS), "replace")


# -- JSON --------------------------------------------------------------------------------------------------------------


def random_value(chance: Chance) -> Any:
    """A JSON value that hardly belongs where it is put."""
    return chance.choice(
        (
            None, True, False, [], {}, [[]], [None], {"": None}, chance.choice(NUMBERS), chance.choice(NUMBERS),
            chance.choice(NONSENSE), [chance.choice(NONSENSE)], [chance.choice(NUMBERS)] * 3, ["a", 1, None],
            {"a": chance.choice(NUMBERS)}, chance.choice(NONSENSE),
        )
    )  # fmt: skip


def mutate_json(value: Any, chance: Chance) -> Any:
    """`value` with one thing wrong somewhere in it: a value, a key, a level more or less."""
    places = list(_places(value))
    if not places or chance.random() < 0.03:
        return random_value(chance)
    container, key = chance.choice(places)
    ways: tuple[Callable[[], Any], ...] = (
        lambda: container.__setitem__(key, random_value(chance)),
        lambda: container.__setitem__(key, random_value(chance)),
        lambda: container.__delitem__(key),
        lambda: container.__setitem__(key, [container[key]]),
        lambda: container.__setitem__(key, _near(container[key], chance)),
        lambda: container.__setitem__(key, _near(container[key], chance)),
        lambda: _rename(container, key, chance),
        lambda: container.__setitem__(key, _deep(chance.choice((3, 90)))),
    )
    chance.choice(ways)()
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def _near(value: Any, chance: Chance) -> Any:
    """A value of the same type, wrong perhaps."""
    if isinstance(value, str):
        return mutate_text(value, chance)
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return chance.choice((-value, value + 1, value * 10, str(value), _float(value), *NUMBERS[:3]))
    return json.dumps(value)


def _float(value: float) -> float:
    """The number as a float, infinity for an integer that is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _rename(container: Any, key: Any, chance: Chance) -> None:
    if isinstance(container, dict):
        container[mutate_text(str(key), chance)] = container.pop(key)
    else:
        container.append(container[key])


def _deep(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def write_json(value: Any, chance: Chance) -> bytes:
    """JSON as programs write it: spaces or none, ASCII or not, now and then a key twice or a comma too many."""
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5, indent=chance.choice((None, None, 2)))
    way = chance.random()
    if way < 0.03:
        text = text.replace("{", "{" + '"steps": 1, "steps": 2, ', 1)
    elif way < 0.06:
        text = text.replace("}", ",}", 1)
    elif way < 0.08:
        text = "[" * 100_000 + text
    return encode_text(text, chance)


# -- safetensors -------------------------------------------------------------------------------------------------------


def mutate_safetensors(data: bytes, chance: Chance) -> bytes:
    """A file whose header is wrong somewhere: names, types, shapes, places of the data, its own length."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return mutate_bytes(data, chance)
    body = data[8 + length :]
    if isinstance(header, dict) and chance.random() < 0.7:
        header = _mutate_header(header, chance)
    else:
        header = mutate_json(header, chance)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    length = len(text) if chance.random() < 0.9 else chance.choice((0, 1, len(text) * 2, 2**40, 2**64 - 1))
    return struct.pack("<Q", length) + text + body


def _mutate_header(header: dict[str, Any], chance: Chance) -> dict[str, Any]:
    names = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
    if not names:
        return {**header, "x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    name, other = chance.choice(names), chance.choice(names)
    entry = header[name]
    shape = entry.get("shape", ())
    shape = list(shape) if isinstance(shape, Iterable) else [shape]  # an earlier mutation may have made it anything
    ways: tuple[Callable[[], Any], ...] = (
        lambda: entry.__setitem__("dtype", chance.choice(("F64", "F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "C64"))),
        lambda: entry.__setitem__("shape", shape[::-1]),
        lambda: entry.__setitem__("shape", [*shape, 1]),
        lambda: entry.__setitem__("shape", shape[1:]),
        lambda: entry.__setitem__("shape", [chance.choice(NUMBERS)]),
        lambda: entry.__setitem__("data_offsets", header[other].get("data_offsets")),
        lambda: header.__setitem__(mutate_text(name, chance), header.pop(name)),
        lambda: header.__setitem__(name.replace("lora_A", "lora_B"), header.pop(name)),
        lambda: header.__setitem__(f"{name.rpartition('.lora')[0]}.alpha", entry),
        lambda: header.__setitem__("__metadata__", {"lora_adapter_metadata": json.dumps(random_value(chance))}),
        lambda: header.__setitem__("__metadata__", random_value(chance)),
    )
    chance.choice(ways)()
    return header


# -- PNG ---------------------------------------------------------------------------------------------------------------


def mutate_png(data: bytes, chance: Chance) -> bytes:
    """A PNG with one chunk wrong and its checksum right, so that more than the checksum is tried."""
    chunks = _chunks(data)
    if not chunks:
        return mutate_bytes(data, chance)
    at = chance.randrange(len(chunks))
    kind, content = chunks[at]
    ways: tuple[Callable[[], Any], ...] = (
        lambda: chunks.__setitem__(at, (kind, mutate_bytes(content, chance))),
        lambda: chunks.__setitem__(at, (kind, mutate_bytes(content, chance))),
        lambda: chunks.pop(at),
        lambda: chunks.insert(at, chunks[chance.randrange(len(chunks))]),
        lambda: chunks.insert(1, (b"tEXt", b"workflow\0" + b"x" * chance.choice((10, 2_000_000)))),
        lambda: chunks.insert(1, (b"zTXt", b"bomb\0\0" + zlib.compress(b"\0" * chance.choice((10, 80_000_000))))),
        lambda: chunks.insert(1, (b"iCCP", b"p\0\0" + zlib.compress(chance.randbytes(200)))),
        lambda: chunks.insert(1, (b"eXIf", chance.randbytes(40))),
        lambda: chunks.__setitem__(0, (b"IHDR", _claim(chunks[0][1], chance))),
        lambda: chunks.insert(1, (b"acTL", struct.pack(">II", chance.choice((0, 2, 2**31)), 0))),
    )
    chance.choice(ways)()
    framed = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return data[:8] + b"".join(framed)


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def _claim(header: bytes, chance: Chance) -> bytes:
    """An IHDR of another size, depth or colour type than the pixels have."""
    sides = struct.pack(">II", *(chance.choice((0, 1, 7, 64, 3000, 20_000, 2**31 - 1)) for _ in range(2)))
    return sides + bytes(chance.choice((1, 2, 4, 8, 16, 3)) for _ in range(2)) + header[10:]
