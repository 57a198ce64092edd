"""Triplet STDP as a learner with the interface of SpikingJelly's learners."""

from collections.abc import Callable

from torch import Tensor, nn

from nord_snn.learning_rules.learner import Learner, SpikeRecord
from nord_snn.ops import TripletState, triplet_stdp
from nord_snn.ops.checks import check_numbers, check_time_constants

__all__ = ["TripletSTDP"]


class TripletSTDP(Learner):
    """Apply STDP whose change per pair grows with the recent firing of the neuron that fires last.

    The equations are those of :func:`nord_snn.ops.triplet_stdp`. Unlike pair-based STDP they explain why the same pairs
    cause potentiation at high rates and depression at low rates. The defaults are the fit of Pfister and Gerstner 2006 to
    visual cortex (all-to-all interaction), with time steps of 1 ms. Everything else is as in :class:`STDP`.

    Args:
        step_mode: see :class:`STDP`.
        synapse: see :class:`STDP`.
        sn: see :class:`STDP`.
        tau_plus: time constant of the fast presynaptic trace, in time steps.
        tau_minus: time constant of the fast postsynaptic trace, in time steps.
        tau_x: time constant of the slow presynaptic trace, in time steps.
        tau_y: time constant of the slow postsynaptic trace, in time steps.
        a2_plus: potentiation per pair.
        a2_minus: depression per pair.
        a3_plus: potentiation per triplet post-pre-post.
        a3_minus: depression per triplet pre-post-pre.
        reduction: see :class:`STDP`.
        bounds: see :class:`STDP`.
        mu: see :class:`STDP`.
        max_norm: see :class:`STDP`.
        name: see :class:`STDP`.

    Raises:
        TypeError: ``synapse`` is neither linear nor a convolution.
        ValueError: an argument is out of its range.

    Source: Pfister and Gerstner 2006, "Triplets of spikes in a model of spike timing-dependent plasticity".

    Example:
        >>> import torch
        >>> from nord_snn.neurons import AssociativeLIFNode
        >>> net = nn.Sequential(nn.Linear(64, 16, bias=False), AssociativeLIFNode(16, n_clusters=4, step_mode="m"))
        >>> rule = TripletSTDP(step_mode="m", synapse=net[0], sn=net[1])
        >>> _ = net((torch.rand(10, 3, 64) < 0.5).float()); rule.step(on_grad=False).shape
        torch.Size([16, 64])
    """

    def __init__(
        self,
        step_mode: str,
        synapse: nn.Module,
        sn: nn.Module,
        tau_plus: float = 16.8,
        tau_minus: float = 33.7,
        tau_x: float = 101.0,
        tau_y: float = 125.0,
        a2_plus: float = 5e-10,
        a2_minus: float = 7e-3,
        a3_plus: float = 6.2e-3,
        a3_minus: float = 2.3e-4,
        *,
        reduction: str = "sum",
        bounds: tuple[float, float] | None = (-0.3, 1.0),
        mu: float = 0.0,
        max_norm: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(step_mode, synapse, sn, reduction, bounds, mu, max_norm, name)
        check_time_constants(tau_plus=tau_plus, tau_minus=tau_minus, tau_x=tau_x, tau_y=tau_y)
        check_numbers(a2_plus=a2_plus, a2_minus=a2_minus, a3_plus=a3_plus, a3_minus=a3_minus)
        self.tau_plus, self.tau_minus, self.tau_x, self.tau_y = tau_plus, tau_minus, tau_x, tau_y
        self.a2_plus, self.a2_minus, self.a3_plus, self.a3_minus = a2_plus, a2_minus, a3_plus, a3_minus
        self.slow_trace_pre: Tensor | None
        self.slow_trace_post: Tensor | None
        self.register_memory("slow_trace_pre", None)
        self.register_memory("slow_trace_post", None)

    def step(self, on_grad: bool = True, scale: float = 1.0, positions: slice | None = None) -> Tensor | None:
        """Compute the weight update of the recorded spikes and clear the record; see :meth:`STDP.step`."""
        return self._return_or_accumulate(self._weight_update(self._change, scale, positions, on_grad), on_grad)

    def extra_repr(self) -> str:
        """Return the constants."""
        constants = ("tau_plus", "tau_minus", "tau_x", "tau_y", "a2_plus", "a2_minus", "a3_plus", "a3_minus")
        return ", ".join(f"{name}={getattr(self, name)}" for name in constants) + f", {super().extra_repr()}"

    def _change(self, record: SpikeRecord) -> tuple[Tensor, Callable[[], None]]:
        stored = (self.trace_pre, self.trace_post, self.slow_trace_pre, self.slow_trace_post)
        delta, traces = triplet_stdp(
            record.pre,
            record.post,
            None if self.trace_pre is None else TripletState(*stored),  # type: ignore[arg-type]  # all four are None, or none of them
            tau_plus=self.tau_plus,
            tau_minus=self.tau_minus,
            tau_x=self.tau_x,
            tau_y=self.tau_y,
            a2_plus=self.a2_plus,
            a2_minus=self.a2_minus,
            a3_plus=self.a3_plus,
            a3_minus=self.a3_minus,
            **self._synapse_arguments(),
        )

        def commit() -> None:
            self.trace_pre, self.trace_post, self.slow_trace_pre, self.slow_trace_post = traces

        return delta, commit
