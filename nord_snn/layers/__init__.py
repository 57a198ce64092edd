"""Layers over sequences ``[T, N, *, D]``: T time steps, N rows, D neurons. Layers with neurons take a ``neuron`` factory."""

from nord_snn.layers.block import NordBlock
from nord_snn.layers.cache import SequenceCache
from nord_snn.layers.feed_forward import SpikingFeedForward
from nord_snn.layers.leaky_clamp import LeakyClamp
from nord_snn.layers.readout import MembraneReadout
from nord_snn.layers.resonance import CoFiringResonance
from nord_snn.layers.spike_fed import SpikeFedBlock
from nord_snn.layers.spike_fed_resonance import SpikeFedResonance
from nord_snn.layers.temporal_encoder import MultiScaleTemporalEncoder
from nord_snn.neurons import AssociativeCascade

__all__ = [
    "AssociativeCascade",
    "CoFiringResonance",
    "LeakyClamp",
    "MembraneReadout",
    "MultiScaleTemporalEncoder",
    "NordBlock",
    "SequenceCache",
    "SpikeFedBlock",
    "SpikeFedResonance",
    "SpikingFeedForward",
]
