"""The LIF with the signature of ``snntorch.Leaky``."""

from typing import Any

import torch
from torch import Tensor

from nord_snn._compat.snntorch import LeakyWithOwnState
from nord_snn.integrations.snntorch.base import NO_PARTS, OneStepNeuron, StrictNode, check_initial, strict_node
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import AssociativeLIFState, Dynamics
from nord_snn.ops.checks import compute_dtype, describe
from nord_snn.ops.surrogate import SurrogateLike

__all__ = ["AssociativeLeaky", "CalledAsLeaky"]

_RESETS = ("subtract", "zero", "none")
#: Arguments of snnTorch's ``Leaky`` that are supported with their default values only.
_DEFAULTS_ONLY: dict[str, Any] = {
    "surrogate_disable": False, "inhibition": False, "state_quant": False, "graded_spikes_factor": 1.0,
    "learn_graded_spikes_factor": False, "reset_delay": True,
}  # fmt: skip
_NODE_ARGUMENTS = {"channel_dim", "own_decays", "alpha", "backend"}


class CalledAsLeaky(OneStepNeuron, LeakyWithOwnState):
    """Neurons that are called and reset as ``snntorch.Leaky`` or ``Lapicque``. Their synaptic current is stored as well.

    Args:
        node: the neurons.
        init_hidden: store the state in the module: ``spk = lif(x)``.
        output: with ``init_hidden``, also return ``mem``.
    """

    stores_current = True

    def __init__(self, node: AssociativeLIFNode, init_hidden: bool, output: bool) -> None:
        super().__init__(init_hidden, output)
        self.node = node
        self._start_at_rest()
        self.register()

    def reset_mem(self) -> Tensor:
        """Set the state to rest and return ``mem``."""
        self._assign_mem(torch.zeros_like(self._mem))
        return self._mem

    def init_leaky(self) -> Tensor:
        """Set the state to rest and return ``mem``: the older name of :meth:`reset_mem`."""
        return self.reset_mem()

    def init_lapicque(self) -> Tensor:
        """Set the state to rest and return ``mem``: the older name of :meth:`reset_mem` in ``Lapicque``."""
        return self.reset_mem()

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Run one time step from ``mem``, or from the stored membrane potential without it."""
        spk = self._step(input_, mem)
        return spk if self.init_hidden and not self.output else (spk, self._mem)


class AssociativeLeaky(CalledAsLeaky):
    """LIF neurons that are called as ``snntorch.Leaky``, one time step per call, and give the same spikes up to rounding.

    Per time step, with the reset by the membrane potential of the time step before, as in ``Leaky``::

        r[t]   = 1 where mem[t-1] > threshold else 0 (no gradient)
        mem[t] = beta * mem[t-1] + x[t] - r[t] * threshold     reset_mechanism "subtract"
                 beta * (1 - r[t]) * mem[t-1] + x[t]           "zero"
                 beta * mem[t-1] + x[t]                        "none"
        spk[t] = 1 where mem[t] > threshold else 0

    There is no refractory period, synaptic current or cascade (:class:`AssociativeSynaptic` has them): ``mem`` is the whole
    state, so calls of several sequences may alternate and ``mem`` may be changed in any way between calls. A call without
    ``mem`` continues from the stored one.

    There are three differences from ``Leaky``. Every neuron has its own threshold. The decay is stored as a logit, so that a
    learned decay stays in (0, 1). A new batch shape raises an error unless :meth:`reset_mem`, :meth:`init_leaky` or
    ``snntorch.utils.reset`` is called before.

    Args:
        n_features: D, the number of neurons. Default: None, found at the first call.
        beta: initial membrane decay per time step, in (0, 1): a number, or a tensor ``[D]``.
        threshold: initial threshold, a number or a tensor ``[D]``.
        spike_grad: a surrogate of snnTorch or SpikingJelly, or a name from :data:`nord_snn.ops.SURROGATES`. Default: None,
            ``snntorch.surrogate.atan(alpha=2.0)``.
        init_hidden: store the state in the module: ``spk = lif(x)``.
        output: with ``init_hidden``, also return the state.
        learn_beta: make the decay learnable.
        learn_threshold: make the thresholds learnable.
        reset_mechanism: "subtract", "zero" or "none", see the equations.
        more: ``channel_dim``, ``own_decays``, ``alpha`` (the sharpness of a named surrogate) and ``backend`` of
            :class:`~nord_snn.neurons.AssociativeLIFNode`; other arguments of ``Leaky`` with their default values only.

    Shapes: ``x [N, *, D]`` -> ``spk, mem``, each ``[N, *, D]``.

    Raises:
        TypeError: ``n_features`` is not a whole number, an argument is not supported, or ``mem`` is passed with
            ``init_hidden``.
        ValueError: ``reset_mechanism`` is unknown, a constant is out of its range, or the shape of ``mem`` is not the input's.

    Source: ``Leaky`` of snnTorch (Eshraghian et al. 2023).

    Example:
        >>> lif = AssociativeLeaky(beta=0.9)
        >>> mem = lif.init_leaky()
        >>> for x in torch.rand(5, 4, 16):
        ...     spk, mem = lif(x, mem)
        >>> spk.shape, lif.threshold.shape
        (torch.Size([4, 16]), torch.Size([16]))
    """

    node: StrictNode

    def __init__(
        self,
        n_features: int | None = None,
        beta: float | Tensor = 0.9,
        threshold: float | Tensor = 1.0,
        spike_grad: SurrogateLike | None = None,
        init_hidden: bool = False,
        output: bool = False,
        learn_beta: bool = False,
        learn_threshold: bool = False,
        reset_mechanism: str = "subtract",
        **more: Any,
    ) -> None:
        if not isinstance(reset_mechanism, str) or reset_mechanism not in _RESETS:
            raise ValueError(f"reset_mechanism must be one of {list(_RESETS)}, got {describe(reset_mechanism)}")
        flags = {
            "init_hidden": init_hidden, "output": output, "learn_beta": learn_beta, "learn_threshold": learn_threshold
        }  # fmt: skip
        check_initial(spike_grad, flags, beta=beta, threshold=threshold)
        defaults = {name: more.pop(name) for name in sorted(_DEFAULTS_ONLY.keys() & more.keys())}
        unsupported = [f"{name}={value!r}" for name, value in defaults.items() if value != _DEFAULTS_ONLY[name]]
        unsupported += sorted(more.keys() - _NODE_ARGUMENTS)
        if unsupported:
            raise TypeError(f"AssociativeLeaky does not support {', '.join(unsupported)}")
        learned = {"beta_mem": learn_beta, "threshold": learn_threshold}
        node = strict_node(
            n_features,
            preset="lif",
            threshold=threshold,
            beta_mem=beta,
            surrogate="atan" if spike_grad is None else spike_grad,
            dynamics=Dynamics("sum", reset_scale=0.0, detach_reset=True),
            learnable=[name for name, learned in learned.items() if learned],
            **more,
        )
        node.resets_outside = reset_mechanism != "none"
        super().__init__(node, init_hidden, output)
        self._reset_mechanism = reset_mechanism

    def _state(self, x: Tensor, mem: Tensor | None, syn: Tensor | None) -> AssociativeLIFState | None:
        """Return the state before the time step, after the reset by its membrane potential; None for rest."""
        state = super()._state(x, mem, syn)
        if self._reset_mechanism == "none":
            return state
        if state is None:  # at rest; neurons with a negative threshold are reset there, too
            rest = torch.zeros_like(x, dtype=compute_dtype(x), requires_grad=False)
            parts = NO_PARTS if self._membrane_only else (rest, torch.zeros_like(rest, dtype=torch.int32))
            state = AssociativeLIFState(rest, *parts)
        return state._replace(v=self._reset(state.v.to(x.device, compute_dtype(x))))

    def _reset(self, mem: Tensor) -> Tensor:
        threshold = self.node.v_threshold
        spiked = mem > self._of_channels(threshold, mem)
        if self._reset_mechanism == "zero":
            return mem.masked_fill(spiked, 0.0)
        # The node multiplies mem by the decay afterwards. The decay is that of the op, which casts before the sigmoid.
        decrement = threshold.to(mem.dtype) / self.node.beta_mem_logit.to(mem.dtype).sigmoid()
        return mem - spiked * self._of_channels(decrement, mem)

    def _of_channels(self, parameter: Tensor, mem: Tensor) -> Tensor:
        """Return a parameter ``[D]`` in a shape that broadcasts with ``mem``."""
        n_dims_after = -1 - self.node.neuron_dimension(mem.ndim)
        return parameter.reshape(-1, *(1,) * n_dims_after) if n_dims_after else parameter
