"""The associative LIF neuron on the CPU: Numba kernels that pass over memory once, rows in parallel.

A block of rows walks through all time steps while its state stays in the cache; the backward pass walks there again and
then back. How the loops are written follows from measurements that the README of this folder gives: LLVM vectorises a loop
over many arrays only where it sees that they do not overlap, so what belongs to a tile of neurons lies in one array at
constant distances; and what has more than one dimension is indexed so, because a computed index might be negative.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from torch import Tensor

from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.threads import as_many_threads_as_torch

__all__ = ["SURROGATE_IDS", "backward", "forward"]

#: The rows of :data:`nord_snn.ops.SURROGATES` that ``_slopes`` knows.
SURROGATE_IDS = {"nord_atan": 0, "atan": 1, "sigmoid": 2, "fast_sigmoid": 3}

_COMPILE: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}

_TILE = 512  # neurons that one loop handles: their state fits into the first-level cache
_ROW = _TILE + 16  # a little off the powers of two, whose multiples share the same few sets of the cache
# What a tile carries from step to step, and what the way there records for the way back.
_V, _CURRENT, _REFRACTORY, _THRESHOLD, _GRAD_V, _GRAD_THRESHOLD, _GRAD_BETA_MEM, _GRAD_BETA_SYN = range(
    0, 8 * _ROW, _ROW
)
_STATE = 8 * _ROW
_SLOPE, _FREE, _PULL, _CURRENT_BEFORE = range(0, 4 * _ROW, _ROW)
_RECORD = 4 * _ROW


@intrinsic
def _prefetch(context, array, t, i):
    """``llvm.prefetch`` of the cache line of ``array[t, i]``: read, keep in all caches, data."""

    def generate(context, builder, signature, arguments):
        view = make_array(signature.args[0])(context, builder, arguments[0])
        row, column = cgutils.unpack_tuple(builder, view.strides)
        offset = builder.add(builder.mul(row, arguments[1]), builder.mul(column, arguments[2]))
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(ask, [builder.gep(builder.bitcast(view.data, byte), [offset]), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


@njit(**_COMPILE)
def _ask_for(array, t, base, n):
    """Fetch ``array[t, base : base + n]`` while something else is computed: every step lies elsewhere, which no cache guesses."""
    for d in range(0, n, 16):
        _prefetch(array, t, base + d)


@njit(**_COMPILE)
def _load(source, base, n, target, offset):
    """``target[offset:] = source[base:]``, or zeros where there is no source."""
    if base < 0 or offset < 0:  # never; but only so LLVM knows
        return
    if source.shape[0] == 0:
        for d in range(n):
            target[offset + d] = 0
    else:
        for d in range(n):
            target[offset + d] = source[base + d]


@njit(**_COMPILE)
def _store(source, offset, n, target, t, base):
    if base < 0 or offset < 0:
        return
    for d in range(n):
        target[t, base + d] = source[offset + d]


@njit(**_COMPILE)
def _step(x, t, base, n, state, s, felt, fired, lo, record, r, q, keep, v_reset, refractory_steps, beta_mem, beta_syn):
    """One time step of one tile: the equations of ``reference.py``, the cascade of the step before in ``felt``."""
    one, zero = state.dtype.type(1), state.dtype.type(0)
    if base < 0 or s < 0 or lo < 0 or q < 0:
        return
    for d in range(n):
        before = state[s + _CURRENT + d] + felt[lo + d]
        current = beta_syn * before + x[t, base + d]
        v = state[s + _V + d]
        refractory = state[s + _REFRACTORY + d]
        threshold = state[s + _THRESHOLD + d]
        free = beta_mem * v + (one - beta_mem) * current
        u = v_reset if refractory > 0 else free
        fires = u - threshold >= 0
        spike = one if fires else zero
        state[s + _V + d] = u - spike * threshold
        state[s + _CURRENT + d] = current
        state[s + _REFRACTORY + d] = refractory_steps if fires else max(refractory - one, zero)
        fired[lo + d] = spike
        if keep:
            record[r, q + _SLOPE + d] = u - threshold
            record[r, q + _FREE + d] = zero if refractory > 0 else one
            record[r, q + _PULL + d] = v - current
            record[r, q + _CURRENT_BEFORE + d] = before


@njit(**_COMPILE)
def _step_back(grad_spikes, t, base, n, state, s, grad_fired, grad_current, lo, record, q, grad_x, beta_mem, beta_syn):
    """The same step backwards; the cascade's part comes in as ``grad_fired``."""
    one = state.dtype.type(1)
    if base < 0 or s < 0 or lo < 0 or q < 0:
        return
    for d in range(n):
        grad_v = state[s + _GRAD_V + d]
        grad_spike = grad_spikes[t, base + d] + grad_fired[lo + d] - state[s + _THRESHOLD + d] * grad_v
        through = grad_spike * record[t, q + _SLOPE + d]
        grad_u = (grad_v + through) * record[t, q + _FREE + d]
        grad_i = grad_current[lo + d] + (one - beta_mem) * grad_u
        state[s + _GRAD_THRESHOLD + d] -= through
        state[s + _GRAD_BETA_MEM + d] += grad_u * record[t, q + _PULL + d]
        state[s + _GRAD_BETA_SYN + d] += grad_i * record[t, q + _CURRENT_BEFORE + d]
        state[s + _GRAD_V + d] = beta_mem * grad_u
        grad_current[lo + d] = beta_syn * grad_i
        grad_x[t, base + d] = grad_i


@njit(**_COMPILE)
def _slopes(surrogate, alpha, record, t, q, n):
    """Surrogate derivative in place of membrane minus threshold; constants typed, else everything becomes float64."""
    one, two = record.dtype.type(1), record.dtype.type(2)
    pi = record.dtype.type(np.pi)
    if q < 0:
        return
    if surrogate == 0:
        for d in range(n):
            z = alpha * record[t, q + d]
            record[t, q + d] = alpha / (two * pi * (one + z * z))
    elif surrogate == 1:
        for d in range(n):
            z = pi / two * alpha * record[t, q + d]
            record[t, q + d] = alpha / (two * (one + z * z))
    elif surrogate == 2:
        for d in range(n):
            z = np.exp(-abs(alpha * record[t, q + d]))  # an even function: the side that cannot overflow
            record[t, q + d] = alpha * z / ((one + z) * (one + z))
    else:
        for d in range(n):
            z = one + alpha * abs(record[t, q + d])
            record[t, q + d] = one / (z * z)


@njit(**_COMPILE)
def _sum_members(source, row, sums, t, n):
    """``sums[t, n, c]``: sum over the members m of each cluster of ``source[row, m, c]``."""
    members, clusters = source.shape[1:]
    eights = members - members % 8
    for c in range(clusters):
        sums[t, n, c] = 0
    for m in range(0, eights, 8):  # a short loop costs more for its start than for its turns
        for c in range(clusters):
            sums[t, n, c] += (
                (source[row, m, c] + source[row, m + 1, c])
                + (source[row, m + 2, c] + source[row, m + 3, c])
                + (source[row, m + 4, c] + source[row, m + 5, c])
                + (source[row, m + 6, c] + source[row, m + 7, c])
            )
    for m in range(eights, members):
        for c in range(clusters):
            sums[t, n, c] += source[row, m, c]


@njit(**{**_COMPILE, "fastmath": {"reassoc", "contract"}})
def _couple(coupling, sums, t, n, out):
    """``out = coupling @ sums[t, n]``; a sum in any order, which is what makes it fast."""
    for c in range(coupling.shape[0]):
        total = out.dtype.type(0)
        for k in range(coupling.shape[1]):
            total += coupling[c, k] * sums[t, n, k]
        out[c] = total


@njit(**_COMPILE)
def _spread(per_cluster, target, row):
    members, clusters = target.shape[1:]
    for m in range(members):
        for c in range(clusters):
            target[row, m, c] = per_cluster[c]


@njit(**_COMPILE)
def _forward_rows(
    first, last, rows, x, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, v_reset, refractory_steps,
    keep_v, spikes, v_seq, v_last, i_last, refractory_last,
):  # fmt: skip
    """Blocks ``first`` to ``last`` of ``rows`` rows each."""
    D, C = threshold.shape[0], coupling.shape[0]
    clusters = C if C else D
    tiles = (rows * D + _TILE - 1) // _TILE
    state = np.empty(tiles * _STATE, x.dtype)
    record = np.empty((1, 1), x.dtype)
    fired, felt = np.empty(rows * D, x.dtype), np.empty(rows * D, x.dtype)
    fired3, felt3 = fired.reshape((rows, D // clusters, clusters)), felt.reshape((rows, D // clusters, clusters))
    sums, current = np.empty((1, 1, C), x.dtype), np.empty(C, x.dtype)
    for block in range(first, last):
        start = block * rows * D
        length = min(rows * D, x.shape[1] - start)
        felt[:] = 0
        for tile in range(tiles):
            lo, s = tile * _TILE, tile * _STATE
            n = min(_TILE, length - lo)
            _load(v, start + lo, n, state, s + _V)
            _load(i_syn, start + lo, n, state, s + _CURRENT)
            _load(refractory, start + lo, n, state, s + _REFRACTORY)
            for d in range(n):
                state[s + _THRESHOLD + d] = threshold[(lo + d) % D]
        for t in range(x.shape[0]):
            for tile in range(tiles):
                lo, s = tile * _TILE, tile * _STATE
                n = min(_TILE, length - lo)
                _ask_for(x, min(t + 1, x.shape[0] - 1), start + lo, n)
                _ask_for(spikes, t, start + lo, n)
                _step(
                    x, t, start + lo, n, state, s, felt, fired, lo, record, 0, 0, False,
                    v_reset, refractory_steps, beta_mem, beta_syn,
                )  # fmt: skip
                if keep_v:
                    _store(state, s + _V, n, v_seq, t, start + lo)
            _store(fired, 0, length, spikes, t, start)
            if C:
                for row in range(length // D):
                    _sum_members(fired3, row, sums, 0, 0)
                    _couple(coupling, sums, 0, 0, current)
                    _spread(current, felt3, row)
        for tile in range(tiles):
            lo, s = tile * _TILE, tile * _STATE
            for d in range(min(_TILE, length - lo)):
                v_last[start + lo + d] = state[s + _V + d]
                i_last[start + lo + d] = state[s + _CURRENT + d] + felt[lo + d]
                refractory_last[start + lo + d] = state[s + _REFRACTORY + d]


@njit(**_COMPILE)
def _backward_rows(
    first, last, rows, grad_spikes, grad_v_seq, grad_v_last, grad_i_last, x, v, i_syn, refractory, threshold,
    beta_mem, beta_syn, coupling, coupling_t, v_reset, refractory_steps, surrogate, alpha, record,
    grad_x, grad_v, grad_i, grad_threshold, grad_betas, sums, grad_sums,
):  # fmt: skip
    """Blocks ``first`` to ``last``; gradients of what all rows share are summed into this chunk's own part."""
    T, D, C = x.shape[0], threshold.shape[0], coupling.shape[0]
    clusters = C if C else D
    tiles = (rows * D + _TILE - 1) // _TILE
    state = np.zeros(tiles * _STATE, x.dtype)
    fired, felt = np.empty(rows * D, x.dtype), np.empty(rows * D, x.dtype)
    grad_fired, grad_current = np.zeros(rows * D, x.dtype), np.empty(rows * D, x.dtype)
    shape = (rows, D // clusters, clusters)
    fired3, felt3 = fired.reshape(shape), felt.reshape(shape)
    grad_fired3, grad_current3 = grad_fired.reshape(shape), grad_current.reshape(shape)
    current = np.empty(C, x.dtype)
    for block in range(first, last):
        start = block * rows * D
        length = min(rows * D, x.shape[1] - start)
        felt[:] = 0
        for tile in range(tiles):
            lo, s = tile * _TILE, tile * _STATE
            n = min(_TILE, length - lo)
            _load(v, start + lo, n, state, s + _V)
            _load(i_syn, start + lo, n, state, s + _CURRENT)
            _load(refractory, start + lo, n, state, s + _REFRACTORY)
            _load(grad_v_last, start + lo, n, state, s + _GRAD_V)
            _load(grad_i_last, start + lo, n, grad_current, lo)
            for d in range(n):
                state[s + _THRESHOLD + d] = threshold[(lo + d) % D]
        for t in range(T):
            for tile in range(tiles):
                lo, s, q = tile * _TILE, tile * _STATE, tile * _RECORD
                n = min(_TILE, length - lo)
                _ask_for(x, min(t + 1, T - 1), start + lo, n)
                _step(
                    x, t, start + lo, n, state, s, felt, fired, lo, record, t, q, True,
                    v_reset, refractory_steps, beta_mem, beta_syn,
                )  # fmt: skip
                _slopes(surrogate, alpha, record, t, q + _SLOPE, n)
            if C:
                for row in range(length // D):
                    n = block * rows + row
                    _sum_members(fired3, row, sums, t, n)
                    _couple(coupling, sums, t, n, current)
                    _spread(current, felt3, row)
        for t in range(T - 1, -1, -1):
            if C:
                for row in range(length // D):
                    n = block * rows + row
                    _sum_members(grad_current3, row, grad_sums, t, n)
                    _couple(coupling_t, grad_sums, t, n, current)
                    _spread(current, grad_fired3, row)
            for tile in range(tiles):
                lo, s, q = tile * _TILE, tile * _STATE, tile * _RECORD
                n = min(_TILE, length - lo)
                if grad_v_seq.shape[0]:
                    for d in range(n):
                        state[s + _GRAD_V + d] += grad_v_seq[t, start + lo + d]
                _ask_for(grad_spikes, max(t - 1, 0), start + lo, n)
                _ask_for(grad_x, t, start + lo, n)
                _step_back(
                    grad_spikes, t, start + lo, n, state, s, grad_fired, grad_current, lo, record, q, grad_x,
                    beta_mem, beta_syn,
                )  # fmt: skip
        for tile in range(tiles):
            lo, s = tile * _TILE, tile * _STATE
            for d in range(min(_TILE, length - lo) if grad_v.shape[0] else 0):
                grad_v[start + lo + d] = state[s + _GRAD_V + d]
                grad_i[start + lo + d] = grad_current[lo + d]
    for tile in range(tiles):
        lo, s = tile * _TILE, tile * _STATE
        for d in range(min(_TILE, rows * D - lo)):
            grad_threshold[(lo + d) % D] += state[s + _GRAD_THRESHOLD + d]
            grad_betas[0] += state[s + _GRAD_BETA_MEM + d]
            grad_betas[1] += state[s + _GRAD_BETA_SYN + d]


@njit(parallel=True, **_COMPILE)
def _forward(
    chunks, blocks, rows, x, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, v_reset, refractory_steps,
    keep_v, spikes, v_seq, v_last, i_last, refractory_last,
):  # fmt: skip
    for c in prange(chunks):
        _forward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, rows, x, v, i_syn, refractory, threshold,
            beta_mem, beta_syn, coupling, v_reset, refractory_steps, keep_v, spikes, v_seq, v_last, i_last,
            refractory_last,
        )  # fmt: skip


@njit(parallel=True, **_COMPILE)
def _backward(
    chunks, blocks, rows, grad_spikes, grad_v_seq, grad_v_last, grad_i_last, x, v, i_syn, refractory, threshold,
    beta_mem, beta_syn, coupling, coupling_t, v_reset, refractory_steps, surrogate, alpha, record,
    grad_x, grad_v, grad_i, grad_threshold, grad_betas, sums, grad_sums,
):  # fmt: skip
    for c in prange(chunks):
        _backward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, rows, grad_spikes, grad_v_seq, grad_v_last, grad_i_last,
            x, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, coupling_t, v_reset, refractory_steps,
            surrogate, alpha, record[c], grad_x, grad_v, grad_i, grad_threshold[c], grad_betas[c], sums, grad_sums,
        )  # fmt: skip


def _deal(n_rows: int, n_features: int, threads: int) -> tuple[int, int, int]:
    """Rows of a block, two tiles or more; the blocks that this makes; and the chunks of blocks, two for each thread."""
    rows = max(1, 2 * _TILE // n_features)
    blocks = -(-n_rows // rows)
    return rows, blocks, min(blocks, 2 * threads)


def _array(x: Tensor | None, like: Tensor, *shape: int) -> Any:
    """What Numba sees of a tensor: an array in the dtype of ``like``, of length 0 along every axis where there is none."""
    if x is None:
        return np.empty([0] * len(shape), like.numpy().dtype)
    return x.detach().to(like.dtype).contiguous().view(shape).numpy()


def forward(
    x: Tensor,
    v: Tensor | None,
    i_syn: Tensor | None,
    refractory: Tensor | None,
    threshold: Tensor,
    beta_mem: Tensor,
    beta_syn: Tensor,
    coupling: Tensor | None,
    v_reset: float,
    refractory_steps: int,
    keep_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Spikes, membranes (empty unless ``keep_v``) and the last state; the arguments are those of the op in ``autograd.py``."""
    T, N, D = x.shape
    dtype = compute_dtype(x)
    like = torch.empty(0, dtype=dtype)
    scalar = like.numpy().dtype.type
    C = 0 if coupling is None else coupling.shape[0]
    spikes, v_seq = torch.empty(T, N, D, dtype=dtype), torch.empty(T if keep_v else 0, N, D, dtype=dtype)
    v_last, i_last = torch.empty(N, D, dtype=dtype), torch.empty(N, D, dtype=dtype)
    refractory_last = torch.empty(N, D, dtype=torch.int32)
    with as_many_threads_as_torch() as threads:
        rows, blocks, chunks = _deal(N, D, threads)
        _forward(
            chunks,
            blocks,
            rows,
            _array(x, like, T, N * D),
            _array(v, like, N * D),
            _array(i_syn, like, N * D),
            _array(refractory, like, N * D),
            _array(threshold, like, D),
            scalar(beta_mem.item()),
            scalar(beta_syn.item()),
            _array(coupling, like, C, C),
            scalar(v_reset),
            scalar(refractory_steps),
            keep_v,
            spikes.flatten(1).numpy(),
            v_seq.flatten(1).numpy(),
            v_last.flatten().numpy(),
            i_last.flatten().numpy(),
            refractory_last.flatten().numpy(),
        )
    return spikes.to(x.dtype), v_seq.to(x.dtype), v_last, i_last, refractory_last


def backward(
    grad_spikes: Tensor,
    grad_v_seq: Tensor | None,
    grad_v_last: Tensor | None,
    grad_i_last: Tensor | None,
    x: Tensor,
    v: Tensor | None,
    i_syn: Tensor | None,
    refractory: Tensor | None,
    threshold: Tensor,
    beta_mem: Tensor,
    beta_syn: Tensor,
    coupling: Tensor | None,
    v_reset: float,
    refractory_steps: int,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, v, i_syn (empty without a state), threshold, both betas and coupling (empty without one)."""
    T, N, D = x.shape
    dtype = compute_dtype(x)
    like = torch.empty(0, dtype=dtype)
    scalar = like.numpy().dtype.type
    C = 0 if coupling is None else coupling.shape[0]
    grad_x = torch.empty(T, N, D, dtype=dtype)
    grad_v, grad_i = (torch.empty(0 if v is None else N, D, dtype=dtype) for _ in range(2))
    sums, grad_sums = torch.empty(T, N, C, dtype=dtype), torch.empty(T, N, C, dtype=dtype)
    with as_many_threads_as_torch() as threads:
        rows, blocks, chunks = _deal(N, D, threads)
        record = torch.empty(chunks, T, -(-rows * D // _TILE) * _RECORD, dtype=dtype)
        # What all rows share is a long sum that may nearly cancel: its last part is added up in float64.
        grad_threshold, grad_betas = (torch.zeros(chunks, n, dtype=torch.float64) for n in (D, 2))
        _backward(
            chunks,
            blocks,
            rows,
            _array(grad_spikes, like, T, N * D),
            _array(grad_v_seq, like, T, N * D),
            _array(grad_v_last, like, N * D),
            _array(grad_i_last, like, N * D),
            _array(x, like, T, N * D),
            _array(v, like, N * D),
            _array(i_syn, like, N * D),
            _array(refractory, like, N * D),
            _array(threshold, like, D),
            scalar(beta_mem.item()),
            scalar(beta_syn.item()),
            _array(coupling, like, C, C),
            _array(None if coupling is None else coupling.T, like, C, C),
            scalar(v_reset),
            scalar(refractory_steps),
            SURROGATE_IDS[surrogate],
            scalar(alpha),
            record.numpy(),
            grad_x.flatten(1).numpy(),
            grad_v.flatten().numpy(),
            grad_i.flatten().numpy(),
            grad_threshold.numpy(),
            grad_betas.numpy(),
            sums.numpy(),
            grad_sums.numpy(),
        )
    grad_beta_mem, grad_beta_syn = (grad_betas[:, i].sum().to(dtype).reshape(1) for i in range(2))
    return (
        grad_x.to(x.dtype),
        grad_v,
        grad_i,
        grad_threshold.sum(0).to(dtype),
        grad_beta_mem,
        grad_beta_syn,
        _product(grad_sums, sums),
    )


def _product(grad_sums: Tensor, sums: Tensor) -> Tensor:
    """``[C, C]`` from two ``[T, N, C]``, in their own precision also under autocast."""
    with torch.autocast("cpu", enabled=False):
        return grad_sums.flatten(0, 1).T @ sums.flatten(0, 1)
