"""SpikeCounter: count the spikes of one layer by time step and neuron; LayerActivity: firing rates from the counts."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, distributed, nn

from nord_snn._compat.torch import observe_forward, stop_observing_forward
from nord_snn.monitor.layers import features_of, spikes_of
from nord_snn.neurons.locking import one_at_a_time

__all__ = ["LayerActivity", "SpikeCounter"]


@dataclass(frozen=True)
class LayerActivity:
    """Activity of one layer of neurons.

    Attributes:
        per_neuron: firing rate of each neuron, ``[*, D]`` as in the layer's output.
        per_step: firing rate in each time step, ``[T]``; one entry if the time steps are not known.
        rows: number of time steps that each neuron ran, summed over rows and calls.
        ceiling: the highest possible rate of a neuron of this layer: with a refractory period of R time steps it fires at most
            in every ``R + 1``-th time step.
    """

    per_neuron: Tensor
    per_step: Tensor
    rows: int
    ceiling: float

    @property
    def rate(self) -> float:
        """Return the mean firing rate of all neurons, rows and time steps."""
        return self.per_neuron.mean().item()

    @property
    def dead(self) -> Tensor:
        """Return a mask of the neurons that never fired."""
        return self.per_neuron == 0

    @property
    def saturated(self) -> Tensor:
        """Return a mask of the neurons that fired at 95 % or more of the highest possible rate."""
        return self.per_neuron >= 0.95 * self.ceiling

    def histogram(self, bins: int = 10) -> tuple[Tensor, Tensor]:
        """Return the histogram of firing rates: counts ``[bins]`` and edges ``[bins + 1]`` from 0 to the ceiling."""
        rates = self.per_neuron.flatten().clamp(max=self.ceiling)
        return torch.histogram(rates.float(), bins, range=(0.0, self.ceiling))


class SpikeCounter:
    """Count the spikes of one layer by time step and neuron, and rows by time step. See :class:`SpikeMonitor` for arguments."""

    def __init__(self, name: str, module: nn.Module, feature_dims: int | None, step_mode: str, max_steps: int) -> None:
        self.name, self.module, self.max_steps = name, module, max_steps
        self.feature_dims, self.step_mode = feature_dims, step_mode
        self.step = self.current_step = (
            0  # step mode "s": index of the last completed time step, and of the running one
        )
        self.on = self.is_open = True
        self.clear()

    def observe(self) -> None:
        """Observe the module until :meth:`close`."""
        observe_forward(self.module, self)

    def clear(self) -> None:
        self.counts: Tensor | None = None  # [T, *, D]
        self.rows: Tensor | None = None  # [T]; a tensor: compiled code specialises on Python numbers

    def close(self) -> None:
        stop_observing_forward(self.module, self)  # does nothing if it was not observed
        self.on = self.is_open = False

    def before(self, module: Any) -> None:
        """Find the time step: a node at rest begins a sequence, a node with state continues it."""
        if isinstance(module, BaseNode) and module.step_mode == "s":
            self.current_step = min(self.step + 1, self.max_steps - 1) if isinstance(module.v, Tensor) else 0

    @torch.inference_mode(False)  # counts are later updated outside inference mode
    @torch.no_grad()
    def after(self, module: nn.Module, output: Any) -> None:
        """Count the spikes of the module."""
        self.step = self.current_step  # not in before(): a call that raises is not counted
        if not self.on:
            return
        spikes, is_sequence = spikes_of(module, output, self.step_mode)
        first = 0 if is_sequence else self.step
        features = features_of(module, spikes, self.feature_dims)
        steps, rows = spikes.shape[0], spikes[0].numel() // max(features.numel(), 1)
        # Reduce over rows first: one pass over the spikes.
        counts = spikes.reshape(steps, rows, *features).sum(1, dtype=torch.float32)
        with one_at_a_time():  # threads that run the network at the same time
            self.add(first, counts, rows)

    def add(self, first: int, spikes: Tensor, rows: int) -> None:
        """Add counts ``[T, *, D]`` of spikes over ``rows`` rows, from time step ``first`` on."""
        steps = first + len(spikes)
        if self.counts is None or self.rows is None:
            self.counts = spikes.new_zeros(steps, *spikes.shape[1:], dtype=torch.float64)
            self.rows = self.counts.new_zeros(steps)
        elif self.counts.shape[1:] != spikes.shape[1:]:
            raise ValueError(
                f"the shape of the neurons of '{self.name}' must not change, got {list(self.counts.shape[1:])} and then "
                f"{list(spikes.shape[1:])}: set feature_dims to the number of last dimensions that are neurons"
            )
        elif len(self.counts) < steps:
            more = steps - len(self.counts)
            self.counts = torch.cat((self.counts, self.counts.new_zeros(more, *self.counts.shape[1:])))
            self.rows = torch.cat((self.rows, self.rows.new_zeros(more)))
        self.counts[first:steps] += spikes
        self.rows[first:steps] += rows

    def gather(self) -> None:
        """Sum over processes, which may have run different numbers of time steps."""
        own = 0 if self.counts is None else len(self.counts)
        bounds = torch.tensor([own, -own], device=_device(self.module))
        distributed.all_reduce(bounds, distributed.ReduceOp.MAX)
        steps, fewest = int(bounds[0]), -int(bounds[1])
        if not steps:
            return
        if not fewest or self.counts is None:  # true in all processes, so that none waits in all_reduce
            raise ValueError(f"'{self.name}' must have run in all processes before gather(), but has run in some only")
        self.add(0, self.counts.new_zeros(steps, *self.counts.shape[1:]), 0)
        distributed.all_reduce(self.rows)
        distributed.all_reduce(self.counts)

    def has_run(self) -> bool:
        return self.rows is not None and bool(self.rows.sum() > 0)

    def spikes(self) -> float:
        assert self.counts is not None
        return self.counts.sum().item()

    def neuron_steps(self) -> int:
        """Return time steps times neurons times rows: the number of spikes at a rate of 1."""
        assert self.counts is not None
        assert self.rows is not None
        return int(self.rows.sum()) * self.counts[0].numel()

    def activity(self) -> LayerActivity:
        assert self.counts is not None
        assert self.rows is not None
        counts, rows = self.counts.cpu(), self.rows.cpu()
        interval = int(getattr(self.module, "refractory_steps", 0)) + 1
        # A neuron fires at most ceil(T / (R + 1)) times: in the first time step and in every (R + 1)-th after it.
        ceiling = ceil(len(rows) / interval) / len(rows)
        per_step = counts.flatten(1).mean(1) / rows.clamp(min=1)
        return LayerActivity(counts.sum(0) / rows.sum(), per_step, int(rows.sum()), ceiling)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
