"""nord-snn: neurons, layers and learning rules of the Nord spiking language model, for any spiking network.

Import neurons, layers, :func:`replace_neurons`, :func:`calibrate_thresholds` and :func:`reset` from here, and all other names
from the subpackages: :mod:`nord_snn.learning_rules`, :mod:`nord_snn.monitor`, :mod:`nord_snn.convert`,
:mod:`nord_snn.integrations`, :mod:`nord_snn.models`, and :mod:`nord_snn.ops` for pure functions.
"""

from nord_snn._version import __version__
from nord_snn.convert import calibrate_thresholds, replace_neurons
from nord_snn.layers import (
    CoFiringResonance,
    LeakyClamp,
    MembraneReadout,
    MultiScaleTemporalEncoder,
    NordBlock,
    SequenceCache,
    SpikeFedBlock,
    SpikeFedResonance,
    SpikingFeedForward,
)
from nord_snn.neurons import AssociativeCascade, AssociativeLIFNode, DenseActivation
from nord_snn.neurons.resetting import reset

__all__ = [
    "AssociativeCascade",
    "AssociativeLIFNode",
    "CoFiringResonance",
    "DenseActivation",
    "LeakyClamp",
    "MembraneReadout",
    "MultiScaleTemporalEncoder",
    "NordBlock",
    "SequenceCache",
    "SpikeFedBlock",
    "SpikeFedResonance",
    "SpikingFeedForward",
    "__version__",
    "calibrate_thresholds",
    "replace_neurons",
    "reset",
]
