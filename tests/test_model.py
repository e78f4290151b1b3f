"""Sites of a plain network, and what a site refuses."""

import pytest
import torch
from torch import nn

from dopsd_core.denoiser import Denoiser, LinearSite, SitePart, plain_linear_sites

from .toy_denoiser import ToyDenoiser, ToyNet, fuse_qkv


def test_the_toy_is_a_denoiser():
    assert isinstance(ToyDenoiser(), Denoiser)


def test_every_linear_is_a_site_once():
    net = ToyNet()
    net.add_module("again", net.embed)
    sites = plain_linear_sites(net, prefix="net.")
    assert [s.module for s in sites] == [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert {s.name for s in sites} == {f"net.{n}" for n, m in net.named_modules() if isinstance(m, nn.Linear)}


def test_fused_projections_have_three_parts_in_row_order():
    sites = {s.name: s for s in ToyDenoiser(fuse_qkv(ToyNet())).sites()}
    parts = sites["layers.0.attention.qkv"].parts
    assert [p.name for p in parts] == [f"layers.0.attention.to_{x}" for x in "qkv"]
    assert [p.rows for p in parts] == [slice(0, 16), slice(16, 32), slice(32, 48)]
    assert sites["layers.0.attention.out"].parts[0].name == "layers.0.attention.to_out.0"


@pytest.mark.parametrize("rows", [[(0, 4), (3, 6)], [(4, 6), (0, 4)], [(0, 7)], [(2, 2)]])
def test_parts_must_be_ordered_and_within_the_rows(rows):
    linear = nn.Linear(2, 6)
    parts = tuple(SitePart(f"p{i}", *r) for i, r in enumerate(rows))
    with pytest.raises(ValueError, match="row order"):
        LinearSite("x", linear, 2, 6, parts, linear.forward, torch.neg)
