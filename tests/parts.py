"""Every neuron and layer of the library with 16 features, for tests that all must pass. Add new layers here."""

from collections.abc import Callable

from torch import nn

from nord_snn.layers import (
    AssociativeCascade,
    CoFiringResonance,
    LeakyClamp,
    MembraneReadout,
    MultiScaleTemporalEncoder,
    NordBlock,
    SpikeFedBlock,
    SpikeFedResonance,
    SpikingFeedForward,
)
from nord_snn.neurons import AssociativeLIFNode


def node(n: int = 16, step_mode: str = "m", **more: object) -> AssociativeLIFNode:
    """Return a node with four clusters: 4 divides all numbers of neurons in ``PARTS``."""
    return AssociativeLIFNode(n, **{"n_clusters": 4, "step_mode": step_mode} | more)  # type: ignore[arg-type]


ATTENTION = {"causal": False, "spiking_values": True, "spikes_out": True, "channels_first": True}

#: Name -> (function that makes the part, shape of its input).
PARTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "node": (node, (6, 3, 16)),
    "clamp": (lambda: LeakyClamp(16), (6, 3, 16)),
    "cascade": (lambda: AssociativeCascade(16, 4), (6, 3, 16)),
    "encoder": (lambda: MultiScaleTemporalEncoder(16), (3, 16)),
    "resonance": (lambda: CoFiringResonance(16, 2, neuron=node), (6, 2, 5, 16)),
    "feed-forward": (lambda: SpikingFeedForward(16, 32, neuron=node), (6, 3, 16)),
    "readout": (lambda: MembraneReadout(16, neuron=node), (6, 3, 16)),
    "block": (lambda: NordBlock(16, 2, 32, neuron=node), (6, 2, 5, 16)),
    "spike-fed resonance": (lambda: SpikeFedResonance(16, 2, neuron=node), (6, 2, 5, 16)),
    "spiking attention": (lambda: SpikeFedResonance(16, 2, neuron=node, norm="batch", **ATTENTION), (6, 2, 16, 5)),
    "spike-fed block": (lambda: SpikeFedBlock(16, 2, 32, neuron=node), (6, 2, 5, 16)),
}
LAYERS = {name: part for name, part in PARTS.items() if name != "node"}
