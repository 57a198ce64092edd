"""What a neuron is: ours and SpikingJelly's by their class, those of libraries that may not be installed by their looks."""

from spikingjelly.activation_based.neuron import BaseNode
from torch import nn

__all__ = ["is_neuron", "is_snntorch", "runs_snntorch"]


def is_snntorch(module: nn.Module) -> bool:
    """Whether it is one of snnTorch's neurons, or derived from one."""
    libraries = (kind.__module__.partition(".")[0] for kind in type(module).__mro__)
    return "snntorch" in libraries and hasattr(module, "reset_mem")


def runs_snntorch(module: nn.Module) -> bool:
    """Whether it is a :class:`nord_snn.integrations.snntorch.MultiStep`, which runs one of them over whole sequences."""
    return type(module).__name__ == "MultiStep" and any(is_snntorch(child) for child in module.children())


def is_neuron(module: nn.Module) -> bool:
    """Whether its output is spikes; not the snnTorch side of one of ours, which holds a node that is a neuron itself."""
    if is_snntorch(module):
        return not any(isinstance(inner, BaseNode) for inner in module.modules())
    return isinstance(module, BaseNode)
