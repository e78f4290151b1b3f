"""The layers to train: checked against the model before training, and counted for the user."""

from __future__ import annotations

from ...dopsd_core.adapters import Adapter, Lora
from ...dopsd_core.adapters.targets import match_targets
from .denoiser import ComfyDenoiser


def require_blocks(denoiser: ComfyDenoiser, adapter: Adapter) -> None:
    """Checks that targets only match layers of the blocks: not every program loads a LoRA of other layers.

    Raises:
        ValueError: a target matches nothing, or a layer outside the blocks.
    """
    inside = {module for block in denoiser.blocks() for module in block.modules()}
    parts = [(part.name, site.module in inside) for site in denoiser.sites() for part in site.parts]
    kinds = list(dict.fromkeys(f"{name.partition('.')[0]}.*" for name, is_inside in parts if is_inside))
    for target in adapter.targets if isinstance(adapter, Lora) else ():
        chosen = match_targets([name for name, _ in parts], (target,))
        outside = [name for name, is_inside in parts if name in chosen and not is_inside]
        if outside:
            raise ValueError(
                f"target {target!r} matches {outside[0]}, which is outside the model's blocks, and not every "
                f"program loads a LoRA of it: choose within {', '.join(kinds)}"
            )


def size_text(modules: int, parameters: int) -> str:
    """The size of the LoRA as text, the same everywhere."""
    return f"{modules} modules, {parameters / 1e6:.1f} M parameters"
