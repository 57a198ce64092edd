"""How networks of a library call their neurons, and which modules replace these: one :class:`Protocol` for each library."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import nn

from nord_snn.neurons import AssociativeLIFNode

__all__ = ["LIBRARIES", "Protocol", "protocol_of", "require_our_node"]

#: Import name of a library -> its written name. ``nord_snn/convert/<import name>.py`` has its protocol and imports the library.
LIBRARIES = {"spikingjelly": "SpikingJelly", "snntorch": "snnTorch", "norse": "Norse"}


@dataclass(frozen=True)
class Protocol:
    """Functions that ``replace_neurons`` needs for the neuron modules of a library.

    Attributes:
        is_neuron: returns whether a module is a neuron module of the library.
        runs_sequences: returns whether a neuron module is called with ``[T, N, *]``, else with ``[N, *]``.
        why_not: returns why a neuron module cannot be replaced, or an empty string.
        like: ``like(module, width, channel_dim=..., **options)`` returns a node that gives the same spikes; a TypeError or
            ValueError says what cannot be matched.
        put: ``put(module, node)`` returns the replacement of ``module``, which runs ``node``.
    """

    is_neuron: Callable[[nn.Module], bool]
    runs_sequences: Callable[[nn.Module], bool]
    why_not: Callable[[nn.Module], str]
    like: Callable[..., AssociativeLIFNode]
    put: Callable[[nn.Module, nn.Module], nn.Module]


def protocol_of(module: nn.Module) -> Protocol | None:
    """Return the protocol of a neuron module, or None for any other module. Only imported libraries are considered."""
    for library in LIBRARIES:
        if library in sys.modules:
            protocol: Protocol = import_module(f"nord_snn.convert.{library}").PROTOCOL
            if protocol.is_neuron(module):
                return protocol
    return None


def require_our_node(node: nn.Module, library: str) -> AssociativeLIFNode:
    """Return ``node`` if it is an ``AssociativeLIFNode``, whose state can be passed in and out.

    Raises:
        TypeError: it is another module.
    """
    if not isinstance(node, AssociativeLIFNode):
        raise TypeError(
            f"in a network of {library}, neuron= must make an AssociativeLIFNode, whose state can be passed in and out, got "
            f"{type(node).__name__}"
        )
    return node
