"""Surrogate derivatives: each is the derivative of its primitive; atan, nord_atan and sigmoid compared with SpikingJelly's."""

import math

import pytest
import torch
from spikingjelly.activation_based import surrogate as sj

from nord_snn.ops import SURROGATES, spike

pytestmark = pytest.mark.quick

X = torch.linspace(-2, 2, 401, dtype=torch.float64)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("alpha", [0.7, 4.0, 25.0])
def test_the_derivative_equals_that_of_the_primitive(name, alpha):
    primitive, derivative = SURROGATES[name]
    h = 1e-6
    numeric = (primitive(X + h, alpha) - primitive(X - h, alpha)) / (2 * h)
    smooth = X.abs() > 2 * h  # at 0 the derivative of fast_sigmoid has a kink
    assert torch.allclose(numeric[smooth], derivative(X, alpha)[smooth], atol=1e-7)


@pytest.mark.parametrize("name", SURROGATES)
def test_spike_fires_at_and_above_zero_and_backpropagates_the_derivative(name):
    x = X.clone().requires_grad_()
    s = spike(x, name, alpha=3.0)
    assert torch.equal(s, (X >= 0).double())
    s.sum().backward()
    assert torch.equal(x.grad, SURROGATES[name].derivative(X, 3.0))


def test_nord_atan_is_half_of_spikingjellys_atan():
    x = X.clone().requires_grad_()
    sj.ATan(alpha=2 * 4.0 / math.pi)(x).sum().backward()
    assert torch.allclose(SURROGATES["nord_atan"].derivative(X, 4.0), x.grad / 2)


def test_atan_and_sigmoid_equal_spikingjellys():
    for name, surrogate in (("atan", sj.ATan(alpha=2.0)), ("sigmoid", sj.Sigmoid(alpha=2.0))):
        x = X.clone().requires_grad_()
        surrogate(x).sum().backward()
        assert torch.allclose(SURROGATES[name].derivative(X, 2.0), x.grad, atol=1e-9)


def test_a_callable_surrogate_has_a_gradient():
    x = X.clone().requires_grad_()
    spike(x, sj.PiecewiseLeakyReLU()).sum().backward()
    assert x.grad.max() > 0


def test_an_unknown_name_raises_with_the_known_names():
    with pytest.raises(ValueError, match=r"unknown surrogate 'atam'.*nord_atan"):
        spike(X, "atam")
