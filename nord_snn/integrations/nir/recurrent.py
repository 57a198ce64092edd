"""Recurrent layers of a NIR graph: neurons, and one map of their spikes of the last time step."""

from typing import Any, NamedTuple

import nir
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from nord_snn.integrations.nir.graphs import ScheduledNode
from nord_snn.neurons import AssociativeLIFNode

__all__ = ["AddFeedback", "Loop", "fold_loops", "recurrent_layer"]

NEURONS = (nir.IF, nir.LIF, nir.CubaLIF)


class AddFeedback(nn.Module):
    """Add a map of the last spikes to the input current: ``x[t] + feedback(s[t-1])``, with ``s = 0`` before the first step.

    Args:
        feedback: the map, on one time step.
    """

    def __init__(self, feedback: nn.Module) -> None:
        super().__init__()
        self.feedback = feedback

    def forward(self, spikes: Tensor, x: Tensor) -> Tensor:
        """Return the input current of one time step."""
        return x + self.feedback(spikes)


def recurrent_layer(neurons: nn.Module, feedback: nn.Module) -> layer.ElementWiseRecurrentContainer:
    """Return SpikingJelly's container of neurons in step mode ``"s"``, whose input is the current and the feedback."""
    return layer.ElementWiseRecurrentContainer(neurons, AddFeedback(feedback), step_mode="m")


class Loop(NamedTuple):
    """The map from the spikes of a node back to its input; ``node`` is None for the spikes themselves."""

    name: str
    node: Any


def fold_loops(scheduled: list[ScheduledNode], last: ScheduledNode) -> tuple[list[ScheduledNode], dict[str, Loop]]:
    """Return the schedule without the maps that lead from neurons back to them, and these maps by the name of the neurons.

    Raises:
        ValueError: the graph has another loop.
    """
    nodes = {item.name: item for item in scheduled}
    loops: dict[str, Loop] = {}
    for item in scheduled:
        if not item.delayed:
            continue
        back = nodes[item.delayed[0]]
        readers = [other.name for other in (*scheduled, last) if back.name in (*other.sources, *other.delayed)]
        is_own = back.name == item.name
        is_map = back.sources == (item.name,) and not back.delayed and readers == [item.name] and _is_linear(back.node)
        if len(item.delayed) > 1 or not _are_neurons(item.node) or not (is_own or is_map):
            raise ValueError(
                "a loop of the graph must be a cascade, or neurons and one linear map of their spikes, but "
                f"'{back.name}' leads back to '{item.name}'"
            )
        loops[item.name] = Loop(back.name, None if is_own else back.node)
    maps = {loop.name for loop in loops.values() if loop.node is not None}
    kept = [item._replace(delayed=()) for item in scheduled if item.name not in maps]
    return kept, loops


def _are_neurons(node: Any) -> bool:
    return isinstance(node, NEURONS) or isinstance(getattr(node, "module", None), AssociativeLIFNode)


def _is_linear(node: Any) -> bool:
    return isinstance(node, nir.Linear | nir.Affine | nir.Scale | nir.Conv1d | nir.Conv2d)
