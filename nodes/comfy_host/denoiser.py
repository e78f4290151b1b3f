"""The host inside ComfyUI: a MODEL as the core's Denoiser.

The user's weights serve as the loader node put them there: inference tensors, fp8, offloaded, patched. Nothing is
copied, converted or re-read. What is put over the network for training lies in instance attributes and is taken off
again whatever happens.

Legend: B batch, C latent channels, h w latent size, L tokens, D features; `sigma` as in the core, 1 = noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from server import PromptServer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...dopsd_core.conditioning.encode import Condition
from ...dopsd_core.denoiser import LinearSite
from ...dopsd_core.families import Family
from ...dopsd_core.overrides import overridden
from .families import family_of, in_comfyui

_FEW_TOKENS = 256

STEPS_OPTION = "dopsd_steps"
"""Key of a MODEL's options: the steps it was distilled for, where they are not the family's."""


def default_steps(model: Any) -> int:
    """Sampling steps that the MODEL was distilled for."""
    return model.model_options.get(STEPS_OPTION) or family_of(model).sample_steps


def send_text(cls: Any, text: str) -> None:
    """Shows text on the node; `cls` is a node class with the hidden input unique_id."""
    if cls.hidden is not None and cls.hidden.unique_id is not None:
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)


def fingerprint(patcher: Any) -> str:
    """16 hex digits: other for other weights or patches, cheap for any size.

    Of every parameter name, shape and form, of the one-dimensional ones (norms, biases) also the values: they differ
    between any two checkpoints, are small, and stay readable where matrices are quantised. Not of the quantised ones'
    scales: those are others while a LoRA is patched in.
    """
    digest = hashlib.sha256()
    for name, parameter in patcher.model.named_parameters():
        form = str(parameter.dtype)
        if isinstance(parameter, QuantizedTensor):  # calls itself what it computes in
            form += f" {parameter._layout_cls} {getattr(parameter._params, 'convrot', '')}"
        digest.update(f"{name}|{tuple(parameter.shape)}|{form}\n".encode())
        if parameter.ndim == 1 and parameter.is_floating_point() and not parameter.is_meta:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    for key, patches in sorted(patcher.patches.items(), key=lambda item: str(item[0])):
        digest.update(f"{key}|{[(patch[0], patch[2]) for patch in patches]}\n".encode())
    return digest.hexdigest()[:16]


def base_name(model: Any) -> str:
    """The file that a loader node took the MODEL from, or "" where the loader does not tell."""
    made_by = getattr(model, "cached_patcher_init", None)
    first = made_by[1][0] if made_by and made_by[1] else ""
    return str(first).replace("\\", "/").rpartition("/")[2] if isinstance(first, str) else ""


class ComfyDenoiser:
    """A MODEL as the core's Denoiser. Sample inside `loaded()`, train inside `trainable()`."""

    def __init__(self, model: Any) -> None:
        self.family = family_of(model)
        self._patcher = model.clone()

    @property
    def device(self) -> torch.device:
        """Where ComfyUI runs the network."""
        return self._patcher.load_device

    @property
    def weight_bytes(self) -> int:
        """Size of the weights in the form in which they were loaded."""
        return int(self._patcher.model_size())

    @property
    def compute_dtype(self) -> torch.dtype:
        """What activations are in."""
        return self._patcher.model.get_dtype_inference()

    @property
    def _network(self) -> nn.Module:
        return self._patcher.model.diffusion_model

    def sites(self) -> Sequence[LinearSite]:
        """Every Linear, plain, cast or quantised, its LoRA parts under diffusers' names."""
        modules = self._network.named_modules()
        return [_site(name, module, self.family) for name, module in modules if _is_linear(module)]

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks of the network, in its order."""
        network: Any = self._network
        return [block for name in in_comfyui(self.family).blocks for block in getattr(network, name)]

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        """x [B, C, h, w] fp32 in model space -> x0_hat, same shape. Stops here when the user has cancelled.

        Conditions of one length go through the network together. Z-Image has no text mask, so padding to a common
        length would change the result.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
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
            model.process_latent_out(torch.stack(latents).to(x.device))
            for latents in zip(*(condition.reference_latents for condition in conditions), strict=True)
        ]
        extra = {"reference_latents": references} if references else {}
        conds = model.extra_conds(cross_attn=features, noise=x, device=x.device, **extra)
        inputs = {name: cond.process_cond(batch_size=len(x), area=None).cond for name, cond in conds.items()}
        sigmas = torch.full((len(x),), sigma, device=x.device)
        options = {
            **self._patcher.model_options.get("transformer_options", {}),
            "sigmas": sigmas[:1],
            "cond_or_uncond": [0],
            "optimized_attention_override": _plain_attention,
        }
        return model.apply_model(x, sigmas, transformer_options=options, **inputs).float()

    def to_vae_space(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] of the model's space -> what ComfyUI's VAE decodes."""
        return self._patcher.model.process_latent_out(latents)

    # -- in memory, and ready for gradients ---------------------------------------------------------------------------

    def load(self, shape: Sequence[int], reserve: int = 0) -> None:
        """Has ComfyUI bring the weights to the device, with room for samples of `shape` [B, C, h, w].

        Where that, or `reserve` bytes if it is more, does not stay free, part of the weights stays in RAM.
        Called again after anything else was loaded. In inference mode, as ComfyUI itself does it: weights that were
        made in it can only be moved in it.
        """
        with torch.inference_mode():
            needed = max(self._patcher.memory_required(list(shape)), reserve)
            comfy.model_management.load_models_gpu([self._patcher], memory_required=needed)

    @contextmanager
    def loaded(self, shape: Sequence[int], reserve: int = 0) -> Iterator[ComfyDenoiser]:
        """On the device inside the `with`."""
        self.load(shape, reserve)
        self._patcher.pre_run()
        try:
            yield self
        finally:
            self._patcher.cleanup()

    @contextmanager
    def trainable(self, shape: Sequence[int], reserve: int = 0) -> Iterator[ComfyDenoiser]:
        """On the device and open to gradients inside the `with`; as it was after it, whatever happens.

        `in_training` takes RoPE off the kernels that have no backward.
        """
        before = comfy.model_management.in_training
        overwritten = in_comfyui(self.family).overwritten
        with (
            self.loaded(shape, reserve),
            _thawed_small_parameters(self._network),
            _norms_on_clones(self._network, overwritten),
        ):
            comfy.model_management.in_training = True
            try:
                yield self
            finally:
                comfy.model_management.in_training = before


def _is_linear(module: nn.Module) -> bool:
    # ComfyUI's quantised Linear is no nn.Linear
    return isinstance(module, nn.Linear) or (hasattr(module, "weight_function") and hasattr(module, "in_features"))


def _site(name: str, module: Any, family: Family) -> LinearSite:
    plain: Callable[[Tensor], Tensor] = module.forward
    clamps = isinstance(module, comfy.ops.fp8_ops.Linear)  # its input, and in place

    def forward(x: Tensor) -> Tensor:
        return plain(x.clone() if clamps else x)

    def grad_input(grad: Tensor) -> Tensor:
        """g [..., out] -> g @ W [..., in], the weight had the way ComfyUI has it in a forward."""
        flat = grad.reshape(-1, grad.shape[-1])
        weight, bias, stream = comfy.ops.cast_bias_weight(module, input=flat, offloadable=True)
        dense = weight.dequantize().to(flat.dtype) if isinstance(weight, QuantizedTensor) else weight
        product = flat @ dense
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)
        return product.reshape(*grad.shape[:-1], -1)

    rows, columns = module.out_features, module.in_features
    return LinearSite(name, module, columns, rows, family.native_parts(name, rows), forward, grad_input)


def _equal_shapes(conditions: Sequence[Condition]) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for row, condition in enumerate(conditions):
        shape = (condition.features.shape, tuple(latent.shape for latent in condition.reference_latents))
        groups.setdefault(shape, []).append(row)
    return list(groups.values())


def _plain_attention(_: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """torch's own attention: others (sage, split) have no backward or a slow one."""
    with ExitStack() as stack:
        # on a CPU, for tens of tokens, the written-out form has by far the faster backward
        if args[0].device.type == "cpu" and args[0].shape[-2] <= _FEW_TOKENS:
            stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def _thawed_small_parameters(network: nn.Module) -> AbstractContextManager[None]:
    """Inside the `with`, norms and embeddings compute with clones of their parameters where gradients flow.

    Loader nodes run in inference mode, and autograd cannot save the tensors made there. Linears need none of this:
    `FrozenLinear` saves nothing. The clone lives for one forward, so weights may be moved or streamed in between.
    """
    modules = [m for m in network.modules() if not _is_linear(m)]
    return overridden([m for m in modules if next(m.parameters(recurse=False), None) is not None], _thawing)


def _thawing(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def thawed(*args: Any, **kwargs: Any) -> Any:
        own = module._parameters
        frozen = {name: value for name, value in own.items() if value is not None and value.is_inference()}
        if not torch.is_grad_enabled() or not frozen:
            return forward(*args, **kwargs)
        for name, value in frozen.items():
            own[name] = nn.Parameter(value.clone(), requires_grad=False)
        try:
            return forward(*args, **kwargs)
        finally:
            own.update(frozen)

    return thawed


def _norms_on_clones(network: nn.Module, names: Collection[str]) -> AbstractContextManager[None]:
    """Inside the `with`, norms of these names, whose input is overwritten later, keep a clone of it for the backward.

    FLUX's blocks write into tensors (`img += ...`) that their norms have saved.
    """
    modules = (m for path, m in network.named_modules() if path.rpartition(".")[2] in names)
    return overridden(modules, _on_clone)


def _on_clone(_: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: forward(x.clone() if torch.is_grad_enabled() else x)
