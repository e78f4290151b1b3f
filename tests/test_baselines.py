"""DreamBooth, PSO, the ablations of D-OPSD and SFT with anchors, each equal to its formula written out plainly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.config import ConfigError, TrainConfig
from dopsd_core.objectives import DOPSD, OBJECTIVES, PSO, SFT, ClassImage, DreamBooth, ObjectiveInputs
from dopsd_core.options import changed

from .devices import DEVICE
from .toy_denoiser import CHANNELS, SIGMAS, ToyDenoiser, assert_near, lora, make_inputs, make_pairs, randomise

World = tuple[ToyDenoiser, AdapterSet]


@pytest.fixture
def world() -> Iterator[World]:
    """(denoiser, attached adapters), student, teacher and base all different."""
    denoiser = ToyDenoiser()
    adapters = AdapterSet(denoiser.sites(), lora(), seed=1, device=DEVICE)
    randomise(adapters)
    with adapters.attached():
        yield denoiser, adapters


def gradients(adapters: AdapterSet) -> Tensor:
    """All gradients in one vector; cleared."""
    flat = torch.cat([p.grad.flatten() for p in adapters.parameters() if p.grad is not None])
    for parameter in adapters.parameters():
        parameter.grad = None
    return flat


def drawn(count: int, size: int = 4) -> list[ClassImage]:
    """Images of an untouched model, here random ones."""
    generator = torch.Generator().manual_seed(77)
    pairs = make_pairs(count, seed=8)
    return [ClassImage(p.student, torch.randn(CHANNELS, size, size, generator=generator)) for p in pairs]


def velocity(inputs: ObjectiveInputs, mode: Any, x: Tensor, sigma: float, condition: Any) -> Tensor:
    """v of one sample, x [C, h, w], straight from the network."""
    denoiser: Any = inputs.denoiser
    with inputs.adapters.use(mode):
        return denoiser.net(x[None], sigma, [condition.features])[0]


def targets_of(inputs: ObjectiveInputs) -> list[Tensor]:
    return [p.target_latent.to(DEVICE) for p in inputs.pairs if p.target_latent is not None]


# -- DreamBooth --------------------------------------------------------------------------------------------------------


def dreambooth_written_out(inputs: ObjectiveInputs, weight: float, objective: DreamBooth) -> Tensor:
    """mean |v - u|^2 over the instances, plus weight times the same over as many class images; draws as documented."""
    generator = torch.Generator().set_state(inputs.generator.get_state())
    instance, prior = [], []
    for i, (pair, target) in enumerate(zip(inputs.pairs, targets_of(inputs), strict=True)):
        sigma, noise = objective.draw_sigma(SIGMAS, generator), inputs.noise[i]
        v = velocity(inputs, "student", (1 - sigma) * target + sigma * noise, sigma, pair.student)
        instance.append((v - (noise - target)).square().mean())
    for number in torch.randint(len(inputs.class_images), (len(inputs.pairs),), generator=generator).tolist():
        image = inputs.class_images[number]
        sigma = objective.draw_sigma(SIGMAS, generator)
        noise = torch.randn(CHANNELS, 4, 4, generator=generator).to(DEVICE)
        clean = image.latent.to(DEVICE)
        v = velocity(inputs, "student", (1 - sigma) * clean + sigma * noise, sigma, image.condition)
        prior.append((v - (noise - clean)).square().mean())
    return torch.stack(instance).mean() + weight * torch.stack(prior).mean()


@pytest.mark.parametrize(("weight", "sigmas"), [(1.0, "logit-normal"), (0.3, "uniform"), (2.0, "grid")])
def test_dreambooth_is_both_losses_in_one_step(world: World, weight: float, sigmas: Any) -> None:
    denoiser, adapters = world
    objective = DreamBooth(prior_weight=weight, sigmas=sigmas)
    inputs = make_inputs(denoiser, adapters, batch=3, class_images=drawn(5))
    expected = dreambooth_written_out(inputs, weight, objective)
    expected.backward()
    wanted = gradients(adapters)
    output = objective.backward(inputs)
    assert_near(gradients(adapters), wanted, 1e-5)
    assert output.loss == pytest.approx(expected.item(), rel=1e-5)
    assert output.metrics["concept_loss"] + weight * output.metrics["prior_loss"] == pytest.approx(output.loss)


def test_class_images_of_another_size_than_the_training_images_are_trained_on(world: World) -> None:
    denoiser, adapters = world
    small = [replace(image, latent=image.latent[:, :2, :3]) for image in drawn(4)]
    output = DreamBooth().backward(make_inputs(denoiser, adapters, class_images=small))
    assert output.metrics["prior_loss"] > 0


# -- PSO ---------------------------------------------------------------------------------------------------------------


def pso_written_out(inputs: ObjectiveInputs, form: str, beta: float) -> Tensor:
    """The loss of both forms by its formula; draws the loser, then the sigma."""
    generator = torch.Generator().set_state(inputs.generator.get_state())
    losses = []
    for i, (pair, winner) in enumerate(zip(inputs.pairs, targets_of(inputs), strict=True)):
        number = int(torch.randint(len(inputs.class_images), (), generator=generator).item())
        loser = inputs.class_images[number].latent.to(DEVICE)
        sigma = SIGMAS[int(torch.randint(4, (), generator=generator).item())]

        def error(mode: Any, image: Tensor, i: int = i, sigma: float = sigma, pair: Any = pair) -> Tensor:
            x = (1 - sigma) * image + sigma * inputs.noise[i]
            return (velocity(inputs, mode, x, sigma, pair.student) - (inputs.noise[i] - image)).square().mean()

        won, lost = error("student", winner), error("student", loser)
        d = won - 0.1 * lost
        if form == "no_reference":
            losses.append(torch.clamp(1 + 5 * d, min=0) + 0.5 * lost)
        else:
            with torch.no_grad():
                reference = error("off", winner) - 0.1 * error("off", loser)
            losses.append(-torch.log(torch.sigmoid(beta * (reference - d))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("form", "beta"), [("no_reference", 200.0), ("dpo", 0.7), ("dpo", 2.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_pso_is_its_formula(world: World, form: Any, beta: float, seed: int) -> None:
    denoiser, adapters = world
    inputs = make_inputs(denoiser, adapters, batch=3, seed=seed, class_images=drawn(4))
    expected = pso_written_out(inputs, form, beta)
    expected.backward()
    wanted = gradients(adapters)
    output = PSO(form=form, beta=beta).backward(inputs)
    assert_near(gradients(adapters), wanted, 1e-4)
    assert output.loss == pytest.approx(expected.item(), rel=1e-4)


def test_pso_in_dpo_form_is_log_2_at_the_start_and_finite_far_from_it() -> None:
    denoiser = ToyDenoiser()
    adapters = AdapterSet(denoiser.sites(), lora(), device=DEVICE)
    with adapters.attached():
        inputs = make_inputs(denoiser, adapters, class_images=drawn(2))
        assert PSO(form="dpo").backward(inputs).loss == pytest.approx(0.693147, rel=1e-4)
        randomise(adapters, std=3.0)
        assert 0 < PSO(form="dpo", beta=1e5).backward(inputs).loss < float("inf")


def test_pso_visits_only_the_distilled_sigmas_with_the_same_noise_and_caption(world: World) -> None:
    denoiser, adapters = world
    seen: list[tuple[Tensor, float, Any]] = []
    predict = denoiser.predict_x0

    def spy(x: Tensor, sigma: float, conditions: Any) -> Tensor:
        seen.append((x, sigma, conditions))
        return predict(x, sigma, conditions)

    denoiser.predict_x0 = spy
    losers = drawn(3)
    visited = set()
    for seed in range(12):
        seen.clear()
        inputs = make_inputs(denoiser, adapters, batch=1, seed=seed, class_images=losers)
        PSO().backward(inputs)
        ((x, sigma, conditions),) = seen
        visited.add(sigma)
        assert conditions == [inputs.pairs[0].student] * 2
        clean = (x - sigma * inputs.noise) / max(1 - sigma, 1e-9)
        if sigma < 1:
            assert_near(clean[0], targets_of(inputs)[0], 1e-4)
            assert any(torch.allclose(clean[1], loser.latent.to(DEVICE), atol=1e-4) for loser in losers)
    assert visited == set(SIGMAS[:-1])


def test_losers_have_the_winners_shape(world: World) -> None:
    denoiser, adapters = world
    sizes = [replace(image, latent=image.latent[:, :2]) for image in drawn(3)] + drawn(1)
    PSO().backward(make_inputs(denoiser, adapters, class_images=sizes))
    with pytest.raises(ValueError, match=r"pso needs losers of shape \(4, 4, 4\)"):
        PSO().backward(make_inputs(denoiser, adapters, class_images=sizes[:3]))


@pytest.mark.parametrize("objective", [DreamBooth(), PSO()])
def test_without_class_images_nothing_is_trained(world: World, objective: Any) -> None:
    denoiser, adapters = world
    with pytest.raises(ValueError, match="train with anchor captions"):
        objective.backward(make_inputs(denoiser, adapters))
    assert all(p.grad is None for p in adapters.parameters())


@pytest.mark.parametrize("objective", [SFT(), DreamBooth(), PSO(), PSO(form="dpo"), DOPSD(anchor_probability=0)])
def test_loss_scale_and_accumulation_scale_the_gradient(world: World, objective: Any) -> None:
    denoiser, adapters = world
    plain = objective.backward(make_inputs(denoiser, adapters, class_images=drawn(3)))
    expected = gradients(adapters)
    scaled = objective.backward(make_inputs(denoiser, adapters, class_images=drawn(3), loss_scale=0.25))
    assert_near(gradients(adapters), expected / 4, 1e-5)
    assert plain == scaled


# -- ablations of D-OPSD -----------------------------------------------------------------------------------------------


def ablation_written_out(inputs: ObjectiveInputs, states: str, target: str, form: str) -> Tensor:
    """The mean over the four states of the squared distance to the target, one sample at a time."""
    losses = []
    for i, (pair, clean) in enumerate(zip(inputs.pairs, targets_of(inputs), strict=True)):
        x = inputs.noise[i]
        for sigma, sigma_next in zip(SIGMAS, SIGMAS[1:], strict=False):
            if states == "data":
                x = (1 - sigma) * clean + sigma * inputs.noise[i]
            v = velocity(inputs, "student", x, sigma, pair.student)
            with torch.no_grad():
                taught = velocity(inputs, "teacher", x, sigma, pair.teacher)
            wanted = taught if target == "teacher" else (x - clean) / sigma
            losses.append((v - wanted).square().mean() * (sigma**2 if form == "x0" else 1))
            x = x + (sigma_next - sigma) * (taught if states == "teacher" else v.detach())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("states", "target", "form"),
    list(product(["own", "data", "teacher"], ["teacher", "ground_truth"], ["x0", "velocity"])),
)
def test_every_ablation_is_its_formula(world: World, states: Any, target: Any, form: Any) -> None:
    denoiser, adapters = world
    inputs = make_inputs(denoiser, adapters, batch=2)
    expected = ablation_written_out(inputs, states, target, form)
    expected.backward()
    wanted = gradients(adapters)
    objective = DOPSD(anchor_probability=0, states=states, regression_target=target, loss=form)
    output = objective.backward(inputs)
    assert_near(gradients(adapters), wanted, 1e-5)
    assert output.loss == pytest.approx(expected.item(), rel=1e-5)
    assert objective.uses_teacher == (states == "teacher" or target == "teacher")


def test_ground_truth_on_noised_images_is_supervised_fine_tuning_on_the_grid(world: World) -> None:
    """The mean over the K states of the velocity loss is the expectation of SFT with sigmas from the grid."""
    denoiser, adapters = world
    objective = DOPSD(anchor_probability=0, states="data", regression_target="ground_truth", loss="velocity")
    objective.backward(make_inputs(denoiser, adapters, batch=1))
    mean_of_states = gradients(adapters)
    by_sigma: dict[float, Tensor] = {}
    for seed in range(60):
        inputs = make_inputs(denoiser, adapters, batch=1)
        inputs = replace(inputs, generator=torch.Generator().manual_seed(seed))
        (step,) = SFT(sigmas="grid").backward(inputs).steps
        by_sigma[step.sigma] = gradients(adapters)
    assert by_sigma.keys() == set(SIGMAS[:-1])
    assert_near(mean_of_states, torch.stack(list(by_sigma.values())).mean(0), 1e-5)


@pytest.mark.parametrize("states", ["data", "teacher"])
def test_m_of_k_works_at_other_states(world: World, states: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over the four choices of one state is the full gradient."""
    denoiser, adapters = world
    options: dict[str, Any] = {"anchor_probability": 0.0, "states": states}
    DOPSD(**options).backward(make_inputs(denoiser, adapters))
    full = gradients(adapters)
    total = torch.zeros_like(full)
    for state in range(4):
        monkeypatch.setattr(DOPSD, "_draw_steps", lambda self, inputs, state=state: {state: 1.0})
        (step,) = DOPSD(grad_steps=1, **options).backward(make_inputs(denoiser, adapters)).steps
        assert step.index == state
        total += gradients(adapters)
    assert_near(total / 4, full, 1e-5)


@pytest.mark.parametrize("states", ["own", "data", "teacher"])
def test_anchors_stay_on_policy_with_the_untouched_network_as_teacher(world: World, states: Any) -> None:
    denoiser, adapters = world
    anchors = [p.student for p in make_pairs(3, seed=5)]
    DOPSD(anchor_probability=1.0).backward(make_inputs(denoiser, adapters, anchors=anchors))
    usual = gradients(adapters)
    objective = DOPSD(anchor_probability=1.0, states=states, regression_target="ground_truth")
    assert objective.backward(make_inputs(denoiser, adapters, anchors=anchors)).is_anchor
    assert torch.equal(gradients(adapters), usual)


def test_every_combination_is_a_valid_configuration() -> None:
    choices = {
        "states": ["own", "data", "teacher"], "regression_target": ["teacher", "ground_truth"],
        "teacher": ["ema", "frozen", "same"], "loss": ["x0", "velocity"], "rollout_steps": [1, 2, 8],
        "grad_steps": [None, 1],
    }  # fmt: skip
    for values in product(*choices.values()):
        config = changed(TrainConfig(), dict(zip(choices, values, strict=True)))
        assert TrainConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match=r"grad_steps is 3; set it to a value from 1 to rollout_steps \(2\)"):
        changed(TrainConfig(), {"states": "data", "rollout_steps": 2, "grad_steps": 3})


# -- SFT with the anchor -----------------------------------------------------------------------------------------------


def test_sft_with_an_anchor_takes_the_anchors_step_of_dopsd(world: World) -> None:
    denoiser, adapters = world
    anchors = [p.student for p in make_pairs(3, seed=5)]
    DOPSD(anchor_probability=1.0).backward(make_inputs(denoiser, adapters, anchors=anchors))
    expected = gradients(adapters)
    output = SFT(anchor_probability=1.0).backward(make_inputs(denoiser, adapters, anchors=anchors))
    assert output.is_anchor
    assert torch.equal(gradients(adapters), expected)


def test_sft_without_anchors_draws_what_it_drew(world: World) -> None:
    """The option at its default does not touch the generator, so saved runs resume with the same sigmas."""
    denoiser, adapters = world
    inputs = make_inputs(denoiser, adapters, batch=2)
    generator = torch.Generator().set_state(inputs.generator.get_state())
    sigmas = [SFT().draw_sigma(SIGMAS, generator) for _ in range(2)]
    assert [step.sigma for step in SFT().backward(inputs).steps] == sigmas


def test_sft_with_anchors_needs_some(world: World) -> None:
    denoiser, adapters = world
    with pytest.raises(ValueError, match="sft_anchor_probability is above 0, but there are no anchor captions"):
        SFT(anchor_probability=0.5).backward(make_inputs(denoiser, adapters))


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DreamBooth(class_images=0), "dreambooth_class_images is 0; set it to at least 1"),
        (lambda: DreamBooth(prior_weight=0), "dreambooth_prior_weight is 0; set it above 0"),
        (lambda: DreamBooth(shift=0), "dreambooth_shift is 0; set it above 0"),
        (lambda: PSO(form="ipo"), "pso_form is 'ipo'; choose one of no_reference, dpo"),  # pyright: ignore[reportArgumentType]
        (lambda: PSO(beta=0), "pso_beta is 0; set it above 0"),
        (lambda: DOPSD(states="past"), "states is 'past'; choose one of own, data, teacher"),  # pyright: ignore[reportArgumentType]
    ],
)  # fmt: skip
def test_impossible_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_defaults_are_the_sources() -> None:
    assert (DreamBooth().prior_weight, DreamBooth().class_images) == (1.0, 100)
    assert (PSO().beta, PSO().loser_images, PSO().form) == (200.0, 20, "no_reference")
    assert set(OBJECTIVES) == {"dopsd", "sft", "dreambooth", "pso"}


def test_old_configurations_are_named_as_before() -> None:
    """The new options are no part of a run's identity at their defaults."""
    assert not {"states", "regression_target"} & TrainConfig().identity().keys()
    assert "sft_anchor_probability" not in TrainConfig(objective=SFT()).identity()
    assert TrainConfig(objective=DOPSD(states="data")).identity()["states"] == "data"
