"""The ways in which ComfyUI treats a card's memory, each by the flags that lead to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """flags: of ComfyUI. about: what it is."""

    name: str
    flags: tuple[str, ...]
    about: str


MODES = {
    mode.name: mode
    for mode in (
        Mode("dynamic", (), "dynamic VRAM, the default on NVIDIA: weights in pages that may leave at any time"),
        Mode("classic", ("--disable-dynamic-vram",), "WSL, torch before 2.8, AMD, Intel, Mac: loaded whole or in part"),
        Mode("lowvram", ("--disable-dynamic-vram", "--lowvram"), "classic, with text encoders on the CPU"),
        Mode("novram", ("--novram",), "classic, with every weight in RAM"),
        Mode("highvram", ("--highvram",), "classic, with nothing ever unloaded"),
        Mode("core", (), "the core alone, without ComfyUI"),
    )
}
CAPABILITIES = ("8.9", "7.5")
"""Ada, which computes in bf16 and has fp8 units; Turing, where ComfyUI computes in fp16."""
