"""RowRates: firing rates of each row, such as an image of a batch or a token of a text."""

from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from nord_snn._compat.torch import observe_forward, stop_observing_forward
from nord_snn.monitor.layers import Kinds, check_feature_dims, check_step_mode, features_of, neuron_layers, spikes_of
from nord_snn.neurons.locking import one_at_a_time

__all__ = ["RowRates"]


class RowRates:
    """Measure the firing rate of each row, such as an image of a batch or a token of a text, in each layer of neurons.

    ``rate[n, *] = spikes / (time_steps * neurons)`` over all calls since the last :meth:`take`.
    :class:`~nord_snn.monitor.SpikeMonitor` sums over rows and has a rate for each neuron; this class sums over neurons and has
    a rate for each row. It stores one number for each row and layer, on the layer's device.

    Args:
        net: any module with neurons.
        kinds: which modules are layers of neurons, as in :class:`~nord_snn.monitor.SpikeMonitor`: a class, a tuple of classes,
            a function of a module, or None for those of nord-snn, SpikingJelly, snnTorch and Norse.
        step_mode: ``"m"`` if modules without an attribute ``step_mode`` run sequences ``[T, N, *]``, else ``"s"``.
        feature_dims: number of last dimensions that are neurons; None: one for neurons of nord-snn, ``[T, N, *, D]``, and for
            others all after ``[T, N]``.

    Raises:
        TypeError: ``kinds`` has another type; or, while the network runs, a layer returns no spikes.
        ValueError: ``net`` has no such neurons; or, while the network runs, the shape of the rows of a layer changes between two
            calls without :meth:`take`.

    Example:
        >>> from nord_snn.layers import SpikingFeedForward
        >>> net = SpikingFeedForward(64, 128)
        >>> with RowRates(net) as rows:
        ...     _ = net(torch.tensor([0.0, 9.0]).reshape(2, 1) * torch.rand(10, 2, 64))  # the first row has no input
        ...     rates = rows.take()
        >>> rates["lif1"].shape, rates["lif1"][0].item(), rates["lif1"][1].item() > 0
        (torch.Size([2]), 0.0, True)
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        kinds: Kinds | None = None,
        step_mode: Literal["s", "m"] = "s",
        feature_dims: int | None = None,
    ) -> None:
        check_feature_dims(feature_dims)
        check_step_mode(step_mode)
        self._layers, self.feature_dims, self.step_mode = neuron_layers(net, kinds), feature_dims, step_mode
        self._spikes: dict[str, Tensor] = {}
        self._neuron_steps: dict[str, Tensor] = {}  # tensors: compiled code specialises on Python numbers
        self._neurons: dict[str, int] = {}
        self._observers = [_LayerObserver(self, name, module) for name, module in self._layers.items()]

    def take(self) -> dict[str, Tensor]:
        """Return the rates ``[N, *]`` of each layer that has run since the last ``take``, and reset the counts."""
        with one_at_a_time():
            counted, neuron_steps = self._spikes, self._neuron_steps
            self._spikes, self._neuron_steps = {}, {}
        return {name: spikes / neuron_steps[name] for name, spikes in counted.items()}

    def neurons(self) -> dict[str, int]:
        """Return the number of neurons per row in each layer that has run, for a weighted mean over layers."""
        return dict(self._neurons)

    def close(self) -> None:
        """Stop counting; :meth:`take` still returns the rates."""
        for observer in self._observers:
            stop_observing_forward(observer.module, observer)

    def __enter__(self) -> Self:
        """Return the monitor, which counts until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        self.close()

    @torch.no_grad()
    def count(self, name: str, module: nn.Module, output: Any) -> None:
        """Add the spikes that a layer has returned."""
        spikes, _ = spikes_of(module, output, self.step_mode)
        features = features_of(module, spikes, self.feature_dims)
        rows = spikes.shape[1 : spikes.ndim - len(features)]
        new = spikes.reshape(len(spikes), *rows, features.numel()).sum((0, -1), dtype=torch.float32)
        with one_at_a_time():  # threads that run the network at the same time
            self._add(name, new, len(spikes) * features.numel(), features.numel())

    def _add(self, name: str, new: Tensor, neuron_steps: int, n_neurons: int) -> None:
        previous = self._spikes.get(name)
        if previous is not None and previous.shape != new.shape:
            raise ValueError(
                f"the shape of the rows of '{name}' must not change, got {list(previous.shape)} and then {list(new.shape)}: call "
                "take() in between"
            )
        self._spikes[name] = new if previous is None else previous + new
        steps = new.new_full((), neuron_steps)
        self._neuron_steps[name] = steps if previous is None else self._neuron_steps[name] + steps
        self._neurons[name] = n_neurons


class _LayerObserver:
    """Pass the output of one layer to a RowRates."""

    def __init__(self, rates: RowRates, name: str, module: nn.Module) -> None:
        self.rates, self.name, self.module = rates, name, module
        observe_forward(module, self)

    def before(self, module: nn.Module) -> None:
        """Do nothing."""

    def after(self, module: nn.Module, output: Any) -> None:
        """Count the output."""
        self.rates.count(self.name, module, output)
