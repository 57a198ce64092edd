"""Recognise neurons: ours and SpikingJelly's by class, snnTorch's, which may not be installed, by module name and methods."""

from spikingjelly.activation_based.neuron import BaseNode
from torch import nn

__all__ = ["is_neuron", "is_snntorch", "runs_snntorch"]


def is_snntorch(module: nn.Module) -> bool:
    """Return whether ``module`` is a snnTorch neuron or of a class derived from one."""
    libraries = (kind.__module__.partition(".")[0] for kind in type(module).__mro__)
    return "snntorch" in libraries and hasattr(module, "reset_mem")


def runs_snntorch(module: nn.Module) -> bool:
    """Return whether it is a :class:`nord_snn.integrations.snntorch.MultiStep`, a snnTorch neuron run over whole sequences."""
    return type(module).__name__ == "MultiStep" and any(is_snntorch(child) for child in module.children())


def is_neuron(module: nn.Module) -> bool:
    """Return whether its output is spikes; False for ``AssociativeSynaptic``, whose inner node is the neuron."""
    if is_snntorch(module):
        return not any(isinstance(inner, BaseNode) for inner in module.modules())
    return isinstance(module, BaseNode)
