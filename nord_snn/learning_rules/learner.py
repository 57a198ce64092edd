"""Base class of the learning rules: spike recording, the interface of SpikingJelly's learners, and the weight update."""

import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn

from nord_snn._compat.torch import padding_on_both_sides, version_counter
from nord_snn.learning_rules.distributed import mean_over_ranks, raise_on_all_ranks
from nord_snn.learning_rules.plastic import PlasticPart
from nord_snn.ops import ConvGeometry
from nord_snn.ops.checks import as_number, check_dependence, check_flags, describe

__all__ = ["Learner", "SpikeRecord"]

#: A learner with one update per time step warns about silence after this many time steps without a weight change.
SILENT_STEPS = 20


class SpikeRecord(NamedTuple):
    """Spikes that were recorded since the last update.

    Attributes:
        pre: input of the synapse, ``[T, N, *]``, batch and positions flattened into N.
        post: output of the neurons, ``[T, N, *]``.
        rows: shape of the dimensions that are flattened into N: ``[B, S]`` for sequences ``[T, B, S, D]``.
    """

    pre: Tensor
    post: Tensor
    rows: torch.Size


#: Returns the weight update of a record, summed over rows, and a function that stores the new traces, called after all checks.
ComputeChange = Callable[[SpikeRecord], tuple[Tensor, Callable[[], None]]]


class Learner(base.MemoryModule):
    """Record the spikes of a synapse and its neurons; subclasses compute a weight update from the record in ``step``.

    Args:
        step_mode: ``"m"`` if the network is called with whole sequences, ``"s"`` if with single time steps.
        synapse: the module that learns.
        sn: the neurons that the synapse drives.
        reduction: how the updates of the rows are combined, ``"sum"`` or ``"mean"``.
        bounds: range to which :meth:`apply` limits weights, or None.
        mu: exponent of the soft bounds: the nearer a weight is to a bound, the smaller its update; 0: no soft bounds.
        max_norm: upper limit of the Euclidean norm of one update, or None.
        name: name of the synapse in messages; None: its class and shape.
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
                f"synapse must have a weight without parametrization, got a {type(synapse).__name__} that computes its weight"
            )
        if not isinstance(sn, nn.Module):
            raise TypeError(f"sn must be a torch.nn.Module, got {type(sn).__name__}")
        if not isinstance(step_mode, str) or step_mode not in ("s", "m"):
            raise ValueError(f"step_mode must be 's' or 'm', got {describe(step_mode)}")
        if not isinstance(reduction, str) or reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {describe(reduction)}")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a text or None, got {describe(name)}")
        check_dependence((0, 1) if bounds is None else bounds, mu)
        if mu and bounds is None:
            raise ValueError(f"bounds must be (lower, upper) if mu is above 0, got None with mu = {mu}")
        if max_norm is not None and not as_number(max_norm, "max_norm") > 0:
            raise ValueError(f"max_norm must be positive or None, got {max_norm}")
        self.step_mode = step_mode
        # Not registered as submodules: the learner must not list their parameters.
        self.__dict__["synapse"], self.__dict__["sn"] = synapse, sn
        self.plastic = PlasticPart(synapse, bounds)
        self.reduction, self.mu, self.max_norm = reduction, mu, max_norm
        self.name = name or f"{type(synapse).__name__}{list(synapse.weight.shape)}"
        self.geometry = _geometry(synapse)  # None for a linear map
        self.trace_pre: Tensor | None
        self.trace_post: Tensor | None
        self.register_memory("trace_pre", None)
        self.register_memory("trace_post", None)
        self._pre: list[Tensor] = []
        self._post: list[Tensor] = []
        self._versions: list[
            tuple[Tensor, int]
        ] = []  # recorded tensors, which are not copied, and their version counters
        self._layout: tuple[torch.Size, slice | None] | None = None  # rows and positions of the traces
        self._enabled = True
        self._was_called = False  # whether synapse or neurons were ever called
        self._input_checked = self._warned_silent = False
        self._silent_steps = 0
        self._pending_warnings: list[str] = []
        self._hooks = [
            synapse.register_forward_pre_hook(_Hook(self, "_record_pre"), with_kwargs=True),
            sn.register_forward_hook(_Hook(self, "_record_post")),
        ]

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Return the range to which :meth:`apply` limits weights."""
        return self.plastic.bounds

    def apply(self, delta: Tensor) -> None:
        """Add ``delta``, in the shape of the weight, within the bounds; :meth:`revert` removes it.

        Raises:
            ValueError: the shape differs, or the sum would not be finite; the weights are unchanged.
        """
        self.plastic.apply(delta)

    def revert(self) -> None:
        """Remove all updates that :meth:`apply` has added, and restore the earlier weights bit for bit.

        If an optimizer has changed weights since, the updates are subtracted from these instead.
        """
        self.plastic.revert()

    def reset(self) -> None:
        """Clear traces and record. Applied updates stay in the weights."""
        super().reset()
        self._layout = None
        self._clear_record()

    def enable(self) -> None:
        """Continue to record."""
        if not self._hooks:
            raise RuntimeError("this learner was closed: make a new one")
        self._enabled = True

    def disable(self) -> None:
        """Stop recording until :meth:`enable`."""
        self._enabled = False

    def close(self) -> None:
        """Remove the hooks and clear traces and record. Applied updates stay in the weights."""
        self.disable()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.reset()

    def extra_repr(self) -> str:
        """Return the arguments that all rules have, for ``repr``."""
        return (
            f"step_mode={self.step_mode!r}, reduction={self.reduction!r}, bounds={self.bounds}, mu={self.mu}, "
            f"max_norm={self.max_norm}, name={self.name!r}"
        )

    # --- for subclasses

    def _synapse_arguments(self) -> dict[str, Any]:
        """Return the arguments of the STDP ops that depend on the synapse."""
        bounds = {} if self.bounds is None else {"bounds": self.bounds}
        weight = self.synapse.weight if self.mu else None
        return {"weight": weight, "mu": self.mu, "geometry": self.geometry, **bounds}

    def _weight_update(
        self, compute: ComputeChange, scale: float, positions: slice | None, on_grad: bool
    ) -> Tensor | None:
        """Return the mean update of all processes and clear the record; None if no process recorded anything."""
        weight = self.synapse.weight

        def own_update() -> Tensor | None:
            check_flags(on_grad=on_grad)
            update = self._update_from_record(compute, as_number(scale, "scale"), positions)
            while self._pending_warnings:  # here, because a filter may make errors of them
                warnings.warn(self._pending_warnings.pop(0), stacklevel=5)  # the caller of step()
            return update

        own_delta = raise_on_all_ranks(own_update, weight.device)
        delta = mean_over_ranks(own_delta, weight)
        if delta is not None and self.max_norm is not None:
            norm = torch.linalg.vector_norm(delta, dtype=torch.float64)  # squares of half precision overflow
            delta = delta * (self.max_norm / norm.clamp(min=self.max_norm)).to(delta.dtype)
        return delta

    def _return_or_accumulate(self, delta: Tensor | None, on_grad: bool) -> Tensor | None:
        """Subtract the update from the gradient and return None, or without ``on_grad`` return it."""
        if delta is None or not on_grad:
            return delta
        weight = self.synapse.weight
        if weight.grad is None:
            weight.grad = -delta
        else:
            weight.grad.sub_(delta)  # in place: the gradient may be a view into a DDP bucket
        return None

    # --- the record

    def _record_pre(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self.synapse:  # a copy of the module has the same hook
            self._record(self._pre, (*inputs, *kwargs.values()), "the synapse was called with")

    def _record_post(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module is self.sn:
            self._record(self._post, output if isinstance(output, tuple) else (output,), "the neurons returned")

    def _record(self, recorded: list[Tensor], values: tuple[Any, ...], source: str) -> None:
        """Append the first of ``values`` to ``recorded``: snnTorch's neurons return spikes first, then states."""
        self._was_called = True
        if not self._enabled:
            return
        if not values or not isinstance(values[0], Tensor):
            got = type(values[0]).__name__ if values else "nothing"
            raise TypeError(f"a learner expects a tensor of spikes as the first value, but {source} {got}")
        spikes = values[0].detach()
        if spikes.is_inference():
            spikes = spikes.clone()  # inference tensors have no version counter
        else:
            self._versions.append((spikes, version_counter(spikes)))
        recorded.append(spikes)

    def _clear_record(self) -> None:
        self._pre.clear()
        self._post.clear()
        self._versions.clear()

    @torch.inference_mode(False)  # traces are later used outside inference mode
    @torch.no_grad()
    def _update_from_record(self, compute: ComputeChange, scale: float, positions: slice | None) -> Tensor | None:
        record = self._spike_record(positions)
        if record is None:
            return None
        if self._layout is not None and self._layout != (record.rows, positions):
            (old_rows, old_positions), rows = self._layout, record.rows
            old, new = (
                (f"{list(old_rows)}", f"{list(rows)}") if old_rows != rows else (f"{old_positions}", f"{positions}")
            )
            raise ValueError(
                f"rows and positions of the traces must not change between updates, got {old} and then {new}: "
                "reset() the learner when the batch shape changes"
            )
        delta, commit = compute(record)
        divisor = max(record.pre.shape[1], 1) if self.reduction == "mean" else 1
        delta = (delta * (scale / divisor)).to(self.synapse.weight.dtype)
        self._check_finite(delta, record)
        commit()
        self._layout = (record.rows, positions)
        self._check_activity(delta, record)
        self._clear_record()
        return delta

    def _spike_record(self, positions: slice | None) -> SpikeRecord | None:
        if len(self._pre) != len(self._post):
            raise RuntimeError(
                f"synapse and neurons must be called equally often, got {len(self._pre)} and {len(self._post)} calls since the "
                "last update: both must be part of the network that ran, and activation checkpointing must recompute both "
                "or neither; reset() clears the record"
            )
        if not self._pre:
            if self._enabled and not self._was_called:
                raise RuntimeError(
                    f"neither {self.name} nor its neurons were ever called: give the learner modules of the network that you call"
                )
            return None
        mode = getattr(self.sn, "step_mode", self.step_mode)
        if mode != self.step_mode:
            raise ValueError(
                f"the neurons after {self.name} must have the step_mode of the learner, {self.step_mode!r}, got {mode!r}"
            )
        if any(version_counter(spikes) != version for spikes, version in self._versions):
            raise RuntimeError(
                f"input or output spikes of {self.name} were modified in place after they were recorded (by a reused buffer "
                "or a layer with inplace=True): pass a new tensor to the network in every call; reset() clears the record"
            )
        pre, post = self._sequence(self._pre), self._sequence(self._post)
        if self.step_mode == "m" and pre.ndim == post.ndim - 1 and len(pre) == len(post) * post.shape[1]:
            # The input of the synapse has time and batch flattened, as in SpikingJelly's SeqToANNContainer.
            pre = pre.unflatten(0, post.shape[:2])
        if self.step_mode == "s" and self.geometry is None and pre.ndim == post.ndim == 2:
            pre, post = pre[:, None], post[:, None]  # a single sample, [D]
        self._check_shapes(pre, post)
        n_feature_dims = 1 if self.geometry is None else pre.ndim - 2
        if positions is not None:
            if pre.ndim != 4 or self.geometry is not None or not isinstance(positions, slice):
                raise ValueError(
                    "positions must be a slice of S in sequences [T, B, S, D], got "
                    f"{positions if isinstance(positions, slice) else describe(positions)} for {list(pre.shape)}"
                )
            if not len(range(pre.shape[2])[positions]):
                raise ValueError(f"positions must select at least one of {pre.shape[2]} positions, got {positions}")
            pre, post = pre[..., positions, :], post[..., positions, :]
        rows = pre.shape[1:-n_feature_dims]
        return SpikeRecord(pre.flatten(1, -1 - n_feature_dims), post.flatten(1, -1 - n_feature_dims), rows)

    def _sequence(self, record: list[Tensor]) -> Tensor:
        """Return the recorded tensors as one sequence ``[T, N, *]``."""
        if self.step_mode == "m" and len(record) == 1:
            return record[0]  # usual case: no copy
        try:
            return torch.cat(record) if self.step_mode == "m" else torch.stack(record)
        except RuntimeError:
            shapes = sorted({tuple(part.shape) for part in record})
            raise ValueError(
                f"the batch shape must not change between two updates, got {shapes}: reset() the learner when it changes"
            ) from None

    def _check_shapes(self, pre: Tensor, post: Tensor) -> None:
        weight, time = self.synapse.weight, "T, " if self.step_mode == "m" else ""
        n_spatial = 0 if self.geometry is None else weight.ndim - 2
        layout = f"[{time}N, *, D]" if self.geometry is None else f"[{time}N, C{', *' * n_spatial}]"
        right_rank = pre.ndim >= 3 if self.geometry is None else pre.ndim == 3 + n_spatial
        if not right_rank or pre.ndim != post.ndim:
            first = 0 if self.step_mode == "m" else 1
            raise ValueError(
                f"with step_mode {self.step_mode!r} the rule expects {layout} before and after {self.name}, "
                f"got {list(pre.shape[first:])} and {list(post.shape[first:])}"
            )
        channel = -1 if self.geometry is None else 2
        n_out, n_in = weight.shape[0], weight.shape[1] * (1 if self.geometry is None else self.geometry.groups)
        rows_end = -1 if self.geometry is None else 2
        fits = pre.shape[channel] == n_in and post.shape[channel] == n_out
        if not fits or pre.shape[:rows_end] != post.shape[:rows_end]:
            raise ValueError(
                f"{self.name} expects {n_in} inputs and {n_out} neurons with the same time steps and rows, "
                f"got {list(pre.shape)} before it and {list(post.shape)} after it"
            )

    # --- errors and warnings

    def _check_finite(self, delta: Tensor, record: SpikeRecord) -> None:
        """Raise a ValueError unless update and weight are finite; NaN in spikes, reward or traces makes the update NaN."""
        finite = delta.isfinite().all() & self.synapse.weight.isfinite().all()
        if finite:
            return
        if not self.synapse.weight.isfinite().all():
            raise ValueError(f"the weight of {self.name} must be finite, but contains NaN or infinity")
        for side, spikes in (("input", record.pre), ("output", record.post)):
            if not spikes.isfinite().all():
                raise ValueError(
                    f"the {side} spikes of {self.name} must be finite, but contain NaN or infinity; the weights are unchanged"
                )
        raise ValueError(f"the weight update of {self.name} must be finite, but is not; the weights are unchanged")

    def _check_activity(self, delta: Tensor, record: SpikeRecord) -> None:
        """Queue warnings, each once: of values other than 0 and 1, and of silence."""
        if not self._input_checked:
            self._input_checked = True
            for side, spikes in (("input of", record.pre), ("output of the neurons after", record.post)):
                if not ((spikes == 0) | (spikes == 1)).all():
                    self._pending_warnings.append(
                        f"the {side} {self.name} must be spikes (0 and 1) for STDP, got other values"
                    )
        self._silent_steps = 0 if delta.any() else self._silent_steps + len(record.pre)
        # One silent time step is normal, a silent sequence is not.
        silent_for_long = self._silent_steps >= SILENT_STEPS or (self._silent_steps > 0 and len(record.pre) > 1)
        if not self._warned_silent and silent_for_long:
            silent = [side for side, spikes in (("input", record.pre), ("neurons", record.post)) if not spikes.any()]
            if silent:
                self._warned_silent = True
                self._pending_warnings.append(
                    f"the {' and the '.join(silent)} of {self.name} did not fire in this update: the weight change is zero"
                )


class _Hook:
    """Call a method of a learner while the learner exists. Copies and pickles of the network do not contain the learner."""

    def __init__(self, learner: "Learner | None", name: str) -> None:
        self._learner = (lambda: None) if learner is None else weakref.ref(learner)
        self._name = name

    def __call__(self, *args: Any) -> None:
        learner = self._learner()
        if learner is not None:
            getattr(learner, self._name)(*args)

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
