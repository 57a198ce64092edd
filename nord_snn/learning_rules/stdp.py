"""Pair-based STDP as a learner with the interface of SpikingJelly's learners."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nord_snn.learning_rules.learner import Learner, SpikeRecord
from nord_snn.ops import STDPState, stdp
from nord_snn.ops.checks import check_numbers, check_time_constants

__all__ = ["STDP"]


class STDP(Learner):
    """Strengthen synapses whose input fires before their output, weaken those whose input fires after it.

    The equations are those of :func:`nord_snn.ops.stdp`. While enabled, the learner records the input spikes of ``synapse``
    and the output spikes of ``sn``; :meth:`step` turns the record into a weight update and clears it. Traces continue from
    one update to the next until :meth:`reset`, so reset between independent sequences; several calls of the network before an
    update count as one longer sequence. A copy of the network needs its own learner. Keep a reference to the learner: the
    network's hooks have only a weak reference, and a garbage-collected learner records nothing.

    Args:
        step_mode: ``"m"`` if the network is called with sequences ``[T, N, *, D]`` or images ``[T, N, C, H, W]``, ``"s"`` if
            with single time steps. If time and batch are flattened in the input of the synapse (``SeqToANNContainer``), the
            shape of the neurons' output separates them.
        synapse: the module that learns, an ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d`` (or a subclass, as SpikingJelly's
            layers) with any stride, padding, dilation and groups; its input must be spikes.
        sn: the neurons that the synapse drives; if they return several tensors, as snnTorch's do, the first is the spikes.
        tau_plus: time constant of the presynaptic trace, in time steps.
        tau_minus: time constant of the postsynaptic trace, in time steps.
        a_plus: potentiation by a pair of simultaneous spikes; it decays with their distance in time.
        a_minus: depression by a pair of simultaneous spikes; it decays with their distance in time.
        reduction: ``"sum"`` or ``"mean"`` over the rows of a batch and the tokens of a sequence.
        bounds: range to which :meth:`apply` limits weights (hard bounds), or None. It limits changes by the rule only: a
            weight that is already outside stays unchanged. Updates through a gradient are not limited.
        mu: exponent of the dependence on the weight: 0 is additive; with 1 (multiplicative) changes vanish towards
            ``bounds`` (soft bounds).
        max_norm: upper limit of the Euclidean norm of one update; a larger update is scaled down to it. None: no limit.
        name: name of the synapse in messages; default: its class and shape.

    Raises:
        TypeError: ``synapse`` is of another class.
        ValueError: an argument is out of its range.

    Source: Bi and Poo 1998; ``mu`` after Guetig et al. 2003. The interface is that of SpikingJelly's ``STDPLearner``; its traces
    decay by the factor ``1 - 1 / tau``, those of this class by ``exp(-1 / tau)``.

    Example:
        >>> import torch
        >>> from nord_snn.neurons import AssociativeLIFNode
        >>> net = nn.Sequential(nn.Linear(64, 16, bias=False), AssociativeLIFNode(16, n_clusters=4, step_mode="m"))
        >>> rule = STDP(step_mode="m", synapse=net[0], sn=net[1])
        >>> spikes = (torch.rand(10, 3, 64) < 0.5).float()
        >>> _ = net(spikes); rule.apply(rule.step(on_grad=False)); rule.revert()
    """

    def __init__(
        self,
        step_mode: str,
        synapse: nn.Module,
        sn: nn.Module,
        tau_plus: float = 20.0,
        tau_minus: float = 20.0,
        a_plus: float = 0.005,
        a_minus: float = 0.005,
        *,
        reduction: str = "sum",
        bounds: tuple[float, float] | None = (-0.3, 1.0),
        mu: float = 0.0,
        max_norm: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(step_mode, synapse, sn, reduction, bounds, mu, max_norm, name)
        check_time_constants(tau_plus=tau_plus, tau_minus=tau_minus)
        check_numbers(a_plus=a_plus, a_minus=a_minus)
        self.tau_plus, self.tau_minus, self.a_plus, self.a_minus = tau_plus, tau_minus, a_plus, a_minus

    def step(self, on_grad: bool = True, scale: float = 1.0, positions: slice | None = None) -> Tensor | None:
        """Compute the weight update of the recorded spikes and clear the record.

        With ``torch.distributed`` all processes must call this; the update is the mean over them.

        Args:
            on_grad: True subtracts the update from ``synapse.weight.grad``, so that gradient descent adds it to the weight,
                times the learning rate; False returns it.
            scale: factor of the update.
            positions: the positions in S of sequences ``[T, B, S, D]`` to learn from; None for all.

        Returns:
            The update, shaped as the weight, or None with ``on_grad`` or if nothing was recorded.

        Raises:
            RuntimeError: the synapse and the neurons were not called equally often, or never.
            ValueError: shapes do not fit, the batch shape changed since the last reset, or spikes or weights contain NaN.
                Weights and traces are then unchanged, and the record stays until :meth:`reset`.
        """
        return self._return_or_accumulate(self._weight_update(self._change, scale, positions, on_grad), on_grad)

    def extra_repr(self) -> str:
        """Return the constants."""
        constants = ("tau_plus", "tau_minus", "a_plus", "a_minus")
        return ", ".join(f"{name}={getattr(self, name)}" for name in constants) + f", {super().extra_repr()}"

    def _change(self, record: SpikeRecord) -> tuple[Tensor, Callable[[], None]]:
        state = None
        if self.trace_pre is not None and self.trace_post is not None:
            state = STDPState(self.trace_pre, self.trace_post)
        delta, traces = stdp(record.pre, record.post, state, **self._constants())

        def commit() -> None:
            self.trace_pre, self.trace_post = traces

        return delta, commit

    def _constants(self) -> dict[str, Any]:
        """Return the arguments of the op that do not depend on the record."""
        return {
            "tau_plus": self.tau_plus,
            "tau_minus": self.tau_minus,
            "a_plus": self.a_plus,
            "a_minus": self.a_minus,
            **self._synapse_arguments(),
        }
