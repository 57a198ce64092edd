"""The public op: argument checks, precision, choice of the backend, registration of the kernel with torch.library."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nord_snn.ops.checks import check_features, check_shape, check_tensor, compute_dtype
from nord_snn.ops.clamp.cost import leaky_clamp_cost
from nord_snn.ops.clamp.reference import reference
from nord_snn.ops.costs import register_cost
from nord_snn.ops.dispatch import CallSignature, backend_selector, register_backends
from nord_snn.ops.registration import Kernel, register_op

__all__ = ["IMPLEMENTATIONS", "leaky_clamp"]

IMPLEMENTATIONS = register_backends("leaky_clamp", "clamp", "numba")
_choose = backend_selector("leaky_clamp", IMPLEMENTATIONS)


def leaky_clamp(
    x: Tensor,
    branch: Tensor | None = None,
    gain: Tensor | None = None,
    *,
    leak: Tensor,
    floor: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Return ``z`` where ``z >= 0``, else ``max(leak * z, floor)``, per channel.

    ``z = x + gain * branch``, or ``z = x`` without a branch. The residual sum is part of the op, so that sum and clamp
    together read and write memory once. Arithmetic is float32 (float64 for float64 input), also under autocast; the
    result has the dtype of ``x``.

    Args:
        x: ``[*, D]``.
        branch: residual branch to add, in the shape of ``x``, or None.
        gain: ``[D]``; required with ``branch``, None without.
        leak: slope for negative z, ``[D]``.
        floor: lower bound for negative z, ``[D]``.
        backend: ``"auto"``, ``"torch"`` or ``"numba"``; see :mod:`nord_snn.ops.dispatch`. Second
            derivatives are computed in plain PyTorch on every backend.

    Returns:
        ``[*, D]``.

    Raises:
        TypeError: an argument is not a dense floating tensor.
        ValueError: a shape or device is wrong, or only one of branch and gain is passed.
        RuntimeError: the requested backend cannot run.

    Source: the Nord spiking language model; the slope as in leaky and parametric ReLU (Maas et al. 2013, He et al.
    2015).

    Example:
        >>> x = torch.tensor([[2.0], [-0.5], [-9.0]])
        >>> leaky_clamp(x, leak=torch.tensor([0.5]), floor=torch.tensor([-1.0])).flatten()
        tensor([ 2.0000, -0.2500, -1.0000])
    """
    _check(x, branch, gain, leak, floor)
    name = _choose(backend, CallSignature(x.device.type, x.dtype, x.shape[-1]))
    dtype = compute_dtype(x)
    leak, floor = leak.to(dtype), floor.to(dtype)
    gain = None if gain is None else gain.to(dtype)
    if name == "torch":
        cast_branch = None if branch is None else branch.to(dtype)
        return reference(x.to(dtype), cast_branch, gain, leak, floor).to(x.dtype)
    return _run(x, branch, gain, leak, floor, backend=name)


def _check(x: Tensor, branch: Tensor | None, gain: Tensor | None, leak: Tensor, floor: Tensor) -> None:
    check_tensor(leak, "leak", "[D]")
    check_tensor(floor, "floor", "[D]")
    if leak.ndim != 1 or leak.shape != floor.shape:
        raise ValueError(
            f"leaky_clamp expects leak and floor of one shape [D], got {list(leak.shape)} and {list(floor.shape)}"
        )
    check_features(x, leak.shape[0], "leaky_clamp", "[*, D]", "x")
    check_tensor(leak, "leak", "[D]", like=x)
    check_tensor(floor, "floor", "[D]", like=x)
    if (branch is None) != (gain is None):
        raise ValueError("pass both branch and gain, or neither for the clamp alone")
    if branch is not None and gain is not None:
        check_shape(branch, "branch", "of x", tuple(x.shape), like=x)
        check_shape(gain, "gain", "[D]", tuple(leak.shape), like=x)


def _check_forward(x: Tensor, *tensors: Any, backend: str) -> None:
    _check(x, *tensors)
    if not x.shape[-1]:
        raise ValueError("x must have at least one channel")


def _check_backward(grad: Tensor, x: Tensor, *tensors: Any, backend: str) -> None:
    _check_forward(x, *tensors, backend=backend)
    check_shape(grad, "grad", "of x", tuple(x.shape), like=x)


def _forward(
    x: Tensor, branch: Tensor | None, gain: Tensor | None, leak: Tensor, floor: Tensor, *, backend: str
) -> Tensor:
    return IMPLEMENTATIONS[backend].kernel().forward(x, branch, gain, leak, floor)


def _forward_fake(x: Tensor, *tensors: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    grad: Tensor, x: Tensor, branch: Tensor | None, gain: Tensor | None, leak: Tensor, floor: Tensor, *, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return IMPLEMENTATIONS[backend].kernel().backward(grad, x, branch, gain, leak, floor)


def _backward_fake(
    grad: Tensor, x: Tensor, branch: Tensor | None, gain: Tensor | None, leak: Tensor, floor: Tensor, *, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_branch = leak.new_empty(0) if branch is None else branch.new_empty(branch.shape)
    return (
        x.new_empty(x.shape), grad_branch, leak.new_empty(0 if gain is None else gain.shape),
        torch.empty_like(leak), torch.empty_like(floor),
    )  # fmt: skip


def _save(ctx: Any, tensors: Sequence[Tensor | None], options: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*tensors)
    ctx.options = options


def _gradients(ctx: Any, grad: Tensor, run: Any) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    x, branch, gain, leak, floor = run(grad, *tensors, **ctx.options)
    residual_grads = (None, None) if tensors[1] is None else (branch, gain)
    return x, *residual_grads, leak, floor


def _differentiable(tensors: Sequence[Any], options: dict[str, Any]) -> Tensor:
    x, branch, gain, leak, floor = tensors
    dtype = compute_dtype(x)
    branch = None if branch is None else branch.to(dtype)
    return reference(x.to(dtype), branch, gain, leak, floor).to(x.dtype)


_run = register_op(
    "leaky_clamp",
    Kernel(_forward, _forward_fake),
    Kernel(_backward, _backward_fake),
    _save,
    _gradients,
    differentiable=_differentiable,
    checks=(_check_forward, _check_backward),
)
register_cost("leaky_clamp", leaky_clamp_cost)
