"""Operators of torch: the cost of products, operators that are counted by their outputs, and those that cannot be counted."""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor

from nord_snn._compat.torch import operators_by_private_name
from nord_snn.ops.costs import ProductCount, is_binary, is_ternary, is_whole, spike_bytes, tensor_bytes

__all__ = ["PRODUCTS", "is_elementwise", "is_uncountable"]

_aten = torch.ops.aten

#: Returns whether a tensor is a weight of the network, possibly a view of one.
IsWeight = Callable[[Tensor], bool]


def _matrix(a: Tensor, b: Tensor, out: Tensor, is_weight: IsWeight) -> ProductCount:
    """Count ``a [*, M, K] @ b [*, K, N]``."""
    batch, (m, k, n) = out.numel() // max(out.shape[-1] * out.shape[-2], 1), (*a.shape[-2:], b.shape[-1])
    weight = b if is_weight(b) else a if is_weight(a) else None
    # The fan-out of an element is n for a, m for b.
    inputs = [(x, fan_out) for x, fan_out in ((a, n), (b, m)) if x is not weight]
    binary_inputs = [(x, fan_out) for x, fan_out in inputs if is_binary(x)]
    dense = batch * m * k * n
    macs = 0 if binary_inputs else dense
    acs = min((int(x.count_nonzero()) * fan_out for x, fan_out in binary_inputs), default=0)
    integer_sops = [_total(x) * fan_out for x, fan_out in inputs if macs and is_whole(x)]
    effective = 0 if weight is None else int(((a != 0).sum(-2) * (b != 0).sum(-1)).sum())
    additions_only = bool(binary_inputs) or (weight is not None and is_ternary(inputs[0][0]))
    activations = [x for x in (a, b, out) if x is not weight]
    return ProductCount(
        "activations" if weight is None else "linear",
        dense,
        macs,
        acs,
        activation_bytes=sum(map(spike_bytes, activations)),
        dense_activation_bytes=sum(map(tensor_bytes, activations)),
        weight_bytes=0 if weight is None else _active_inputs(a, b, weight) * tensor_bytes(weight) // k,
        dense_weight_bytes=0 if weight is None else tensor_bytes(weight),
        sop_macs=0 if integer_sops else macs,
        sops=min(integer_sops, default=acs),
        effective_macs=0 if additions_only else effective,
        effective_acs=effective if additions_only else 0,
        unpadded=0 if weight is None else dense,
    )


def _total(x: Tensor) -> int:
    """Return the sum of the absolute values of integers: an integer n times a weight is n additions of the weight."""
    return int(x.abs().double().sum())


def _active_inputs(a: Tensor, b: Tensor, weight: Tensor) -> int:
    """Return the number of inputs of a weight that are not zero in some row."""
    k = a.shape[-1]
    rows = a.reshape(-1, k) if weight is b else b.movedim(-2, -1).reshape(-1, k)
    return int((rows != 0).any(0).sum())


def _convolution(x: Tensor, weight: Tensor, out: Tensor, settings: tuple[Any, ...]) -> ProductCount:
    """Count a convolution. The fan-out of an input is the number of windows that contain it, times the output channels."""
    transposed, active, connected = settings[3], x != 0, weight != 0
    dense, binary = (x if transposed else out).numel() * weight[0].numel(), is_binary(x)
    whole = not binary and is_whole(x)
    acs = _fan_out(active, weight, settings) if binary else 0
    if not connected.all():
        effective = _effective(active, connected, settings)
    else:
        effective = acs if binary else _fan_out(active, weight, settings)
    additions_only = binary or is_ternary(x)
    return ProductCount(
        "convolution",
        dense,
        macs=0 if binary else dense,
        acs=acs,
        activation_bytes=(ceil(x.numel() / 8) if binary else tensor_bytes(x)) + spike_bytes(out),
        dense_activation_bytes=tensor_bytes(x) + tensor_bytes(out),
        weight_bytes=tensor_bytes(weight),
        dense_weight_bytes=tensor_bytes(weight),
        sop_macs=0 if binary or whole else dense,
        sops=_fan_out(x.abs(), weight, settings) if whole else acs,
        effective_macs=0 if additions_only else effective,
        effective_acs=effective if additions_only else 0,
        unpadded=x.shape[1] * len(x) * _fan_out(torch.ones_like(x[:1, :1]), weight, settings),
    )


def _fan_out(x: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> int:
    """Return the sum of the inputs times their fan-out, which depends on the place in the image only."""
    *others, transposed, output_padding, groups = settings
    windows = torch.ones_like(weight[:1, :1], dtype=torch.float64)
    summed = x.sum((0, 1), dtype=torch.float64)[None, None]
    total = _aten.convolution(summed, windows, None, *others, transposed, output_padding, 1).sum()
    return int(total.round()) * (weight.shape[1] if transposed else weight.shape[0] // groups)


def _effective(active: Tensor, connected: Tensor, settings: tuple[Any, ...]) -> int:
    """Return the number of products of a nonzero input and a nonzero weight."""
    transposed, groups = settings[3], settings[-1]
    connections = connected.double()
    # Sum over the output channels of a group: the products of an input with all of them are counted at once.
    summed = connections.sum(1, keepdim=True) if transposed else connections.unflatten(0, (groups, -1)).sum(1)
    return int(_aten.convolution(active.double(), summed, None, *settings).sum().round())


#: Operator -> function that counts a product from its arguments, its output, and a function that recognises weights.
PRODUCTS: dict[Any, Callable[[Any, Tensor, IsWeight], ProductCount]] = {
    _aten.mm: lambda args, out, is_weight: _matrix(args[0], args[1], out, is_weight),
    _aten.bmm: lambda args, out, is_weight: _matrix(args[0], args[1], out, is_weight),
    _aten.addmm: lambda args, out, is_weight: _matrix(args[1], args[2], out, is_weight),
    _aten.baddbmm: lambda args, out, is_weight: _matrix(args[1], args[2], out, is_weight),
    _aten.mv: lambda args, out, is_weight: _matrix(args[0], args[1][:, None], out[:, None], is_weight),
    _aten.addmv: lambda args, out, is_weight: _matrix(args[1], args[2][:, None], out[:, None], is_weight),
    _aten.dot: lambda args, out, is_weight: _matrix(args[0][None], args[1][:, None], out[None, None], is_weight),
    _aten.convolution: lambda args, out, is_weight: _convolution(args[0], args[1], out, args[3:]),
}

#: Operators counted by their outputs that torch does not tag as pointwise.
_ELEMENTWISE = {
    *(_aten.mean, _aten.sum, _aten.avg_pool2d, _aten.max_pool2d_with_indices, _aten.native_layer_norm),
    *(_aten.native_batch_norm, _aten.native_group_norm, _aten.leaky_relu, _aten.hardswish, _aten.log_sigmoid_forward),
    *(_aten.glu, _aten.avg_pool3d, _aten.adaptive_max_pool2d, _aten.max_pool3d_with_indices),
    *(_aten.amax, _aten.amin, _aten.max, _aten.min, _aten.var, _aten.var_mean),
    *(_aten.std, _aten.prod, _aten.cumsum, _aten.linalg_vector_norm),
    *operators_by_private_name(
        "_softmax",
        "_log_softmax",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_prelu_kernel",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
    ),
}

#: Parts of names of operators that contain products and are not counted.
_UNCOUNTABLE = (
    "scaled_dot_product",
    "multi_head_attention",
    "transformer_encoder_layer",
    "lstm",
    "gru",
    "rnn",
    "mkldnn",
    "cdist",
    "aten._int_mm",
    "scaled_mm",
    "aten._trilinear",
)


def is_elementwise(func: Any, out: Any) -> bool:
    """Return whether an operator is elementwise or a reduction, and its output is floating."""
    if func.overloadpacket is _aten.clone:  # tagged pointwise by torch
        return False
    first = out[0] if isinstance(out, tuple) else out
    floating = isinstance(first, Tensor) and first.is_floating_point()
    return floating and (torch.Tag.pointwise in func.tags or func.overloadpacket in _ELEMENTWISE)


def is_uncountable(func: Any) -> bool:
    """Return whether an operator contains products that cannot be counted."""
    return any(part in str(func.overloadpacket) for part in _UNCOUNTABLE)
