"""The associative LIF neuron as a SpikingJelly node."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nord_snn._compat.spikingjelly import StatefulNode
from nord_snn.neurons.cascade import AssociativeCascade
from nord_snn.ops import AssociativeLIFState, BackendChoice, OpCost, associative_lif, which_backend
from nord_snn.ops.checks import check_features, compute_dtype
from nord_snn.ops.dispatch import BACKENDS
from nord_snn.ops.lif.cost import associative_update_cost
from nord_snn.ops.surrogate import SurrogateLike, resolve_surrogate

__all__ = ["AssociativeLIFNode"]

_States = tuple[object, ...]
_Tensors = tuple[Tensor, ...]


class AssociativeLIFNode(StatefulNode):
    """Current-based LIF neurons with learnable thresholds, a refractory period and an associative cascade.

    The equations are those of :func:`nord_snn.ops.associative_lif`. The threshold of every neuron, both decays (stored as
    logits, so that they stay in (0, 1)) and the cascade's weight and gain are learnable.

    It is a SpikingJelly node: ``step_mode``, ``functional.reset_net``, ``set_step_mode``, ``detach_net`` and monitors work on
    it; its state is ``v``, ``i_syn`` and ``refractory``. It differs from SpikingJelly's nodes in two ways. The resting
    potential is 0; the membrane potential is ``v_reset`` only while a neuron is refractory. If the batch shape changes while
    state is stored, the node raises an error; SpikingJelly's nodes reset silently.

    Args:
        n_features: D, the number of neurons.
        n_clusters: C of the cascade, a divisor of D. None switches the cascade off.
        cascade_radius: initial range of the cascade, in neighbouring clusters on each side.
        cascade_gain: initial gain of the cascade.
        threshold: initial threshold of every neuron.
        beta_mem: initial membrane decay, in (0, 1).
        beta_syn: initial synaptic decay, in (0, 1).
        v_reset: membrane potential while refractory.
        refractory_steps: refractory period after a spike, in time steps.
        surrogate: a name from :data:`nord_snn.ops.SURROGATES` or a SpikingJelly surrogate module.
        alpha: sharpness of a named surrogate.
        step_mode: ``"s"`` for one time step ``[N, *, D]`` per call, ``"m"`` for sequences ``[T, N, *, D]``.
        backend: see :func:`nord_snn.ops.associative_lif`.
        store_v_seq: store membrane potentials in ``v_seq``, ``[T, N, *, D]``: of the last call in step mode ``"m"``, of all
            calls since the last reset in ``"s"``.

    Raises:
        TypeError: ``v_reset`` is not a number.
        ValueError: D is not a multiple of C, a decay is not in (0, 1), an input has the wrong rank or width, or its batch
            shape differs from that of the stored state.

    Source: the Nord spiking language model.

    Example:
        >>> node = AssociativeLIFNode(512, n_clusters=64, step_mode="m")
        >>> spikes = node(torch.rand(10, 4, 512))
        >>> spikes.shape, spikes.unique().tolist()
        (torch.Size([10, 4, 512]), [0.0, 1.0])
    """

    def __init__(
        self,
        n_features: int,
        n_clusters: int | None = 64,
        *,
        cascade_radius: int = 3,
        cascade_gain: float = 0.8,
        threshold: float = 0.25,
        beta_mem: float = 0.9,
        beta_syn: float = 0.5,
        v_reset: float = -0.1,
        refractory_steps: int = 2,
        surrogate: SurrogateLike = "nord_atan",
        alpha: float = 4.0,
        step_mode: str = "s",
        backend: str = "auto",
        store_v_seq: bool = False,
    ) -> None:
        resolve_surrogate(surrogate, alpha)
        if not isinstance(v_reset, int | float) or math.isnan(v_reset):
            raise TypeError(
                f"v_reset must be a number, the membrane potential while refractory, got {v_reset!r}: every spike subtracts "
                "the threshold, and refractory_steps=0 switches v_reset off"
            )
        if refractory_steps < 0:
            raise ValueError(f"refractory_steps must be 0 or more, got {refractory_steps}")
        # BaseNode requires floats and uses v_reset as the resting potential, which is 0 here.
        super().__init__(
            v_threshold=float(threshold),
            v_reset=None,
            surrogate_function=surrogate,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
        )
        self.v: float | Tensor
        self.i_syn: float | Tensor
        self.refractory: int | Tensor
        self.register_memory("i_syn", 0.0)
        self.register_memory("refractory", 0)
        self.n_features, self.alpha, self.backend = n_features, alpha, backend
        self.v_reset, self.refractory_steps = v_reset, refractory_steps
        if not hasattr(self, "v_seq"):  # SpikingJelly 0.0.0.0.14 registers it with store_v_seq only; reset() clears it
            self.register_memory("v_seq", None)
        self._initial = (float(threshold), _logit(beta_mem, "beta_mem"), _logit(beta_syn, "beta_syn"))
        self.v_threshold = nn.Parameter(torch.empty(n_features))
        self.beta_mem_logit = nn.Parameter(torch.empty(1))
        self.beta_syn_logit = nn.Parameter(torch.empty(1))
        self.cascade = (
            None
            if n_clusters is None
            else AssociativeCascade(n_features, n_clusters, radius=cascade_radius, gain=cascade_gain)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set thresholds and decays to their initial values. The cascade has its own method; ``reset`` clears the state."""
        threshold, beta_mem_logit, beta_syn_logit = self._initial
        nn.init.constant_(self.v_threshold, threshold)
        nn.init.constant_(self.beta_mem_logit, beta_mem_logit)
        nn.init.constant_(self.beta_syn_logit, beta_syn_logit)

    @property
    def beta_mem(self) -> Tensor:
        """Return the membrane decay, ``[1]``, in (0, 1)."""
        return self.beta_mem_logit.sigmoid()

    @property
    def beta_syn(self) -> Tensor:
        """Return the synaptic decay, ``[1]``, in (0, 1)."""
        return self.beta_syn_logit.sigmoid()

    @property
    def emits_binary_spikes(self) -> bool:
        """Return whether all outputs are zeros and ones; False for a callable surrogate without ``spiking = True``."""
        return isinstance(self.surrogate_function, str) or getattr(self.surrogate_function, "spiking", False) is True

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """Return every valid ``backend``; SpikingJelly 0.0.0.0.14 and its ``functional.set_backend`` read it."""
        return ("auto", *BACKENDS)

    @property
    def backend(self) -> str:
        """Return the requested backend. Assigning an unknown name raises; each call checks whether the backend can run."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if value not in self.supported_backends:
            raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {value!r}")
        self._backend = value

    def which_backend(self, x: Tensor) -> BackendChoice:
        """Return the backend that would run on input ``x``, and for each other backend why it would not."""
        clusters = None if self.cascade is None else self.cascade.n_clusters
        return which_backend(x, self.backend, self.surrogate_function, clusters)

    def forward(self, x: Tensor, *, stateless: bool = False) -> Tensor:
        """Return the spikes for input current ``x``.

        Args:
            x: ``[N, *, D]`` in step mode ``"s"``, ``[T, N, *, D]`` in ``"m"``.
            stateless: start from rest and leave the stored state unchanged, as layers over whole sequences do.

        Returns:
            Zeros and ones in the shape and dtype of ``x``.
        """
        multi = self.step_mode == "m"
        check_features(x, self.n_features, type(self).__name__, "[T, N, *, D]" if multi else "[N, *, D]")
        x_seq = x if multi else x.unsqueeze(0)
        stored: _States = (0.0, 0.0, 0) if stateless else (self.v, self.i_syn, self.refractory)
        at_rest = not any(isinstance(part, Tensor) or part for part in stored)
        initial = None if at_rest else self.materialize_states((x_seq,), stored, "m")
        spikes, v_seq, state = self._run(x_seq, initial, self.store_v_seq)
        if not stateless:
            self.v, self.i_syn, self.refractory = state
        if v_seq is not None:
            earlier = None if multi or stateless else self.v_seq
            self.v_seq = v_seq if earlier is None else torch.cat((earlier, v_seq))
        return spikes if multi else spikes.squeeze(0)

    def single_step_functional_forward(
        self, inputs: _Tensors, states: _States, **kwargs: object
    ) -> tuple[_Tensors, _States]:
        """Run one time step from explicit states ``(v, i_syn, refractory)``; the stored state is unchanged."""
        spikes, _, state = self._run(inputs[0].unsqueeze(0), self.materialize_states(inputs, states, "s"))
        return (spikes.squeeze(0),), tuple(state)

    def multi_step_functional_forward(
        self, inputs: _Tensors, states: _States, **kwargs: object
    ) -> tuple[_Tensors, _States]:
        """Run a sequence from explicit states ``(v, i_syn, refractory)``; the stored state is unchanged."""
        spikes, _, state = self._run(inputs[0], self.materialize_states(inputs, states, "m"))
        return (spikes,), tuple(state)

    def materialize_states(self, inputs: _Tensors, states: _States, step_mode: str) -> AssociativeLIFState:
        """Turn states at rest (numbers) into tensors for this input; raise if state tensors have another batch shape."""
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        dtypes = (compute_dtype(x), compute_dtype(x), torch.int32)
        return AssociativeLIFState(*(self._state_for(x, s, d) for s, d in zip(states, dtypes, strict=True)))

    def _state_for(self, x: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        if not isinstance(state, Tensor):
            return torch.full_like(x, state, dtype=dtype, requires_grad=False)
        if state.shape != x.shape:
            raise ValueError(
                f"{type(self).__name__} has state of shape {list(state.shape)}, but got input of shape {list(x.shape)} "
                "per time step: call reset() (or functional.reset_net) before a batch of another shape"
            )
        if state.is_meta and not x.is_meta:
            raise ValueError(f"{type(self).__name__} has state without data (device meta): call reset() before it runs")
        return state.to(device=x.device, dtype=dtype)

    def _run(
        self, x_seq: Tensor, states: AssociativeLIFState | None, return_v_seq: bool = False
    ) -> tuple[Tensor, Tensor | None, AssociativeLIFState]:
        rows = x_seq.flatten(1, -2)  # the op takes [T, rows, D]
        dtype = compute_dtype(x_seq)  # cast before the sigmoid: in bfloat16, 1 - beta_mem would be 2 % off
        spikes, v_seq, state = associative_lif(
            rows,
            None if states is None else AssociativeLIFState(*(part.flatten(0, -2) for part in states)),
            threshold=self.firing_threshold(),
            beta_mem=self.beta_mem_logit.to(dtype).sigmoid(),
            beta_syn=self.beta_syn_logit.to(dtype).sigmoid(),
            cascade_weight=None if self.cascade is None else self.cascade.weight.to(dtype).sigmoid(),
            cascade_gain=None if self.cascade is None else self.cascade.gain,
            v_reset=self.v_reset,
            refractory_steps=self.refractory_steps,
            surrogate=self.surrogate_function,
            alpha=self.alpha,
            return_v_seq=return_v_seq,
            backend=self.backend,
        )
        final = AssociativeLIFState(*(part.reshape(x_seq.shape[1:]) for part in state))
        return spikes.reshape(x_seq.shape), None if v_seq is None else v_seq.reshape(x_seq.shape), final

    def firing_threshold(self) -> Tensor:
        """Return the membrane potential at which a neuron fires, ``[D]``; a subclass may override this method."""
        return self.v_threshold

    def update_cost(self, spikes: Tensor) -> OpCost:
        """Return the cost of the updates that computed ``spikes [*, D]``, cascade included."""
        return associative_update_cost(spikes, None if self.cascade is None else self.cascade.n_clusters)

    def extra_repr(self) -> str:
        """Return the sizes and the constants that are not learnable."""
        return (
            f"n_features={self.n_features}, v_reset={self.v_reset}, refractory_steps={self.refractory_steps}, "
            f"surrogate={self.surrogate_function!r}, alpha={self.alpha}, "
            f"step_mode={self.step_mode!r}, backend={self.backend!r}"
        )


def _logit(beta: float, name: str) -> float:
    if not 0 < beta < 1:
        raise ValueError(f"{name} must lie in (0, 1), got {beta}")
    return math.log(beta / (1 - beta))
