"""SpikeMonitor: firing rates of all neurons, counted from their spikes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from types import TracebackType
from typing import Any, Self

import torch
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, distributed, nn

from nord_snn._compat.torch import observe_forward, stop_observing_forward
from nord_snn.neurons.detection import is_neuron, runs_snntorch

__all__ = [
    "LayerActivity",
    "SpikeMonitor",
    "check_feature_dims",
    "features_of",
    "neuron_layers",
    "spikes_of",
]


@dataclass(frozen=True)
class LayerActivity:
    """Activity of one layer of neurons.

    Attributes:
        per_neuron: firing rate of each neuron, ``[*, D]`` as in the layer's output.
        per_step: firing rate in each time step, ``[T]``; one entry if the time steps are not known.
        rows: number of time steps that each neuron ran, summed over rows.
        ceiling: the highest possible rate of a neuron of this layer: with a refractory period of R it fires at most in every
            ``R + 1``-th time step.
    """

    per_neuron: Tensor
    per_step: Tensor
    rows: int
    ceiling: float

    @property
    def rate(self) -> float:
        """Return the mean firing rate, ``spikes / (steps * neurons * rows)``."""
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


class SpikeMonitor:
    """Count the spikes of every neuron in a network while it runs.

    ``rate = spikes / (steps * neurons * rows)`` over all calls since the start or the last :meth:`clear`. It stores counts for
    each time step and neuron of a layer, on the layer's device: memory does not grow, and the GPU is synchronised only when
    a figure is read. Without a monitor a network has no hooks and no overhead.

    It works under ``torch.compile``, also with ``fullgraph=True``, started before or after compilation. The first monitor causes
    one recompilation of the code that contains a monitored neuron, and of no other code. Later monitors use that code again;
    without a monitor the earlier code runs. Nodes in step mode ``"s"`` are compiled for each time step, up to torch's limit.
    Under DDP every process counts its own calls; :meth:`gather` sums them.

    Args:
        net: any module; its neurons (nord-snn's, SpikingJelly's and snnTorch's) are listed under their names in ``net``, or
            under ``""`` if ``net`` itself is a neuron.
        zones: groups of layers: zone -> names of layers or of modules that contain them. None: no zones.
        feature_dims: number of last dimensions that are neurons; all before them are time and rows. None: one for our neurons,
            ``[T, N, *, D]``, and for others all that follow ``[T, N]``, so that in images ``[T, N, C, H, W]`` every pixel of
            every channel is a neuron.
        max_steps: in step mode ``"s"``, later time steps are counted as the last one; limits memory if a node is never reset.

    Raises:
        ValueError: ``net`` or a zone has no neuron layers; or, while the network runs, the number of neurons of a layer
            changes.

    Example:
        >>> from nord_snn.layers import SpikingFeedForward
        >>> net = SpikingFeedForward(64, 128)
        >>> with SpikeMonitor(net, zones={"all": [""], "hidden": ["lif1"]}) as monitor:
        ...     _ = net(4 * torch.randn(10, 4, 64))
        >>> sorted(monitor.rates())
        ['lif1', 'lif2']
        >>> abs(monitor.zone_rates()["hidden"] - monitor.rates()["lif1"]) < 1e-9
        True
        >>> activity = monitor.activity()["lif1"]
        >>> activity.per_step.shape, activity.per_neuron.shape, activity.ceiling  # ceiling: 4 of 10 time steps
        (torch.Size([10]), torch.Size([128]), 0.4)
    """

    def __init__(
        self,
        net: nn.Module,
        zones: Mapping[str, Sequence[str]] | None = None,
        *,
        feature_dims: int | None = None,
        max_steps: int = 1024,
    ) -> None:
        check_feature_dims(feature_dims)
        self._counters = {n: _Counter(n, m, feature_dims, max_steps) for n, m in neuron_layers(net).items()}
        try:
            self._zones = {zone: self._members(zone, prefixes) for zone, prefixes in (zones or {}).items()}
        except ValueError:
            self.close()  # the caller gets no monitor to close
            raise

    def pause(self) -> None:
        """Stop counting until :meth:`resume`."""
        for counter in self._counters.values():
            counter.on = False

    def resume(self) -> None:
        """Continue counting."""
        for counter in self._counters.values():
            counter.on = counter.is_open

    def clear(self) -> None:
        """Reset the counts."""
        for counter in self._counters.values():
            counter.clear()

    def rates(self) -> dict[str, float]:
        """Return the mean firing rate of each layer that has run."""
        return {name: activity.rate for name, activity in self.activity().items()}

    def activity(self) -> dict[str, LayerActivity]:
        """Return the activity of each layer that has run on at least one row."""
        return {name: counter.activity() for name, counter in self._counters.items() if counter.has_run()}

    def zone_rates(self) -> dict[str, float]:
        """Return the mean firing rate of each zone: spikes divided by neuron steps."""
        rates = {}
        for zone, members in self._zones.items():
            ran = [self._counters[name] for name in members if self._counters[name].counts is not None]
            spikes = sum(counter.spikes() for counter in ran)
            rates[zone] = spikes / max(sum(counter.neuron_steps() for counter in ran), 1)
        return rates

    def gather(self) -> None:
        """Sum the counts over all processes of ``torch.distributed``; all must call this. Without it this is a no-op.

        Afterwards each process has the sum: call :meth:`clear` before counting further.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        for counter in self._counters.values():
            counter.gather()

    def close(self) -> None:
        """Remove the observers; the counts stay readable."""
        for counter in self._counters.values():
            counter.close()

    def __enter__(self) -> Self:
        """Return the monitor, which counts until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        self.close()

    def _members(self, zone: str, prefixes: Sequence[str]) -> list[str]:
        members = [name for name in self._counters if any(_is_inside(name, prefix) for prefix in prefixes)]
        if not members:
            raise ValueError(
                f"zone {zone!r} has no layer: none of {list(self._counters)} begins with any of {list(prefixes)}"
            )
        return members


def neuron_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Return the neuron layers of ``net`` by name; ``net`` itself under ``""``.

    Raises:
        ValueError: ``net`` has no neuron layers.
    """
    layers = {name: module for name, module in net.named_modules() if is_neuron(module) or runs_snntorch(module)}
    inside = [inner for module in layers.values() for inner in module.modules() if inner is not module]
    if not layers:
        raise ValueError(f"expected neuron layers of nord-snn, SpikingJelly or snnTorch, {type(net).__name__} has none")
    return {name: module for name, module in layers.items() if not any(module is inner for inner in inside)}


def spikes_of(module: nn.Module, output: Any) -> tuple[Tensor, bool]:
    """Return the spikes ``[T, N, *, D]`` in the output of a layer of neurons, and whether it ran a sequence (not a time step)."""
    spikes: Tensor = output[0] if isinstance(output, tuple) else output  # snnTorch's neurons also return states
    is_sequence = getattr(module, "step_mode", "s") == "m" or runs_snntorch(module)
    return spikes if is_sequence else spikes.unsqueeze(0), is_sequence


def features_of(module: nn.Module, spikes: Tensor, feature_dims: int | None) -> torch.Size:
    """Return the last dimensions of ``spikes``, which are neurons."""
    if feature_dims is None:
        feature_dims = 1 if hasattr(module, "n_features") else max(spikes.ndim - 2, 0)
    if feature_dims >= spikes.ndim:
        raise ValueError(
            f"feature_dims must be less than the {spikes.ndim} dimensions of the spikes {list(spikes.shape)}, got {feature_dims}"
        )
    return spikes.shape[spikes.ndim - feature_dims :]


def check_feature_dims(feature_dims: int | None) -> None:
    """Raise a ValueError if ``feature_dims`` is below 1."""
    if feature_dims is not None and feature_dims < 1:
        raise ValueError(f"feature_dims must be at least 1, got {feature_dims}")


class _Counter:
    """Count the spikes of one layer by time step and neuron, and the rows by time step."""

    def __init__(self, name: str, module: nn.Module, feature_dims: int | None, max_steps: int) -> None:
        self.name, self.module, self.max_steps = name, module, max_steps
        self.feature_dims = feature_dims
        self.step = self.current_step = 0  # index of the last completed single step, and of the running one
        self.on = self.is_open = True
        self.clear()
        observe_forward(module, self)

    def clear(self) -> None:
        self.counts: Tensor | None = None  # [T, *, D]
        self.rows: Tensor | None = None  # [T]; a tensor: compiled code specialises on Python numbers

    def close(self) -> None:
        stop_observing_forward(self.module, self)
        self.on = self.is_open = False

    def before(self, module: Any) -> None:
        """Find the time step: a node at rest begins a sequence, a node with state continues it."""
        if isinstance(module, BaseNode) and module.step_mode == "s":
            self.current_step = min(self.step + 1, self.max_steps - 1) if isinstance(module.v, Tensor) else 0

    @torch.inference_mode(False)  # counts are later updated outside inference mode
    @torch.no_grad()
    def after(self, module: nn.Module, output: Any) -> None:
        """Count the spikes of the module."""
        self.step = self.current_step  # not in before(): a step that raises must not count
        if not self.on:
            return
        spikes, is_sequence = spikes_of(module, output)
        first = 0 if is_sequence else self.step
        features = features_of(module, spikes, self.feature_dims)
        steps, rows = spikes.shape[0], spikes[0].numel() // max(features.numel(), 1)
        # Reduce over rows first: one pass over the spikes.
        self.add(first, spikes.reshape(steps, rows, *features).sum(1, dtype=torch.float32), rows)

    def add(self, first: int, spikes: Tensor, rows: int) -> None:
        steps = first + len(spikes)
        if self.counts is None or self.rows is None:
            self.counts = spikes.new_zeros(steps, *spikes.shape[1:], dtype=torch.float64)
            self.rows = self.counts.new_zeros(steps)
        elif self.counts.shape[1:] != spikes.shape[1:]:
            raise ValueError(
                f"the neurons of '{self.name}' must not change, got {list(self.counts.shape[1:])} and then "
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


def _is_inside(name: str, prefix: str) -> bool:
    """Return whether ``prefix`` is ``name`` or a module that contains it: ``blocks.1`` contains ``blocks.1.ffn``."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
