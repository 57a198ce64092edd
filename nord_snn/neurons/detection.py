"""Recognise neurons: ours and SpikingJelly's by class, snnTorch's, which may not be installed, by module name and methods.

And read what a module says of itself: see :mod:`nord_snn.neurons.factory`.
"""

from collections.abc import Callable

from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from nord_snn.ops import OpCost
from nord_snn.ops.lif.cost import lif_update_cost

__all__ = ["cost_of_updates", "emits_binary_spikes", "is_neuron", "is_snntorch", "runs_snntorch"]


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


def emits_binary_spikes(module: nn.Module) -> bool:
    """Return ``module.emits_binary_spikes``; False if a subclass overrides ``forward`` and does not say it again."""
    for kind in type(module).__mro__:
        if "emits_binary_spikes" in kind.__dict__:
            return bool(module.emits_binary_spikes)
        if "forward" in kind.__dict__:
            return False
    return False


def cost_of_updates(neuron: nn.Module, spikes: Tensor) -> OpCost:
    """Return the cost of the updates that gave ``spikes``: what the neuron says, or that of LIF neurons."""
    own: Callable[[Tensor], OpCost] | None = getattr(neuron, "update_cost", None)
    return lif_update_cost(spikes) if own is None else own(spikes)
