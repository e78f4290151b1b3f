"""Patches on a MODEL that training and previews do not use.

Training and previews call the network directly (`ComfyDenoiser`). Weights, LoRAs, object patches and
`transformer_options` are used as in ComfyUI. Patches of ComfyUI's sampling loop are not: guidance functions, wrappers
around sampling, context windows. Nor is the noise schedule of a patched sampling, since a few-step model is trained and
sampled on its own. Everything that is not known to be used is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from .denoiser import STEPS_OPTION
from .families import family_of

_USED_OPTIONS = {"transformer_options", STEPS_OPTION}
_COMPANIONS = {"disable_cfg1_optimization", "torch_compile_kwargs"}
"""Options that belong to another option, which is reported."""

_OPTIONS = {
    "sampler_cfg_function": "a guidance function",
    "sampler_pre_cfg_function": "a guidance function",
    "sampler_post_cfg_function": "a guidance function",
    "sampler_calc_cond_batch_function": "a guidance function",
    "model_function_wrapper": "a function around the network",
    "denoise_mask_function": "a denoising mask",
    "context_handler": "context windows",
}
_USED_WRAPPERS = {WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL}
"""Of those in `transformer_options`; ComfyUI's samplers add the MODEL's own wrappers, which are not used here."""


def unused_patches(model: Any) -> tuple[str, ...]:
    """One line for each patch on the MODEL that training and previews do not use."""
    options = model.model_options
    found = [_OPTIONS.get(name, f"the option {name}") for name in _set_options(options)]
    transformer = options.get("transformer_options", {})
    found += [f"the wrapper {key}" for key in _wrappers(model.wrappers)]
    found += [f"the wrapper {key}" for key in _wrappers(transformer.get("wrappers", {}), without=_USED_WRAPPERS)]
    if "optimized_attention_override" in transformer:
        found.append("an attention other than torch's own")
    if model.hook_patches:
        found.append("a LoRA or other weights on hooks")
    note = "the MODEL has {}, which training and previews do not use"
    return (*(note.format(what) for what in dict.fromkeys(found)), *unused_schedule(model, ("shift", "noise_scale")))


def unused_schedule(model: Any, parameters: Sequence[str] = ("shift",)) -> tuple[str, ...]:
    """One line if the MODEL's sampling is patched to another noise schedule than the family's; () otherwise.

    Args:
        parameters: those that are not used; ComfyUI's samplers do use the MODEL's noise scale.
    """
    patched = model.object_patches.get("model_sampling")
    settings = model.model.model_config.sampling_settings
    changes = [
        f"{name} {float(value):g}"
        for name in parameters
        if (value := getattr(patched, name, None)) is not None and abs(float(value) - settings.get(name, 1.0)) > 1e-6
    ]
    if not changes:
        return ()
    return (
        f"the MODEL's patched sampling ({', '.join(changes)}) is not used: {family_of(model).title} is trained and "
        "sampled on its own noise schedule",
    )


def require_own_sampling(model: Any) -> None:
    """Checks that the network gets the right timesteps and that its output is interpreted correctly.

    Raises:
        ValueError: the MODEL's sampling is patched to that of another kind of model.
    """
    patched = model.object_patches.get("model_sampling")
    if patched is None:
        return
    multiplier = model.model.model_config.sampling_settings.get("multiplier", 1.0)
    sigma, x, velocity = torch.tensor([0.5]), torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    right = torch.tensor([0.5 * multiplier, 2.0, 2.0 - 0.5 * 3.0])
    try:
        x0 = patched.calculate_denoised(sigma, velocity, x)
        found = torch.stack([patched.timestep(sigma)[0], patched.calculate_input(sigma, x).sum(), x0.sum()]).float()
    except (AttributeError, RuntimeError):
        found = torch.full_like(right, torch.nan)
    if not torch.allclose(found.cpu(), right, rtol=1e-4):
        raise ValueError(
            f"the MODEL's sampling is patched to that of another kind of model than {family_of(model).title}: remove "
            "that node, such as ModelSamplingSD3 (ModelSamplingAuraFlow and ModelSamplingFlux are fine)"
        )


def _set_options(options: dict[str, Any]) -> list[str]:
    unset = (None, False, [], {})
    rest = {name: value for name, value in options.items() if name not in _USED_OPTIONS | _COMPANIONS}
    return [name for name, value in rest.items() if isinstance(value, torch.Tensor) or value not in unset]


def _wrappers(wrappers: dict[Any, dict[Any, Any]], without: Iterable[str] = ()) -> list[str]:
    """The keys of wrappers, under which their nodes register them."""
    kinds = [kind for kind in wrappers if kind not in set(without)]
    return [str(key or "without a name") for kind in kinds for key, several in wrappers[kind].items() if several]
