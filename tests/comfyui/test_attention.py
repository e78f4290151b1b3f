"""The attention that training uses: ComfyUI's result, by kernels whose backward is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inprocess import ComfyUI
from torch import Tensor

HEADS, WIDTH = 3, 16


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(reshaped: bool, tokens: int) -> list[Tensor]:
    shape = (2, HEADS, tokens, WIDTH) if reshaped else (2, tokens, HEADS * WIDTH)
    return [seeded(*shape, seed=number) for number in range(3)]


def masks(tokens: int) -> dict[str, Tensor | None]:
    allowed = seeded(tokens, tokens, seed=9) > -1
    allowed[:, 0] = True
    return {
        "none": None,
        "boolean": allowed,
        "per sample": seeded(2, tokens, tokens, seed=8),
        "per head": seeded(2, HEADS, tokens, tokens, seed=7),
    }


@pytest.mark.parametrize("tokens", [7, 300])
@pytest.mark.parametrize("mask", ["none", "boolean", "per sample", "per head"])
@pytest.mark.parametrize("reshaped", [True, False])
def test_it_is_comfyuis(comfyui: ComfyUI, reshaped: bool, mask: str, tokens: int) -> None:
    import comfy.ldm.modules.attention as attention

    ours, chosen = comfyui.module("nodes.comfy_host.gradients").plain_attention, masks(tokens)[mask]
    for output_reshaped in (True, False):
        options: dict[str, Any] = {"skip_reshape": reshaped, "skip_output_reshape": not output_reshaped}
        wanted = attention.attention_pytorch(*inputs(reshaped, tokens), HEADS, chosen, **options)
        got = ours(None, *inputs(reshaped, tokens), HEADS, chosen, **options, transformer_options={})
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_cudnns_kernel_is_not_asked(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI puts it first on Windows; its backward has not been run."""
    import comfy.ops

    seen: list[bool] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(*args, **kwargs)

    def first_on_windows(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("ComfyUI's own order of kernels was used")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(comfy.ops, "scaled_dot_product_attention", first_on_windows)
    comfyui.module("nodes.comfy_host.gradients").plain_attention(None, *inputs(True, 300), HEADS, skip_reshape=True)
    assert seen == [False] and torch.backends.cuda.cudnn_sdp_enabled()
