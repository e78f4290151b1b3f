"""Whatever a LoRA file holds, reading it gives a LoRA or a ValueError (FileNotFoundError where there is none)."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from dopsd_core.adapters.lora_file import load_lora, load_peft
from dopsd_core.adapters.lora_import import import_lora, read_lora
from dopsd_core.families import Z_IMAGE
from tests.toy_denoiser import WIDTH, ToyDenoiser

SITES = ToyDenoiser().sites()
TARGETS = Z_IMAGE.lora_targets[:6]

FUZZ = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])

PREFIXES = st.sampled_from(
    ["", "transformer.", "diffusion_model.", "base_model.model.", "lora_unet_", "lycoris_", "💥"]
)
MODULES = st.sampled_from(
    [
        "layers.0.attention.to_q",
        "layers_0_attention_to_q",
        "layers.1_feed_forward.w1",
        "layers.0.attention.qkv",
        "x",
        "",
    ]
)
KINDS = st.sampled_from(
    ["lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up", "lora_A.student", "lora_B.student", "lora_A.x"]
).map(lambda kind: f".{kind}.weight")
OTHERS = st.sampled_from(
    [".alpha", ".diff", ".diff_b", ".lora_B.bias", ".reshape_weight", ".dora_scale", ".weight", ""]
)
KEYS = st.one_of(
    st.builds(lambda p, m, k: p + m + k, PREFIXES, MODULES, st.one_of(KINDS, OTHERS)), st.text(max_size=20)
)
DTYPES = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]
    + [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex64]
)
SHAPES = st.one_of(
    st.sampled_from(
        [(2, WIDTH), (WIDTH, 2), (24, 2), (0, WIDTH), (WIDTH, 0), (), (1,), (2,), (2, WIDTH, 1, 1), (1500, 1)]
    ),
    st.lists(st.integers(0, 5), max_size=5).map(tuple),
)
VALUES = st.sampled_from([0.0, 1.0, -2.5, 1e-30, 3e38, math.inf, math.nan])


@st.composite
def tensors(draw: Any) -> Tensor:
    return torch.full(draw(SHAPES), draw(VALUES), dtype=torch.float32).to(draw(DTYPES))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
PATTERNS = st.one_of(
    st.sampled_from(["to_q", "layers.0.*", "(", "[", "(l+)+x", "a{99999999999}", ".*" * 9, "x" * 600, "\\"]), st.text()
)
CONFIG = st.fixed_dictionaries(
    {},
    optional={
        "r": JSON,
        "lora_alpha": st.one_of(st.integers(1, 64), JSON, st.just(10**400)),
        "alpha_pattern": st.one_of(st.dictionaries(PATTERNS, st.one_of(st.integers(1, 64), JSON), max_size=3), JSON),
        "use_rslora": JSON,
        "use_dora": st.just(False),
        "transformer.lora_alpha": JSON,
    },
)


def read_every_way(path: Path) -> None:
    """Every reader, and what reads on from it; anything but the documented errors fails the test."""
    for read in (load_lora, lambda p: import_lora(read_lora(p), SITES, TARGETS)):
        try:
            read(path)
        except (ValueError, FileNotFoundError) as error:
            assert str(error)


@FUZZ
@given(file=st.dictionaries(KEYS, tensors(), max_size=6), metadata=st.one_of(st.none(), CONFIG, JSON))
def test_any_tensors_under_any_names(tmp_path: Path, file: dict[str, Tensor], metadata: Any) -> None:
    path = tmp_path / "x.safetensors"
    header = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    path.write_bytes(save(file, header))
    read_every_way(path)


@FUZZ
@given(file=st.dictionaries(KEYS, tensors(), max_size=4), config=st.one_of(CONFIG, JSON))
def test_any_peft_folder(tmp_path: Path, file: dict[str, Tensor], config: Any) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(save(file))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read_every_way(tmp_path / "adapter_model.safetensors")
    for read in (load_peft, read_lora):
        try:
            read(tmp_path)
        except ValueError as error:
            assert str(error)


@FUZZ
@given(st.data())
def test_any_damage(tmp_path: Path, data: st.DataObject) -> None:
    """A good file with bytes changed, cut off, or put in."""
    name = "transformer.layers.0.attention.to_q"
    good = {f"{name}.lora_A.weight": torch.ones(2, WIDTH), f"{name}.lora_B.weight": torch.ones(WIDTH, 2)}
    content = bytearray(save(good | {f"{name}.alpha": torch.tensor(2.0)}))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "cut":
            del content[place : place + data.draw(st.integers(1, 2000))]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=40))
        elif content:
            content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    read_every_way(path)


def header(content: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if size is None else size) + content


def one(dtype: str, shape: list, end: int) -> bytes:
    described = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    return header(json.dumps({"transformer.q.lora_A.weight": described}).encode()) + bytes(end)


BOMBS = {
    "empty": b"",
    "a length alone": struct.pack("<Q", 3),
    "2^63 bytes of header": header(b"{}", 2**63),
    "99 MB of header announced": header(b"{}", 99_000_000),
    "deep nesting": header(b"[" * 200_000),
    "deep objects": header(b'{"a":' * 50_000),
    "no object": header(b"[1]"),
    "NUL": header(b"\0" * 64),
    "not UTF-8": header(b'{"\xff\xfe": 1}'),
    "2^60 elements": one("F32", [2**60], 8),
    "overflowing shape": one("F32", [2**62, 2**62], 8),
    "negative shape": one("F32", [-1, 4], 16),
    "zero elements of 2^60": one("F32", [0, 2**60], 0),
    "an unknown dtype": one("F7", [2], 8),
    "F8_E8M0": one("F8_E8M0", [2, 4], 8),
    "F4": one("F4", [2, 4], 4),
    "F6_E2M3": one("F6_E2M3", [4], 3),
    "C64": one("C64", [1, 1], 8),
    "U64": one("U64", [1, 1], 8),
    "metadata of a number": header(b'{"__metadata__": {"a": 1}}'),
    "metadata of a list": header(b'{"__metadata__": []}'),
    "a pickle": b"\x80\x02}q\x00.",
    "a zip": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS.keys())
def test_headers_that_lie(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (load_lora, lambda p: import_lora(read_lora(p), SITES, TARGETS)):
        with pytest.raises(ValueError, match="."):
            read(path)


@pytest.mark.parametrize("config", [b"[" * 200_000, b"\xff\xfe{", b"[]", b"", b"1e999", b"9" * 5000, b"nul"])
def test_configurations_that_are_none(tmp_path: Path, config: bytes) -> None:
    name = "base_model.model.layers.0.attention.to_q"
    file = {f"{name}.lora_A.weight": torch.ones(2, WIDTH), f"{name}.lora_B.weight": torch.ones(WIDTH, 2)}
    (tmp_path / "adapter_model.safetensors").write_bytes(save(file))
    (tmp_path / "adapter_config.json").write_bytes(config)
    for read in (load_peft, read_lora):
        with pytest.raises(ValueError, match=r"adapter_config\.json.* is not (a )?JSON"):
            read(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no such file: .*safetensors"):
            read_lora(path)
