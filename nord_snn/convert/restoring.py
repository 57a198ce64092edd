"""Run a network without effect on its modes and buffers."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import is_lazy

from nord_snn.neurons.resetting import reset

__all__ = ["unchanged"]


@contextmanager
def unchanged(net: nn.Module, evaluate: bool = True) -> Iterator[None]:
    """Reset the state of ``net`` at the start and the end, and restore its modes and buffers at the end.

    Args:
        net: the network.
        evaluate: put ``net`` into evaluation mode in between. Default: True.
    """
    modes = [(module, module.training) for module in net.modules()]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers() if not is_lazy(buffer)}
    reset(net)
    if evaluate:
        net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for name, buffer in net.named_buffers():
            if (
                name in buffers and buffer.shape == buffers[name].shape
            ):  # other buffers are states of snnTorch, reset below
                buffer.copy_(buffers[name])
        reset(net)
