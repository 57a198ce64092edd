"""SpikeMonitor: firing rates of every neuron layer, counted from the spikes themselves."""

from types import TracebackType
from typing import Any, Self

import torch
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from nord_snn.neurons.foreign import is_snntorch

__all__ = ["SpikeMonitor"]


class SpikeMonitor:
    """Count the spikes of every neuron layer in a network while it runs.

    ``rate = spikes / (steps * neurons * rows)`` over everything since the start or the last :meth:`clear`. Counters are two
    numbers a layer, on the layer's device: memory is constant, and nothing waits for a GPU before :meth:`rates`.

    Args:
        net: any module; its neurons (ours, SpikingJelly's and snnTorch's) are watched under their names in ``net``, a neuron
            that is itself ``net`` under ``""``.

    Raises:
        ValueError: there are no neuron layers in ``net``.

    Example:
        >>> from nord_snn.layers import SpikingFeedForward
        >>> net = SpikingFeedForward(64, 128)
        >>> with SpikeMonitor(net) as monitor:
        ...     _ = net(torch.rand(10, 4, 64))
        >>> sorted(monitor.rates())
        ['lif1', 'lif2']
    """

    def __init__(self, net: nn.Module) -> None:
        self._layers = {name: module for name, module in net.named_modules() if _fires(module)}
        if not self._layers:
            raise ValueError(
                f"{type(net).__name__} has no neuron layers of ours, SpikingJelly's or snnTorch's to watch"
            )
        self._hooks = [module.register_forward_hook(self._counter(name)) for name, module in self._layers.items()]
        self.clear()

    def clear(self) -> None:
        """Start counting anew."""
        self._spikes: dict[str, Tensor] = {}
        self._chances: dict[str, int] = dict.fromkeys(self._layers, 0)

    def rates(self) -> dict[str, float]:
        """Mean firing rate of each layer that has run."""
        return {name: spikes.item() / max(self._chances[name], 1) for name, spikes in self._spikes.items()}

    def close(self) -> None:
        """Take the hooks off; the counts stay readable."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Self:
        """Watch until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        self.close()

    def _counter(self, name: str) -> Any:
        @torch.no_grad()
        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            if module is not self._layers[name]:  # of a deep copy of the network, which took the hook along
                return
            spikes: Tensor = output[0] if isinstance(output, tuple) else output  # snnTorch's return their states too
            total = spikes.count_nonzero()  # int64: a sum in half precision would overflow
            self._spikes[name] = self._spikes[name] + total if name in self._spikes else total
            self._chances[name] += spikes.numel()

        return count


def _fires(module: nn.Module) -> bool:
    """A neuron, but not the snnTorch side of one of ours, which holds a node that is watched itself."""
    if is_snntorch(module):
        return not any(isinstance(inner, BaseNode) for inner in module.modules())
    return isinstance(module, BaseNode)
