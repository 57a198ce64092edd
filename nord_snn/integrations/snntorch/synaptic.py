"""The associative LIF with the signature of ``snntorch.Synaptic``."""

from typing import Any

import torch
from torch import Tensor

from nord_snn._compat.snntorch import SynapticWithOwnState
from nord_snn.integrations.snntorch.base import OneStepNeuron, check_initial, strict_node
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.neurons.presets import OF_PRESET
from nord_snn.ops.surrogate import SurrogateLike

__all__ = ["AssociativeSynaptic", "CalledAsSynaptic"]

#: Arguments of snnTorch's neurons that AssociativeSynaptic does not support.
_UNSUPPORTED = {"graded_spikes_factor", "inhibition", "learn_graded_spikes_factor", "reset_delay", "reset_mechanism",
             "state_quant", "surrogate_disable", "weight_hadamard"}  # fmt: skip


class CalledAsSynaptic(OneStepNeuron, SynapticWithOwnState):
    """Neurons that are called and reset as ``snntorch.Synaptic``.

    Args:
        node: the neurons.
        init_hidden: store the states in the module: ``spk = lif(x)``.
        output: with ``init_hidden``, also return the states.
    """

    def __init__(self, node: AssociativeLIFNode, init_hidden: bool, output: bool) -> None:
        super().__init__(init_hidden, output)
        self.node = node
        self._start_at_rest()
        self.register()

    @property
    def alpha(self) -> Tensor:
        """Return the synaptic decay, ``[1]`` or ``[D]``."""
        return self.node.beta_syn

    @property
    def syn(self) -> Tensor:
        """Return the synaptic current after the last time step."""
        return self._syn

    @syn.setter
    def syn(self, value: Tensor) -> None:
        self._syn = value
        self._assigned = True

    def reset_mem(self) -> tuple[Tensor, Tensor]:
        """Set the state to rest and return ``syn, mem``."""
        self._syn = torch.zeros_like(self._syn)
        self._assign_mem(torch.zeros_like(self._mem))
        return self._syn, self._mem

    def init_synaptic(self) -> tuple[Tensor, Tensor]:
        """Set the state to rest and return ``syn, mem``: the older name of :meth:`reset_mem`."""
        return self.reset_mem()

    def forward(
        self, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Run one time step from ``syn`` and ``mem``, or without them from the stored states."""
        if (syn is None) != (mem is None):
            raise ValueError("pass both syn and mem, or neither to continue from the stored states")
        spk = self._step(input_, mem, syn)
        return spk if self.init_hidden and not self.output else (spk, self._syn, self._mem)


class AssociativeSynaptic(CalledAsSynaptic):
    """Associative LIF neurons that are called and reset as ``snntorch.Synaptic``: one time step per call.

    The equations are those of :func:`nord_snn.ops.associative_lif`, with two differences from
    :class:`~nord_snn.neurons.AssociativeLIFNode`. A neuron fires only above its threshold, not at it, as snnTorch's neurons do.
    A call without states continues from the stored ones.

    Callers pass and receive ``mem`` and ``syn`` only. The refractory counters are stored in the module after each call and used
    in the next one for any ``mem`` of the same shape: the returned tensor, also changed in place, copied or detached, or a
    computed tensor. They are 0 after :meth:`reset_mem`, ``snntorch.utils.reset`` and an assignment to ``mem`` or ``syn``, and if
    all states that are passed are zero. A tensor that was returned before the last call raises an error. A copy of it cannot be
    recognised, so calls of several sequences may alternate only with ``refractory_steps=0``.

    There are two differences from ``Synaptic``. The threshold is subtracted in the same time step (``mem`` is the membrane
    potential after the reset). A new batch shape raises an error unless :meth:`reset_mem` or ``snntorch.utils.reset`` is called
    before.

    Args:
        n_features: D, the number of neurons. None: found at the first call.
        n_clusters: C of the cascade, a divisor of D; "auto" for the largest divisor up to 64; None switches the cascade off.
            This and ``alpha``, ``beta``, ``threshold`` and ``spike_grad`` are by default those of ``preset``: "nord" if
            ``n_features`` is given, else "lif".
        alpha: initial synaptic decay per time step, in (0, 1); ``beta_syn`` of the node.
        beta: initial membrane decay per time step, in (0, 1); ``beta_mem`` of the node.
        threshold: initial threshold of every neuron.
        init_hidden: store the states in the module: ``spk = lif(x)``.
        output: with ``init_hidden``, also return the states.
        learn_alpha: make the synaptic decay learnable.
        learn_beta: make the membrane decay learnable.
        learn_threshold: make the thresholds learnable.
        spike_grad: a surrogate of snnTorch or SpikingJelly, or a name from :data:`nord_snn.ops.SURROGATES`, with
            sharpness 4.
        more: further arguments of :class:`~nord_snn.neurons.AssociativeLIFNode` (``preset``, ``channel_dim``, ``cascade_radius``,
            ``cascade_gain``, ``v_reset``, ``refractory_steps``, ``backend``).

    Shapes: ``x [N, *, D]`` -> ``spk, syn, mem``, each ``[N, *, D]``.

    Raises:
        TypeError: ``n_features`` is not a whole number, states are passed with ``init_hidden``, or an
            unsupported argument of snnTorch's neurons is passed.
        ValueError: one of ``syn`` and ``mem`` is passed without the other, their shape differs from the input's, or
            ``mem`` is that of an earlier call while there is a refractory period.

    Source: the Nord spiking language model; the signature is snnTorch's (Eshraghian et al. 2023).

    Example:
        >>> lif = AssociativeSynaptic(512, n_clusters=64)
        >>> spk, syn, mem = lif(torch.rand(4, 512))
        >>> spk, syn, mem = lif(torch.rand(4, 512), syn, mem)
    """

    def __init__(
        self,
        n_features: int | None = None,
        n_clusters: int | str | None = OF_PRESET,
        alpha: float | Tensor = OF_PRESET,
        beta: float | Tensor = OF_PRESET,
        threshold: float | Tensor = OF_PRESET,
        init_hidden: bool = False,
        output: bool = False,
        learn_alpha: bool = True,
        learn_beta: bool = True,
        learn_threshold: bool = True,
        spike_grad: SurrogateLike = OF_PRESET,
        **more: Any,
    ) -> None:
        if unsupported := sorted(_UNSUPPORTED & more.keys()):
            raise TypeError(
                f"AssociativeSynaptic does not support {', '.join(unsupported)} of snnTorch's neurons: leave them out"
            )
        flags = {
            "init_hidden": init_hidden, "output": output, "learn_alpha": learn_alpha, "learn_beta": learn_beta,
            "learn_threshold": learn_threshold,
        }  # fmt: skip
        check_initial(spike_grad, flags, alpha=alpha, beta=beta, threshold=threshold)
        learned = {"beta_syn": learn_alpha, "beta_mem": learn_beta, "threshold": learn_threshold}
        node = strict_node(
            n_features,
            n_clusters,
            threshold=threshold,
            beta_mem=beta,
            beta_syn=alpha,
            surrogate=spike_grad,
            learnable=[name for name, learned in learned.items() if learned],
            **more,
        )
        super().__init__(node, init_hidden, output)
