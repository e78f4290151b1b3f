"""The network of the stand-in for ComfyUI's Qwen-Image 2.1: names, inputs and in-place operations as ComfyUI has them,
and what diffusers' network computes. Import only after the `comfyui` fixture has booted ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn
from torch.nn import functional

TEXT_WIDTH, HEAD, HEADS = 64, 32, 2
AXES = (8, 12, 12)
"""Of RoPE: place, row, column."""


class _TextNorm(nn.Module):
    """Stores its scale minus one."""

    def __init__(self, width: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight + 1, 1e-6)


class _Text(nn.Module):
    def __init__(self, inside: int, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.text_norm = _TextNorm(inside, factory)
        self.in_layer = operations.Linear(inside, width, bias=False, **factory)
        self.out_layer = operations.Linear(width, width, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(functional.gelu(self.in_layer(self.text_norm(x)), approximate="tanh"))


class _Mlp(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.gate_up = operations.Linear(width, 6 * width, bias=False, **factory)
        self.out = operations.Linear(3 * width, width, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Outside of training, as with ComfyUI's fused kernel for 8 bits, the last layer is read and not called."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        activated = functional.silu(gate).mul_(up)
        if comfy.model_management.in_training:
            return self.out(activated)
        return functional.linear(activated, self.out.weight)


class _Attention(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (operations.Linear(width, width, bias=False, **factory) for _ in range(3))
        self.to_out = nn.ModuleList([operations.Linear(width, width, bias=False, **factory)])
        self.norm_q, self.norm_k = (operations.RMSNorm(HEAD, eps=1e-6, **factory) for _ in range(2))

    def forward(self, x: Tensor, layout: _Layout, cache: dict[str, Tensor] | None, options: Any) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, HEAD)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = layout.turned(self.norm_q(q)), layout.turned(self.norm_k(k))
        if cache is not None:  # keys and values of the prefix are those of the first step
            own = {"k": k[:, : layout.prefix], "v": v[:, : layout.prefix]}
            own = {name: cache.setdefault(name, value.detach()) for name, value in own.items()}
            k, v = (torch.cat([own[name], new[:, layout.prefix :]], 1) for name, new in (("k", k), ("v", v)))
        seen = [
            optimized_attention(
                q[:, start:end].flatten(2), k[:, :end].flatten(2), v[:, :end].flatten(2), HEADS, mask=mask,
                transformer_options=options, preferred_attention=None,
            )
            for start, end, mask in layout.segments
        ]  # fmt: skip
        return self.to_out[0](torch.cat(seen, dim=1))


class _Block(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.img_norm1, self.img_norm2 = (
            operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **factory) for _ in range(2)
        )
        self.attn = _Attention(width, operations, factory)
        self.img_mlp = _Mlp(width, operations, factory)

    def forward(self, x: Tensor, rows: Sequence[Tensor], layout: _Layout, cache: Any, options: Any) -> Tensor:
        """rows: scale and gate of attention and MLP, each [B + 1, D], the last one for text and references."""
        scale1, gate1, scale2, gate2 = rows
        attended = self.attn(layout.scaled(self.img_norm1(x), scale1), layout, cache, options)
        layout.add(x, attended, gate1)
        layout.add(x, self.img_mlp(layout.scaled(self.img_norm2(x), scale2)), gate2)
        return x


class _Layout:
    """Where text, references and image are in the sequence; `prefix` tokens are before the image."""

    def __init__(self, text: int, images: Sequence[tuple[int, int]], slots: Sequence[int]) -> None:
        bounds = [0, *slots, *[text] * (len(images) - 1 - len(slots)), text]
        positions, self.segments, self.prefix, place = [], [], 0, 0
        for begin, end, (height, width) in zip(bounds[:-1], bounds[1:], images, strict=True):
            if (count := end - begin) > 0:
                positions.append(torch.arange(place, place + count).unsqueeze(1).expand(count, 3))
                start = sum(len(p) for p in positions) - count
                causal = torch.ones(count, start + count, dtype=torch.bool).tril(start)
                self.segments.append((start, start + count, causal))
                place += count
            start = sum(len(p) for p in positions)
            rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
            positions.append(torch.cartesian_prod(torch.tensor([place]), rows, columns))
            self.segments.append((start, start + height * width, None))
            place, self.prefix = place + max(height, width), start
        self.bounds = bounds
        angles = [
            position[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
            for position, dim in zip(torch.cat(positions).float().unbind(1), AXES, strict=True)
        ]
        self.turn = torch.polar(torch.tensor(1.0), torch.cat(angles, dim=1)[:, None])

    def turned(self, x: Tensor) -> Tensor:
        """RoPE on x [B, L, heads, head]."""
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * self.turn).flatten(3)

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """x [B, L, D] * (1 + scale), the prefix by the last row of scale [B + 1, D]."""
        before, image = x[:, : self.prefix], x[:, self.prefix :]
        return torch.cat([before * (1 + scale[-1:, None]), image * (1 + scale[:-1, None])], dim=1)

    def add(self, x: Tensor, y: Tensor, gate: Tensor) -> None:
        """x += gate * y in place, on slices, as ComfyUI does."""
        x[:, self.prefix :].addcmul_(y[:, self.prefix :], gate[:-1, None])
        x[:, : self.prefix].addcmul_(y[:, : self.prefix], gate[-1:, None])


class _Last(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.linear = operations.Linear(width, width, bias=False, **factory)
        self.norm = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **factory)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.norm(x) * (1 + self.linear(functional.silu(time)).unsqueeze(1))


class _TimeLayers(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(256, width, bias=False, **factory)
        self.linear_2 = operations.Linear(width, width, bias=False, **factory)


class _Time(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.timestep_embedder = _TimeLayers(width, operations, factory)

    def forward(self, t: Tensor) -> Tensor:
        angles = 1000 * t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.timestep_embedder.linear_2(functional.silu(self.timestep_embedder.linear_1(waves)))


class Network(nn.Module):
    """With names, inputs and in-place operations of ComfyUI's QwenImage21Transformer2DModel."""

    def __init__(
        self, num_layers: int = 2, context_in_dim: int = TEXT_WIDTH, image_model: Any = None, dtype: Any = None,
        device: Any = None, operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dtype = dtype
        width, factory = HEADS * HEAD, {"dtype": dtype, "device": device}
        self.time_text_embed = _Time(width, operations, factory)
        self.txt_in = _Text(context_in_dim, width, operations, factory)
        self.img_in = operations.Linear(64, width, bias=False, **factory)
        self.modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, 4 * width, bias=False, **factory))
        self.transformer_blocks = nn.ModuleList([_Block(width, operations, factory) for _ in range(num_layers)])
        self.norm_out = _Last(width, operations, factory)
        self.proj_out = operations.Linear(width, 64, bias=False, **factory)
        self.prefix_cache: list[dict[str, Tensor]] | None = None
        self.prefix_cache_enabled = False

    def reset_prefix_cache(self, enabled: bool) -> None:
        self.prefix_cache, self.prefix_cache_enabled = None, enabled

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, ref_latents: Any = None, image_slots: Any = None,
        transformer_options: Any = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        images = [*(ref_latents or ()), x]
        text = self.txt_in(context)
        layout = _Layout(text.shape[1], [image.shape[-2:] for image in images], image_slots or ())
        pieces = []
        for begin, end, image in zip(layout.bounds[:-1], layout.bounds[1:], images, strict=True):
            pieces += [text[:, begin:end], self.img_in(image.flatten(2).transpose(1, 2))]
        hidden = torch.cat(pieces, dim=1)
        time = self.time_text_embed(torch.cat([timestep, timestep.new_zeros(1)]))
        scale1, gate1, scale2, gate2 = self.modulation(time).chunk(4, dim=-1)
        rows = (scale1, gate1.tanh(), scale2, gate2.tanh())
        if self.prefix_cache_enabled and self.prefix_cache is None:
            self.prefix_cache = [{} for _ in self.transformer_blocks]
        caches = self.prefix_cache or [None] * len(self.transformer_blocks)
        for block, cache in zip(self.transformer_blocks, caches, strict=True):
            hidden = block(hidden, rows, layout, cache, transformer_options)
        out = self.proj_out(self.norm_out(hidden[:, layout.prefix :], time[:-1]))
        return out.transpose(1, 2).reshape(x.shape)
