"""Copies on the host: of the same values, without shared memory, and pinned where they come from a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dopsd_core import transfer
from dopsd_core.transfer import copies_on_host

from .devices import DEVICE


def tensors() -> dict[str, torch.Tensor]:
    moments = torch.arange(6, dtype=torch.float32, device=DEVICE).reshape(2, 3)
    return {
        "moments": moments,
        "transposed": moments.T,
        "step": torch.tensor(3.0),
        "parameter": torch.nn.Parameter(moments),
    }


@pytest.mark.parametrize("refuses", [False, True], ids=["", "no pinned memory"])
def test_they_are_equal_and_independent(monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    if refuses:
        monkeypatch.setattr(transfer, "_pinned_like", lambda tensor: None)
    given = tensors()
    wanted = {name: tensor.tolist() for name, tensor in given.items()}
    copies = copies_on_host(given)
    with torch.no_grad():
        for tensor in given.values():
            tensor.zero_()
    assert {name: copy.tolist() for name, copy in copies.items()} == wanted
    assert all(copy.device.type == "cpu" and not copy.requires_grad for copy in copies.values())
    pinned = {name for name, copy in copies.items() if copy.is_pinned()}
    assert pinned == ({"moments", "transposed", "parameter"} if DEVICE.type == "cuda" and not refuses else set())


def test_pinned_memory_is_asked_for_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that only says that it is CUDA."""
    asked: list[int] = []
    monkeypatch.setattr(
        transfer, "_pinned_like", lambda tensor: asked.append(tensor.nbytes) or torch.empty(tensor.shape)
    )
    monkeypatch.setattr(transfer, "_MOST_PINNED", 100)
    waits: list[Any] = []
    stream = type("Stream", (), {"synchronize": lambda self: waits.append(1)})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream())
    copies = copies_on_host({f"t{number}": OnCuda(torch.full((10,), float(number))) for number in range(4)})  # type: ignore[dict-item]
    assert asked == [40, 40] and len(waits) == 1
    assert [copy.tolist() for copy in copies.values()] == [[float(number)] * 10 for number in range(4)]


class OnCuda:
    """A tensor of the CPU under the name of another device."""

    device = torch.device("cuda")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def detach(self) -> torch.Tensor:
        return self._tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)
