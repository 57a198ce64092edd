"""Recurrent layers of a NIR graph: neurons, and one map from their spikes of the last time step to their input."""

from typing import Any, NamedTuple

import nir
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from nord_snn.integrations.nir.graphs import ScheduledNode
from nord_snn.neurons import AssociativeLIFNode

__all__ = ["AddFeedback", "Loop", "fold_loops", "recurrent_layer"]

NEURONS = (nir.IF, nir.LIF, nir.CubaLIF)


class AddFeedback(nn.Module):
    """Add a map of the last spikes to the input current: ``x[t] + feedback(s[t-1])``, with no spikes before t = 0.

    Args:
        feedback: the map, from spikes ``[N, *]`` of one time step to current ``[N, *]``.
    """

    def __init__(self, feedback: nn.Module) -> None:
        super().__init__()
        self.feedback = feedback

    def forward(self, spikes: Tensor, x: Tensor) -> Tensor:
        """Return the input current of one time step."""
        return x + self.feedback(spikes)


def recurrent_layer(neurons: nn.Module, feedback: nn.Module) -> layer.ElementWiseRecurrentContainer:
    """Return SpikingJelly's container that runs neurons in step mode ``"s"`` on the sum of current and feedback."""
    return layer.ElementWiseRecurrentContainer(neurons, AddFeedback(feedback), step_mode="m")


class Loop(NamedTuple):
    """The map from the spikes of neurons to their input.

    Attributes:
        name: name of the node of the map, or of the neurons.
        node: the node of the map; None for the identity.
    """

    name: str
    node: Any


def fold_loops(scheduled: list[ScheduledNode], output: ScheduledNode) -> tuple[list[ScheduledNode], dict[str, Loop]]:
    """Return the schedule without maps from neurons' spikes to their input, and these maps by the name of the neurons.

    Raises:
        ValueError: the graph has another loop.
    """
    nodes = {item.name: item for item in scheduled}
    loops: dict[str, Loop] = {}
    for item in scheduled:
        if not item.delayed:
            continue
        source = nodes[item.delayed[0]]
        targets = [other.name for other in (*scheduled, output) if source.name in (*other.sources, *other.delayed)]
        is_identity = source.name == item.name
        is_map = (
            source.sources == (item.name,) and not source.delayed and targets == [item.name] and _is_linear(source.node)
        )
        if len(item.delayed) > 1 or not _are_neurons(item.node) or not (is_identity or is_map):
            raise ValueError(
                "a loop of the graph must be a cascade, or neurons and one linear map of their spikes, but "
                f"'{source.name}' leads back to '{item.name}'"
            )
        loops[item.name] = Loop(source.name, None if is_identity else source.node)
    maps = {loop.name for loop in loops.values() if loop.node is not None}
    return [item._replace(delayed=()) for item in scheduled if item.name not in maps], loops


def _are_neurons(node: Any) -> bool:
    return isinstance(node, NEURONS) or isinstance(getattr(node, "module", None), AssociativeLIFNode)


def _is_linear(node: Any) -> bool:
    return isinstance(node, nir.Linear | nir.Affine | nir.Scale | nir.Conv1d | nir.Conv2d)
