"""FrozenLinear is plain autograd minus the weight: same gradient, nothing saved, no node where none is needed."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dopsd_core.adapters.frozen_linear import frozen_linear
from dopsd_core.denoiser import plain_linear_sites


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(5, 7)


def _site(linear):
    return plain_linear_sites(linear)[0]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5)])
def test_gradient_is_that_of_plain_autograd(linear, shape):
    x = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad(linear(x).sin().sum(), x)[0]
    y = frozen_linear(x, _site(linear))
    assert torch.equal(y, linear(x))
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), x)[0], expected, rtol=1e-6, atol=1e-7)


def test_the_weight_gets_no_gradient_and_nothing_is_saved(linear):
    saved = []
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = frozen_linear(x, _site(linear))
    y.sum().backward()
    assert saved == []
    assert linear.weight.grad is None
    assert linear.bias.grad is None


def test_no_graph_where_no_gradient_is_needed(linear):
    assert not frozen_linear(torch.randn(3, 5), _site(linear)).requires_grad
    with torch.no_grad():
        assert not frozen_linear(torch.randn(3, 5, requires_grad=True), _site(linear)).requires_grad


def test_gradient_has_the_dtype_of_the_input_under_autocast(linear):
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_linear(x, _site(linear))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(3, 5), rtol=2e-2, atol=2e-2)


def test_weights_made_in_inference_mode_pass_gradients_through():
    with torch.inference_mode():
        linear = nn.Linear(5, 7)
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="[Ii]nference tensor"):
        linear(x).sum().backward()
    frozen_linear(x, _site(linear)).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, linear.weight.sum(0).expand(3, 5))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_view_that_the_host_returns_may_be_written_into(linear, requires_grad):
    """FLUX adds into what a Linear gives it; a host's Linear may give a view, as a reshape of its output is."""
    site = replace(_site(linear), forward=lambda x: linear(x.reshape(-1, 5)).reshape(*x.shape[:-1], 7))
    x, other = torch.randn(2, 3, 5, requires_grad=requires_grad), torch.randn(2, 3, 7, requires_grad=True)

    def run(y):
        y += other
        return torch.autograd.grad(y.sin().sum(), [other, *([x] if requires_grad else [])])

    for got, wanted in zip(run(frozen_linear(x, site)), run(linear(x)), strict=True):
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        assert torch.equal(frozen_linear(x, site), linear(x))
