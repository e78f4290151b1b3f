"""The encoders that the authors keep on the GPU and run in every step, by shape, without their VAE."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import fill

LAYERS, WORDS = 36, 151_936
HIDDEN = {2560: 9728, 4096: 12288}
"""Width of Qwen3-4B and Qwen3-8B -> that of its MLP."""


class EncoderBlock(nn.Module):
    """A block of a language model or of a vision tower: attention with shared keys, gated MLP."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int, head: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head, self.causal = heads, kv_heads, head, causal
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * head, bias=False)
        self.out = nn.Linear(heads * head, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> the same shape."""
        h = F.rms_norm(x, x.shape[-1:])
        parts = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self.qkv(h).unflatten(-1, (-1, self.head)).transpose(1, 2).split(parts, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, value = self.up(F.rms_norm(x, x.shape[-1:])).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class AuthorsEncoders(nn.Module):
    """Qwen3 of that width; with a vision tower (Qwen3-VL-4B's) another one that reads what it sees."""

    def __init__(self, width: int, sees: bool, device: torch.device, dtype: torch.dtype, layers: int = LAYERS) -> None:
        super().__init__()
        self.width, words = width, WORDS if layers == LAYERS else 1000
        with torch.device(device):
            self.embed = nn.ModuleList(nn.Embedding(words, width) for _ in range(1 + sees)).to(dtype)
            language = [
                [EncoderBlock(width, 32, 8, HIDDEN[width], 128, True).to(dtype) for _ in range(layers)]
                for _ in range(1 + sees)
            ]
            depth = max(1, 24 * layers // LAYERS) if sees else 0
            tower = [EncoderBlock(1024, 16, 16, 2731, 64, False).to(dtype) for _ in range(depth)]
        self.language = nn.ModuleList(nn.Sequential(*blocks) for blocks in language)
        self.tower = nn.Sequential(*tower)
        fill(self, device).requires_grad_(False)

    @torch.no_grad()
    def forward(self, student: int, teacher: int, vision: int, context: int) -> tuple[Tensor, Tensor]:
        """Features [L, context] of so many tokens each, `vision` of the teacher's from the image. A tower has 4
        patches to a token; features wider than the model are those of several of its layers."""
        first = next(self.embed.parameters())
        seen = first.new_empty(0, self.width)
        if vision:
            patches = torch.randn(1, 4 * vision, 1024, device=first.device, dtype=first.dtype)
            seen = self.tower(patches)[0, ::4].repeat(1, 3)[:, : self.width]
        texts = self._read(0, student, seen[:0]), self._read(-1, teacher - vision, seen)
        one, other = (hidden.repeat(1, context // self.width).float() for hidden in texts)
        return one, other

    def _read(self, model: int, length: int, seen: Tensor) -> Tensor:
        words = next(self.embed[model].parameters())
        ids = torch.arange(length, device=words.device) % len(words)
        return self.language[model](torch.cat([seen, self.embed[model](ids)])[None])[0]
