"""Neurons that fire above the threshold only: the next number of the dtype of the membrane fires."""

import pytest
import torch

from nord_snn.integrations.nir.neurons import NIRNeurons
from nord_snn.integrations.snntorch import AssociativeLeaky, AssociativeSynaptic
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.neurons.strict import firing_above

pytestmark = pytest.mark.quick


class Strict(AssociativeLIFNode):
    strict = True


# The membrane is half of the input, in AssociativeLeaky the input.
NEURONS = {
    "a subclass": lambda: Strict(3, None, threshold=0.0625, beta_mem=0.5),
    "snnTorch, two states": lambda: AssociativeSynaptic(3, None, threshold=0.0625, beta=0.5),
    "snnTorch, one state": lambda: AssociativeLeaky(3, threshold=0.125, beta=0.5),
    "NIR": lambda: NIRNeurons(3, n_clusters=None, threshold=0.0625, beta_mem=0.5, strict=True, bias=None),
}


@pytest.mark.parametrize("parameters", [torch.float32, torch.float64])
@pytest.mark.parametrize("membrane", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NEURONS)
def test_the_threshold_is_silent_and_the_next_number_fires(name, membrane, parameters):
    threshold = torch.full((1, 3), 0.125, dtype=membrane)  # of the input
    for x, expected in ((threshold, 0.0), (torch.nextafter(threshold, torch.ones_like(threshold)), 1.0)):
        out = NEURONS[name]().to(parameters)(x)
        assert (out[0] if isinstance(out, tuple) else out).tolist() == [[expected] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -0.1, 0.0, 1e30])
def test_no_number_is_between_the_threshold_and_where_it_fires_and_the_gradient_is_one(dtype, value):
    threshold = torch.full((2,), value, dtype=torch.float32, requires_grad=True)
    above = firing_above(threshold, dtype)
    assert above.dtype == dtype
    assert torch.equal(above, torch.nextafter(threshold.detach().to(dtype), torch.full((2,), torch.inf, dtype=dtype)))
    above.sum().backward()
    assert threshold.grad.tolist() == [1.0, 1.0]
