"""OneStepNeuron: the stored states of a node that is called with snnTorch's signatures."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from nord_snn._compat.torch import assert_in_graph, initialize_lazy_module, is_view
from nord_snn.neurons.activity import has_values
from nord_snn.neurons.associative_lif import AssociativeLIFNode, LazyAssociativeLIFNode
from nord_snn.neurons.presets import OF_PRESET
from nord_snn.ops import AssociativeLIFState
from nord_snn.ops.checks import as_number, check_flags, check_tensor, describe

__all__ = ["NO_PARTS", "STORED", "OneStepNeuron", "StrictNode", "check_initial", "strict_node"]

#: Attributes of :class:`OneStepNeuron` that a call changes.
STORED = ("_syn", "_mem", "_refractory", "_assigned", "_call")

_calls = itertools.count(1)
#: Attribute of a returned ``mem``: the number of the call that computed it.
_CALL = "_nord_snn_call"
#: Synaptic current and refractory counter of a node that has neither.
NO_PARTS: Any = (None, None)


class StrictNode(AssociativeLIFNode):
    """Fire only above the threshold, not at it, as snnTorch's neurons do.

    Attributes:
        resets_outside: whether ``AssociativeLeaky`` resets the membrane between the calls of the node, not the node itself.
    """

    strict = True
    resets_outside = False

    def neuron_dimension(self, ndim: int) -> int:
        """Return the dimension of the neurons in a time step of ``ndim`` dimensions, counted from the end."""
        return self._dimension(ndim)


class LazyStrictNode(LazyAssociativeLIFNode, StrictNode):
    """A :class:`StrictNode` whose width is found at the first call."""

    cls_to_become = StrictNode


def strict_node(n_features: int | None, *arguments: Any, **more: Any) -> StrictNode:
    """Return a :class:`StrictNode`, or a lazy one if ``n_features`` is None."""
    if n_features is not None and not isinstance(n_features, int):
        raise TypeError(
            f"n_features must be a whole number or None, got {describe(n_features)}: pass beta by name, beta=0.9"
        )
    return (LazyStrictNode if n_features is None else StrictNode)(n_features, *arguments, step_mode="s", **more)


def check_initial(spike_grad: Any, flags: dict[str, Any], **constants: Any) -> None:
    """Raise unless the arguments of a neuron have the right type, under snnTorch's names."""
    check_flags(**flags)
    for name, value in constants.items():
        if isinstance(value, Tensor):
            check_tensor(value, name, "of one element or [D]")
        elif value is not OF_PRESET:
            as_number(value, name)
    given = spike_grad is not None and spike_grad is not OF_PRESET
    if given and not callable(spike_grad) and not isinstance(spike_grad, str):
        raise TypeError(f"spike_grad must be a name or a callable, got {describe(spike_grad)}")


class OneStepNeuron(nn.Module):
    """Mixin: run ``self.node`` for one time step and store its state, as snnTorch's neurons do.

    Callers pass ``mem``, and ``syn`` if the signature is that of ``Synaptic``. The other parts of the state (refractory counters,
    and otherwise the synaptic current) are stored after each call and used in the next one with a ``mem`` of the same shape. If
    all states that are passed are zero, these parts are 0, too.
    """

    node: AssociativeLIFNode
    init_hidden: bool
    output: bool
    runs_single_steps = True
    #: Whether the synaptic current is stored, because callers do not pass it.
    stores_current = False

    def _start_at_rest(self) -> None:
        for name in ("_syn", "_mem", "_refractory"):
            self.register_buffer(name, torch.zeros(0), persistent=False)
        self._syn: Tensor
        self._mem: Tensor
        self._refractory: Tensor
        self._assigned = True  # whether the states were assigned, also by a reset, and not computed by a call
        self._call = 0

    @property
    def beta(self) -> Tensor:
        """Return the membrane decay, ``[1]`` or ``[D]``."""
        return self.node.beta_mem

    @property
    def threshold(self) -> Tensor:
        """Return the thresholds, ``[D]``."""
        return self.node.v_threshold

    @property
    def mem(self) -> Tensor:
        """Return the membrane potential after the last time step. Assigning it sets all refractory counters to 0."""
        return self._mem

    @mem.setter
    def mem(self, value: Tensor) -> None:
        self._assign_mem(value)

    def _assign_mem(self, value: Tensor) -> None:
        """Assign ``mem``; methods call this one, because TorchDynamo does not run setters of properties."""
        self._mem = value
        if self.stores_current or self._syn.shape != value.shape:
            self._syn = torch.zeros_like(value)
        self._refractory = torch.zeros_like(value, dtype=torch.int32)
        self._assigned = True

    def rest_like(self, x: Tensor) -> None:
        """Set the states to rest in the shape of ``x``."""
        self._syn = torch.zeros_like(x, requires_grad=False)
        self._assign_mem(torch.zeros_like(x, requires_grad=False))

    def _rests_in_another_shape(self, x: Tensor) -> bool:
        """Return whether the stored states are those of a reset before a batch of another shape."""
        mem, syn = self._mem, self._syn
        if not self._assigned or mem.shape == x.shape:
            return False
        if mem.is_meta:
            return True
        if torch.compiler.is_compiling():
            assert_in_graph(~(mem.any() | syn.any()), self._wrong_shape(x, mem))
        elif mem.any() or syn.any():
            raise ValueError(self._wrong_shape(x, mem))
        return True

    @property
    def _membrane_only(self) -> bool:
        return self.stores_current and self.node.is_membrane_only

    @property
    def _has_hidden_parts(self) -> bool:
        """Return whether there is a part of the state that callers do not pass."""
        return (self.stores_current and not self.node.is_membrane_only) or self.node.refractory_steps > 0

    def _step(self, x: Tensor, mem: Tensor | None, syn: Tensor | None = None) -> Tensor:
        """Run one time step from the states that are passed, else from the stored states; store the new states."""
        if isinstance(self.node, LazyModuleMixin):
            initialize_lazy_module(self.node, x.unsqueeze(0) if self.node.step_mode == "m" else x)
        self.node.check_input(x, "s")
        if self.init_hidden and not (mem is None and syn is None):
            raise TypeError("with init_hidden=True the module stores the states: do not pass mem or syn")
        state = self._state(x, mem, syn)
        if self._starts_sequence(mem):
            self.node.start_sequence()
        new_states: list[AssociativeLIFState] = []
        is_sequence = self.node.step_mode == "m"  # layers set the step mode of all their modules
        spk = self.node(x.unsqueeze(0) if is_sequence else x, state=state, new_states=new_states)
        self._store(new_states[0])
        return spk.squeeze(0) if is_sequence else spk

    def _starts_sequence(self, mem: Tensor | None) -> bool:
        """Return whether a sequence starts: after a reset, or from zeros that the caller passes."""
        if mem is None or mem is self._mem:
            return self._assigned
        node = self.node
        if not (node.store_v_seq or (node.training and node.first_batches.batches_left)):
            return False
        return not torch.compiler.is_compiling() and has_values(mem) and not mem.any()

    def _state(self, x: Tensor, mem: Tensor | None, syn: Tensor | None) -> AssociativeLIFState | None:
        """Return the state before the time step; None for rest."""
        uses_stored = mem is None or (mem is self._mem and (syn is None or syn is self._syn))
        if uses_stored and self._rests_in_another_shape(x):
            return None
        mem = self._mem if mem is None else mem
        if mem.shape != x.shape:
            raise ValueError(self._wrong_shape(x, mem))
        if self._membrane_only:
            return AssociativeLIFState(mem, *NO_PARTS)
        syn, counter = (self._syn, self._refractory) if uses_stored else self._other_parts(x, mem, syn)
        if syn.shape != x.shape:
            raise ValueError(self._wrong_shape(x, syn))
        return AssociativeLIFState(mem, syn, counter)

    def _other_parts(self, x: Tensor, mem: Tensor, syn: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return synaptic current and refractory counter for states that the caller passes.

        Raises:
            ValueError: ``mem`` is that of an earlier call, whose other parts are no longer stored.
        """
        current, counter = self._syn if syn is None else syn, self._refractory
        if counter.shape != x.shape:
            current = torch.zeros_like(x, requires_grad=False) if syn is None else syn
            return current, torch.zeros_like(x, dtype=torch.int32, requires_grad=False)
        if mem is self._mem or not self._has_hidden_parts:
            return current, counter
        if not torch.compiler.is_compiling() and getattr(mem, _CALL, self._call) != self._call:
            parts = "synaptic currents and refractory counters" if syn is None else "refractory counters"
            constants = "refractory_steps=0 and beta_syn=0" if syn is None else "refractory_steps=0"
            raise ValueError(
                f"{type(self).__name__} got the mem of an earlier call, but stores the {parts} of its last call only: run one "
                f"sequence after the other, or pass {constants}"
            )
        rest = ~(mem.any() if syn is None else mem.any() | syn.any()).to(counter.device)
        return current.masked_fill(rest, 0) if syn is None else current, counter.masked_fill(rest, 0)

    def _store(self, state: AssociativeLIFState) -> None:
        compiling = torch.compiler.is_compiling()

        def without_view(x: Tensor) -> Tensor:
            # snnTorch detaches states in place, which raises an error for views. Compiled code returns no views.
            return x.clone() if not compiling and is_view(x) else x

        self._mem = without_view(state.v)
        if not self._membrane_only:
            self._syn, self._refractory = without_view(state.i_syn), state.refractory
        if self._assigned:
            self._assigned = False
        if self._has_hidden_parts and not compiling:
            self._call = next(_calls)
            setattr(self._mem, _CALL, self._call)

    def _wrong_shape(self, x: Tensor, state: Tensor) -> str:
        return (
            f"{type(self).__name__} has states of shape {list(state.shape)}, but got input of shape {list(x.shape)}: call "
            "reset_mem() (or snntorch.utils.reset) before a batch of another shape"
        )

    def extra_repr(self) -> str:
        """Return the arguments of snnTorch."""
        return f"init_hidden={self.init_hidden}, output={self.output}"
