"""Neurons with ``strict``, which fire only above their threshold: they fire at the next larger number of their dtype."""

import pytest
import torch

from nord_snn.integrations.nir.neurons import NIRNeurons
from nord_snn.integrations.snntorch import AssociativeLeaky, AssociativeSynaptic
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.neurons.strict import firing_above

pytestmark = pytest.mark.quick


class Strict(AssociativeLIFNode):
    strict = True


# The membrane potential is half of the input, in AssociativeLeaky equal to the input.
NEURONS = {
    "a subclass": lambda: Strict(3, None, threshold=0.0625, beta_mem=0.5),
    "snnTorch, two states": lambda: AssociativeSynaptic(3, None, threshold=0.0625, beta=0.5),
    "snnTorch, one state": lambda: AssociativeLeaky(3, threshold=0.125, beta=0.5),
    "NIR": lambda: NIRNeurons(3, n_clusters=None, threshold=0.0625, beta_mem=0.5, strict=True, bias=None),
}


@pytest.mark.parametrize("parameters", [torch.float32, torch.float64])
@pytest.mark.parametrize("membrane", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NEURONS)
def test_neurons_are_silent_at_the_threshold_and_fire_at_the_next_number(name, membrane, parameters):
    threshold = torch.full((1, 3), 0.125, dtype=membrane)  # input at which the membrane potential is the threshold
    for x, expected in ((threshold, 0.0), (torch.nextafter(threshold, torch.ones_like(threshold)), 1.0)):
        out = NEURONS[name]().to(parameters)(x)
        assert (out[0] if isinstance(out, tuple) else out).tolist() == [[expected] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -0.1, 0.0, 1e30])
def test_firing_above_returns_the_next_number_with_a_gradient_of_1(dtype, value):
    threshold = torch.full((2,), value, dtype=torch.float32, requires_grad=True)
    above = firing_above(threshold, dtype)
    assert above.dtype == dtype
    assert torch.equal(above, torch.nextafter(threshold.detach().to(dtype), torch.full((2,), torch.inf, dtype=dtype)))
    above.sum().backward()
    assert threshold.grad.tolist() == [1.0, 1.0]
