"""The leaky clamp on the CPU: one pass forward and one back, where autograd takes a dozen."""

from typing import Any

import torch
from numba import njit, prange
from torch import Tensor

from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.threads import as_many_threads_as_torch

__all__ = ["backward", "forward"]

_COMPILE: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_COMPILE)
def _forward_rows(first, last, x, leak, floor, y):
    for n in range(first, last):
        for d in range(x.shape[1]):
            low = max(leak[d] * x[n, d], floor[d])
            y[n, d] = x[n, d] if x[n, d] >= 0 else low


@njit(**_COMPILE)
def _backward_rows(first, last, grad, x, leak, floor, grad_x, sums):
    """A tie of ``leak * x`` and ``floor`` shares the gradient, as ``torch.maximum`` does."""
    one, half, zero = x.dtype.type(1), x.dtype.type(0.5), x.dtype.type(0)
    for n in range(first, last):
        for d in range(x.shape[1]):
            leaked = leak[d] * x[n, d]
            above = one if leaked > floor[d] else (half if leaked == floor[d] else zero)
            negative = zero if x[n, d] >= 0 else grad[n, d]
            grad_x[n, d] = grad[n, d] - negative + negative * above * leak[d]
            sums[0, d] += negative * above * x[n, d]
            sums[1, d] += negative * (one - above)


@njit(parallel=True, **_COMPILE)
def _forward(chunks, x, leak, floor, y):
    for c in prange(chunks):
        _forward_rows(c * x.shape[0] // chunks, (c + 1) * x.shape[0] // chunks, x, leak, floor, y)


@njit(parallel=True, **_COMPILE)
def _backward(chunks, grad, x, leak, floor, grad_x, sums):
    for c in prange(chunks):
        first, last = c * x.shape[0] // chunks, (c + 1) * x.shape[0] // chunks
        _backward_rows(first, last, grad, x, leak, floor, grad_x, sums[c])


def _rows(x: Tensor, dtype: torch.dtype) -> Any:
    """``[*, D]`` as Numba's ``[rows, D]``."""
    return x.detach().to(dtype).contiguous().view(-1, x.shape[-1]).numpy()


def forward(x: Tensor, leak: Tensor, floor: Tensor) -> Tensor:
    """``x [*, D]`` clamped; the arguments are those of the op in ``autograd.py``."""
    dtype = compute_dtype(x)
    y = torch.empty(x.shape, dtype=dtype)
    with as_many_threads_as_torch() as threads:
        _forward(2 * threads, _rows(x, dtype), leak.detach().numpy(), floor.detach().numpy(), _rows(y, dtype))
    return y.to(x.dtype)


def backward(grad: Tensor, x: Tensor, leak: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, leak and floor."""
    dtype = compute_dtype(x)
    grad_x = torch.empty(x.shape, dtype=dtype)
    with as_many_threads_as_torch() as threads:
        sums = torch.zeros(2 * threads, 2, x.shape[-1], dtype=dtype)
        _backward(
            2 * threads,
            _rows(grad, dtype),
            _rows(x, dtype),
            leak.detach().numpy(),
            floor.detach().numpy(),
            _rows(grad_x, dtype),
            sums.numpy(),
        )
    return grad_x.to(x.dtype), sums[:, 0].sum(0), sums[:, 1].sum(0)
