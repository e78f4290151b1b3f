"""Tensors are distinguished by their values: small ones by each of them, large ones by each row and column."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dopsd_core.identity.tensor_digest as tensor_digest
from dopsd_core.identity.tensor_digest import COVERED_BYTES, WHOLE_BYTES, Content, NoContentError, digest_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool]
DTYPES += [torch.float64, torch.complex64]


def digest(*tensors: Tensor, glance: bool = False, dtype: torch.dtype | None = None) -> list[bytes]:
    return list(digest_tensors([Content(tensor, dtype) for tensor in tensors], glance))


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values > 0 if dtype == torch.bool else values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_of_a_small_tensor_counts(dtype: torch.dtype) -> None:
    tensor = noise(5, 3, dtype=dtype)
    seen = {*digest(tensor)}
    for index in range(tensor.numel()):
        other = tensor.clone().reshape(-1)
        other[index] = torch.tensor(float(not bool(other[index] != 0))).to(dtype)
        seen |= {*digest(other.reshape(5, 3))}
    assert len(seen) == tensor.numel() + 1 and digest(tensor) == digest(tensor.clone())


def test_shape_and_dtype_count() -> None:
    tensor = torch.zeros(4, 6)
    others = [tensor.reshape(6, 4), tensor.reshape(24), tensor.bfloat16(), tensor.int(), torch.zeros(4, 7)]
    others += [torch.zeros(0), torch.zeros(0, 3), torch.zeros(())]
    assert len({*digest(tensor, *others)}) == 1 + len(others)


def test_a_view_is_read_as_it_is_seen() -> None:
    tensor = noise(700, 900)
    assert digest(tensor[:, :512].T) == digest(tensor[:, :512].T.contiguous())
    assert digest(tensor[3:]) == digest(tensor[3:].clone())
    assert digest(tensor[3:]) != digest(tensor[:-3])


SHAPES = [(1000, 700), (300, 2100), (1001, 703), (64, 8192), (640, 80, 3, 3), (12, 256, 256), (600_000,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_changed_row_or_column_of_a_large_tensor_is_seen(shape: tuple[int, ...]) -> None:
    tensor = noise(*shape)
    assert tensor.numel() * 4 > WHOLE_BYTES
    before = digest(tensor)
    matrix = tensor.view(shape[0], -1) if len(shape) > 1 else tensor.view(-1, 2400)  # holds a whole row of 1024
    rows, columns = matrix.shape
    chosen = [(row, slice(None)) for row in {0, 1, rows // 2, rows - 2, rows - 1}]
    if len(shape) == 2:
        blocks = [slice(start, start + 4) for start in (0, 4, columns // 8 * 4, (columns - 1) // 4 * 4)]
        chosen += [(slice(None), block) for block in blocks]
    for place in chosen:
        kept = matrix[place].clone()
        matrix[place] += 1
        assert digest(tensor) != before, place
        matrix[place] = kept
    assert digest(tensor) == before


def test_a_glance_sees_another_tensor_and_not_a_changed_row() -> None:
    tensor = noise(1000, 700)
    other = tensor.clone()
    other[3] += 1
    assert digest(tensor, glance=True) == digest(other, glance=True)
    assert digest(tensor, glance=True) != digest(tensor + 1, glance=True)
    assert digest(tensor[:5], glance=True) == digest(tensor[:5]), "what is small is read whole"


def test_of_more_than_is_covered_whole_stretches_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is merged into a whole matrix is still seen."""
    tensor = noise(2000, 700)
    before = digest(tensor)
    monkeypatch.setattr(tensor_digest, "COVERED_BYTES", tensor.numel() * 4 // 3 + 1)
    monkeypatch.setattr(tensor_digest, "STRETCH_BYTES", 2**16)
    assert digest(tensor) != before
    few = digest(tensor)
    seen = 0
    for row in range(0, 2000, 40):
        other = tensor.clone()
        other[row] += 1
        seen += digest(other) != few
    assert 10 <= seen <= 25  # of 50: a third
    up, down = noise(2000, 1), noise(700, 1)
    assert digest(tensor + 1e-3 * up @ down.T) != few
    assert digest(tensor.bfloat16() + 1e-3 * (up @ down.T).bfloat16()) != digest(tensor.bfloat16())
    last = tensor.clone()
    last[-1] += 1
    assert digest(last) != few, "the last row"


def test_values_may_count_in_the_dtype_that_they_are_computed_in() -> None:
    for shape in ((7, 5), (1000, 700)):
        wide = noise(*shape)
        assert digest(wide, dtype=torch.bfloat16) == digest(wide.bfloat16(), dtype=torch.bfloat16)
        assert digest(wide, dtype=torch.bfloat16) == digest(wide.bfloat16())
        assert digest(wide, dtype=torch.bfloat16) != digest(wide)
        whole = (wide * 100).int()
        assert digest(whole, dtype=torch.bfloat16) == digest(whole), "numbers that index or are quantised are kept"


def test_the_order_and_number_of_tensors_do_not_change_a_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [noise(50, 60), noise(3), noise(1000, 700), noise(2, 2)]
    together = digest(*tensors)
    monkeypatch.setattr(tensor_digest, "_BATCH_BYTES", 1)
    assert digest(*tensors) == together == [digest(tensor)[0] for tensor in tensors]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, device="meta"),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
)
def test_what_cannot_be_read_is_said(make: Callable[[], Tensor]) -> None:
    with pytest.raises(NoContentError, match="cannot be read"):
        digest(make())


def test_inference_tensors_and_parameters_are_read() -> None:
    with torch.inference_mode():
        made = noise(1000, 700)
    assert digest(made) == digest(torch.nn.Parameter(noise(1000, 700)))
    with torch.inference_mode():
        assert digest(made) == digest(noise(1000, 700))


def test_twelve_gigabytes_are_sampled_in_their_every_second_stretch() -> None:
    """Figures that the documentation states; the cost is measured in benchmarks/identity_cost.py."""
    assert COVERED_BYTES == 2**33
