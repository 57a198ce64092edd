"""How a library's networks call their neurons, and what takes their place. One file a library registers a :class:`Protocol`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import nn

from nord_snn.neurons import AssociativeLIFNode

__all__ = ["LIBRARIES", "Protocol", "protocol_of", "require_our_node"]

#: Module of the library -> its name. Each has a file of this name beside this one, which alone imports the library.
LIBRARIES = {"spikingjelly": "SpikingJelly", "snntorch": "snnTorch", "norse": "Norse"}


@dataclass(frozen=True)
class Protocol:
    """What the conversion knows of a library.

    Attributes:
        is_neuron: whether a module is a neuron of the library.
        runs_sequences: whether a neuron is called with ``[T, N, *]``, else with ``[N, *]``.
        why_not: why a neuron cannot be replaced, or an empty string.
        like: ``like(neuron, width, channel_dim=..., **more)`` returns neurons that give the same spikes; a TypeError says what
            cannot be matched.
        put: ``put(neuron, ours)`` returns the module that takes the place of ``neuron`` and runs ``ours``.
    """

    is_neuron: Callable[[nn.Module], bool]
    runs_sequences: Callable[[nn.Module], bool]
    why_not: Callable[[nn.Module], str]
    like: Callable[..., AssociativeLIFNode]
    put: Callable[[nn.Module, nn.Module], nn.Module]


def protocol_of(module: nn.Module) -> Protocol | None:
    """Return the protocol of a neuron, or None for any other module. A library that is not imported has no neurons here."""
    for library in LIBRARIES:
        if library in sys.modules:
            protocol: Protocol = import_module(f"nord_snn.convert.{library}").PROTOCOL
            if protocol.is_neuron(module):
                return protocol
    return None


def require_our_node(node: nn.Module, library: str) -> AssociativeLIFNode:
    """Return ``node`` if its state can be passed in and out, as networks of ``library`` do; else raise.

    Raises:
        TypeError: it is not an ``AssociativeLIFNode``.
    """
    if not isinstance(node, AssociativeLIFNode):
        raise TypeError(
            f"in a network of {library}, neuron= must make an AssociativeLIFNode, whose state the network passes on, got "
            f"{type(node).__name__}"
        )
    return node
