"""Layers give the same results if several threads call them at once."""

import pytest
import torch
from helpers import wrong_in_threads
from spikingjelly.activation_based.neuron import LIFNode

from nord_snn.layers import CoFiringResonance, MembraneReadout, NordBlock, SpikeFedResonance, SpikingFeedForward
from nord_snn.neurons import AssociativeLIFNode, DenseActivation

NEURONS = {
    "ours": lambda n: AssociativeLIFNode(n, n_clusters=4),
    "SpikingJelly": lambda n: LIFNode(),
    "dense": DenseActivation,
}
LAYERS = {
    "readout": (MembraneReadout, (8,)),
    "feed forward": (SpikingFeedForward, (8, 16)),
    "resonance": (CoFiringResonance, (8, 2)),
    "spike-fed": (SpikeFedResonance, (8, 2)),
    "block": (NordBlock, (8, 2, 16)),
}


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_four_threads_get_the_results_of_a_single_thread(layer, neuron):
    _call_in_four_threads(layer, neuron, 25)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["readout", "spike-fed"])
def test_four_threads_get_the_results_of_a_single_thread_3000_times(layer):
    _call_in_four_threads(layer, "ours", 3000)


def _call_in_four_threads(layer, neuron, calls):
    kind, sizes = LAYERS[layer]
    net = kind(*sizes, neuron=NEURONS[neuron]).eval().requires_grad_(False)
    assert not wrong_in_threads(net, [2 * torch.randn(4, 2, 3, 8) for _ in range(4)], calls)
