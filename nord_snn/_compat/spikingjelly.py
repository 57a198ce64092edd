"""Private names of SpikingJelly, and what differs between its releases 0.0.0.0.14 and 2.0."""

import copy
from typing import Any

from spikingjelly.activation_based import base, functional
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from nord_snn._compat.torch import KeepsStatePrecision, without_graph

__all__ = ["StatefulNode", "forget_module_list", "is_release_2", "reset_value"]

#: Release 2 caches the modules that ``reset_net`` found, and offers functional forwards; 0.0.0.0.14 does neither.
is_release_2 = hasattr(functional, "invalidate_reset_cache")


def reset_value(module: base.MemoryModule, name: str) -> Any:
    """Return what ``reset()`` would put a memory back to; 0.0.0.0.14 has no public way to ask."""
    if hasattr(module, "get_reset_value"):
        return module.get_reset_value(name)
    return copy.deepcopy(module._memories_rv[name])


def forget_module_list(net: nn.Module) -> None:
    """Let ``reset_net`` search ``net`` again: release 2 caches the stateful modules of its first call."""
    if is_release_2:
        functional.invalidate_reset_cache(net)


class StatefulNode(KeepsStatePrecision, BaseNode):
    """A ``BaseNode`` whose memories keep their precision when it moves, and whose copies have no graph.

    ``BaseNode`` halves its memories in a half-precision network, detaches them in place, which views refuse, and copies
    their graph along. Memories are set past ``__setattr__``, which is for one at a time.
    """

    v_seq: Tensor | None

    def get_state(self) -> dict[str, Any]:
        """Return all memories and the stored membranes."""
        stored = {"v_seq": self.v_seq} if "v_seq" in self.__dict__ else {}  # a memory in 0.0.0.0.14
        return dict(self.named_memories()) | stored

    def set_state(self, state: dict[str, Any]) -> None:
        """Set memories and stored membranes."""
        for name, value in state.items():
            if name in self._memories:
                self._memories[name] = value
            else:
                setattr(self, name, value)

    def detach(self) -> None:
        """Cut the graph behind the memories, for truncated backpropagation through time."""
        self.set_state({name: without_graph(value) for name, value in self.get_state().items()})

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles have: the state, but not the graph behind it."""
        state = {name: without_graph(value) for name, value in self.get_state().items()}
        memories = {name: state[name] for name in self._memories}
        stored = {name: value for name, value in state.items() if name not in memories}
        return self.__dict__ | {"_memories": memories} | stored
