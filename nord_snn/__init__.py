"""nord-snn: the five mechanisms of the Nord spiking language model as parts for any spiking network.

Import neurons and layers from here. Everything else is one level down: :mod:`nord_snn.learning_rules`,
:mod:`nord_snn.monitor`, :mod:`nord_snn.convert`, :mod:`nord_snn.integrations`, :mod:`nord_snn.models`, and the pure functions
in :mod:`nord_snn.ops`. :func:`replace_neurons` and :func:`calibrate_thresholds` are here, too.
"""

from spikingjelly.activation_based import functional
from torch import nn

from nord_snn._compat.spikingjelly import clear_module_cache
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
from nord_snn.neurons.detection import is_snntorch

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


def reset(net: nn.Module) -> None:
    """Reset every stateful module in ``net`` (nord-snn's, SpikingJelly's and snnTorch's) to rest.

    Args:
        net: any module; its submodules are searched too.

    Example:
        >>> import nord_snn, torch
        >>> from nord_snn.neurons import AssociativeLIFNode
        >>> node = AssociativeLIFNode(8, n_clusters=4, step_mode="m")
        >>> _ = node(torch.rand(5, 2, 8)); nord_snn.reset(node); node.v
        0.0
    """
    # reset_net caches its module list, which lacks neurons that were replaced after its first call.
    clear_module_cache(net)
    snntorch_neurons = [module for module in net.modules() if is_snntorch(module)]
    for module in snntorch_neurons:
        module.__dict__.pop("reset", None)  # snnTorch stores a tensor under this name, SpikingJelly would call it
    functional.reset_net(net)
    for module in snntorch_neurons:
        module.reset_mem()  # type: ignore[operator]
