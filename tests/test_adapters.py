"""Identities of the adapter set: start, modes, fused sites, EMA, attaching and detaching."""

import copy
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_core.adapters import Lora
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.denoiser import LinearSite
from dopsd_core.families import Z_IMAGE
from dopsd_core.teachers import EmaTeacher

from .devices import DEVICE
from .toy_denoiser import ToyDenoiser, ToyNet, assert_near, fuse_qkv, linear, lora, make_pairs, randomise

X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5)).to(DEVICE)
CONDITIONS = [pair.student for pair in make_pairs(2)]


def predict(denoiser):
    return denoiser.predict_x0(X, 0.75, CONDITIONS)


def fresh(teacher="ema", randomised=True, **config):
    denoiser = ToyDenoiser()
    weights = EmaTeacher(decay=0.9) if teacher == "ema" else teacher
    adapters = AdapterSet(denoiser.sites(), lora(**config), seed=3, teacher=weights, device=DEVICE)
    if randomised:
        randomise(adapters)
    return denoiser, adapters


def test_a_new_student_is_the_base_bit_for_bit():
    denoiser, adapters = fresh(randomised=False)
    base = predict(denoiser)
    with adapters.attached():
        for mode in ("student", "teacher", "off"):
            with adapters.use(mode):
                assert torch.equal(predict(denoiser), base), mode


def test_the_student_is_the_merged_weight():
    denoiser, adapters = fresh()
    merged = copy.deepcopy(denoiser.net)
    state = adapters.state()
    for name in adapters.part_names():
        update = 2.0 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        linear(merged, name).weight += update.to(DEVICE)
    with adapters.attached():
        assert_near(predict(denoiser), predict(ToyDenoiser(merged)))


def test_gradients_are_those_of_the_merged_weight():
    denoiser, adapters = fresh()
    names = adapters.part_names()
    leaves = {k: v.to(DEVICE, copy=True).requires_grad_() for k, v in adapters.state().items()}
    weights = {
        f"{n}.weight": linear(denoiser.net, n).weight
        + 2.0 * leaves[f"{n}.lora_B.weight"] @ leaves[f"{n}.lora_A.weight"]
        for n in names
    }
    features = [c.features for c in CONDITIONS]
    torch.func.functional_call(denoiser.net, weights, (X, 0.75, features)).square().mean().backward()
    with adapters.attached():
        denoiser.net(X, 0.75, features).square().mean().backward()
    expected = [leaves[f"{n}.lora_{m}.weight"].grad for n in names for m in "AB"]
    for parameter, gradient in zip(adapters.parameters(), expected, strict=True):
        assert_near(parameter.grad, gradient)


def test_the_init_is_pefts_gaussian_and_a_function_of_the_seed():
    _, adapters = fresh(randomised=False, rank=16, alpha=16.0)
    state = adapters.state()
    drawn = torch.cat([v.flatten() for k, v in state.items() if "lora_A" in k])
    assert abs(drawn.std().item() * 16 - 1) < 0.05
    assert not any(v.any() for k, v in state.items() if "lora_B" in k)
    sites = ToyDenoiser().sites()
    again = AdapterSet(sites, lora(rank=16), seed=3).state()
    other = AdapterSet(sites, lora(rank=16), seed=4).state()
    assert all(torch.equal(state[k], again[k]) for k in state)
    assert not any(torch.equal(state[k], other[k]) for k in state if "lora_A" in k)


@pytest.mark.parametrize("targets", [("layers.*",), ("to_q", "to_v"), ("to_k",), ("*to_v", "w1")])
def test_fused_qkv_equals_split(targets):
    net = ToyNet()
    outcomes = []
    for host in (ToyDenoiser(net), ToyDenoiser(fuse_qkv(net))):
        adapters = AdapterSet(host.sites(), lora(targets=targets), seed=3, device=DEVICE)
        start = adapters.state()
        generator = torch.Generator().manual_seed(0)
        drawn = {
            k: v if "lora_A" in k else torch.randn(v.shape, generator=generator) / 3 for k, v in sorted(start.items())
        }
        adapters.load_state("student", drawn)
        with adapters.attached():
            out = predict(host)
            out.square().mean().backward()
        outcomes.append((start, out.detach(), _gradients(adapters)))
    (split_start, split_out, split_grad), (fused_start, fused_out, fused_grad) = outcomes
    assert split_start.keys() == fused_start.keys()
    assert all(torch.equal(split_start[k], fused_start[k]) for k in split_start)
    assert_near(fused_out, split_out)
    for key, gradient in split_grad.items():
        assert_near(fused_grad[key], gradient)


def _gradients(adapters):
    """The gradients under the names of `state`; they take the place of the weights."""
    for parameter in adapters.parameters():
        parameter.data.copy_(parameter.grad)
    return adapters.state()


# -- modes and teachers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["ema", "frozen", "same"])
def test_modes_choose_the_weights(teacher):
    denoiser, adapters = fresh(teacher)
    base = predict(denoiser)
    with adapters.attached():
        outs = {}
        for mode in ("student", "teacher", "off"):
            with adapters.use(mode):
                outs[mode] = predict(denoiser)
    assert torch.equal(outs["off"], base)
    assert not torch.allclose(outs["student"], base)
    assert torch.equal(outs["teacher"], base) == (teacher == "frozen")
    assert torch.equal(outs["teacher"], outs["student"]) == (teacher == "same")


@pytest.mark.parametrize("teacher", ["ema", "frozen", "same"])
def test_only_the_student_gets_a_gradient(teacher):
    denoiser, adapters = fresh(teacher)
    with adapters.attached():
        for mode in ("teacher", "off"):
            with adapters.use(mode):
                assert not predict(denoiser).requires_grad
        predict(denoiser).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.parameters())
    assert all(p.grad is None for p in denoiser.net.parameters())


def test_use_restores_the_previous_mode_when_nested_and_after_an_exception():
    _, adapters = fresh()
    with adapters.use("off"):
        with pytest.raises(KeyError), adapters.use("teacher"), adapters.use("student"):
            raise KeyError
        assert adapters.mode == "off"
    assert adapters.mode == "student"
    with pytest.raises(ValueError, match="'studnet'"):
        adapters.mode = "studnet"  # pyright: ignore[reportAttributeAccessIssue]


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 1), st.integers(1, 5))
def test_ema_closed_form(decay, count):
    """theta_bar_n = decay^n theta_bar_0 + (1 - decay^n) theta, for a theta that stays."""
    adapters = AdapterSet(ToyDenoiser().sites(), lora(), teacher=EmaTeacher(decay=decay))
    randomise(adapters)
    start, student = adapters.state("teacher"), adapters.state("student")
    for _ in range(count):
        adapters.update_teacher()
    for key, value in adapters.state("teacher").items():
        expected = decay**count * start[key] + (1 - decay**count) * student[key]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_ema_does_not_underflow():
    """At .9999 an update in bf16 would be lost in rounding; in fp32 a thousand of them arrive."""
    adapters = AdapterSet(ToyDenoiser().sites(), lora(), teacher=EmaTeacher(decay=0.9999))
    key = next(k for k in adapters.state() if "lora_B" in k)
    adapters.load_state("student", {k: torch.ones_like(v) for k, v in adapters.state().items()})
    for _ in range(1000):
        adapters.update_teacher()
    torch.testing.assert_close(adapters.state("teacher")[key], torch.full((16, 3), 1 - 0.9999**1000), rtol=1e-3, atol=0)


def test_teachers_without_weights_have_an_empty_state():
    for teacher in ("frozen", "same"):
        _, adapters = fresh(teacher)
        adapters.update_teacher()
        assert adapters.state("teacher") == {}
        adapters.load_state("teacher", {})


# -- state -------------------------------------------------------------------------------------------------------------


def test_state_is_a_copy_and_loads_back_into_the_same_parameters():
    _, adapters = fresh()
    parameters, state = adapters.parameters(), adapters.state()
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    adapters.load_state("student", state)
    assert all(a is b for a, b in zip(parameters, adapters.parameters(), strict=True))
    assert all(torch.equal(adapters.state()[k], v) for k, v in state.items())


def test_load_refuses_what_does_not_fit_and_changes_nothing():
    _, adapters = fresh()
    state = adapters.state()
    first, *rest = state
    zeros = {k: torch.zeros_like(v) for k, v in state.items()}
    with pytest.raises(ValueError, match="1 missing.*1 unexpected"):
        adapters.load_state("student", {"x": zeros[first], **{k: zeros[k] for k in rest}})
    with pytest.raises(ValueError, match="expected shape"):
        adapters.load_state("student", {**zeros, rest[-1]: torch.zeros(1, 1)})
    assert all(torch.equal(adapters.state()[k], v) for k, v in state.items())


# -- attaching ---------------------------------------------------------------------------------------------------------


def _fingerprint(net):
    forwards = {name: module.__dict__.get("forward") for name, module in net.named_modules()}
    return {k: v.clone() for k, v in net.state_dict().items()}, forwards


def _same(net, fingerprint):
    state, forwards = fingerprint
    now, forwards_now = _fingerprint(net)
    return now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in state) and forwards_now == forwards


def test_detached_is_bit_identical_also_after_an_exception():
    denoiser, adapters = fresh()
    before, out = _fingerprint(denoiser.net), predict(denoiser)
    with pytest.raises(KeyError), adapters.attached():
        assert not torch.equal(predict(denoiser), out)
        predict(denoiser).sum().backward()
        raise KeyError
    assert _same(denoiser.net, before)
    assert torch.equal(predict(denoiser), out)
    assert not adapters.is_attached


def test_attaching_leaves_names_and_state_dict_alone():
    denoiser, adapters = fresh()
    names = [n for n, _ in denoiser.net.named_modules()]
    keys = list(denoiser.net.state_dict())
    with adapters.attached():
        assert [n for n, _ in denoiser.net.named_modules()] == names
        assert list(denoiser.net.state_dict()) == keys


def test_a_second_set_is_refused_and_the_first_continues():
    denoiser, adapters = fresh()
    second = AdapterSet(denoiser.sites(), lora(), device=DEVICE)
    with adapters.attached():
        out = predict(denoiser)
        for other, whose in ((adapters, "this"), (second, "another")):
            with pytest.raises(RuntimeError, match=f"{whose} adapter set is already attached to 'embed'"):
                other.attach()
        late = AdapterSet(denoiser.sites(), lora(), device=DEVICE)
        with pytest.raises(RuntimeError, match="already attached"):
            late.attach()
        assert torch.equal(predict(denoiser), out)
    with second.attached():
        predict(denoiser)


def test_an_attach_that_fails_half_way_is_undone():
    denoiser, _ = fresh()
    before = _fingerprint(denoiser.net)

    class ReadOnly(dict):
        def __setitem__(self, key, value):
            raise OSError("evicted")

    class Brittle:
        __dict__ = ReadOnly()

    sites = denoiser.sites()
    sites.append(LinearSite("brittle", cast(torch.nn.Module, Brittle()), 2, 2, (), torch.neg, torch.neg))
    adapters = AdapterSet(sites, lora())
    with pytest.raises(OSError, match="evicted"):
        adapters.attach()
    assert _same(denoiser.net, before)


def test_a_forward_that_was_there_before_comes_back():
    denoiser, _ = fresh()
    calls = []
    module = denoiser.net.embed
    original = module.forward

    def theirs(input):
        calls.append(1)
        return original(input)

    module.forward = theirs
    adapters = AdapterSet(denoiser.sites(), lora(), device=DEVICE)
    with adapters.attached():
        predict(denoiser)
    assert calls == [1]
    assert module.__dict__["forward"] is theirs


def test_a_forward_put_over_ours_stays_and_passes_through_after_detach(caplog):
    denoiser, adapters = fresh()
    base = predict(denoiser)
    adapters.attach()
    module = linear(denoiser.net, "layers.0.feed_forward.w1")
    ours = module.forward
    module.forward = lambda input: ours(input)
    adapters.detach()
    assert "has another forward" in caplog.text
    assert torch.equal(predict(denoiser), base)


def test_every_linear_is_kept_out_of_the_graph():
    """Also those without LoRA: even a base that requires gradients gets none, in weight or bias."""
    denoiser, adapters = fresh(targets=("to_q",))
    for site in denoiser.sites():
        site.module.requires_grad_(True)
    with adapters.attached():
        predict(denoiser).sum().backward()
    assert all(p.grad is None for s in denoiser.sites() for p in s.module.parameters())


def test_bf16_network_trains_fp32_masters():
    denoiser, adapters = fresh()
    denoiser.net.to(torch.bfloat16)
    features = [c.features.bfloat16().to(DEVICE) for c in CONDITIONS]
    adapters.attach()
    embed = denoiser.net.embed
    hidden = denoiser.net.layers[0](embed(X.bfloat16().flatten(2).mT))
    assert hidden.dtype == torch.bfloat16
    hidden.float().sum().backward()
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    assert any(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.parameters())
    assert features[0].dtype == torch.bfloat16


def test_bad_sites_and_settings_are_refused():
    sites = ToyDenoiser().sites()
    with pytest.raises(ValueError, match="share one module"):
        AdapterSet([*sites, sites[0]], lora())
    with pytest.raises(ValueError, match="distinct.*embed"):
        AdapterSet([*sites, *ToyDenoiser().sites()], lora())
    with pytest.raises(ValueError, match="teacher is 'emma'; choose one of ema, frozen, same"):
        AdapterSet(sites, lora(), teacher="emma")
    with pytest.raises(ValueError, match="ema_decay is 1.5; set it to a value from 0 to 1"):
        EmaTeacher(decay=1.5)
    with pytest.raises(ValueError, match="targets are empty"):
        AdapterSet(sites, Lora())
    with pytest.raises(ValueError, match=r"'to_p'.*layers\.N\.attention\.to_q \(x2\)"):
        AdapterSet(sites, lora(targets=("to_p",)))


def test_family_targets_fit_the_toy():
    with pytest.raises(ValueError, match=r"feed_forward.w3"):
        AdapterSet(ToyDenoiser().sites(), Z_IMAGE.lora_config(rank=4))
