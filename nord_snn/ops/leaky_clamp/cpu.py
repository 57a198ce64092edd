"""The leaky clamp on the CPU: one pass forward and one back, where autograd takes a dozen."""

from typing import Any

import torch
from numba import njit, prange
from torch import Tensor

from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.lanes import WIDTH, at_address, at_least, beyond, load, load_first, splat, store, store_first, where
from nord_snn.ops.memory import NUMBERS, address, ready
from nord_snn.ops.threads import as_many_threads_as_torch

__all__ = ["backward", "forward"]

_COMPILE: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
_LANES = "768ebc5945fe"  # SHA-256 of lanes.py and _compat/numba.py: Numba's cache notices a change of this file alone


@njit(**_COMPILE)
def _forward_rows(first, last, D, x, branch, gain, leak, floor, y, adds):
    zero = splat(x, 0)
    for at in range(first * D, last * D, D):
        for d in range(0, D, WIDTH):
            n = D - d
            z = load_first(x, at + d, n)
            if adds:
                z = z + load_first(gain, d, n) * load_first(branch, at + d, n)
            leaked, low = load_first(leak, d, n) * z, load_first(floor, d, n)
            low = where(at_least(leaked, low), leaked, where(at_least(low, leaked), low, leaked + low))  # NaN stays NaN
            store_first(y, at + d, n, where(at_least(z, zero), z, low))


@njit(**_COMPILE)
def _backward_rows(first, last, D, grad, x, branch, gain, leak, floor, grad_x, grad_branch, sums, adds):
    """A tie of ``leak * z`` and ``floor`` shares the gradient, as ``torch.maximum`` does.

    ``sums [3, whole vectors of D]``: gradients of leak, floor and gain, so far.
    """
    zero, one, half = splat(x, 0), splat(x, 1), splat(x, 0.5)
    row = -(-D // WIDTH) * WIDTH
    of_leak, of_floor, of_gain = sums, beyond(sums, row), beyond(sums, 2 * row)
    for at in range(first * D, last * D, D):
        for d in range(0, D, WIDTH):
            n = D - d
            z, given = load_first(x, at + d, n), load_first(grad, at + d, n)
            if adds:
                added, scale = load_first(branch, at + d, n), load_first(gain, d, n)
                z = z + scale * added
            slope, low = load_first(leak, d, n), load_first(floor, d, n)
            leaked = slope * z
            least, most = at_least(low, leaked), at_least(leaked, low)
            of_slope, of_low = where(least, where(most, half, zero), one), where(most, where(least, half, zero), one)
            negative = where(at_least(z, zero), zero, given)
            through = negative * of_slope
            grad_z = given - negative + through * slope
            store(of_leak, d, load(of_leak, d) + through * z)
            store(of_floor, d, load(of_floor, d) + negative * of_low)
            store_first(grad_x, at + d, n, grad_z)
            if adds:
                store(of_gain, d, load(of_gain, d) + grad_z * added)
                store_first(grad_branch, at + d, n, grad_z * scale)


@njit(parallel=True, **_COMPILE)
def _forward(like, chunks, N, D, x, branch, gain, leak, floor, y):
    adds = branch != 0
    for c in prange(chunks):
        _forward_rows(
            c * N // chunks, (c + 1) * N // chunks, D, at_address(x, like), at_address(branch, like),
            at_address(gain, like), at_address(leak, like), at_address(floor, like), at_address(y, like), adds,
        )  # fmt: skip


@njit(parallel=True, **_COMPILE)
def _backward(like, chunks, N, D, grad, x, branch, gain, leak, floor, grad_x, grad_branch, sums):
    adds, own = branch != 0, 3 * -(-D // WIDTH) * WIDTH
    for c in prange(chunks):
        _backward_rows(
            c * N // chunks, (c + 1) * N // chunks, D, at_address(grad, like), at_address(x, like),
            at_address(branch, like), at_address(gain, like), at_address(leak, like), at_address(floor, like),
            at_address(grad_x, like), at_address(grad_branch, like), beyond(at_address(sums, like), c * own), adds,
        )  # fmt: skip


def forward(x: Tensor, branch: Tensor | None, gain: Tensor | None, leak: Tensor, floor: Tensor) -> Tensor:
    """``x [*, D]`` plus the branch, clamped; the arguments are those of the op in ``autograd.py``."""
    dtype, D = compute_dtype(x), x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype)
    held = [None if part is None else ready(part, dtype) for part in (x, branch, gain, leak, floor)]
    with as_many_threads_as_torch() as threads:
        _forward(NUMBERS[dtype](0), 2 * threads, x.numel() // D, D, *map(address, held), address(y))
    return y.to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, branch: Tensor | None, gain: Tensor | None, leak: Tensor, floor: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch and gain (empty where there are none), leak and floor."""
    dtype, D = compute_dtype(x), x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=dtype)
    grad_branch = torch.empty(0 if branch is None else x.shape, dtype=dtype)
    held = [None if part is None else ready(part, dtype) for part in (grad, x, branch, gain, leak, floor)]
    with as_many_threads_as_torch() as threads:
        sums = torch.zeros(2 * threads, 3, -(-D // WIDTH) * WIDTH, dtype=dtype)
        _backward(
            NUMBERS[dtype](0), 2 * threads, x.numel() // D, D, *map(address, [*held, grad_x, grad_branch, sums])
        )  # fmt: skip
    grad_leak, grad_floor, grad_gain = (sums[:, kind, :D].sum(0) for kind in range(3))
    if branch is None:
        return grad_x.to(x.dtype), grad_branch, torch.empty(0, dtype=dtype), grad_leak, grad_floor
    return grad_x.to(x.dtype), grad_branch.to(branch.dtype), grad_gain, grad_leak, grad_floor
