"""snnTorch: ``spk, mem = lif(x, mem)``, ``spk, syn, mem = lif(x, syn, mem)``, or ``spk = lif(x)`` with ``init_hidden``."""

from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from nord_snn._compat.torch import detached_state, is_view
from nord_snn.convert.protocols import Protocol, SingleStep, advance, require_our_node
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.neurons.detection import is_snntorch
from nord_snn.ops import AssociativeLIFState

__all__ = ["PROTOCOL", "CalledAsLeaky", "CalledAsSynaptic"]


class _Called(SingleStep):
    """State and call of both classes.

    ``mem``, and ``syn`` of ``Synaptic``, are passed in and out. What they do not carry, the refractory counter and for
    ``Leaky`` the synaptic current, is stored here, and is cleared by ``reset_mem``, ``init_leaky``, ``init_synaptic``,
    ``snntorch.utils.reset`` and whenever ``mem`` is assigned. A ``mem`` of another shape starts without it.
    """

    init_hidden: bool
    output: bool

    def _set_up(self, node: AssociativeLIFNode, init_hidden: bool, output: bool) -> None:
        self.node, self.init_hidden, self.output = node, init_hidden, output
        self._state: AssociativeLIFState | None = None  # None at rest
        self._rest = torch.zeros(0)  # what reset_mem returned last
        snntorch.SpikingNeuron.instances.append(self)  # those that snntorch.utils.reset resets

    @property
    def mem(self) -> Tensor:
        """Return the membrane potential after the last time step and its reset."""
        return self._rest if self._state is None else self._state.v

    @mem.setter
    def mem(self, value: Tensor) -> None:
        zeros, state = torch.zeros_like(value), self._state
        current = state.i_syn if state is not None and isinstance(self, snntorch.Synaptic) else zeros
        self._state = AssociativeLIFState(value, current, torch.zeros_like(value, dtype=torch.int32))
        self._drop_rest()

    def _drop_rest(self) -> None:
        """Take zeros for rest, which has no batch shape."""
        if self._state is not None and not (self._state.v.any() or self._state.i_syn.any()):
            self._rest, self._state = self._state.v, None

    def _reset(self) -> Tensor:
        self._rest, self._state = torch.zeros_like(self.mem), None
        return self._rest

    def _run(self, x: Tensor, state: AssociativeLIFState | None) -> Tensor:
        spikes, new = advance(self.node, x.unsqueeze(0), state)
        # snnTorch detaches states in place, which raises for views.
        self._state = AssociativeLIFState(*(part.clone() if is_view(part) else part for part in new))
        return spikes.squeeze(0)

    def _before(self, x: Tensor, mem: Tensor | None, syn: Tensor | None = None) -> AssociativeLIFState | None:
        """Return the state before the time step: what is passed, and what is stored for the rest; None at rest."""
        if mem is None:
            return self._state
        if self.init_hidden:
            raise TypeError("with init_hidden=True the module stores the states: pass none")
        if mem is self._rest and mem.shape != x.shape:  # from a reset, in the batch shape before it
            if mem.any():
                raise ValueError(f"mem has shape {list(mem.shape)}, but the input has shape {list(x.shape)}")
            return None
        stored = self._state
        is_new = stored is None or mem is self._rest or stored.v.shape != mem.shape
        if stored is None or is_new or (mem is not stored.v and not mem.any()):  # nothing stored belongs to this mem
            stored = AssociativeLIFState(mem, torch.zeros_like(mem), torch.zeros_like(mem, dtype=torch.int32))
        return AssociativeLIFState(mem, stored.i_syn if syn is None else syn, stored.refractory)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies and pickles, with detached state."""
        state = None if self._state is None else AssociativeLIFState(*map(detached_state, self._state))
        return self.__dict__ | {"_state": state, "_rest": detached_state(self._rest)}

    def extra_repr(self) -> str:
        """Return the arguments of snnTorch."""
        return f"init_hidden={self.init_hidden}, output={self.output}"


class CalledAsLeaky(_Called, snntorch.Leaky):
    """Our neurons where a network calls a ``snntorch.Leaky`` or ``Lapicque``.

    Args:
        node: the neurons.
        init_hidden: store the state in the module: ``spk = lif(x)``.
        output: with ``init_hidden``, also return ``mem``.
    """

    def __init__(self, node: AssociativeLIFNode, init_hidden: bool, output: bool) -> None:
        nn.Module.__init__(self)  # Leaky would register a threshold and a decay, which the node has
        self._set_up(node, init_hidden, output)

    def reset_mem(self) -> Tensor:
        """Set the state to rest and return ``mem``."""
        return self._reset()

    def init_leaky(self) -> Tensor:
        """Set the state to rest and return ``mem``."""
        return self._reset()

    def init_lapicque(self) -> Tensor:
        """Set the state to rest and return ``mem``."""
        return self._reset()

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Run one time step; without ``mem``, from the state that is stored."""
        spikes = self._run(input_, self._before(input_, mem))
        return spikes if self.init_hidden and not self.output else (spikes, self.mem)


class CalledAsSynaptic(_Called, snntorch.Synaptic):
    """Our neurons where a network calls a ``snntorch.Synaptic``. The arguments are those of :class:`CalledAsLeaky`."""

    def __init__(self, node: AssociativeLIFNode, init_hidden: bool, output: bool) -> None:
        nn.Module.__init__(self)
        self._set_up(node, init_hidden, output)

    @property
    def syn(self) -> Tensor:
        """Return the synaptic current after the last time step."""
        return torch.zeros_like(self._rest) if self._state is None else self._state.i_syn

    @syn.setter
    def syn(self, value: Tensor) -> None:
        mem = torch.zeros_like(value) if self._state is None else self._state.v
        self._state = AssociativeLIFState(mem, value, torch.zeros_like(value, dtype=torch.int32))
        self._drop_rest()

    def reset_mem(self) -> tuple[Tensor, Tensor]:
        """Set the state to rest and return ``syn, mem``."""
        mem = self._reset()
        return torch.zeros_like(mem), mem

    def init_synaptic(self) -> tuple[Tensor, Tensor]:
        """Set the state to rest and return ``syn, mem``."""
        return self.reset_mem()

    def forward(
        self, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Run one time step; without states, from those that are stored.

        Raises:
            ValueError: one of ``syn`` and ``mem`` is passed without the other.
        """
        if (syn is None) != (mem is None):
            raise ValueError("pass both syn and mem, or neither to go on from the states that are stored")
        spikes = self._run(input_, self._before(input_, mem, syn))
        return spikes if self.init_hidden and not self.output else (spikes, self.syn, self.mem)


def _is_neuron(module: nn.Module) -> bool:
    return is_snntorch(module) and not any(isinstance(inner, AssociativeLIFNode) for inner in module.modules())


def _runs_sequences(module: nn.Module) -> bool:
    return False


def _why_not(module: nn.Module) -> str:
    if type(module) in (snntorch.Leaky, snntorch.Lapicque, snntorch.Synaptic):
        return ""
    return f"snnTorch's Leaky, Lapicque and Synaptic can be replaced, {type(module).__name__} has other states"


def _put(module: Any, ours: nn.Module) -> nn.Module:
    node = require_our_node(ours, "snnTorch")
    if node.dynamics.v_rest:
        raise ValueError(
            f"snnTorch resets membranes to 0, so the resting potential must be 0, got {node.dynamics.v_rest}"
        )
    node.step_mode = "m"
    kind = CalledAsSynaptic if isinstance(module, snntorch.Synaptic) else CalledAsLeaky
    return kind(node, module.init_hidden, module.output)


PROTOCOL = Protocol(_is_neuron, _runs_sequences, _why_not, AssociativeLIFNode.like, _put)
