"""Modules for the NIR nodes that have no state: one step ``[N, *]`` a call."""

from collections.abc import Callable
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Scale", "Threshold", "stateless"]


class Scale(nn.Module):
    """One factor a channel."""

    def __init__(self, node: nir.Scale) -> None:
        super().__init__()
        self.scale = nn.Parameter(_tensor(node.scale))

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x``."""
        return self.scale * x


class Threshold(nn.Module):
    """1 above the threshold, 0 elsewhere."""

    threshold: Tensor

    def __init__(self, node: nir.Threshold) -> None:
        super().__init__()
        self.register_buffer("threshold", _tensor(node.threshold))

    def forward(self, x: Tensor) -> Tensor:
        """Compare ``x``."""
        return (x > self.threshold).to(x.dtype)


class SumPool(nn.Module):
    """Sums over windows."""

    def __init__(self, mean: nn.AvgPool2d, size: int) -> None:
        super().__init__()
        self.mean, self.size = mean, size

    def forward(self, x: Tensor) -> Tensor:
        """Sum ``x``."""
        return self.size * self.mean(x)


def stateless(node: nir.NIRNode) -> nn.Module | None:
    """The module for a node, or None if it has state or is of no known kind."""
    make = _MAKERS.get(type(node))
    return None if make is None else make(node)


def _linear(node: Any) -> nn.Module:
    bias = getattr(node, "bias", None)
    made = nn.Linear(node.weight.shape[1], node.weight.shape[0], bias=bias is not None)
    return _filled(made, node.weight, bias)


def _conv(kind: Callable[..., nn.Module]) -> Callable[[Any], nn.Module]:
    def make(node: Any) -> nn.Module:
        out_channels, in_channels, *kernel = node.weight.shape
        groups = int(node.groups)
        padding = node.padding if isinstance(node.padding, str) else _tuple(node.padding)
        made = kind(
            in_channels * groups,
            out_channels,
            tuple(kernel),
            _tuple(node.stride),
            padding,
            _tuple(node.dilation),
            groups,
        )
        return _filled(made, node.weight, node.bias)

    return make


def _flatten(node: nir.Flatten) -> nn.Module:
    """NIR counts dimensions without the batch."""
    start, end = (int(d) + 1 if d >= 0 else int(d) for d in (node.start_dim, node.end_dim))
    return nn.Flatten(start, end)


def _pool(node: Any) -> nn.Module:
    kernel, stride, padding = (
        (w[0], w[-1]) for w in (_tuple(x) for x in (node.kernel_size, node.stride, node.padding))
    )
    mean = nn.AvgPool2d(kernel, stride, padding)
    return SumPool(mean, kernel[0] * kernel[1]) if isinstance(node, nir.SumPool2d) else mean


def _filled(module: Any, weight: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    module.weight = nn.Parameter(_tensor(weight))
    if bias is not None:
        module.bias = nn.Parameter(_tensor(bias))
    return module


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _tuple(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in np.atleast_1d(values))


_MAKERS: dict[type[nir.NIRNode], Callable[[Any], nn.Module]] = {
    nir.Linear: _linear,
    nir.Affine: _linear,
    nir.Scale: Scale,
    nir.Threshold: Threshold,
    nir.Conv1d: _conv(nn.Conv1d),
    nir.Conv2d: _conv(nn.Conv2d),
    nir.AvgPool2d: _pool,
    nir.SumPool2d: _pool,
    nir.Flatten: _flatten,
}
