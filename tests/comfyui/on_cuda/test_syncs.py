"""How often the host waits for the device while it trains."""

from __future__ import annotations

from typing import Any

import pytest
from bases import EVERY_FORM, Load, train
from inprocess import ComfyUI
from pretend_cuda.watch import Event, watching


def is_comfyuis(event: Event) -> bool:
    """Whether a line of ComfyUI's network waits: Z-Image's brings padding tokens that are in RAM, each time."""
    return event.place.startswith("ldm/")


@pytest.mark.parametrize("form", EVERY_FORM)
def test_two_waits_per_optimizer_step_and_none_in_the_backward(
    comfyui: ComfyUI, load: Load, form: str, record_property: Any
) -> None:
    """The losses and the gradient's norm are read; an upload that waits would count too."""
    model = load(form)
    with watching(comfyui.core("training.run").Run, "make_step") as watches:
        train(comfyui, model, f"waits-{form}")
    assert len(watches) == 3
    for watch in watches[1:]:
        waits = watch.syncs()
        ours = sum(count for event, count in waits.items() if not is_comfyuis(event))
        record_property(
            "waits", f"{ours}" if ours == waits.total() else f"{ours} and {waits.total() - ours} of ComfyUI's"
        )
        assert ours <= 2, watch.describe(waits)
        assert not watch.syncs(in_backward=True), watch.describe(waits)
