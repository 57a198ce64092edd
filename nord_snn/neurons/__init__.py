"""Neurons: SpikingJelly nodes around the ops."""

from nord_snn.neurons.associative_lif import AssociativeLIFNode
from nord_snn.neurons.cascade import AssociativeCascade
from nord_snn.neurons.factory import NeuronFactory, fire_from_rest, make_neuron
from nord_snn.neurons.smooth import SmoothActivation

__all__ = [
    "AssociativeCascade",
    "AssociativeLIFNode",
    "NeuronFactory",
    "SmoothActivation",
    "fire_from_rest",
    "make_neuron",
]
