"""Inputs that several nodes have: each declared once, with the texts that differ from node to node as arguments."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .sockets import ConditionsSocket


def conditions_input() -> Any:
    """The socket for what Build Teacher Condition gives."""
    return ConditionsSocket.Input("conditions", tooltip="From Build Teacher Condition.")


def seed_input(tooltip: str, *, changes_after_run: bool = False) -> Any:
    """A seed from 0 to 2^64 - 1.

    Args:
        changes_after_run: whether the page offers to change it after each run. Otherwise it must be switched off, since
            the page does so for every input of this name, and the same graph would never give the same result again.
    """
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**64 - 1,
        control_after_generate=changes_after_run,
        optional=True,
        tooltip=tooltip,
    )


def sampling_steps_input(examples: str = "") -> Any:
    """Sampling steps, 0 to 64; examples: what the 0 stands for, in brackets."""
    ending = f" ({examples})." if examples else "."
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=64,
        optional=True,
        tooltip=f"Sampling steps; 0: the number that the model was distilled for{ending}",
    )


def size_inputs(low: int, high: int, tooltip: str) -> list[Any]:
    """Width and height in pixels, multiples of 16.

    Args:
        low: the smallest size.
        high: the largest size.
        tooltip: of both; "{side}" in it becomes "Width" or "Height".
    """
    return [
        io.Int.Input(
            side.lower(),
            default=1024,
            min=low,
            max=high,
            step=16,
            optional=True,
            tooltip=tooltip.format(side=side),
        )
        for side in ("Width", "Height")
    ]
