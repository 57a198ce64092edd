"""snnTorch: the associative LIF with snnTorch's signature, and snnTorch's neurons in Nord layers."""

from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from nord_snn._compat.snntorch import SynapticWithOwnState
from nord_snn._compat.torch import StatePrecisionMixin, detached_state, is_view
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import AssociativeLIFState
from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.surrogate import SurrogateLike

__all__ = ["AssociativeSynaptic", "MultiStep"]

#: Arguments of snnTorch's neurons that AssociativeSynaptic does not support.
_UNSUPPORTED = {"graded_spikes_factor", "inhibition", "learn_graded_spikes_factor", "reset_delay", "reset_mechanism",
             "state_quant", "surrogate_disable", "weight_hadamard"}  # fmt: skip


class _StrictNode(AssociativeLIFNode):
    """Fire only above the threshold, not at it, as snnTorch's neurons do: the threshold is the next larger number."""

    def firing_threshold(self) -> Tensor:
        threshold = self.v_threshold.to(compute_dtype(self.v_threshold))
        above = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
        return threshold + (above - threshold).detach()


class AssociativeSynaptic(SynapticWithOwnState):
    """Associative LIF neurons that are called and reset as ``snntorch.Synaptic``: one time step per call.

    The equations are those of :func:`nord_snn.ops.associative_lif`, with two differences from
    :class:`~nord_snn.neurons.AssociativeLIFNode`. A neuron fires only above its threshold, not at it, as snnTorch's neurons do.
    Callers pass and receive ``mem`` and ``syn`` only: the refractory counter is stored in the module and belongs to the ``mem``
    that was returned last. If another ``mem`` is passed, such as a new tensor or a modified copy, all refractory counters start
    at 0; ``mem.detach()`` counts as the same tensor.

    There are two differences from ``Synaptic``. The threshold is subtracted in the same time step (``mem`` is the membrane
    potential after the reset). A new batch shape needs :meth:`reset_mem` or ``snntorch.utils.reset`` first, or raises an error.

    Args:
        n_features: D, the number of neurons.
        n_clusters: C of the cascade, a divisor of D; None switches it off.
        alpha: initial synaptic decay, in (0, 1); ``beta_syn`` of the node.
        beta: initial membrane decay, in (0, 1); ``beta_mem`` of the node.
        threshold: initial threshold of every neuron.
        init_hidden: store the states in the module: ``spk = lif(x)``.
        output: with ``init_hidden``, also return the states.
        learn_alpha: make the synaptic decay learnable.
        learn_beta: make the membrane decay learnable.
        learn_threshold: make the thresholds learnable.
        spike_grad: a surrogate of snnTorch or SpikingJelly, or a name from :data:`nord_snn.ops.SURROGATES`, with
            sharpness 4.
        more: further arguments of :class:`~nord_snn.neurons.AssociativeLIFNode` (``cascade_radius``, ``cascade_gain``,
            ``v_reset``, ``refractory_steps``, ``backend``).

    Shapes: ``x [N, *, D]`` -> ``spk, syn, mem``, each ``[N, *, D]``.

    Raises:
        TypeError: states are passed with ``init_hidden``, or an unsupported argument of snnTorch's neurons is passed.
        ValueError: one of ``syn`` and ``mem`` is passed without the other, or their shape differs from the input's.

    Source: the Nord spiking language model; the signature is snnTorch's (Eshraghian et al. 2023).

    Example:
        >>> lif = AssociativeSynaptic(512, n_clusters=64)
        >>> spk, syn, mem = lif(torch.rand(4, 512))
        >>> spk, syn, mem = lif(torch.rand(4, 512), syn, mem)
    """

    def __init__(
        self,
        n_features: int,
        n_clusters: int | None = 64,
        alpha: float = 0.5,
        beta: float = 0.9,
        threshold: float = 0.25,
        init_hidden: bool = False,
        output: bool = False,
        learn_alpha: bool = True,
        learn_beta: bool = True,
        learn_threshold: bool = True,
        spike_grad: SurrogateLike = "nord_atan",
        **more: Any,
    ) -> None:
        if unsupported := sorted(_UNSUPPORTED & more.keys()):
            raise TypeError(
                f"AssociativeSynaptic does not support {', '.join(unsupported)}: it subtracts its threshold in the same time step"
            )
        super().__init__(init_hidden, output)
        learned = {"beta_syn": learn_alpha, "beta_mem": learn_beta, "threshold": learn_threshold}
        self.node = _StrictNode(
            n_features,
            n_clusters,
            threshold=threshold,
            beta_mem=beta,
            beta_syn=alpha,
            surrogate=spike_grad,
            step_mode="s",
            learnable=[name for name, learned in learned.items() if learned],
            **more,
        )
        self.node.first_batches.batches_left = 0  # it is reset after every time step
        for name in ("_syn", "_mem", "_refractory"):
            self.register_buffer(name, torch.zeros(0), persistent=False)
        self._syn: Tensor
        self._mem: Tensor
        self._refractory: Tensor
        self._set_from_outside = True  # the states were assigned, usually by a reset, and not computed here
        self.register()

    @property
    def alpha(self) -> Tensor:
        """Return the synaptic decay, ``[1]``."""
        return self.node.beta_syn

    @property
    def beta(self) -> Tensor:
        """Return the membrane decay, ``[1]``."""
        return self.node.beta_mem

    @property
    def threshold(self) -> Tensor:
        """Return the thresholds, ``[D]``."""
        return self.node.v_threshold

    @property
    def syn(self) -> Tensor:
        """Return the synaptic current after the last time step."""
        return self._syn

    @syn.setter
    def syn(self, value: Tensor) -> None:
        self._syn = value
        self._set_from_outside = True

    @property
    def mem(self) -> Tensor:
        """Return the membrane potential after the last time step. Assigning it sets all refractory counters to 0."""
        return self._mem

    @mem.setter
    def mem(self, value: Tensor) -> None:
        self._mem = value
        self._refractory = torch.zeros_like(value, dtype=torch.int32)
        self._set_from_outside = True

    def reset_mem(self) -> tuple[Tensor, Tensor]:
        """Set the state to rest and return ``syn, mem``."""
        self.syn, self.mem = torch.zeros_like(self._syn), torch.zeros_like(self._mem)
        return self.syn, self.mem

    def forward(
        self, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Run one time step."""
        self.node.check_input(input_, "s")
        if self.init_hidden and not (syn is None and mem is None):
            raise TypeError("with init_hidden=True the module stores the states: pass neither syn nor mem")
        if (syn is None) != (mem is None):
            raise ValueError("pass both syn and mem, or neither to start from rest")
        state = self._state(input_, syn, mem)
        spk, new_state = self._step(input_, state)
        # snnTorch detaches states in place, which raises for views.
        self._syn, self._mem = (x.clone() if is_view(x) else x for x in (new_state.i_syn, new_state.v))
        self._refractory = new_state.refractory
        self._set_from_outside = False
        return spk if self.init_hidden and not self.output else (spk, self._syn, self._mem)

    def _step(self, x: Tensor, state: AssociativeLIFState | None) -> tuple[Tensor, AssociativeLIFState]:
        """Run the node through ``__call__``, so that monitors count its spikes, and reset it afterwards."""
        node = self.node
        node.v, node.i_syn, node.refractory = (0.0, 0.0, 0) if state is None else state
        multi = node.step_mode == "m"  # layers set it on all their modules
        try:
            spk = node(x.unsqueeze(0) if multi else x)
            new_state = AssociativeLIFState(node.v, node.i_syn, node.refractory)  # type: ignore[arg-type]  # tensors
        finally:
            node.reset()
        return spk.squeeze(0) if multi else spk, new_state

    def _at_rest(self, syn: Tensor, mem: Tensor) -> bool:
        """Return whether these are the stored states after a reset."""
        same = syn is self._syn and mem is self._mem
        return same and self._set_from_outside and (mem.is_meta or not (mem.any() or syn.any()))

    def _state(self, x: Tensor, syn: Tensor | None, mem: Tensor | None) -> AssociativeLIFState | None:
        """Return the state before the time step; None for rest."""
        if syn is None or mem is None:
            if not self.init_hidden:
                return None
            if self._set_from_outside and self._mem.shape != x.shape:  # no call since the reset
                if not self._mem.is_meta and (self._mem.any() or self._syn.any()):
                    raise ValueError(_wrong_shape(x, self._mem))
                return None
            syn, mem, refractory = self._syn, self._mem, self._refractory
        elif self._at_rest(syn, mem):  # returned by reset_mem, in the previous batch shape
            return None
        elif mem.shape == self._mem.shape and mem.data_ptr() == self._mem.data_ptr():
            refractory = self._refractory
        else:
            refractory = torch.zeros_like(x, dtype=torch.int32)
        for state in (syn, mem):
            if state.shape != x.shape:
                raise ValueError(_wrong_shape(x, state))
        dtype = compute_dtype(x)
        return AssociativeLIFState(mem.to(x.device, dtype), syn.to(x.device, dtype), refractory.to(x.device))

    def extra_repr(self) -> str:
        """Return the arguments of snnTorch."""
        return f"init_hidden={self.init_hidden}, output={self.output}"


class MultiStep(StatePrecisionMixin, nn.Module):
    """Run a snnTorch neuron over a whole sequence from rest, as the ``neuron`` of a Nord layer.

    Args:
        neuron: a snnTorch neuron that returns ``spk, ..., mem`` and starts from rest without states, or has
            ``init_hidden=True``.

    Attributes:
        store_v_seq: store the membrane potentials of the last call in ``v_seq``.
        v_seq: the stored membrane potentials, ``[T, N, *, D]``, or None.

    Shapes: ``[T, N, *, D]`` -> spikes ``[T, N, *, D]``. The states of the neuron before the call are restored afterwards.

    Raises:
        TypeError: ``neuron`` is not a snnTorch neuron.
        ValueError: ``store_v_seq`` is set, but the neuron does not return ``mem`` (``init_hidden=True`` without
            ``output=True``).

    Example:
        >>> from nord_snn.layers import SpikingFeedForward
        >>> ffn = SpikingFeedForward(16, 32, neuron=lambda n: MultiStep(snntorch.Leaky(beta=0.9)))
        >>> ffn(torch.rand(5, 2, 16)).shape
        torch.Size([5, 2, 16])
    """

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        if not isinstance(neuron, snntorch.SpikingNeuron):
            raise TypeError(f"MultiStep expects a neuron of snnTorch, got {type(neuron).__name__}")
        self.neuron = neuron
        self.store_v_seq = False
        self.v_seq: Tensor | None = None

    def forward(self, x_seq: Tensor) -> Tensor:
        """Run all time steps, one after the other, from rest."""
        if x_seq.ndim < 2 or not len(x_seq):
            raise ValueError(
                f"MultiStep expects shape [T, N, *, D] with at least one time step, got {list(x_seq.shape)}"
            )
        saved = {name: getattr(self.neuron, name) for name in _saved_names(self.neuron)}
        try:
            return self._run(x_seq)
        finally:
            for name, value in saved.items():
                setattr(self.neuron, name, value)

    def get_state(self) -> dict[str, Any]:
        """Return the stored membrane potentials."""
        return {"v_seq": self.v_seq}

    def set_state(self, state: dict[str, Any]) -> None:
        """Set the stored membrane potentials."""
        self.v_seq = state["v_seq"]

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies and pickles, with detached membrane potentials."""
        return self.__dict__ | {"v_seq": detached_state(self.v_seq)}

    def _run(self, x_seq: Tensor) -> Tensor:
        states = self._rest(x_seq[0])
        spikes, membranes = [], []
        for x in x_seq:
            out = self.neuron(x, *states)
            first, *more = out if isinstance(out, tuple) else (out,)
            parts = (first.to(x.dtype), *more)  # snnTorch's surrogates return float32 for every input dtype
            spikes.append(parts[0])
            if self.store_v_seq:
                if len(parts) == 1:
                    raise ValueError(
                        f"{type(self.neuron).__name__} with init_hidden=True must have output=True if a layer reads v_seq"
                    )
                membranes.append(parts[-1])
            states = (
                () if self.neuron.init_hidden else parts[-len(states) :]
            )  # recurrent neurons also take their spikes
        self.v_seq = torch.stack(membranes) if self.store_v_seq else None
        return torch.stack(spikes)

    def _rest(self, x: Tensor) -> tuple[Tensor, ...]:
        """Set the neuron's states to rest and return them as arguments, unless it has ``init_hidden``."""
        names = _state_names(self.neuron)
        zeros = {name: torch.zeros_like(x) for name in names}
        for name, value in zeros.items():
            setattr(self.neuron, name, value)
        return () if self.neuron.init_hidden else tuple(zeros.values())


def _state_names(neuron: nn.Module) -> tuple[str, ...]:
    """Return the names of a neuron's state attributes, in the order of its arguments."""
    known: dict[type, tuple[str, ...]] = {
        snntorch.RSynaptic: ("spk", "syn", "mem"),
        snntorch.RLeaky: ("spk", "mem"),
        snntorch.Alpha: ("syn_exc", "syn_inh", "mem"),
        snntorch.Synaptic: ("syn", "mem"),
        snntorch.Leaky: ("mem",),
        snntorch.Lapicque: ("mem",),
    }
    for kind, names in known.items():
        if isinstance(neuron, kind):
            return names
    raise TypeError("MultiStep expects Leaky, Lapicque, Synaptic, Alpha, RLeaky, RSynaptic or AssociativeSynaptic, got "
                    f"{type(neuron).__name__}, whose states are unknown")  # fmt: skip


def _saved_names(neuron: nn.Module) -> tuple[str, ...]:
    """Return the attributes to save and restore; for our neuron also the refractory counter, which assigning ``mem`` clears."""
    if isinstance(neuron, AssociativeSynaptic):
        return ("_syn", "_mem", "_refractory", "_set_from_outside")
    return _state_names(neuron)


def _wrong_shape(x: Tensor, state: Tensor) -> str:
    return (
        f"AssociativeSynaptic has states of shape {list(state.shape)}, but got input of shape {list(x.shape)}: call reset_mem() "
        "(or snntorch.utils.reset) before a batch of another shape"
    )
