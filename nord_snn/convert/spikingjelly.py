"""The protocol of SpikingJelly's neurons, of ``activation_based`` and of the earlier ``clock_driven``."""

from typing import Any

from spikingjelly.activation_based import neuron
from torch import nn

from nord_snn.convert.protocols import Protocol
from nord_snn.neurons import AssociativeLIFNode

__all__ = ["PROTOCOL"]

_CLOCK_DRIVEN = "spikingjelly.clock_driven.neuron"  # also the name of the module of nord_snn.integrations.clock_driven


def _is_neuron(module: nn.Module) -> bool:
    return isinstance(module, neuron.BaseNode) or _is_clock_driven(module)


def _is_clock_driven(module: nn.Module) -> bool:
    """Return whether it is a neuron of ``clock_driven``, which is not imported here: it may not be installed."""
    return any((kind.__module__, kind.__name__) == (_CLOCK_DRIVEN, "BaseNode") for kind in type(module).__mro__)


def _runs_sequences(module: nn.Module) -> bool:
    if _is_clock_driven(module):
        return type(module).__name__.startswith("MultiStep")
    return module.step_mode == "m"


def _why_not(module: nn.Module) -> str:
    return ""


def _like(module: nn.Module, width: int, **options: Any) -> AssociativeLIFNode:
    return AssociativeLIFNode.like(_as_activation_based(module), width, **options)


def _as_activation_based(module: Any) -> nn.Module:
    """Return a neuron of ``activation_based`` with the constants of one of ``clock_driven``; others as they are."""
    name = type(module).__name__.removeprefix("MultiStep")
    if type(module).__module__ != _CLOCK_DRIVEN or name not in ("IFNode", "LIFNode", "ParametricLIFNode"):
        return module
    arguments = {key: getattr(module, key) for key in ("v_threshold", "v_reset", "surrogate_function", "detach_reset")}
    if name == "LIFNode":
        arguments |= {"tau": float(module.tau), "decay_input": module.decay_input}
    elif name == "ParametricLIFNode":
        arguments |= {"decay_input": module.decay_input}
    node: Any = getattr(neuron, name)(step_mode="m" if _runs_sequences(module) else "s", **arguments)
    if name == "ParametricLIFNode":
        node.w = module.w
    return node


def _put(module: nn.Module, node: nn.Module) -> nn.Module:
    return node


PROTOCOL = Protocol(_is_neuron, _runs_sequences, _why_not, _like, _put)
