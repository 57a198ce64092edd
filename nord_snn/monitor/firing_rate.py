"""SpikeMonitor: firing rates of all neurons, counted from their spikes."""

import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

from torch import distributed, nn

from nord_snn.monitor.candidates import Candidate, candidates_in, described
from nord_snn.monitor.layers import Kinds, check_feature_dims, check_step_mode, neuron_layers
from nord_snn.monitor.spike_counter import LayerActivity, SpikeCounter

__all__ = ["LayerActivity", "SpikeMonitor"]


class SpikeMonitor:
    """Count the spikes of every neuron in a network while it runs.

    The firing rate is ``spikes / (time_steps * neurons * rows)`` over all calls since the start or the last :meth:`clear`. The
    monitor stores counts for each time step and neuron of a layer, on the layer's device: memory does not grow, and the GPU is
    synchronised only when a figure is read. Without a monitor a network has no hooks and no overhead.

    It works under ``torch.compile``, also with ``fullgraph=True``, started before or after compilation. The first monitor causes
    one recompilation of the code that contains a monitored neuron, and of no other code. Later monitors reuse that code;
    without a monitor the earlier code runs. Nodes in step mode ``"s"`` are compiled for each time step, up to torch's
    recompilation limit. Under DDP every process counts its own calls; :meth:`gather` sums them.

    Args:
        net: any module; layers of neurons are listed under their names in ``net``, ``net`` itself under ``""``.
        zones: groups of layers: zone -> names of layers or of modules that contain them. None: no zones.
        kinds: which modules are layers of neurons: a class, a tuple of classes, or a function that returns whether a module is
            one. None: those of nord-snn, SpikingJelly (also ``PSN``, ``MaskedPSN``, ``SlidingPSN``, ``GatedLIFNode``,
            ``SimpleLIFNode`` and ``SimpleIFNode``), snnTorch and Norse; if ``net`` has none of them, as ``"spiking"``, with a
            warning. ``"spiking"``: these, and modules whose outputs are exactly 0 and 1.
        step_mode: ``"m"`` if modules without an attribute ``step_mode`` run sequences ``[T, N, *]``; ``"s"`` if they run one
            time step ``[N, *]`` per call.
        feature_dims: number of last dimensions that are neurons; the dimensions before them are time and rows. None: one for
            neurons of nord-snn, ``[T, N, *, D]``; for others all after ``[T, N]``, so that in images ``[T, N, C, H, W]`` every
            pixel of every channel is a neuron.
        max_steps: number of time steps with counts of their own in step mode ``"s"``; later ones are added to the last count,
            which limits memory if a node is never reset.

    With ``kinds="spiking"`` a module is taken for a layer of neurons if all its outputs are 0 or 1, both values occur, some
    input is neither, and some output of 1 is not copied from the input. Dropout, pooling and reshaping of spikes fail this, and
    so does a ReLU. Modules of torch and modules with children (other than SpikingJelly's surrogate functions) are not
    considered. ``str(monitor)`` lists the modules that were found. This uses forward hooks, which code that was compiled before
    does not call.

    Raises:
        TypeError: ``kinds`` has another type; or, while the network runs, a layer returns no spikes.
        ValueError: ``net`` or a zone has no layers of neurons; or, while the network runs, the number of neurons of a layer
            changes.

    Example:
        >>> import torch
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
        >>> class Step(nn.Module):
        ...     def forward(self, x):
        ...         return (x > 0.5).float()
        >>> net = nn.Sequential(Step(), nn.Linear(8, 2))
        >>> with SpikeMonitor(net, kinds=Step) as monitor:  # or kinds="spiking"
        ...     _ = net(torch.tensor([[0.2], [0.9]]).expand(2, 8))
        >>> monitor.rates()
        {'0': 0.5}
    """

    def __init__(
        self,
        net: nn.Module,
        zones: Mapping[str, Sequence[str]] | None = None,
        *,
        kinds: Kinds | Literal["spiking"] | None = None,
        step_mode: Literal["s", "m"] = "s",
        feature_dims: int | None = None,
        max_steps: int = 1024,
    ) -> None:
        check_feature_dims(feature_dims)
        check_step_mode(step_mode)
        known, possible, self._warn_of_candidates = _select(net, kinds)
        self._counters = {
            name: SpikeCounter(name, module, feature_dims, step_mode, max_steps)
            for name, module in (known | possible).items()
        }
        for name in known:
            self._counters[name].observe()
        self._candidates = {name: Candidate(self._counters[name]) for name in possible}
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
        return {name: activity.rate for name, activity in _activity_of(self._neuron_counters()).items()}

    def activity(self) -> dict[str, LayerActivity]:
        """Return the activity of each layer that has run on at least one row."""
        return _activity_of(self._neuron_counters())

    def zone_rates(self) -> dict[str, float]:
        """Return the mean firing rate of each zone, over all neurons of its layers."""
        rates, counters = {}, self._neuron_counters()
        for zone, members in self._zones.items():
            ran = [counters[name] for name in members if name in counters and counters[name].counts is not None]
            spikes = sum(counter.spikes() for counter in ran)
            rates[zone] = spikes / max(sum(counter.neuron_steps() for counter in ran), 1)
        return rates

    def gather(self) -> None:
        """Sum the counts over all processes of ``torch.distributed``, which must all call this. In a single process do nothing.

        Afterwards each process has the sum: call :meth:`clear` before counting further.

        Raises:
            ValueError: neurons are found by their outputs, which may differ between processes; or a layer has run in some
                processes only.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        if self._candidates:
            raise ValueError("gather() needs neurons of known classes: pass kinds= as a class, several, or a function")
        for counter in self._counters.values():
            counter.gather()

    def close(self) -> None:
        """Stop counting and remove all hooks; the counts stay readable."""
        for candidate in self._candidates.values():
            candidate.close()
        for counter in self._counters.values():
            counter.close()

    def __str__(self) -> str:
        """Return a Markdown table of the rates, and which modules were taken for neurons by their outputs."""
        rows = [
            f"| {name or 'network'} | {layer.rate:.4f} |"
            for name, layer in _activity_of(self._neuron_counters()).items()
        ]
        notes = ["", described(self._candidates)] if self._candidates else []
        return "\n".join(["| neurons | firing rate |", "|---|---|", *rows, *notes])

    def __enter__(self) -> Self:
        """Return the monitor, which counts until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        self.close()

    def _neuron_counters(self) -> dict[str, SpikeCounter]:
        """Return the counters of layers of neurons; warn once if these were found by their outputs with ``kinds=None``."""
        if self._warn_of_candidates and any(candidate.calls for candidate in self._candidates.values()):
            self._warn_of_candidates = False
            warnings.warn(f"the network has no neurons of known classes. {described(self._candidates)}", stacklevel=3)
        verdicts = {name: candidate.verdict() for name, candidate in self._candidates.items()}
        return {name: c for name, c in self._counters.items() if verdicts.get(name, "neurons") == "neurons"}

    def _members(self, zone: str, prefixes: Sequence[str]) -> list[str]:
        members = [name for name in self._counters if any(_is_inside(name, prefix) for prefix in prefixes)]
        if not members:
            raise ValueError(
                f"zone {zone!r} has no layer: none of {list(self._counters)} begins with any of {list(prefixes)}"
            )
        return members


def _select(
    net: nn.Module, kinds: Kinds | Literal["spiking"] | None
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], bool]:
    """Return layers of known classes, modules that may be neurons, and whether to warn that there are only such."""
    if isinstance(kinds, str) and kinds != "spiking":
        raise TypeError(
            f'kinds must be a class of modules, several, a function of a module, "spiking" or None, got {kinds!r}'
        )
    if kinds is not None and not isinstance(kinds, str):
        return neuron_layers(net, kinds), {}, False
    try:
        known = neuron_layers(net)
    except ValueError:
        possible = candidates_in(net, {})
        if not possible:
            raise
        return {}, possible, kinds is None
    return known, candidates_in(net, known) if kinds == "spiking" else {}, False


def _activity_of(counters: dict[str, SpikeCounter]) -> dict[str, LayerActivity]:
    return {name: counter.activity() for name, counter in counters.items() if counter.has_run()}


def _is_inside(name: str, prefix: str) -> bool:
    """Return whether ``prefix`` is ``name`` or a module that contains it: ``blocks.1`` contains ``blocks.1.ffn``."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")
