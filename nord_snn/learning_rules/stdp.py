"""Pair-based STDP as a learner with SpikingJelly's life cycle."""

from typing import Any

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn

from nord_snn.learning_rules.ranks import mean_over_ranks
from nord_snn.ops import STDPState, stdp

__all__ = ["STDP"]


class STDP(base.MemoryModule):
    """Strengthen synapses whose input fires before their output, weaken those whose input fires after it.

    The equations are those of :func:`nord_snn.ops.stdp`. While enabled, the learner records the spikes that enter ``synapse``
    and those that leave ``sn``; :meth:`step` turns the record into a weight change and forgets it. Traces go on from one step
    to the next until :meth:`reset`, so reset between independent sequences. A copy of the network needs a learner of its own.

    Args:
        step_mode: ``"m"`` if the network is called with sequences ``[T, N, *, D]``, ``"s"`` if step by step.
        synapse: the ``nn.Linear`` that learns; its input must be spikes.
        sn: the neurons that it drives.
        tau_plus: time constant of the presynaptic trace, in steps.
        tau_minus: time constant of the postsynaptic trace, in steps.
        a_plus: strengthening per pair.
        a_minus: weakening per pair.
        reduction: over the rows of a batch, ``"sum"`` or ``"mean"``.
        bounds: what :meth:`apply` may bring a weight to, or None. They limit only what the rule adds: a weight that already
            lies outside stays where it is.

    Raises:
        TypeError: ``synapse`` is no ``nn.Linear``.
        ValueError: an argument is out of its range.

    Source: Bi and Poo 1998; the life cycle is that of SpikingJelly's ``STDPLearner``, whose traces decay by ``1 - 1 / tau``.

    Example:
        >>> from nord_snn.neurons import AssociativeLIFNode
        >>> net = nn.Sequential(nn.Linear(8, 4, bias=False), AssociativeLIFNode(4, n_clusters=2, step_mode="m"))
        >>> rule = STDP(step_mode="m", synapse=net[0], sn=net[1])
        >>> spikes = (torch.rand(10, 3, 8) < 0.5).float()
        >>> _ = net(spikes); rule.apply(rule.step(on_grad=False)); rule.revert()
    """

    def __init__(
        self,
        step_mode: str,
        synapse: nn.Linear,
        sn: nn.Module,
        tau_plus: float = 20.0,
        tau_minus: float = 20.0,
        a_plus: float = 0.005,
        a_minus: float = 0.005,
        reduction: str = "sum",
        bounds: tuple[float, float] | None = (-0.3, 1.0),
    ) -> None:
        super().__init__()
        if not isinstance(synapse, nn.Linear):
            raise TypeError(f"synapse must be a torch.nn.Linear, got {type(synapse).__name__}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be (lower, upper) with lower < upper, got {bounds}")
        if not (tau_plus > 0 and tau_minus > 0):
            raise ValueError(f"time constants must be positive, got tau_plus = {tau_plus} and tau_minus = {tau_minus}")
        self.step_mode = step_mode
        # Past nn.Module's registration: the learner watches the two, their parameters are not the learner's.
        self.__dict__["synapse"], self.__dict__["sn"] = synapse, sn
        self.tau_plus, self.tau_minus, self.a_plus, self.a_minus = tau_plus, tau_minus, a_plus, a_minus
        self.reduction, self.bounds = reduction, bounds
        self.trace_pre: Tensor | None
        self.trace_post: Tensor | None
        self.register_memory("trace_pre", None)
        self.register_memory("trace_post", None)
        self._pre: list[Tensor] = []
        self._post: list[Tensor] = []
        self._enabled = True
        self._trained: Tensor | None = None  # the weight before the first apply
        self._plastic: Tensor | None = None  # the weight after the last apply
        self._hooks = [
            synapse.register_forward_pre_hook(self._record_pre),
            sn.register_forward_hook(self._record_post),
        ]

    def step(self, on_grad: bool = True, scale: float = 1.0, positions: slice | None = None) -> Tensor | None:
        """Turn what was recorded into a weight change, and forget the record.

        In several processes (``torch.distributed``) all of them call this, and the change is the mean of theirs.

        Args:
            on_grad: True subtracts the change from ``synapse.weight.grad``, so that a step of gradient descent adds it;
                False returns it.
            scale: factor on the change.
            positions: of sequences ``[T, B, S, D]``, the positions in S that take part; None for all.

        Returns:
            ``[n_out, n_in]``, or None with ``on_grad`` or if nothing was recorded.

        Raises:
            RuntimeError: the synapse and the neurons were not called equally often.
            ValueError: the batch shape changed since the last reset.
        """
        delta = mean_over_ranks(lambda: self._consume(scale, positions), self.synapse.weight)
        if delta is None or not on_grad:
            return delta
        weight = self.synapse.weight
        if weight.grad is None:
            weight.grad = -delta
        else:
            weight.grad.sub_(delta)  # in place: the gradient may be a view into a bucket of DDP
        return None

    @torch.no_grad()
    def apply(self, delta: Tensor) -> None:
        """Add ``delta [n_out, n_in]`` to the weights within the bounds; :meth:`revert` can take it back."""
        weight = self.synapse.weight
        if not isinstance(delta, Tensor) or delta.shape != weight.shape:
            got = list(delta.shape) if isinstance(delta, Tensor) else type(delta).__name__
            raise ValueError(f"apply expects a weight change of shape [n_out, n_in] = {list(weight.shape)}, got {got}")
        if not delta.isfinite().all():
            raise ValueError(
                "apply expects a finite weight change, got one with NaN or infinity; the weights are untouched"
            )
        if self._trained is None or self._plastic is None:
            self._trained = weight.detach().clone()
        elif not torch.equal(weight, self._plastic):
            # An optimizer ran since: what it did belongs to the trained weights.
            self._trained += weight - self._plastic
        weight.copy_(self._within_bounds(weight, weight + delta.to(weight.dtype)))
        self._plastic = weight.detach().clone()

    @torch.no_grad()
    def revert(self) -> None:
        """Take back everything that :meth:`apply` has added.

        Bit for bit if nothing else has changed the weights since; else (an optimizer ran in between) what the rule added is
        subtracted from what they are now. Does nothing if nothing was applied.
        """
        if self._trained is None or self._plastic is None:
            return
        weight = self.synapse.weight
        untouched = torch.equal(weight, self._plastic)
        weight.copy_(self._trained if untouched else weight - (self._plastic - self._trained))
        self._trained = self._plastic = None

    def reset(self) -> None:
        """Forget traces and records. What was applied to the weights stays."""
        super().reset()
        self._pre.clear()
        self._post.clear()

    def enable(self) -> None:
        """Record again."""
        if not self._hooks:
            raise RuntimeError("this learner was closed: make a new one")
        self._enabled = True

    def disable(self) -> None:
        """Do not record until :meth:`enable`."""
        self._enabled = False

    def close(self) -> None:
        """Stop watching for good and forget the record. What was applied to the weights stays."""
        self.disable()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.reset()

    def extra_repr(self) -> str:
        """The constants."""
        return (
            f"step_mode={self.step_mode!r}, tau_plus={self.tau_plus}, tau_minus={self.tau_minus}, "
            f"a_plus={self.a_plus}, a_minus={self.a_minus}, reduction={self.reduction!r}, bounds={self.bounds}"
        )

    def _record_pre(self, module: nn.Module, inputs: Any) -> None:
        # A deep copy of the network takes the hooks along: what the copy does is none of this learner's business.
        if self._enabled and module is self.synapse:
            self._pre.append(inputs[0].detach())

    def _record_post(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._enabled and module is self.sn:
            self._post.append(output.detach())

    @torch.no_grad()
    def _consume(self, scale: float, positions: slice | None) -> Tensor | None:
        if len(self._pre) != len(self._post):
            raise RuntimeError(
                f"the synapse was called {len(self._pre)} times and its neurons {len(self._post)} times since the last step: "
                "a learner needs one call of each per pass; reset() forgets the record"
            )
        if not self._pre:
            return None
        pre, post = self._sequence(self._pre, positions), self._sequence(self._post, positions)
        held = None
        if self.trace_pre is not None and self.trace_post is not None:
            held = STDPState(self.trace_pre, self.trace_post)
        delta, traces = stdp(
            pre,
            post,
            held,
            tau_plus=self.tau_plus,
            tau_minus=self.tau_minus,
            a_plus=self.a_plus,
            a_minus=self.a_minus,
        )
        self.trace_pre, self.trace_post = traces
        self._pre.clear()
        self._post.clear()
        rows = pre.shape[1] if self.reduction == "mean" else 1
        return (delta * (scale / max(rows, 1))).to(self.synapse.weight.dtype)

    def _sequence(self, record: list[Tensor], positions: slice | None) -> Tensor:
        """All records as one sequence ``[T, rows, n]``."""
        try:
            x = torch.cat(record) if self.step_mode == "m" else torch.stack(record)
        except RuntimeError:
            shapes = sorted({tuple(part.shape) for part in record})
            raise ValueError(
                f"the batch shape changed between two steps of the rule ({shapes}): reset() it there"
            ) from None
        if x.ndim < 3:
            layout = "[T, N, *, D]" if self.step_mode == "m" else "[N, *, D]"
            raise ValueError(
                f"with step_mode {self.step_mode!r} the rule expects {layout}, got {list(record[0].shape)}"
            )
        return (x if positions is None else x[..., positions, :]).flatten(1, -2)

    def _within_bounds(self, old: Tensor, new: Tensor) -> Tensor:
        if self.bounds is None:
            return new
        lower, upper = self.bounds
        return torch.minimum(torch.maximum(new, old.clamp(max=lower)), old.clamp(min=upper))
