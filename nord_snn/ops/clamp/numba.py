"""The leaky clamp on the CPU: forward and backward pass read and write memory once each, autograd a dozen times."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nord_snn.ops._numba.compiling import chunks_of, kernel, parallel_kernel
from nord_snn.ops._numba.simd import (
    WIDTH,
    advance,
    as_pointer,
    broadcast,
    ge_mask,
    load,
    masked_load,
    masked_store,
    store,
    where,
)
from nord_snn.ops._numba.tensors import NUMPY_TYPES, addresses, as_contiguous, data_pointer
from nord_snn.ops._numba.threads import n_threads
from nord_snn.ops.checks import compute_dtype

__all__ = ["backward", "forward"]


class _Inputs(NamedTuple):
    """Pointers to the inputs; branch and gain are null pointers without a branch."""

    x: Any
    branch: Any
    gain: Any
    leak: Any
    floor: Any


@kernel
def _pointers(inputs, like):
    x, branch, gain, leak, floor = inputs
    return _Inputs(
        as_pointer(x, like), as_pointer(branch, like), as_pointer(gain, like), as_pointer(leak, like),
        as_pointer(floor, like),
    )  # fmt: skip


@kernel
def _forward_rows(first, last, D, inputs, y, has_branch):
    x, branch, gain, leak, floor = inputs
    zero = broadcast(x, 0)
    for at in range(first * D, last * D, D):
        for d in range(0, D, WIDTH):
            n = D - d
            z = masked_load(x, at + d, n)
            if has_branch:
                z = z + masked_load(gain, d, n) * masked_load(branch, at + d, n)
            leaked, low = masked_load(leak, d, n) * z, masked_load(floor, d, n)
            low = where(ge_mask(leaked, low), leaked, where(ge_mask(low, leaked), low, leaked + low))  # NaN stays NaN
            masked_store(y, at + d, n, where(ge_mask(z, zero), z, low))


@kernel
def _backward_rows(first, last, D, grad, inputs, grad_x, grad_branch, sums, has_branch):
    """Compute the gradients of the rows ``first`` to ``last - 1``.

    If ``leak * z`` equals ``floor``, each gets half of the gradient, as in ``torch.maximum``. The gradients of leak, floor
    and gain are added to ``sums [3, D rounded up to whole vectors]``.
    """
    x, branch, gain, leak, floor = inputs
    zero, one, half = broadcast(x, 0), broadcast(x, 1), broadcast(x, 0.5)
    row = -(-D // WIDTH) * WIDTH
    leak_sums, floor_sums, gain_sums = sums, advance(sums, row), advance(sums, 2 * row)
    for at in range(first * D, last * D, D):
        for d in range(0, D, WIDTH):
            n = D - d
            z, grad_y = masked_load(x, at + d, n), masked_load(grad, at + d, n)
            if has_branch:
                residual, scale = masked_load(branch, at + d, n), masked_load(gain, d, n)
                z = z + scale * residual
            slope, low = masked_load(leak, d, n), masked_load(floor, d, n)
            leaked = slope * z
            floor_wins, leak_wins = ge_mask(low, leaked), ge_mask(leaked, low)
            leak_share, floor_share = (
                where(floor_wins, where(leak_wins, half, zero), one),
                where(leak_wins, where(floor_wins, half, zero), one),
            )
            grad_negative = where(ge_mask(z, zero), zero, grad_y)
            grad_leaked = grad_negative * leak_share
            grad_z = grad_y - grad_negative + grad_leaked * slope
            store(leak_sums, d, load(leak_sums, d) + grad_leaked * z)
            store(floor_sums, d, load(floor_sums, d) + grad_negative * floor_share)
            masked_store(grad_x, at + d, n, grad_z)
            if has_branch:
                store(gain_sums, d, load(gain_sums, d) + grad_z * residual)
                masked_store(grad_branch, at + d, n, grad_z * scale)


@parallel_kernel
def _forward(share, like, chunks, N, D, inputs, y):
    has_branch = inputs[1] != 0
    for c in chunks_of(share, chunks):
        first, last = c * N // chunks, (c + 1) * N // chunks
        _forward_rows(first, last, D, _pointers(inputs, like), as_pointer(y, like), has_branch)


@parallel_kernel
def _backward(share, like, chunks, N, D, grad, inputs, grad_x, grad_branch, sums):
    has_branch, chunk_size = inputs[1] != 0, 3 * -(-D // WIDTH) * WIDTH
    for c in chunks_of(share, chunks):
        _backward_rows(
            c * N // chunks, (c + 1) * N // chunks, D, as_pointer(grad, like), _pointers(inputs, like),
            as_pointer(grad_x, like), as_pointer(grad_branch, like), advance(as_pointer(sums, like), c * chunk_size),
            has_branch,
        )  # fmt: skip


def _contiguous(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else as_contiguous(x, dtype) for x in tensors]


def forward(x: Tensor, branch: Tensor | None, gain: Tensor | None, leak: Tensor, floor: Tensor) -> Tensor:
    """Return the clamped sum ``[*, D]``; the arguments are those of the op in ``op.py``."""
    dtype, D = compute_dtype(x), x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device="cpu")
    inputs = _contiguous(x, branch, gain, leak, floor, dtype=dtype)
    threads = n_threads(x.numel())
    _forward(threads, NUMPY_TYPES[dtype](0), 2 * threads, x.numel() // D, D, addresses(inputs), data_pointer(y))
    return y.to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, branch: Tensor | None, gain: Tensor | None, leak: Tensor, floor: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, branch and gain (both empty without a branch), leak and floor."""
    dtype, D = compute_dtype(x), x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=dtype, device="cpu")
    grad_branch = torch.empty(0 if branch is None else x.shape, dtype=dtype, device="cpu")
    grad, inputs = as_contiguous(grad, dtype), _contiguous(x, branch, gain, leak, floor, dtype=dtype)
    threads = n_threads(x.numel())
    sums = torch.zeros(2 * threads, 3, -(-D // WIDTH) * WIDTH, dtype=dtype, device="cpu")
    _backward(
        threads, NUMPY_TYPES[dtype](0), 2 * threads, x.numel() // D, D, data_pointer(grad), addresses(inputs),
        *addresses((grad_x, grad_branch, sums)),
    )  # fmt: skip
    grad_leak, grad_floor, grad_gain = (sums[:, kind, :D].sum(0) for kind in range(3))
    if branch is None:
        return grad_x.to(x.dtype), grad_branch, torch.empty(0, dtype=dtype, device="cpu"), grad_leak, grad_floor
    return grad_x.to(x.dtype), grad_branch.to(branch.dtype), grad_gain, grad_leak, grad_floor
