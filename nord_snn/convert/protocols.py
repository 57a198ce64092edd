"""How a library's networks call their neurons, and what takes their place. One file a library registers a :class:`Protocol`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import Tensor, nn

from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import AssociativeLIFState

__all__ = ["LIBRARIES", "Protocol", "SingleStep", "advance", "protocol_of", "require_our_node"]

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


class SingleStep:
    """Mixin of modules whose network passes single time steps and loops over time itself."""

    node: AssociativeLIFNode


def protocol_of(module: nn.Module) -> Protocol | None:
    """Return the protocol of a neuron, or None for any other module. A library that is not imported has no neurons here."""
    for library in LIBRARIES:
        if library in sys.modules:
            protocol: Protocol = import_module(f"nord_snn.convert.{library}").PROTOCOL
            if protocol.is_neuron(module):
                return protocol
    return None


def advance(
    node: AssociativeLIFNode, x_seq: Tensor, state: AssociativeLIFState | None
) -> tuple[Tensor, AssociativeLIFState]:
    """Run ``node`` over ``x_seq [T, N, *]`` from ``state``, None for rest; return spikes and the new state.

    The node runs through ``__call__``, so that monitors and hooks work, and stores no state afterwards. It stays in step mode
    "m", which ``functional.set_step_mode`` may have changed.
    """
    node.step_mode = "m"
    node.first_batches.batches_left = 0  # a call may be a single time step, not a batch
    node.v, node.i_syn, node.refractory = (node.dynamics.v_rest, 0.0, 0) if state is None else state
    try:
        spikes = node(x_seq)
        return spikes, node.materialize_states((x_seq,), (node.v, node.i_syn, node.refractory), "m")
    finally:
        node.reset()


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
