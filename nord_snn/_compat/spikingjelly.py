"""Private names of SpikingJelly, and differences between its releases 0.0.0.0.14 and 2.0."""

import copy
from typing import Any

from spikingjelly.activation_based import base, functional
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from nord_snn._compat.torch import StatePrecisionMixin, detached_state, in_backward

__all__ = ["StatefulModule", "StatefulNode", "clear_module_cache", "is_release_2", "reset_value"]

#: Release 2 caches the modules that ``reset_net`` resets, and its nodes have ``functional_forward``; 0.0.0.0.14 has neither.
is_release_2 = hasattr(functional, "invalidate_reset_cache")


def reset_value(module: base.MemoryModule, name: str) -> Any:
    """Return the value to which ``reset()`` sets a registered memory; 0.0.0.0.14 has no public method for it."""
    if hasattr(module, "get_reset_value"):
        return module.get_reset_value(name)
    return copy.deepcopy(module._memories_rv[name])


def clear_module_cache(net: nn.Module) -> None:
    """Clear the list of stateful modules of ``net`` that ``reset_net`` of release 2 caches in its first call."""
    if is_release_2:
        functional.invalidate_reset_cache(net)


class _DirectState(StatePrecisionMixin):
    """Mixin for a ``MemoryModule`` whose state stays float32 in ``half()``, and whose copies have a detached state.

    SpikingJelly casts the state to half precision with the network, copies it with its autograd graph, and detaches it in
    place, which fails for views.
    """

    _memories: dict[str, Any]
    named_memories: Any
    v_seq: Tensor | None

    def get_memories(self, *names: str) -> tuple[Any, ...]:
        """Return memories by name: faster than attributes, which torch searches among parameters and buffers first."""
        memories = self._memories
        return tuple([memories[name] for name in names])

    def set_memories(self, values: dict[str, Any]) -> None:
        """Set memories by name: one update of a dict instead of one ``__setattr__`` per memory."""
        self._memories.update(values)

    def reset(self) -> None:
        """Set the state to rest."""
        super().reset()  # type: ignore[misc]
        self.__dict__["_backward_of_reset"] = in_backward()

    def check_not_recomputed(self) -> None:
        """Raise if gradient checkpointing calls the module again: its state is no longer that of the first call.

        A function that begins with ``reset()`` can be checkpointed.

        Raises:
            RuntimeError: the module is called in a backward pass, in which it was not reset.
        """
        backward = in_backward()
        if backward is not None and self.__dict__.get("_backward_of_reset") != backward:
            raise RuntimeError(
                f"gradient checkpointing called {type(self).__name__} again in the backward pass, where its state is no longer "
                "that of the first call, so the gradient would be wrong: checkpoint a function that begins with reset(), or a "
                "layer that starts from rest (stateless=True), or do not checkpoint it"
            )

    def get_state(self) -> dict[str, Any]:
        """Return the state by name, and the stored membrane potentials."""
        stored = (
            {"v_seq": self.v_seq} if "v_seq" in self.__dict__ else {}
        )  # a memory in 0.0.0.0.14, an attribute in 2.0
        return dict(self.named_memories()) | stored

    def set_state(self, state: dict[str, Any]) -> None:
        """Set the state and the stored membrane potentials."""
        for name, value in state.items():
            if name in self._memories:
                self._memories[name] = value
            else:
                setattr(self, name, value)

    def detach(self) -> None:
        """Detach the state, for truncated backpropagation through time."""
        self.set_state({name: detached_state(value) for name, value in self.get_state().items()})

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies and pickles, with detached state."""
        state = {name: detached_state(value) for name, value in self.get_state().items()}
        memories = {name: state[name] for name in self._memories}
        stored = {name: value for name, value in state.items() if name not in memories}
        return self.__dict__ | {"_memories": memories} | stored


class StatefulNode(_DirectState, BaseNode):
    """A ``BaseNode`` with the state of :class:`_DirectState`."""


class StatefulModule(_DirectState, base.MemoryModule):
    """A ``MemoryModule`` with the state of :class:`_DirectState`."""
