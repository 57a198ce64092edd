"""The public op: argument checks, precision, the choice of a backend, and the kernel as an op that torch.compile knows."""

from typing import Any

import torch
from torch import Tensor

from nord_snn.ops.checks import check_features, compute_dtype
from nord_snn.ops.differentiable import differentiable
from nord_snn.ops.dispatch import Call, choose_backend, implementations_of
from nord_snn.ops.leaky_clamp.reference import reference

__all__ = ["IMPLEMENTATIONS", "leaky_clamp"]

IMPLEMENTATIONS = implementations_of("leaky_clamp", "numba")


@torch.compiler.assume_constant_result
def _choose(backend: str, *call: Any) -> str:
    return choose_backend("leaky_clamp", IMPLEMENTATIONS, backend, Call(*call)).name


def leaky_clamp(x: Tensor, *, leak: Tensor, floor: Tensor, backend: str = "auto") -> Tensor:
    """``y = x`` where ``x >= 0``, else ``max(leak * x, floor)``, per channel.

    Arithmetic is float32 (float64 for float64 input), also under autocast; the result has the dtype of ``x``.

    Args:
        x: ``[*, D]``.
        leak: slope of the negative side, ``[D]``.
        floor: lower bound of the negative side, ``[D]``.
        backend: ``"auto"``, ``"torch"`` or ``"numba"``; see :mod:`nord_snn.ops.dispatch`. The kernel is differentiable once.

    Returns:
        ``[*, D]``.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: a shape does not fit.
        RuntimeError: the backend asked for cannot run.

    Source: the Nord spiking language model; the slope after leaky and parametric ReLU (Maas et al. 2013, He et al. 2015).

    Example:
        >>> x = torch.tensor([[2.0], [-0.5], [-9.0]])
        >>> leaky_clamp(x, leak=torch.tensor([0.5]), floor=torch.tensor([-1.0])).flatten()
        tensor([ 2.0000, -0.2500, -1.0000])
    """
    if leak.ndim != 1 or leak.shape != floor.shape:
        raise ValueError(
            f"leaky_clamp expects leak and floor of one shape [D], got {list(leak.shape)} and {list(floor.shape)}"
        )
    check_features(x, leak.shape[0], "leaky_clamp", "[*, D]")
    name = _choose(backend, x.device.type, x.dtype, x.shape[-1])
    dtype = compute_dtype(x)
    leak, floor = leak.to(dtype), floor.to(dtype)
    if name == "torch":
        return reference(x.to(dtype), leak, floor).to(x.dtype)
    return _run(x, leak, floor, name)


@torch.library.custom_op("nord_snn::leaky_clamp", mutates_args=())
def _leaky_clamp(x: Tensor, leak: Tensor, floor: Tensor, backend: str) -> Tensor:
    return IMPLEMENTATIONS[backend].kernel().forward(x, leak, floor)


@_leaky_clamp.register_fake
def _(x: Tensor, leak: Tensor, floor: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("nord_snn::leaky_clamp_backward", mutates_args=())
def _leaky_clamp_backward(
    grad: Tensor, x: Tensor, leak: Tensor, floor: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return IMPLEMENTATIONS[backend].kernel().backward(grad, x, leak, floor)


@_leaky_clamp_backward.register_fake
def _(grad: Tensor, x: Tensor, leak: Tensor, floor: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(leak), torch.empty_like(floor)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor, run: Any) -> tuple[Tensor | None, ...]:
    return (*run(grad, *ctx.saved_tensors, ctx.backend), None)


_run = differentiable(_leaky_clamp, _leaky_clamp_backward, _setup_context, _gradients)
