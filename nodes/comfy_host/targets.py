"""Which layers learn: checked against the model before any training, and counted for the user."""

from __future__ import annotations

from ...dopsd_core.adapters import Adapter
from ...dopsd_core.adapters.targets import match_targets
from .denoiser import ComfyDenoiser


def require_blocks(denoiser: ComfyDenoiser, adapter: Adapter) -> None:
    """Keeps targets to the blocks: for layers outside them there is no name that both ComfyUI and diffusers load.

    Raises:
        ValueError: a target chooses nothing, or something else.
    """
    inside = {module for block in denoiser.blocks() for module in block.modules()}
    parts = [(part.name, site.module in inside) for site in denoiser.sites() for part in site.parts]
    kinds = list(dict.fromkeys(f"{name.partition('.')[0]}.*" for name, is_inside in parts if is_inside))
    for target in adapter.targets:
        chosen = match_targets([name for name, _ in parts], (target,))
        outside = [name for name, is_inside in parts if name in chosen and not is_inside]
        if outside:
            raise ValueError(
                f"target {target!r} chooses {outside[0]}, which is in none of the model's blocks, and not every "
                f"program would load a LoRA of it: choose within {', '.join(kinds)}"
            )


def told_size(modules: int, parameters: int) -> str:
    """How large the LoRA is, as it is counted everywhere."""
    return f"{modules} modules, {parameters / 1e6:.1f} M parameters"
