"""Recognise neurons, and read their optional attributes, which :mod:`nord_snn.neurons.factory` describes.

Neurons of nord-snn and SpikingJelly are recognised by class, neurons of snnTorch and Norse by the names of their modules and
base classes, because these libraries may not be installed.
"""

from collections.abc import Callable
from typing import Any

from spikingjelly.activation_based import neuron as spikingjelly_neurons
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from nord_snn.ops import OpCost
from nord_snn.ops.lif.cost import lif_update_cost, parallel_update_cost

__all__ = [
    "cost_of_updates",
    "emits_binary_spikes",
    "is_neuron",
    "is_norse",
    "is_snntorch",
    "runs_sequences",
    "runs_snntorch",
    "states_its_cost",
]


def _classes(*names: str) -> tuple[type, ...]:
    """Return the classes of SpikingJelly's neurons with these names, of which release 0.0.0.0.14 lacks some."""
    return tuple(getattr(spikingjelly_neurons, name) for name in names if hasattr(spikingjelly_neurons, name))


#: The parallel spiking neuron (Fang et al. 2023), which always runs whole sequences and has no ``step_mode``.
_PSN = _classes("PSN")

#: All parallel spiking neurons.
_PARALLEL = (*_PSN, *_classes("MaskedPSN", "SlidingPSN"))

#: SpikingJelly's neurons that are not derived from ``BaseNode``.
_NOT_BASE_NODES = (*_PARALLEL, *_classes("GatedLIFNode", "SimpleBaseNode"))

#: Norse's base classes of neurons that take sequences ``[T, N, *]``, and of neurons that take single time steps.
_NORSE_SEQUENCES = {"SNN", "SNNRecurrent"}
_NORSE_STEPS = {"SNNCell", "SNNRecurrentCell", "CobaLIFCell", "LIFCorrelation"}

#: Norse's leaky integrators, which return membrane potentials.
_NORSE_INTEGRATORS = {"LI", "LICell", "LIBoxCell"}


def _norse_names(module: nn.Module) -> set[str]:
    """Return the names of Norse's classes from which ``module`` is derived."""
    return {kind.__name__ for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "norse"}


def is_norse(module: nn.Module) -> bool:
    """Return whether ``module`` is a neuron of Norse, which returns ``(spikes, state)``; False for its leaky integrators."""
    names = _norse_names(module)
    return bool(names & (_NORSE_SEQUENCES | _NORSE_STEPS)) and not names & _NORSE_INTEGRATORS


def is_snntorch(module: nn.Module) -> bool:
    """Return whether the class of ``module`` is a snnTorch neuron or derived from one."""
    libraries = (kind.__module__.partition(".")[0] for kind in type(module).__mro__)
    return "snntorch" in libraries and hasattr(module, "reset_mem")


def runs_snntorch(module: nn.Module) -> bool:
    """Return whether ``module`` is a :class:`nord_snn.integrations.snntorch.MultiStep`, which runs a neuron over sequences."""
    return type(module).__name__ == "MultiStep" and any(is_snntorch(child) for child in module.children())


def is_neuron(module: nn.Module) -> bool:
    """Return whether ``module`` is a neuron.

    False for nord-snn's neurons with snnTorch's signatures: they contain an ``AssociativeLIFNode``, which is the neuron.
    """
    if is_snntorch(module):
        return not any(isinstance(inner, BaseNode) for inner in module.modules())
    return isinstance(module, (BaseNode, *_NOT_BASE_NODES)) or is_norse(module)


def runs_sequences(module: nn.Module, default: str = "s") -> bool:
    """Return whether ``module`` takes whole sequences ``[T, N, *]``; ``default`` replaces a missing ``step_mode``."""
    if _norse_names(module):
        return bool(_norse_names(module) & _NORSE_SEQUENCES)
    return runs_snntorch(module) or isinstance(module, _PSN) or getattr(module, "step_mode", default) == "m"


def emits_binary_spikes(module: nn.Module) -> bool:
    """Return ``module.emits_binary_spikes``, False if missing or if a subclass overrides ``forward`` without defining it."""
    for kind in type(module).__mro__:
        if "emits_binary_spikes" in kind.__dict__:
            return bool(module.emits_binary_spikes)
        if "forward" in kind.__dict__:
            return False
    return False


def states_its_cost(neuron: nn.Module) -> bool:
    """Return whether :func:`cost_of_updates` knows the cost of ``neuron``, including products, and does not assume a LIF."""
    return hasattr(neuron, "update_cost") or isinstance(neuron, _PARALLEL)


def cost_of_updates(neuron: nn.Module, spikes: Tensor) -> OpCost:
    """Return the cost of the updates that computed ``spikes``: from ``neuron.update_cost``, else the cost of LIF neurons.

    Each output of SpikingJelly's parallel spiking neurons costs a weighted sum of inputs.
    """
    update_cost: Callable[[Tensor], OpCost] | None = getattr(neuron, "update_cost", None)
    if update_cost is not None:
        return update_cost(spikes)
    if isinstance(neuron, _PARALLEL):
        n_inputs: Any = getattr(neuron, "k", None) or neuron.T  # PSN's sums are over all T time steps
        return parallel_update_cost(spikes, int(n_inputs))
    return lif_update_cost(spikes)
