"""The step's identities: Eq. 7 by hand, per-step backward, m of K, anchors, SFT."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.objectives import DOPSD, OBJECTIVES, SFT, measure_gap, self_distillation_loss
from dopsd_core.rollout import euler_step

from .devices import DEVICE
from .toy_denoiser import SIGMAS, ToyDenoiser, assert_near, lora, make_inputs, make_pairs, randomise


def dopsd(**options):
    """D-OPSD, without prior anchors unless asked for."""
    return DOPSD(**{"anchor_probability": 0.0, **options})


@pytest.fixture
def world():
    """(denoiser, attached adapters), student, teacher and base all different."""
    denoiser = ToyDenoiser()
    adapters = AdapterSet(denoiser.sites(), lora(), seed=1, device=DEVICE)
    randomise(adapters)
    with adapters.attached():
        yield denoiser, adapters


def gradients(adapters):
    """All gradients in one vector; cleared."""
    flat = torch.cat([p.grad.flatten() for p in adapters.parameters()])
    for parameter in adapters.parameters():
        parameter.grad = None
    return flat


def whole_loss(inputs, steps=range(4), form="x0", conditions=None, teacher_mode="teacher"):
    """Mean over `steps` of Eq. 7 with ALL graphs alive, written out: what the reference scripts do."""
    denoiser, adapters = inputs.denoiser, inputs.adapters
    student, teacher = conditions or ([p.student for p in inputs.pairs], [p.teacher for p in inputs.pairs])
    x, losses = inputs.noise, []
    for k in range(4):
        sigma, sigma_next = SIGMAS[k], SIGMAS[k + 1]
        with adapters.use("student"):
            x0 = denoiser.predict_x0(x, sigma, student)
        with adapters.use(teacher_mode), torch.no_grad():
            target = denoiser.predict_x0(x, sigma, teacher)
        weight = 1 if form == "x0" else 1 / sigma**2
        losses.append(weight * (x0 - target).square().mean())
        velocity = ((x - x0) / sigma).detach()
        x = x + (sigma_next - sigma) * velocity
    return torch.stack([losses[k] for k in steps]).mean()


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    student, teacher = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[0.0, 4.0]]]])
    assert self_distillation_loss(student, teacher, 0.5).item() == 2.5
    assert self_distillation_loss(student, teacher, 0.5, "velocity").item() == 10.0


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 1.0), st.integers(0, 1000))
def test_velocity_loss_is_the_mse_of_velocities(sigma, seed):
    x, x0_student, x0_teacher = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    velocities = [(x - x0) / sigma for x0 in (x0_student, x0_teacher)]
    expected = torch.nn.functional.mse_loss(*velocities)
    torch.testing.assert_close(self_distillation_loss(x0_student, x0_teacher, sigma, "velocity"), expected)
    torch.testing.assert_close(self_distillation_loss(x0_student, x0_teacher, sigma, "x0"), expected * sigma**2)


def test_the_teacher_is_a_constant():
    student, teacher = torch.randn(2, 1, 1, 2, 2, requires_grad=True).unbind()
    assert torch.autograd.grad(self_distillation_loss(student, teacher, 1.0), teacher, allow_unused=True) == (None,)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="'eps'"):
        self_distillation_loss(torch.zeros(1), torch.zeros(1), 1.0, "eps")  # pyright: ignore[reportArgumentType]


# -- D-OPSD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["x0", "velocity"])
def test_per_step_backward_is_one_backward_over_all_steps(world, form):
    denoiser, adapters = world
    inputs = make_inputs(denoiser, adapters, batch=3)
    output = dopsd(loss=form).backward(inputs)
    stepwise = gradients(adapters)
    loss = whole_loss(inputs, form=form)
    loss.backward()
    assert_near(stepwise, gradients(adapters), 1e-6)
    assert output.loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_m_of_k_is_unbiased(world, m, monkeypatch):
    """The mean over ALL subsets of m steps is the full gradient, exactly."""
    denoiser, adapters = world
    whole_loss(make_inputs(denoiser, adapters)).backward()
    full = gradients(adapters)
    total, subsets = torch.zeros_like(full), list(combinations(range(4), m))
    for subset in subsets:
        monkeypatch.setattr(DOPSD, "_draw_steps", lambda *_, subset=subset: dict.fromkeys(subset, 1 / len(subset)))
        output = dopsd(grad_steps=m).backward(make_inputs(denoiser, adapters))
        assert tuple(s.index for s in output.steps) == subset
        total += gradients(adapters)
    assert_near(total / len(subsets), full, 1e-6)


def test_m_of_k_draws_every_step_equally_often_and_asks_for_no_more_than_it_needs(world):
    denoiser, adapters = world
    counts = torch.zeros(4)
    inputs = make_inputs(denoiser, adapters, batch=1)
    for _ in range(200):
        denoiser.grad_modes.clear()
        (step,) = dopsd(grad_steps=1).backward(inputs).steps
        counts[step.index] += 1
        # One student call per state up to the chosen one, one teacher call there, one graph in all.
        assert denoiser.grad_modes == [False] * step.index + [True, False]
    assert counts.min() > 30


def test_each_states_graph_is_gone_before_the_next_is_built(world):
    """Saved tensors alive at once do not grow with K: what makes peak memory flat."""
    denoiser, adapters = world
    alive, peaks = 0, []

    class Held:
        def __init__(self, tensor):
            nonlocal alive
            alive += 1
            self.tensor = tensor

        def __del__(self):
            nonlocal alive
            alive -= 1

    predict = denoiser.predict_x0

    def counted(*args):
        out = predict(*args)
        peaks.append(alive)
        return out

    denoiser.predict_x0 = counted
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        dopsd().backward(make_inputs(denoiser, adapters))
    with_graph = peaks[::2]
    assert len(with_graph) == 4
    assert with_graph[0] > 0
    assert set(with_graph) == {with_graph[0]}


def test_mode_is_set_for_each_pass_and_restored(world):
    denoiser, adapters = world
    seen = []
    predict = denoiser.predict_x0

    def spy(*args):
        seen.append((adapters.mode, torch.is_grad_enabled()))
        return predict(*args)

    denoiser.predict_x0 = spy
    adapters.mode = "off"
    dopsd().backward(make_inputs(denoiser, adapters))
    assert seen == [("student", True), ("teacher", False)] * 4
    assert adapters.mode == "off"


def test_a_checkpointed_block_recomputes_with_the_students_weights(world):
    denoiser, adapters = world
    inputs = make_inputs(denoiser, adapters)
    dopsd().backward(inputs)
    expected = gradients(adapters)
    for layer in denoiser.net.layers:
        plain = layer.forward
        layer.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
    adapters.mode = "off"
    dopsd().backward(make_inputs(denoiser, adapters))
    assert_near(gradients(adapters), expected, 1e-6)


def test_at_the_start_same_conditions_give_zero_loss_and_gradient():
    denoiser = ToyDenoiser()
    adapters = AdapterSet(denoiser.sites(), lora(), device=DEVICE)
    pairs = [replace(p, teacher=p.student) for p in make_pairs(2)]
    with adapters.attached():
        output = dopsd().backward(make_inputs(denoiser, adapters, pairs=pairs))
    assert output.loss == 0
    assert output.metrics["gap"] == 0
    assert not gradients(adapters).any()


def test_loss_scale_scales_the_gradient_and_not_the_report(world):
    denoiser, adapters = world
    plain = dopsd().backward(make_inputs(denoiser, adapters))
    expected = gradients(adapters)
    scaled = dopsd().backward(make_inputs(denoiser, adapters, loss_scale=0.25))
    assert_near(gradients(adapters), expected / 4, 1e-6)
    assert plain == scaled


def test_statistics_by_hand(world):
    denoiser, adapters = world
    inputs = make_inputs(denoiser, adapters, batch=1)
    stats = dopsd().backward(inputs).steps
    assert [s.sigma for s in stats] == list(SIGMAS[:-1])
    with torch.no_grad():
        student = denoiser.net(inputs.noise, 1.0, [inputs.pairs[0].student.features]).flatten()
        with adapters.use("teacher"):
            teacher = denoiser.net(inputs.noise, 1.0, [inputs.pairs[0].teacher.features]).flatten()
    assert stats[0].gap == pytest.approx((student - teacher).square().mean().sqrt().item(), rel=1e-4)
    assert stats[0].cosine == pytest.approx((student @ teacher / student.norm() / teacher.norm()).item(), rel=1e-4)
    assert stats[0].norm_ratio == pytest.approx((student.norm() / teacher.norm()).item(), rel=1e-4)
    assert stats[0].loss == pytest.approx(stats[0].gap ** 2, rel=1e-4)
    assert stats[3].loss == pytest.approx((SIGMAS[3] * stats[3].gap) ** 2, rel=1e-4)


def test_measured_gap_is_that_of_training_without_a_graph(world):
    denoiser, adapters = world
    trained = dopsd().backward(make_inputs(denoiser, adapters))
    denoiser.grad_modes.clear()
    measured = measure_gap(make_inputs(denoiser, adapters))
    assert measured.metrics["gap"] == pytest.approx(trained.metrics["gap"], rel=1e-6)
    assert set(denoiser.grad_modes) == {False}


def test_on_policy_states_are_the_students(world):
    denoiser, adapters = world
    seen = []
    predict = denoiser.predict_x0

    def spy(x, sigma, conditions):
        out = predict(x, sigma, conditions)
        seen.append((x, out.detach()))
        return out

    denoiser.predict_x0 = spy
    dopsd().backward(make_inputs(denoiser, adapters))
    (x_student, x0_student), (x_teacher, _), (x_next, _) = seen[:3]
    assert torch.equal(x_student, x_teacher)
    assert torch.equal(x_next, euler_step(x_student, x0_student, SIGMAS[0], SIGMAS[1]))


# -- the prior anchor --------------------------------------------------------------------------------------------------


def test_anchor_pulls_the_student_to_the_frozen_base_under_the_same_text(world):
    denoiser, adapters = world
    anchors = [p.student for p in make_pairs(1, seed=9)]
    inputs = make_inputs(denoiser, adapters, batch=2, anchors=anchors)
    output = DOPSD(anchor_probability=1.0).backward(inputs)
    assert output.is_anchor
    stepwise = gradients(adapters)
    whole_loss(inputs, conditions=(anchors * 2, anchors * 2), teacher_mode="off").backward()
    assert_near(stepwise, gradients(adapters), 1e-6)


def test_anchor_has_nothing_to_say_while_student_is_base():
    denoiser = ToyDenoiser()
    adapters = AdapterSet(denoiser.sites(), lora(), device=DEVICE)
    with adapters.attached():
        inputs = make_inputs(denoiser, adapters, anchors=[p.student for p in make_pairs(3)])
        assert DOPSD(anchor_probability=1.0).backward(inputs).loss == 0


def test_anchors_come_with_their_probability_and_leave_the_other_draws_alone(world):
    denoiser, adapters = world
    anchors = [p.student for p in make_pairs(3)]
    runs = {}
    for probability in (0.0, 0.3):
        objective = DOPSD(grad_steps=1, anchor_probability=probability)
        outputs = [objective.backward(make_inputs(denoiser, adapters, 1, seed, anchors=anchors)) for seed in range(200)]
        runs[probability] = ([o.is_anchor for o in outputs], [o.steps[0].index for o in outputs])
    assert not any(runs[0.0][0])
    assert 35 <= sum(runs[0.3][0]) <= 85
    assert runs[0.0][1] == runs[0.3][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad_steps": 5}, "grad_steps is 5, but the rollout has only 4"),
        ({"anchor_probability": 0.5}, "no anchor captions"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_pass(world, options, message):
    denoiser, adapters = world
    with pytest.raises(ValueError, match=message):
        dopsd(**options).backward(make_inputs(denoiser, adapters))
    assert denoiser.grad_modes == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DOPSD(grad_steps=0), "grad_steps is 0; set it to at least 1, or null for all of the steps"),
        (lambda: DOPSD(anchor_probability=2), "anchor_probability is 2; set it to a value from 0 to 1"),
        (lambda: DOPSD(loss="l1"), "loss is 'l1'; choose one of x0, velocity"),  # pyright: ignore[reportArgumentType]
        (lambda: SFT(shift=0), "sft_shift is 0; set it above 0"),
        (lambda: SFT(sigmas="beta"), "sft_sigmas is 'beta'"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- SFT ---------------------------------------------------------------------------------------------------------------


def test_sft_is_the_flow_matching_loss_per_sample(world):
    denoiser, adapters = world
    inputs = make_inputs(denoiser, adapters, batch=3)
    output = SFT().backward(inputs)
    stepwise = gradients(adapters)
    losses = []
    for i, (pair, stats) in enumerate(zip(inputs.pairs, output.steps, strict=True)):
        assert pair.target_latent is not None
        noise, target, sigma = inputs.noise[i], pair.target_latent.to(DEVICE), stats.sigma
        x = (1 - sigma) * target + sigma * noise
        velocity = denoiser.net(x[None], sigma, [pair.student.features])[0]
        losses.append((velocity - (noise - target)).square().mean())
    torch.stack(losses).mean().backward()
    assert_near(stepwise, gradients(adapters), 1e-5)
    assert output.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert len({s.sigma for s in output.steps}) == 3


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["logit-normal", "uniform", "grid"]), st.floats(0.2, 8), st.integers(0, 100))
def test_sft_sigmas_are_usable(kind, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = [SFT(sigmas=kind, shift=shift).draw_sigma(SIGMAS, generator) for _ in range(20)]
    assert all(0 < s <= 1 for s in drawn)
    assert kind != "grid" or set(drawn) <= set(SIGMAS[:-1])


def test_sft_sigma_distributions():
    generator = torch.Generator().manual_seed(0)

    def draw(**options):
        return torch.tensor([SFT(**options).draw_sigma(SIGMAS, generator) for _ in range(4000)])

    uniform = draw(sigmas="uniform", shift=1.0)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    assert uniform.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.02)
    normal = draw(sigmas="logit-normal", shift=3.0).logit() - math.log(3.0)
    assert normal.mean().item() == pytest.approx(0.0, abs=0.06)
    assert normal.std().item() == pytest.approx(1.0, abs=0.05)
    grid = draw(sigmas="grid")
    assert all((grid - s).abs().lt(1e-6).float().mean().item() == pytest.approx(0.25, abs=0.04) for s in SIGMAS[:-1])


def test_sft_without_a_target_says_whose(world):
    denoiser, adapters = world
    pairs = [replace(p, target_latent=None) for p in make_pairs(1)]
    with pytest.raises(ValueError, match="'caption 0' has none"):
        SFT().backward(make_inputs(denoiser, adapters, pairs=pairs))


def test_registry_holds_what_this_version_trains():
    names = ("dopsd", "sft", "dreambooth", "pso")
    assert {name: make().name for name, make in OBJECTIVES.items()} == dict(zip(names, names, strict=True))
