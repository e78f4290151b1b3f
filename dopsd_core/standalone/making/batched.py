"""Batched forwards with the parameters of the real networks, used only for pre-training.

diffusers' Z-Image takes ragged lists, and transformers' Qwen3-VL rebuilds its masks and positions in every call; for
the demo's fixed geometry, these forwards do the same arithmetic with fixed shapes, about twice as fast on a CPU. They
are tested for parity with the real forwards in tests/test_making.py. Shapes: B samples, L = 32 caption tokens, D = 128
text width, latents [B, 16, 8, 8].
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from einops import rearrange
from torch import Tensor, nn
from transformers import Qwen3VLModel

CAPTION_TOKENS = 32
IMAGE_START, IMAGE_TOKENS = 4, 9  # after <|im_start|> user \n <|vision_start|>; 96x96 pixels, patch 16, merge 2
_EVEN = 6


def autocast() -> torch.autocast:
    """bf16 for the products, on CPUs that have instructions for it; without them it is ten times slower than fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability().startswith("AVX512"))


Rope = tuple[Tensor, Tensor]


def _rms(x: Tensor, norm: Any) -> Tensor:
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 1e-6)
    return F.rms_norm(x.float(), (x.shape[-1],), norm.weight, eps)


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _pair_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotates adjacent pairs. Real parts come first in the output, which does not change q.k."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * rope[0] - b * rope[1], a * rope[1] + b * rope[0]], -1)


def _half_rope(x: Tensor, rope: Rope) -> Tensor:
    half = x.shape[-1] // 2
    return x * rope[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * rope[1]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, heads, N, d] -> [B, N, heads*d]. Unfused, which at these sizes has a faster backward on a CPU."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).float()
    if bias is not None:
        scores = scores + bias
    return rearrange(torch.matmul(scores.softmax(-1), v), "b heads n d -> b n (heads d)")


class BatchedTransformer:
    """Velocity of the Z-Image transformer for 8x8 latents and captions of at most 32 tokens."""

    def __init__(self, network: ZImageTransformer2DModel) -> None:
        model: Any = network
        self.model = model
        image = torch.tensor([[CAPTION_TOKENS + 1, h, w] for h in range(4) for w in range(4)] + [[0, 0, 0]])
        caption = torch.tensor([[i + 1, 0, 0] for i in range(CAPTION_TOKENS)])
        complex_image, complex_caption = model.rope_embedder(image), model.rope_embedder(caption)
        both = torch.cat([complex_image, complex_caption])
        self.rope_image, self.rope_caption, self.rope_both = (
            (f.real.contiguous(), f.imag.contiguous()) for f in (complex_image, complex_caption, both)
        )
        # the network pads 16 image tokens with 16 equal pad tokens: one token with 16 times the attention weight
        self.bias_image = torch.zeros(17)
        self.bias_image[16] = math.log(16.0)
        self.bias_both = torch.cat([self.bias_image, torch.zeros(CAPTION_TOKENS)])

    def _block(self, block: Any, x: Tensor, rope: Rope, bias: Tensor | None, time: Tensor | None) -> Tensor:
        attention, mlp = block.attention, block.feed_forward
        scale_a, gate_a, scale_m, gate_m = 1.0, 1.0, 1.0, 1.0
        if time is not None:
            scale_a, gate_a, scale_m, gate_m = block.adaLN_modulation(time).float().unsqueeze(1).chunk(4, 2)
            scale_a, scale_m, gate_a, gate_m = 1 + scale_a, 1 + scale_m, gate_a.tanh(), gate_m.tanh()
        h = _rms(x, block.attention_norm1) * scale_a
        weight = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
        heads = self.model.config.n_heads
        q, k, v = rearrange(F.linear(h, weight), "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=heads)
        q = _pair_rope(_rms(q, attention.norm_q), rope)
        k = _pair_rope(_rms(k, attention.norm_k), rope)
        out = attention.to_out[0](_attend(q, k, v, bias))
        x = x + gate_a * _rms(out, block.attention_norm2)
        h = _rms(x, block.ffn_norm1) * scale_m
        gate, value = F.linear(h, torch.cat([mlp.w1.weight, mlp.w3.weight])).chunk(2, -1)
        return x + gate_m * _rms(mlp.w2(F.silu(gate) * value), block.ffn_norm2)

    def __call__(self, x: Tensor, sigma: Tensor, features: Tensor, lengths: Tensor) -> Tensor:
        """x [B, 16, 8, 8], sigma [B], features [B, 32, D], lengths [B] -> velocity [B, 16, 8, 8]."""
        return self.with_tokens(x, sigma, features, lengths, after=1)[0]

    def with_tokens(
        self, x: Tensor, sigma: Tensor, features: Tensor, lengths: Tensor, after: int
    ) -> tuple[Tensor, Tensor]:
        """(velocity [B, 16, 8, 8], image tokens [B, 16, width] after `after` main blocks).

        x: [B, 16, 8, 8]. sigma: [B]. features: [B, 32, D]. lengths: [B].
        """
        model, batch = self.model, len(x)
        time = model.t_embedder((1 - sigma) * 1000.0).float()
        patches = rearrange(x, "b c (y p) (x q) -> b (y x) (p q c)", p=2, q=2)
        image = model.all_x_embedder["2-1"](patches).float()
        image = torch.cat([image, model.x_pad_token.expand(batch, 1, -1)], 1)
        for block in model.noise_refiner:
            image = self._block(block, image, self.rope_image, self.bias_image, time)
        caption = model.cap_embedder[1](_rms(features, model.cap_embedder[0])).float()
        real = torch.arange(CAPTION_TOKENS)[None] < lengths[:, None]
        caption = torch.where(real[..., None], caption, model.cap_pad_token)
        for block in model.context_refiner:
            caption = self._block(block, caption, self.rope_caption, None, None)
        both = torch.cat([image, caption], 1)
        seen = both
        for i, block in enumerate(model.layers):
            both = self._block(block, both, self.rope_both, self.bias_both, time)
            if i + 1 == after:
                seen = both[:, :16]
        final = model.all_final_layer["2-1"]
        h = F.layer_norm(both[:, :16].float(), (both.shape[-1],), eps=1e-6)
        out = final.linear(h * (1 + final.adaLN_modulation(time).unsqueeze(1))).float()
        velocity = -rearrange(out, "b (y x) (p q c) -> b c (y p) (x q)", y=4, p=2, q=2)
        return velocity, seen


def teacher_pixels(image: Tensor) -> Tensor:
    """The input of the vision tower: [B, 3, 64, 64] in [0, 1] -> [B, 3, 96, 96] in [-1, 1] (bicubic, antialiased)."""
    big = F.interpolate(image, size=(96, 96), mode="bicubic", antialias=True, align_corners=False)
    return big * 2 - 1


class BatchedEncoder:
    """hidden_states[-2] of the small Qwen3-VL, for text [B, N] only or with one image per row."""

    def __init__(self, network: Qwen3VLModel) -> None:
        model: Any = network
        self.model = model
        text, vision = model.language_model, model.visual
        plain = torch.arange(CAPTION_TOKENS).expand(3, -1)
        mixed = plain.clone()
        cell = torch.arange(IMAGE_TOKENS)
        image = slice(IMAGE_START, IMAGE_START + IMAGE_TOKENS)
        mixed[:, image] = IMAGE_START + torch.stack([torch.zeros_like(cell), cell // 3, cell % 3])
        mixed[:, image.stop :] = torch.arange(CAPTION_TOKENS - image.stop) + IMAGE_START + 3
        self.rope_text, self.rope_mixed = (
            tuple(part[0] for part in text.rotary_emb(torch.zeros(1), p[:, None])) for p in (plain, mixed)
        )
        self.causal = torch.full((CAPTION_TOKENS, CAPTION_TOKENS), -1e9).triu(1)
        rows = [[2 * a + i, 2 * b + j] for a in range(3) for b in range(3) for i in range(2) for j in range(2)]
        position = torch.tensor(rows)  # patches in merge order
        self.order = position[:, 0] * _EVEN + position[:, 1]
        angle = (position[..., None].float() * vision.rotary_pos_emb.inv_freq).flatten(1)
        angle = torch.cat([angle, angle], -1)
        self.rope_vision = (angle.cos(), angle.sin())

    def vision(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, 3, 96, 96] in [-1, 1] -> image tokens [B, 9, D] and the DeepStack additions, each [B, 9, D]."""
        tower = self.model.visual
        weight = tower.patch_embed.proj.weight.sum(2)  # a still image consists of two equal frames
        patches = rearrange(pixels, "b c (y p) (x q) -> b (y x) (c p q)", p=16, q=16)
        h = F.linear(patches[:, self.order], weight.flatten(1), tower.patch_embed.proj.bias).float()
        h, deep = h + tower.pos_embed.weight[self.order], []
        for i, block in enumerate(tower.blocks):
            qkv = block.attn.qkv(_layer_norm(h, block.norm1))
            q, k, v = rearrange(qkv, "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=block.attn.num_heads)
            h = h + block.attn.proj(_attend(_half_rope(q, self.rope_vision), _half_rope(k, self.rope_vision), v))
            mlp = block.mlp
            h = h + mlp.linear_fc2(F.gelu(mlp.linear_fc1(_layer_norm(h, block.norm2)), approximate="tanh"))
            if i in tower.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(i)]
                deep.append(self._merge(merger, _layer_norm(self._group(h), merger.norm)))
        return self._merge(tower.merger, self._group(_layer_norm(h, tower.merger.norm))).float(), deep

    @staticmethod
    def _group(h: Tensor) -> Tensor:
        return rearrange(h, "b (tokens four) d -> b tokens (four d)", tokens=IMAGE_TOKENS)

    @staticmethod
    def _merge(merger: Any, h: Tensor) -> Tensor:
        return merger.linear_fc2(F.gelu(merger.linear_fc1(h)))

    def __call__(self, rows: Tensor, pixels: Tensor | None = None) -> Tensor:
        """rows: embedding rows int64 [B, N <= 32] (arbitrary at the nine image tokens) -> features [B, N, D]."""
        text, n = self.model.language_model, rows.shape[1]
        h, deep, rope = text.embed_tokens(rows), [], self.rope_text
        a, b = IMAGE_START, IMAGE_START + IMAGE_TOKENS
        if pixels is not None:
            image, deep = self.vision(pixels)
            h, rope = torch.cat([h[:, :a], image, h[:, b:]], 1), self.rope_mixed
        rope, causal = (rope[0][:n], rope[1][:n]), self.causal[:n, :n]
        for i, layer in enumerate(text.layers[:-1]):
            attention, mlp, x = layer.self_attn, layer.mlp, _rms(h, layer.input_layernorm)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (
                rearrange(project(x), "b n (heads d) -> b heads n d", d=attention.head_dim) for project in projections
            )
            q = _half_rope(_rms(q, attention.q_norm), rope)
            k = _half_rope(_rms(k, attention.k_norm), rope)
            groups = q.shape[1] // k.shape[1]
            out = _attend(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), causal)
            h = h + attention.o_proj(out)
            x = _rms(h, layer.post_attention_layernorm)
            h = h + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
            if i < len(deep):
                h = torch.cat([h[:, :a], h[:, a:b] + deep[i], h[:, b:]], 1)
        return h.float()


def pad_features(features: Tensor) -> Tensor:
    """[B, N, D] -> [B, 32, D]; the transformer replaces the tokens beyond a row's length."""
    return F.pad(features, (0, 0, 0, CAPTION_TOKENS - features.shape[1]))
