"""What our neurons with snnTorch's signatures share: the node, the stored state, the rule of the refractory counter."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from nord_snn._compat.torch import assert_in_graph, initialize_lazy_module, is_view
from nord_snn.neurons.associative_lif import AssociativeLIFNode, LazyAssociativeLIFNode
from nord_snn.neurons.strict import firing_above
from nord_snn.ops import AssociativeLIFState
from nord_snn.ops.checks import compute_dtype

__all__ = ["STORED", "OneStepNeuron", "StrictNode", "strict_node"]

#: Attributes of :class:`OneStepNeuron` that a call changes.
STORED = ("_syn", "_mem", "_refractory", "_fresh", "_call")

_calls = itertools.count(1)
_CALL = "_nord_snn_call"


class StrictNode(AssociativeLIFNode):
    """Fire only above the threshold, not at it, as snnTorch's neurons do, and run one time step from an explicit state.

    Attributes:
        resets_outside: whether the membrane is reset between the calls of the node, and not by its dynamics.
    """

    resets_outside = False

    def firing_threshold(self) -> Tensor:
        """Return the next number above the threshold, with the gradient of the threshold."""
        return firing_above(self.v_threshold)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        stateless: bool = False,
        state: AssociativeLIFState | None = None,
        new_states: list[AssociativeLIFState] | None = None,
    ) -> Tensor:
        """Return the spikes of one time step from ``state``, None for rest, and append the state after it to ``new_states``.

        Without ``new_states`` it is a call of an :class:`AssociativeLIFNode`.
        """
        if new_states is None:
            return super().forward(x, stateless=stateless)
        # Layers set step mode "m" on all their modules; x is then [1, N, *, D].
        spikes, _, new_state = self._run(x, state, single_step=self.step_mode == "s")
        new_states.append(new_state)
        return spikes

    def neuron_dimension(self, ndim: int) -> int:
        """Return the dimension of the neurons in a time step of ``ndim`` dimensions, counted from the end."""
        return self._dimension(ndim)

    @property
    def emits_binary_spikes(self) -> bool:
        """Return whether all outputs are zeros and ones."""
        return super().emits_binary_spikes


class LazyStrictNode(LazyAssociativeLIFNode, StrictNode):
    """A :class:`StrictNode` whose width is found at the first call."""

    cls_to_become = StrictNode


def strict_node(n_features: int | None, *arguments: Any, **more: Any) -> StrictNode:
    """Make a :class:`StrictNode`, a lazy one where the width is not given."""
    if n_features is not None and not isinstance(n_features, int):
        raise TypeError(f"n_features must be a whole number or None, got {n_features!r}: pass beta by name, beta=0.9")
    return (LazyStrictNode if n_features is None else StrictNode)(n_features, *arguments, step_mode="s", **more)


class OneStepNeuron(nn.Module):
    """Mixin: run ``self.node`` for one time step and store its state, as snnTorch's neurons do."""

    node: StrictNode
    init_hidden: bool
    output: bool

    def _store_at_rest(self) -> None:
        for name in ("_syn", "_mem", "_refractory"):
            self.register_buffer(name, torch.zeros(0), persistent=False)
        self._syn: Tensor
        self._mem: Tensor
        self._refractory: Tensor
        self._fresh = True  # the states were reset or assigned, and not computed here
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
        """Assign ``mem``. TorchDynamo does not run setters of properties, so our methods call this one."""
        self._mem = value
        self._refractory = torch.zeros_like(value, dtype=torch.int32)
        self._fresh = True

    def rest_like(self, x: Tensor) -> None:
        """Set the states to rest in the shape of ``x``."""
        self._syn = torch.zeros_like(x, requires_grad=False)
        self._assign_mem(torch.zeros_like(x, requires_grad=False))

    def _prepare(self, x: Tensor) -> None:
        """Find the width at the first call, and check the input."""
        if isinstance(self.node, LazyModuleMixin):
            initialize_lazy_module(self.node, x.unsqueeze(0) if self.node.step_mode == "m" else x)
        self.node.check_input(x, "s")

    def _own_is_rest(self, x: Tensor) -> bool:
        """Return whether the stored states are those of a reset before a batch of another shape."""
        mem, syn = self._mem, self._syn  # in AssociativeLeaky syn is always 0
        if not self._fresh or mem.shape == x.shape:
            return False
        if mem.is_meta:
            return True
        if torch.compiler.is_compiling():
            assert_in_graph(~(mem.any() | syn.any()), self._wrong_shape(x, mem))
        elif mem.any() or syn.any():
            raise ValueError(self._wrong_shape(x, mem))
        return True

    def _checked(self, x: Tensor, syn: Tensor, mem: Tensor, refractory: Tensor) -> AssociativeLIFState:
        """Return the state before the time step, converted to the device and precision of the input."""
        for state in (mem, syn):
            if state.shape != x.shape:
                raise ValueError(self._wrong_shape(x, state))
        dtype = compute_dtype(x)
        return AssociativeLIFState(mem.to(x.device, dtype), syn.to(x.device, dtype), refractory.to(x.device))

    def _counter_of(self, x: Tensor, syn: Tensor, mem: Tensor) -> Tensor:
        """Return the refractory counter for states that the caller passes.

        Raises:
            ValueError: the states are those of an earlier call, whose counter is no longer stored.
        """
        counter = self._refractory
        if counter.shape != x.shape:
            return torch.zeros_like(x, dtype=torch.int32)
        if mem is self._mem or self.node.refractory_steps == 0:
            return counter
        if not torch.compiler.is_compiling() and getattr(mem, _CALL, self._call) != self._call:
            raise ValueError(
                f"{type(self).__name__} got the mem of an earlier call, but stores the refractory counters of its last call "
                "only: run one sequence after the other, or pass refractory_steps=0"
            )
        return counter.masked_fill(~(mem.any() | syn.any()).to(counter.device), 0)

    def _run_node(self, x: Tensor, state: AssociativeLIFState | None) -> tuple[Tensor, AssociativeLIFState]:
        """Run the node through ``__call__``, so that monitors count its spikes."""
        new_states: list[AssociativeLIFState] = []
        multi = self.node.step_mode == "m"
        spk = self.node(x.unsqueeze(0) if multi else x, state=state, new_states=new_states)
        return spk.squeeze(0) if multi else spk, new_states[0]

    def _store(self, state: AssociativeLIFState) -> None:
        compiling = torch.compiler.is_compiling()
        # snnTorch detaches states in place, which raises for views; views do not outlive compiled code.
        self._mem, self._syn = (x.clone() if not compiling and is_view(x) else x for x in (state.v, state.i_syn))
        self._refractory = state.refractory
        if self._fresh:
            self._fresh = False
        if self.node.refractory_steps and not compiling:
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
