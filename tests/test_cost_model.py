"""The cost model of docs/cost.md against torch's own counter of FLOPs."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost_model import WRITTEN_OUT_ATTENTION_BACKWARD, StepCost, pass_cost
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.conditioning.encode import Condition, DualCondition
from dopsd_core.families import FLUX2_KLEIN, Z_IMAGE
from dopsd_core.memory.activation_checkpointing import checkpointed
from dopsd_core.objectives import DOPSD, ObjectiveInputs

pytestmark = pytest.mark.long

diffusers = pytest.importorskip("diffusers")

STUDENT, TEACHER, SIDE = 30, 90, 24
CONFIG = Z_IMAGE.lora_config(8)


@pytest.fixture(scope="module")
def denoiser():
    from dopsd_core.standalone.hosts.demo import StandaloneDenoiser

    torch.manual_seed(0)
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[8, 12, 12], axes_lens=[512, 64, 64],
    )  # fmt: skip
    return StandaloneDenoiser(net)


def model(denoiser, **settings) -> StepCost:
    image = Z_IMAGE.image_tokens(SIDE, SIDE)
    student, teacher = (pass_cost(denoiser, Z_IMAGE, CONFIG, (image, text)) for text in (STUDENT, TEACHER))
    return StepCost(student, teacher, attention_factor=WRITTEN_OUT_ATTENTION_BACKWARD, **settings)


def counted(denoiser, objective: DOPSD, teacher: str = "ema", count: int = 0) -> int:
    generator = torch.Generator().manual_seed(0)
    student, reader = (Condition(torch.randn(length, 12, generator=generator)) for length in (STUDENT, TEACHER))
    pair = DualCondition(student, reader, torch.zeros(4, SIDE, SIDE), "caption", "key")
    adapters = AdapterSet(denoiser.sites(), CONFIG, teacher=teacher)
    noise = torch.randn(1, 4, SIDE, SIDE, generator=generator)
    sigmas = (1.0, 0.9, 0.75, 0.5, 0.0)
    inputs = ObjectiveInputs(denoiser, adapters, [pair], noise, sigmas, generator, [student])
    with adapters.attached(), checkpointed(denoiser.blocks(), count), FlopCounterMode(display=False) as counter:
        objective.backward(inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_whole_step(denoiser, count: int) -> None:
    wanted = model(denoiser, checkpointing=count)
    assert counted(denoiser, DOPSD(anchor_probability=0), count=count) == pytest.approx(wanted.flops, rel=0.05)
    assert wanted.flops - model(denoiser).flops == pytest.approx(wanted.flops - wanted.model_flops)


def test_a_frozen_teacher_has_no_lora(denoiser) -> None:
    got = counted(denoiser, DOPSD(anchor_probability=0), teacher="frozen")
    assert got == pytest.approx(model(denoiser, teacher_has_lora=False).flops, rel=0.05)
    saved = 4 * model(denoiser).teacher.lora
    assert counted(denoiser, DOPSD(anchor_probability=0)) - got == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("m", [1, 3])
def test_m_of_k_on_average(denoiser, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all draws, which are equally likely; the last step drawn decides how long the rollout is."""
    total = 0
    draws = [dict.fromkeys(drawn, 1 / m) for drawn in itertools.combinations(range(4), m)]
    for drawn in draws:
        monkeypatch.setattr(DOPSD, "_draw_steps", lambda *_, drawn=drawn: drawn)
        total += counted(denoiser, DOPSD(grad_steps=m, anchor_probability=0))
    assert total / len(draws) == pytest.approx(model(denoiser, grad_steps=m).flops, rel=0.05)


def test_an_anchor_has_the_students_text_and_no_lora(denoiser) -> None:
    cost = model(denoiser, teacher_has_lora=False)
    anchor = dataclasses.replace(cost, teacher=cost.student)
    assert counted(denoiser, DOPSD(anchor_probability=1.0)) == pytest.approx(anchor.flops, rel=0.05)


def test_frozen_weights_have_no_gradient(denoiser) -> None:
    """A backward with weight gradients would be two forwards of the Linears; ours is one."""
    student = model(denoiser).student
    assert student.backward(0.0) - 2 * student.lora == student.linears


# -- FLUX.2-klein: two streams, references ----------------------------------------------------------------------------

KLEIN_SIDE, KLEIN_TEXT = 12, 512
TEACHERS = {"vlm": (0, 0), "edit": (0, 1), "edit_target": (1, 2)}
"""References of student and teacher."""


@pytest.fixture(scope="module")
def klein():
    from dopsd_core.standalone.hosts.klein import klein

    torch.manual_seed(0)
    return klein(
        2, 2, 4, 12, attention_head_dim=32, axes_dims_rope=(8, 8, 8, 8), in_channels=8, timestep_guidance_channels=16
    )


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("name", TEACHERS)
def test_a_whole_step_of_klein(klein, name: str, count: int) -> None:
    """The teacher's references lengthen its forward alone; the student's those of forward, backward and recomputing."""
    config = FLUX2_KLEIN.lora_config(8)
    generator = torch.Generator().manual_seed(0)
    latent = (8, KLEIN_SIDE, KLEIN_SIDE)
    student, teacher = (
        Condition(
            torch.randn(KLEIN_TEXT, 12, generator=generator), tuple(torch.randn(latent) for _ in range(references))
        )
        for references in TEACHERS[name]
    )
    pair = DualCondition(student, teacher, torch.zeros(latent), "caption", "key")
    adapters = AdapterSet(klein.sites(), config)
    inputs = ObjectiveInputs(klein, adapters, [pair], torch.randn(1, *latent), (1.0, 0.8, 0.0), generator)
    with (
        sdpa_kernel([SDPBackend.MATH]),
        adapters.attached(),
        checkpointed(klein.blocks(), count),
        FlopCounterMode(display=False) as counter,
    ):
        DOPSD(anchor_probability=0).backward(inputs)
    seen, read = (pass_cost(klein, FLUX2_KLEIN, config, FLUX2_KLEIN.tokens(latent, c)) for c in (student, teacher))
    factor = WRITTEN_OUT_ATTENTION_BACKWARD
    wanted = StepCost(seen, read, 2, 2, checkpointing=count, attention_factor=factor)
    assert counter.get_total_flops() == pytest.approx(wanted.flops, rel=0.02)
