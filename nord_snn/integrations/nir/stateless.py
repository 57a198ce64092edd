"""Modules for NIR nodes without state: one time step ``[N, *]`` per call."""

from collections.abc import Callable
from typing import Any

import nir
import numpy as np
import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from nord_snn.ops.checks import compute_dtype

__all__ = ["MODULE_NODES", "Scale", "SumPool", "Threshold", "known_shape", "output_shape", "stateless_module"]


class Scale(nn.Module):
    """Multiply each channel by a factor."""

    def __init__(self, node: nir.Scale) -> None:
        super().__init__()
        self.scale = nn.Parameter(_tensor(node.scale))

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x``."""
        return self.scale * x


class Threshold(nn.Module):
    """Return 1 above the threshold and 0 elsewhere."""

    threshold: Tensor

    def __init__(self, node: nir.Threshold) -> None:
        super().__init__()
        self.register_buffer("threshold", _tensor(node.threshold))

    def forward(self, x: Tensor) -> Tensor:
        """Compare ``x`` with the threshold."""
        return (x > self.threshold).to(x.dtype)


class SumPool(nn.Module):
    """Sum over windows: the mean of ``mean`` times ``size``, the number of entries of a window."""

    def __init__(self, mean: nn.AvgPool2d, size: int) -> None:
        super().__init__()
        self.mean, self.size = mean, size

    def forward(self, x: Tensor) -> Tensor:
        """Sum ``x``."""
        return self.size * self.mean(x)


def stateless_module(node: nir.NIRNode) -> nn.Module | None:
    """Return the module for a node, or None if the node has state or is of an unknown class."""
    build = _BUILDERS.get(type(node))
    return None if build is None else build(node)


def known_shape(types: dict[str, Any] | None) -> tuple[int, ...] | None:
    """Return the shape in the input or output type of a node, or None if there is no shape."""
    shape = next(iter((types or {}).values()), None)
    return None if shape is None else tuple(int(size) for size in np.atleast_1d(shape))


def output_shape(node: Any, module: nn.Module, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the shape of one row of a node's output for rows of ``shape``, or None if it is not known.

    Args:
        node: a node without state.
        module: its module.
        shape: shape of one row of its input. Leading dimensions that a convolution or pooling does not use are ignored.
    """
    if isinstance(node, nir.Linear | nir.Affine):
        return (int(node.weight.shape[0]),)
    if isinstance(node, nir.Scale | nir.Threshold):
        return shape
    if isinstance(node, nir.Conv1d | nir.Conv2d) and node.input_shape is not None:
        shape = (int(node.weight.shape[1] * node.groups), *_tuple(node.input_shape))
    elif shape is not None and not isinstance(node, nir.Flatten):
        shape = shape[-2 if isinstance(node, nir.Conv1d) else -3 :]
    if shape is None:
        return None
    example = torch.zeros(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        return tuple(module.double()(example).shape[1:])


def _linear(node: Any) -> nn.Module:
    bias = getattr(node, "bias", None)
    module = nn.Linear(node.weight.shape[1], node.weight.shape[0], bias=bias is not None)
    return _with_parameters(module, node.weight, bias)


def _conv(kind: Callable[..., nn.Module]) -> Callable[[Any], nn.Module]:
    def build(node: Any) -> nn.Module:
        out_channels, in_channels, *kernel = node.weight.shape
        groups = int(node.groups)
        padding = node.padding if isinstance(node.padding, str) else _tuple(node.padding)
        module = kind(
            in_channels * groups,
            out_channels,
            tuple(kernel),
            _tuple(node.stride),
            padding,
            _tuple(node.dilation),
            groups,
        )
        return _with_parameters(module, node.weight, node.bias)

    return build


def _flatten(node: nir.Flatten) -> nn.Module:
    """Return a Flatten; NIR's dimensions do not include the batch."""
    start, end = (int(d) + 1 if d >= 0 else int(d) for d in (node.start_dim, node.end_dim))
    return nn.Flatten(start, end)


def _pool(node: Any) -> nn.Module:
    kernel, stride, padding = (
        (w[0], w[-1]) for w in (_tuple(x) for x in (node.kernel_size, node.stride, node.padding))
    )
    mean = nn.AvgPool2d(kernel, stride, padding)
    return SumPool(mean, kernel[0] * kernel[1]) if isinstance(node, nir.SumPool2d) else mean


def _with_parameters(module: Any, weight: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    module.weight = nn.Parameter(_tensor(weight))
    if bias is not None:
        module.bias = nn.Parameter(_tensor(bias))
    return module


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _tuple(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in np.atleast_1d(values))


_BUILDERS: dict[type[nir.NIRNode], Callable[[Any], nn.Module]] = {
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


def _array(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", compute_dtype(x)).numpy().copy()


def _from_conv(kind: Callable[..., nir.NIRNode], n_spatial: int) -> Callable[[Any, Tensor], nir.NIRNode]:
    def build(module: Any, x: Tensor) -> nir.NIRNode:
        if module.padding_mode != "zeros":
            raise ValueError(f"cannot export {type(module).__name__}: NIR pads with zeros, got {module.padding_mode!r}")
        bias = module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias
        options = {
            name: value if isinstance(value, str) or n_spatial > 1 else value[0]
            for name in ("stride", "padding", "dilation")
            for value in (getattr(module, name),)
        }
        spatial = tuple(x.shape[-n_spatial:])
        return kind(
            input_shape=spatial if n_spatial > 1 else spatial[0],
            weight=_array(module.weight),
            bias=_array(bias),
            groups=module.groups,
            **options,
        )

    return build


def _from_average(module: Any, x: Tensor) -> nir.NIRNode:
    if (
        module.ceil_mode
        or module.divisor_override is not None
        or (np.any(module.padding) and not module.count_include_pad)
    ):
        raise ValueError(
            "cannot export AvgPool2d: NIR has no ceil_mode, divisor_override, nor count_include_pad=False with a padding"
        )
    return nir.AvgPool2d(*(np.array(_pair(v)) for v in (module.kernel_size, module.stride, module.padding)))


def _from_sum(module: SumPool, x: Tensor) -> nir.NIRNode:
    mean = module.mean
    return nir.SumPool2d(*(np.array(_pair(v)) for v in (mean.kernel_size, mean.stride, mean.padding)))


def _from_flatten(module: Any, x: Tensor) -> nir.NIRNode:
    """Return a Flatten; NIR's dimensions are those of one row, torch's include the batch."""
    first = 2 if getattr(module, "step_mode", "s") == "m" else 1  # dimension of the input after time and batch
    start, end = (dim - 1 if dim >= 0 else dim for dim in (module.start_dim, module.end_dim))
    if start == -1 and module.start_dim == 0:
        raise ValueError("cannot export Flatten: start_dim must be 1 or more, as NIR has no batch dimension, got 0")
    return nir.Flatten(input_type={"input": np.array(x.shape[first:])}, start_dim=start, end_dim=end)


def _pair(value: Any) -> tuple[int, int]:
    pair = _tuple(value)
    return pair[0], pair[-1]


#: Class of a module without state -> function of the module and its input that returns its node.
MODULE_NODES: dict[type[nn.Module], Callable[[Any, Tensor], nir.NIRNode]] = {
    Scale: lambda module, x: nir.Scale(scale=_array(module.scale)),
    Threshold: lambda module, x: nir.Threshold(threshold=_array(module.threshold)),
    SumPool: _from_sum,
    **{kind: _from_conv(nir.Conv1d, 1) for kind in (nn.Conv1d, layer.Conv1d)},
    **{kind: _from_conv(nir.Conv2d, 2) for kind in (nn.Conv2d, layer.Conv2d)},
    **dict.fromkeys((nn.AvgPool2d, layer.AvgPool2d), _from_average),
    **dict.fromkeys((nn.Flatten, layer.Flatten), _from_flatten),
}
