"""How often the host waits for the device while it trains."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from bases import EVERY_FORM, Load, train
from inprocess import ComfyUI
from pretend_cuda.watch import Event, Watch

STEPS = (1, 3)


@pytest.mark.parametrize("form", EVERY_FORM)
def test_two_waits_per_optimizer_step_and_none_in_the_backward(
    comfyui: ComfyUI, load: Load, form: str, record_property: Any
) -> None:
    """The losses and the gradient's norm are read; an upload that waits would count too."""
    model, watched = load(form), []
    for steps in STEPS:
        with Watch() as watch:
            train(comfyui, model, f"waits-{steps}-{form}", steps=steps)
        watched.append(watch)
    few, many = watched
    more: Counter[Event] = many.syncs() - few.syncs()
    per_step = more.total() / (STEPS[1] - STEPS[0])
    record_property("waits", f"{per_step:g}")
    assert per_step <= 2, many.describe(more)
    assert not many.syncs(in_backward=True), many.describe(many.syncs(in_backward=True))
