"""Neurons: SpikingJelly nodes that run the ops of :mod:`nord_snn.ops`."""

import warnings
from typing import Any

from nord_snn.neurons.activity import NeuronActivityWarning
from nord_snn.neurons.associative_lif import AssociativeLIFNode
from nord_snn.neurons.cascade import AssociativeCascade
from nord_snn.neurons.dense import DenseActivation
from nord_snn.neurons.factory import NeuronFactory, fire_from_rest, make_neuron
from nord_snn.neurons.leaky_integrator import LeakyIntegrator
from nord_snn.neurons.presets import PRESETS

__all__ = [
    "PRESETS",
    "AssociativeCascade",
    "AssociativeLIFNode",
    "DenseActivation",
    "LeakyIntegrator",
    "NeuronActivityWarning",
    "NeuronFactory",
    "fire_from_rest",
    "make_neuron",
]


def __getattr__(name: str) -> Any:
    """Return ``DenseActivation`` under its former name, for one release."""
    if name == "SmoothActivation":
        warnings.warn("SmoothActivation is now called DenseActivation", FutureWarning, stacklevel=2)
        return DenseActivation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
