"""What all rules have in common: watching two modules, SpikingJelly's life cycle, and where the change goes."""

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn

from nord_snn._compat.torch import padding_on_both_sides, version_of
from nord_snn.learning_rules.plastic import PlasticPart
from nord_snn.learning_rules.ranks import mean_over_ranks, together
from nord_snn.ops import ConvGeometry
from nord_snn.ops.checks import check_dependence

__all__ = ["Learner", "Window"]

#: Windows of one step that may pass without a change before a learner says that nobody fires.
SILENT_STEPS = 20


class Window(NamedTuple):
    """What was recorded since the last step.

    Attributes:
        pre: ``[T, N, *]``, all rows in one dimension.
        post: ``[T, N, *]``.
        rows: what N was before: ``[B, S]`` for sequences ``[T, B, S, D]``.
    """

    pre: Tensor
    post: Tensor
    rows: torch.Size


#: A window's change, summed over rows, and what writes the new traces once everything is known to be well.
Change = Callable[[Window], tuple[Tensor, Callable[[], None]]]


class Learner(base.MemoryModule):
    """A rule that watches a synapse and its neurons; subclasses say in ``step`` what it computes from the record.

    Args:
        step_mode: ``"m"`` if the network is called with whole sequences, ``"s"`` if step by step.
        synapse: what learns.
        sn: the neurons that it drives.
        reduction: over rows, ``"sum"`` or ``"mean"``.
        bounds: what :meth:`apply` may bring a weight to, or None.
        mu: exponent of the dependence on the weight.
        max_norm: the largest norm of the change of one step, or None.
        name: what messages call the synapse.
    """

    def __init__(
        self,
        step_mode: str,
        synapse: nn.Module,
        sn: nn.Module,
        reduction: str,
        bounds: tuple[float, float] | None,
        mu: float,
        max_norm: float | None,
        name: str | None,
    ) -> None:
        super().__init__()
        if not isinstance(synapse, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            raise TypeError(f"synapse must be a Linear, Conv1d or Conv2d of torch.nn, got {type(synapse).__name__}")
        if "weight" not in dict(synapse.named_parameters(recurse=False)):
            raise TypeError(
                f"the weight of a {type(synapse).__name__} with a parametrization is computed from others and cannot learn itself"
            )
        if not isinstance(sn, nn.Module):
            raise TypeError(f"sn must be a torch.nn.Module, got {type(sn).__name__}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        check_dependence((0, 1) if bounds is None else bounds, mu)
        if mu and bounds is None:
            raise ValueError(f"a dependence on the weight (mu = {mu}) needs bounds, got None")
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"max_norm must be positive or None, got {max_norm}")
        self.step_mode = step_mode
        # Past nn.Module's registration: the learner watches the two, their parameters are not the learner's.
        self.__dict__["synapse"], self.__dict__["sn"] = synapse, sn
        self.plastic = PlasticPart(synapse, bounds)
        self.reduction, self.mu, self.max_norm = reduction, mu, max_norm
        self.name = name or f"{type(synapse).__name__}{list(synapse.weight.shape)}"
        self.geometry = _geometry(synapse)
        self.trace_pre: Tensor | None
        self.trace_post: Tensor | None
        self.register_memory("trace_pre", None)
        self.register_memory("trace_post", None)
        self._pre: list[Tensor] = []
        self._post: list[Tensor] = []
        self._versions: list[tuple[Tensor, int]] = []  # of what was recorded: it is not copied
        self._layout: tuple[torch.Size, slice | None] | None = None  # rows that the traces are of
        self._enabled = True
        self._ran = False  # whether one of the two was ever called
        self._looked = self._said_silent = False
        self._silent_steps = 0
        self._to_say: list[str] = []
        self._hooks = [
            synapse.register_forward_pre_hook(_Hook(self, "_record_pre"), with_kwargs=True),
            sn.register_forward_hook(_Hook(self, "_record_post")),
        ]

    @property
    def bounds(self) -> tuple[float, float] | None:
        """What :meth:`apply` may bring a weight to."""
        return self.plastic.bounds

    def apply(self, delta: Tensor) -> None:
        """Add ``delta``, shaped as the weight, within the bounds; :meth:`revert` can take it back.

        Raises:
            ValueError: another shape, or the sum would not be finite; the weights are untouched.
        """
        self.plastic.apply(delta)

    def revert(self) -> None:
        """Take back everything that :meth:`apply` has added, bit for bit unless an optimizer ran in between.

        Then what the rule added is subtracted from what the weights are now.
        """
        self.plastic.revert()

    def reset(self) -> None:
        """Forget traces and records. What was applied to the weights stays."""
        super().reset()
        self._layout = None
        self._forget_record()

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
        """What all rules have."""
        return (
            f"step_mode={self.step_mode!r}, reduction={self.reduction!r}, bounds={self.bounds}, mu={self.mu}, "
            f"max_norm={self.max_norm}, name={self.name!r}"
        )

    # --- for subclasses

    def _dependence(self) -> dict[str, Any]:
        """Arguments of every op that the synapse decides."""
        bounds = {} if self.bounds is None else {"bounds": self.bounds}
        weight = self.synapse.weight if self.mu else None
        return {"weight": weight, "mu": self.mu, "geometry": self.geometry, **bounds}

    def _delta(self, change: Change, scale: float, positions: slice | None) -> Tensor | None:
        """Turn the record of all processes into one change, and forget it; None if nobody recorded anything."""
        weight = self.synapse.weight
        own = together(lambda: self._consume(change, scale, positions), weight.device)
        while self._to_say:
            warnings.warn(self._to_say.pop(0), stacklevel=3)  # where step() was called
        delta = mean_over_ranks(own, weight)
        if delta is not None and self.max_norm is not None:
            norm = torch.linalg.vector_norm(delta, dtype=torch.float64)  # squares of half precision overflow
            delta = delta * (self.max_norm / norm.clamp(min=self.max_norm)).to(delta.dtype)
        return delta

    def _deliver(self, delta: Tensor | None, on_grad: bool) -> Tensor | None:
        """Return the change, or subtract it from the gradient."""
        if delta is None or not on_grad:
            return delta
        weight = self.synapse.weight
        if weight.grad is None:
            weight.grad = -delta
        else:
            weight.grad.sub_(delta)  # in place: the gradient may be a view into a bucket of DDP
        return None

    # --- the record

    def _record_pre(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module is self.synapse:
            self._record(self._pre, (*inputs, *named.values()), "the synapse was called with")

    def _record_post(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module is self.sn:
            self._record(self._post, output if isinstance(output, tuple) else (output,), "the neurons returned")

    def _record(self, record: list[Tensor], given: tuple[Any, ...], what: str) -> None:
        """Keep the first of what a module was called with or returned: snnTorch's neurons return spikes and membranes."""
        self._ran = True
        if not self._enabled:
            return
        if not given or not isinstance(given[0], Tensor):
            got = type(given[0]).__name__ if given else "nothing"
            raise TypeError(f"a learner expects spikes as the first tensor, {what} {got}")
        spikes = given[0].detach()
        if spikes.is_inference():
            spikes = spikes.clone()  # torch keeps no version of these
        else:
            self._versions.append((spikes, version_of(spikes)))
        record.append(spikes)

    def _forget_record(self) -> None:
        self._pre.clear()
        self._post.clear()
        self._versions.clear()

    @torch.inference_mode(False)  # traces outlive it
    @torch.no_grad()
    def _consume(self, change: Change, scale: float, positions: slice | None) -> Tensor | None:
        window = self._window(positions)
        if window is None:
            return None
        if self._layout not in (None, (window.rows, positions)):
            before, now = (f"{list(rows)}" for rows in (self._layout[0], window.rows))
            raise ValueError(
                f"the rows that the traces are of changed from {before} to {now} (or their positions did): "
                "reset() the learner when the batch shape changes"
            )
        delta, keep = change(window)
        rows = max(window.pre.shape[1], 1) if self.reduction == "mean" else 1
        delta = (delta * (scale / rows)).to(self.synapse.weight.dtype)
        self._check_finite(delta, window)
        keep()
        self._layout = (window.rows, positions)
        self._notice(delta, window)
        self._forget_record()
        return delta

    def _window(self, positions: slice | None) -> Window | None:
        if len(self._pre) != len(self._post):
            raise RuntimeError(
                f"the synapse was called {len(self._pre)} times and its neurons {len(self._post)} times since the last step: "
                "a learner needs one call of each per pass. Are both part of the network that ran, and called once each (also "
                "where activation checkpointing runs a part of it again)? reset() forgets the record"
            )
        if not self._pre:
            if self._enabled and not self._ran:
                raise RuntimeError(
                    f"neither {self.name} nor its neurons were ever called: a learner needs modules of the network that runs"
                )
            return None
        mode = getattr(self.sn, "step_mode", self.step_mode)
        if mode != self.step_mode:
            raise ValueError(f"the neurons behind {self.name} have step_mode {mode!r}, the learner {self.step_mode!r}")
        if any(version_of(spikes) != version for spikes, version in self._versions):
            raise RuntimeError(
                f"spikes before or behind {self.name} were written into after they were recorded (a buffer that is used "
                "again, or a layer with inplace=True): give the network a new tensor in every call; reset() forgets the record"
            )
        pre, post = self._sequence(self._pre), self._sequence(self._post)
        if self.step_mode == "m" and pre.ndim == post.ndim - 1 and len(pre) == len(post) * post.shape[1]:
            # Time and batch were one while the synapse ran, as in SpikingJelly's SeqToANNContainer.
            pre = pre.unflatten(0, post.shape[:2])
        if self.step_mode == "s" and self.geometry is None and pre.ndim == post.ndim == 2:
            pre, post = pre[:, None], post[:, None]  # one sample without a batch, [D]
        self._check_shapes(pre, post)
        n_features = 1 if self.geometry is None else pre.ndim - 2
        if positions is not None:
            if pre.ndim != 4 or self.geometry is not None or not isinstance(positions, slice):
                raise ValueError(
                    f"positions are a slice of S in sequences [T, B, S, D], got {positions} of {list(pre.shape)}"
                )
            if not len(range(pre.shape[2])[positions]):
                raise ValueError(f"no position is left: {positions} of {pre.shape[2]}")
            pre, post = pre[..., positions, :], post[..., positions, :]
        rows = pre.shape[1:-n_features]
        return Window(pre.flatten(1, -1 - n_features), post.flatten(1, -1 - n_features), rows)

    def _sequence(self, record: list[Tensor]) -> Tensor:
        """All records as one sequence ``[T, N, *]``."""
        if self.step_mode == "m" and len(record) == 1:
            return record[0]  # the usual case, without a copy
        try:
            return torch.cat(record) if self.step_mode == "m" else torch.stack(record)
        except RuntimeError:
            shapes = sorted({tuple(part.shape) for part in record})
            raise ValueError(
                f"the batch shape changed between two steps of the rule ({shapes}): reset() it there"
            ) from None

    def _check_shapes(self, pre: Tensor, post: Tensor) -> None:
        weight, time = self.synapse.weight, "T, " if self.step_mode == "m" else ""
        n_spatial = 0 if self.geometry is None else weight.ndim - 2
        layout = f"[{time}N, *, D]" if self.geometry is None else f"[{time}N, C{', *' * n_spatial}]"
        right_rank = pre.ndim >= 3 if self.geometry is None else pre.ndim == 3 + n_spatial
        if not right_rank or pre.ndim != post.ndim:
            skip = 0 if self.step_mode == "m" else 1
            raise ValueError(
                f"with step_mode {self.step_mode!r} the rule expects {layout} before and behind {self.name}, "
                f"got {list(pre.shape[skip:])} and {list(post.shape[skip:])}"
            )
        channel = -1 if self.geometry is None else 2
        n_out, n_in = weight.shape[0], weight.shape[1] * (1 if self.geometry is None else self.geometry.groups)
        rows_end = -1 if self.geometry is None else 2
        fits = pre.shape[channel] == n_in and post.shape[channel] == n_out
        if not fits or pre.shape[:rows_end] != post.shape[:rows_end]:
            raise ValueError(
                f"{self.name} joins {n_in} inputs to {n_out} neurons in the same steps and rows, "
                f"got {list(pre.shape)} before it and {list(post.shape)} behind"
            )

    # --- what is wrong, and what is only strange

    def _check_finite(self, delta: Tensor, window: Window) -> None:
        """NaN anywhere in spikes, reward or traces ends up in the change, so one look at it is enough."""
        well = delta.isfinite().all() & self.synapse.weight.isfinite().all()
        if well:
            return
        if not self.synapse.weight.isfinite().all():
            raise ValueError(f"the weight of {self.name} holds NaN or infinity: there is nothing to learn on")
        for side, spikes in (("input", window.pre), ("output", window.post)):
            if not spikes.isfinite().all():
                raise ValueError(f"the {side} spikes of {self.name} hold NaN or infinity; the weights are untouched")
        raise ValueError(f"the change of {self.name} is not finite; the weights are untouched")

    def _notice(self, delta: Tensor, window: Window) -> None:
        """Note once what makes a rule do nothing, or something else than STDP."""
        if not self._looked:
            self._looked = True
            for side, spikes in (("input", window.pre), ("neurons' output", window.post)):
                if not ((spikes == 0) | (spikes == 1)).all():
                    self._to_say.append(
                        f"the {side} of {self.name} is not spikes (0 and 1): what the rule computes is no STDP"
                    )
        self._silent_steps = 0 if delta.any() else self._silent_steps + len(window.pre)
        # A single step in which nobody fires is nothing to speak of.
        if not self._said_silent and self._silent_steps >= (2 if len(window.pre) > 1 else SILENT_STEPS):
            silent = [side for side, spikes in (("input", window.pre), ("neurons", window.post)) if not spikes.any()]
            if silent:
                self._said_silent = True
                self._to_say.append(
                    f"the {' and the '.join(silent)} of {self.name} did not fire in a window: no update"
                )


class _Hook:
    """Calls a learner as long as there is one. A copy of the network takes the hook along, but not the learner."""

    def __init__(self, learner: "Learner | None", name: str) -> None:
        self._learner = (lambda: None) if learner is None else weakref.ref(learner)
        self._name = name

    def __call__(self, *given: Any) -> None:
        learner = self._learner()
        if learner is not None:
            getattr(learner, self._name)(*given)

    def __deepcopy__(self, memo: Any) -> "_Hook":
        return self

    def __reduce__(self) -> Any:
        return _Hook, (None, self._name)


def _geometry(synapse: nn.Linear | nn.Conv1d | nn.Conv2d) -> ConvGeometry | None:
    if isinstance(synapse, nn.Linear):
        return None
    return ConvGeometry(
        tuple(synapse.kernel_size),
        tuple(synapse.stride),
        padding_on_both_sides(synapse),
        tuple(synapse.dilation),
        synapse.groups,
        synapse.padding_mode,
    )
