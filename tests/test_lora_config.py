"""Which Linears a target selects, and what a target that selects nothing says."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_core.adapters import Lora
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.site_weights import part_seed
from dopsd_core.adapters.targets import match_targets, parse_targets

from .toy_denoiser import ToyDenoiser, ToyNet, fuse_qkv

NAMES = [f"{s}.{i}.{m}" for s in ("layers", "context_refiner") for i in range(12) for m in ("attention.to_q", "ff.w1")]


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("attention.to_q", 24),
        ("to_q", 24),
        ("layers.3.ff.w1", 1),
        ("layers.*", 24),
        ("*.to_q", 24),
        ("layers.?.ff.w1", 10),
        (r"re:layers\.[0-3]\..*", 8),
    ],
)
def test_kinds_of_target(target, count):
    assert len(match_targets(NAMES, [target])) == count


@pytest.mark.parametrize("target", ["o_q", "q", "LAYERS.*", "re:ff", "layers.1"])
def test_a_target_that_matches_nothing_lists_what_there_is(target):
    with pytest.raises(ValueError, match=r"layers\.N\.attention\.to_q \(x12\)") as caught:
        match_targets(NAMES, ["to_q", target])
    assert repr(target) in str(caught.value)
    assert "context_refiner.N.ff.w1 (x12)" in str(caught.value)


def test_a_near_miss_is_suggested():
    with pytest.raises(ValueError, match=r"Nearest: [^.]*layers\.N\.attention\.to_q"):
        match_targets(NAMES, ["layers.attention.toq"])


def test_a_broken_regular_expression_says_so():
    with pytest.raises(ValueError, match="not a regular expression"):
        match_targets(NAMES, ["re:("])


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("", ()),
        (" ,\n, ", ()),
        ("to_q", ("to_q",)),
        (" to_q ,layers.*.ff.w1\nto_v,", ("to_q", "layers.*.ff.w1", "to_v")),
        (r"to_q, re:layers\.\d{1,2}\..*, to_v", ("to_q", r"re:layers\.\d{1,2}\..*", "to_v")),
        ("re:a{2}, re:b{,3}\nc", ("re:a{2}", "re:b{,3}", "c")),
    ],
)
def test_commas_and_lines_separate_targets_and_a_repetition_does_not(text, targets):
    assert parse_targets(text) == targets


@pytest.mark.parametrize("targets", [("*",), ("to_q", "to_k"), ("layers.0.*",)])
@pytest.mark.parametrize("fused", [False, True])
def test_the_size_is_that_of_what_is_made(targets, fused):
    denoiser = ToyDenoiser(fuse_qkv(ToyNet()) if fused else ToyNet())
    config = Lora(rank=3, targets=targets)
    adapters = AdapterSet(denoiser.sites(), config)
    made = len(adapters.part_names()), sum(parameter.numel() for parameter in adapters.parameters())
    assert config.size(denoiser.sites()) == made


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank is 0; set it to a value from 1 to 1024"),
        ({"rank": 9999}, "rank is 9999; set it to a value from 1 to 1024"),
        ({"alpha": -1.0}, "alpha is -1.0; set it above 0"),
        ({"targets": "to_q"}, "targets is 'to_q', it must be a list of texts"),
        ({"targets": (1,)}, "it must be a list of texts"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Lora(**fields)


def test_alpha_is_twice_the_rank_unless_it_is_given():
    assert (Lora().alpha, Lora(rank=5).alpha, Lora(rank=5, alpha=3).alpha) == (32.0, 10.0, 3.0)
    assert Lora(rank=4, alpha=2.0).with_options(rank=8) == Lora(rank=8, alpha=4.0)
    assert Lora(rank=4, alpha=2.0).with_options(rank=8, alpha=1.0) == Lora(rank=8, alpha=1.0)


def test_lists_are_targets_too_and_a_familys_stand_in_for_none():
    from_json: Any = ["a", "b"]
    assert Lora(targets=from_json).targets == ("a", "b")
    assert Lora().for_targets(["a"]).targets == ("a",) == Lora(targets=("a",)).for_targets(["b"]).targets


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.text(max_size=20))
def test_part_seeds_are_torch_seeds_and_tell_names_apart(seed, name):
    value = part_seed(seed, name)
    assert 0 <= value < 2**63
    assert value != part_seed(seed, name + "x")
    assert value != part_seed(seed + 1, name)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", value) for value in (0, 1025, 2.5, True, "3", None)]
    + [("alpha", value) for value in (0, -1.0, float("inf"), float("nan"), True, "x", None, [1])]
    + [("targets", value) for value in ("to_q", (1,), ("to_q", None), (["to_q"],), {"to_q": 1}.keys() | {1})],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_name(field, value):
    good = {"rank": 2, "alpha": 2.0, "targets": ("to_q",)}
    Lora(**good)
    with pytest.raises(ValueError, match=f"{field} is "):
        Lora(**(good | {field: value}))
