"""The host inside ComfyUI: a MODEL as the core's Denoiser.

The user's weights are used as the loader node loaded them: inference tensors, fp8, offloaded, patched. Nothing is
copied, converted or read again. What training adds to the network are instance attributes, which are always removed
again.

Legend: B batch, C latent channels, h w latent size, L tokens, D features; `sigma` as in the core, 1 = noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from server import PromptServer
from torch import Tensor, nn

from ...dopsd_core.conditioning.encode import Condition
from ...dopsd_core.denoiser import LinearSite
from ...dopsd_core.text import printable
from .bypass import kept_injected
from .families import block_lists, family_of, in_comfyui, with_time, without_time
from .gradients import norms_on_clones, plain_attention, thawed_small_parameters, without_allocation_graphs
from .linears import linear_sites, require_adjoints
from .running_graph import running_id
from .sent_values import unread_inputs

STEPS_OPTION = "dopsd_steps"
"""Key in a MODEL's options: the steps it was distilled for, if not the family's."""


def default_steps(model: Any) -> int:
    """The number of sampling steps that the MODEL was distilled for."""
    return model.model_options.get(STEPS_OPTION) or family_of(model).sample_steps


def send_text(cls: Any, text: str) -> None:
    """Shows text on the node that runs, and below it what was sent to the node that it has no input for.

    cls: the node class, with the hidden input dynprompt.
    """
    id, lines = running_id(cls), text.split("\n") if text else []
    lines += [note for note in unread_inputs(cls) if note not in lines]
    if id is not None and lines:
        PromptServer.instance.send_progress_text(printable("\n".join(lines)), id)


class ComfyDenoiser:
    """A MODEL as the core's Denoiser. Sample inside `loaded()`, train inside `trainable()`."""

    def __init__(self, model: Any) -> None:
        self.family = family_of(model)
        self._patcher = model.clone()
        self._called: set[str] = set()  # Linears that the forward in progress has called, while that is being checked
        self._is_checked = False

    @property
    def device(self) -> torch.device:
        """Where ComfyUI runs the network."""
        return self._patcher.load_device

    @property
    def weight_bytes(self) -> int:
        """Size of the weights as they were loaded."""
        return int(self._patcher.model_size())

    @property
    def is_dynamic(self) -> bool:
        """Whether ComfyUI's dynamic VRAM decides which weights are on the device at each use."""
        return self._patcher.is_dynamic()

    def patched_in_8_bits(self) -> int:
        """The number of weights of 8 bits or fewer that LoRAs or other patches on the MODEL change."""
        weights = (comfy.utils.get_attr(self._patcher.model, key) for key in self._patcher.patches)
        return sum(isinstance(w, QuantizedTensor) or (w.is_floating_point() and w.itemsize < 2) for w in weights)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations. A node may set it on the MODEL; that takes effect when the MODEL is loaded."""
        return self._patcher.get_model_object("manual_cast_dtype") or self._patcher.model.get_dtype()

    @property
    def _network(self) -> nn.Module:
        return self._patcher.model.diffusion_model

    def sites(self) -> Sequence[LinearSite]:
        """Every Linear (plain, cast or quantised), with its LoRA parts under diffusers' names."""
        return [self._recorded(site) for site in linear_sites(self._network, self.family)]

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks of the network, in the order of the forward."""
        return [block for blocks in block_lists(self._network, self.family).values() for block in blocks]

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        """x [B, C, h, w] fp32 in model space -> x0_hat, same shape. Raises InterruptProcessingException when cancelled.

        Conditions of one length go through the network together. Z-Image has no text mask, so padding to a common
        length would change the result.

        Raises:
            ValueError: in the first forward with gradients, if the network computes with a layer of a block without
                calling it, so that a LoRA on it would have no effect.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._called.clear()
        x0 = self._predict(x, sigma, conditions)
        if self._called and not self._is_checked and torch.is_grad_enabled():
            self._require_all_called()
        return x0

    def _predict(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        groups = _equal_shapes(conditions)
        if len(groups) == 1:
            return self._forward(x, sigma, conditions)
        out: list[Tensor | None] = [None] * len(conditions)
        for rows in groups:
            x0 = self._forward(x[rows], sigma, [conditions[row] for row in rows])
            for row, value in zip(rows, x0.unbind(0), strict=True):
                out[row] = value
        return torch.stack([value for value in out if value is not None])

    def _forward(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        model = self._patcher.model
        features = torch.stack([condition.features for condition in conditions]).to(x.device)
        references = [
            self.to_vae_space(torch.stack(latents).to(x.device))
            for latents in zip(*(condition.reference_latents for condition in conditions), strict=True)
        ]
        extra: dict[str, Any] = {"reference_latents": references} if references else {}
        if slots := conditions[0].slots:
            extra["image_slots"] = list(slots)
        latents = with_time(x, self.family)
        conds = model.extra_conds(cross_attn=features, noise=latents, device=x.device, **extra)
        inputs = {name: cond.process_cond(batch_size=len(x), area=None).cond for name, cond in conds.items()}
        sigmas = torch.full((len(x),), sigma, device=x.device)
        options = {
            **self._patcher.model_options.get("transformer_options", {}),
            "sigmas": sigmas[:1],
            "cond_or_uncond": [0],
            "optimized_attention_override": plain_attention,
        }
        x0 = model.apply_model(latents, sigmas, transformer_options=options, **inputs).float()
        return without_time(x0, self.family)

    def _recorded(self, site: LinearSite) -> LinearSite:
        """The site, whose forward is noted until the first check."""

        def forward(x: Tensor) -> Tensor:
            if not self._is_checked:
                self._called.add(site.name)
            return site.forward(x)

        return replace(site, forward=forward)

    def _require_all_called(self) -> None:
        """Newer networks fuse layers with what is before them and read their weights: nothing else would notice."""
        inside = {module for block in self.blocks() for module in block.modules()}
        missed = [site.name for site in self.sites() if site.module in inside and site.name not in self._called]
        if missed:
            raise ValueError(
                f"this ComfyUI computes with {len(missed)} layers of the MODEL, such as {missed[0]}, without calling "
                "them, so a LoRA on them would not be trained: update ComfyUI-DOPSD, or remove nodes that replace the "
                "MODEL's layers"
            )
        self._is_checked = True

    def to_vae_space(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] in model space -> latents for ComfyUI's VAE, [B, C, 1, h, w] with a time axis."""
        return self._patcher.model.process_latent_out(with_time(latents, self.family))

    # -- in memory, and ready for gradients ---------------------------------------------------------------------------

    def load(self, shape: Sequence[int], reserve: int = 0) -> None:
        """Loads the weights to the device, with room for samples of `shape` [B, C, h, w].

        If that, or `reserve` bytes if more, does not stay free, part of the weights stays in RAM. Call it again after
        another model was loaded. It runs in inference mode, since weights created in that mode can only be moved in it.
        """
        with torch.inference_mode():
            needed = max(self._patcher.memory_required(list(shape)), reserve)
            comfy.model_management.load_models_gpu([self._patcher], memory_required=needed)

    @contextmanager
    def loaded(self, shape: Sequence[int], reserve: int = 0) -> Iterator[ComfyDenoiser]:
        """The weights are on the device inside the `with`; arguments as in `load`."""
        self.load(shape, reserve)
        try:
            with torch.inference_mode():
                self._patcher.pre_run()
            self._switch_off()
            yield self
        finally:
            with torch.inference_mode():  # hooks restore weights, which may be inference tensors
                self._patcher.cleanup()

    def _switch_off(self) -> None:
        """What `pre_run` switches on for a sampling, and `cleanup` off again."""
        for flag in in_comfyui(self.family).switched_off:
            if hasattr(self._network, flag):
                setattr(self._network, flag, False)

    @contextmanager
    def trainable(self, shape: Sequence[int], reserve: int = 0) -> Iterator[ComfyDenoiser]:
        """On the device and ready for gradients inside the `with`; always restored afterwards. Arguments as in `load`.

        ComfyUI's `in_training` makes RoPE avoid kernels that have no backward.

        Raises:
            UnknownLayer: the forward of another pack's layer is not x @ W.T + b of its weight.
        """
        before = comfy.model_management.in_training
        overwritten = in_comfyui(self.family).overwritten
        with (
            self.loaded(shape, reserve),
            kept_injected(self._patcher),
            without_allocation_graphs(),
            thawed_small_parameters(self._network),
            norms_on_clones(self._network, overwritten),
        ):
            require_adjoints(self.sites(), self.device, self.compute_dtype)
            comfy.model_management.in_training = True
            try:
                yield self
            finally:
                comfy.model_management.in_training = before


def _equal_shapes(conditions: Sequence[Condition]) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for row, condition in enumerate(conditions):
        shape = (condition.features.shape, condition.slots, tuple(r.shape for r in condition.reference_latents))
        groups.setdefault(shape, []).append(row)
    return list(groups.values())
