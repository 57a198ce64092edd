"""Recognise neurons, and read the optional attributes of :mod:`nord_snn.neurons.factory`.

Neurons of nord-snn and SpikingJelly are recognised by class; snnTorch's by module name and methods, because snnTorch may not be
installed.
"""

from collections.abc import Callable

from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from nord_snn.ops import OpCost
from nord_snn.ops.lif.cost import lif_update_cost

__all__ = ["cost_of_updates", "emits_binary_spikes", "is_neuron", "is_snntorch", "runs_snntorch"]


def is_snntorch(module: nn.Module) -> bool:
    """Return whether ``module`` is a snnTorch neuron or of a derived class."""
    libraries = (kind.__module__.partition(".")[0] for kind in type(module).__mro__)
    return "snntorch" in libraries and hasattr(module, "reset_mem")


def runs_snntorch(module: nn.Module) -> bool:
    """Return whether ``module`` is a :class:`nord_snn.integrations.snntorch.MultiStep`, which runs a neuron over sequences."""
    return type(module).__name__ == "MultiStep" and any(is_snntorch(child) for child in module.children())


def is_neuron(module: nn.Module) -> bool:
    """Return whether ``module`` is a neuron; False for those of ours with snnTorch's signatures, whose inner node counts."""
    if is_snntorch(module):
        return not any(isinstance(inner, BaseNode) for inner in module.modules())
    return isinstance(module, BaseNode)


def emits_binary_spikes(module: nn.Module) -> bool:
    """Return ``module.emits_binary_spikes``; False if a subclass overrides ``forward`` without setting it again."""
    for kind in type(module).__mro__:
        if "emits_binary_spikes" in kind.__dict__:
            return bool(module.emits_binary_spikes)
        if "forward" in kind.__dict__:
            return False
    return False


def cost_of_updates(neuron: nn.Module, spikes: Tensor) -> OpCost:
    """Return the cost of the updates that computed ``spikes``: from ``neuron.update_cost``, else the cost of LIF neurons."""
    update_cost: Callable[[Tensor], OpCost] | None = getattr(neuron, "update_cost", None)
    return lif_update_cost(spikes) if update_cost is None else update_cost(spikes)
