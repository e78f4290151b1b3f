"""How often the host waits for the device while it trains."""

from __future__ import annotations

from typing import Any

import pytest
from bases import EVERY_FORM, Load, train
from inprocess import ComfyUI
from pretend_cuda.watch import watching


@pytest.mark.parametrize("form", EVERY_FORM)
def test_two_waits_per_optimizer_step_and_none_in_the_backward(
    comfyui: ComfyUI, load: Load, form: str, record_property: Any
) -> None:
    """The losses and the gradient's norm are read; uploads that wait count too, ComfyUI's own included."""
    model = load(form)
    with watching(comfyui.core("training.run").Run, "make_step") as watches:
        train(comfyui, model, f"waits-{form}")
    assert len(watches) == 3
    record_property("waits", str(max(watch.syncs().total() for watch in watches[1:])))
    for watch in watches[1:]:
        waits = watch.syncs()
        assert waits.total() <= 2, watch.describe(waits)
        assert not watch.syncs(in_backward=True), watch.describe(waits)
