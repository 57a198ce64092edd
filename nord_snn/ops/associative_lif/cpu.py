"""The associative LIF neuron on the CPU: Numba kernels that pass over memory once, rows in parallel.

A block of rows walks through all time steps while its state stays in the cache; the backward pass walks there again and
then back. Why the loops are written sixteen neurons at a time, and with pointers, the README of this folder says.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.lanes import (
    WIDTH,
    fused,
    larger,
    load,
    load_first,
    pointer,
    prefetch,
    splat,
    store,
    store_first,
    total,
    where_at_least,
)
from nord_snn.ops.threads import as_many_threads_as_torch

__all__ = ["SURROGATE_IDS", "backward", "forward"]

#: The rows of :data:`nord_snn.ops.SURROGATES` that ``_slopes`` knows.
SURROGATE_IDS = {"nord_atan": 0, "atan": 1, "sigmoid": 2, "fast_sigmoid": 3}

_COMPILE: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
_LANES = "9f57d91b561a"  # how the SHA-256 of lanes.py begins: Numba's cache notices a change of this file alone

_TILE = 512  # neurons that one loop handles: their state fits into the first-level cache
_ROW = _TILE + 16  # a little off the powers of two, whose multiples share the same few sets of the cache
# What a tile carries from step to step, and what the way there records for the way back.
_V, _CURRENT, _REFRACTORY, _THRESHOLD, _GRAD_V, _GRAD_THRESHOLD = range(0, 6 * _ROW, _ROW)
_STATE = 6 * _ROW
_SLOPE, _FREE, _PULL, _CURRENT_BEFORE = range(0, 4 * _ROW, _ROW)
_RECORD = 4 * _ROW
_TOGETHER = (
    16  # blocks whose share of the coupling's gradient, which may be large, is added up in the kernel's own dtype
)


@njit(**_COMPILE)
def _ask_for(source, at, n):
    """Fetch n numbers while something else is computed: every time step lies elsewhere, which no cache guesses."""
    for d in range(0, n, WIDTH):
        prefetch(source, at + d)


@njit(**_COMPILE)
def _read(given, source, at, n, target, offset):
    """``target[offset:] = source[at:]``, or zeros where nothing is given; zeros also up to the end of the last vector."""
    zero = splat(target, 0)
    for d in range(0, n, WIDTH):
        store(target, offset + d, load_first(source, at + d, n - d) if given else zero)


@njit(**_COMPILE)
def _step(
    x, spikes, v_seq, at, n, state, s, felt, fired, lo, record, q, keep_v, keep, v_reset, refractory_steps,
    beta_mem, beta_syn,
):  # fmt: skip
    """One time step of one tile: the equations of ``reference.py``, the cascade of the step before in ``felt``."""
    one, zero, held, rest = splat(x, 1), splat(x, 0), splat(x, v_reset), splat(x, refractory_steps)
    keeps_v, keeps_i = splat(x, beta_mem), splat(x, beta_syn)
    lets_in = one - keeps_v
    for d in range(0, n, WIDTH):
        before = load(state, s + _CURRENT + d) + load(felt, lo + d)
        current = keeps_i * before + load_first(x, at + d, n - d)
        v = load(state, s + _V + d)
        refractory = load(state, s + _REFRACTORY + d)
        threshold = load(state, s + _THRESHOLD + d)
        u = where_at_least(refractory, one, held, keeps_v * v + lets_in * current)
        distance = u - threshold
        spike = where_at_least(distance, zero, one, zero)
        after = u - spike * threshold
        store(state, s + _V + d, after)
        store(state, s + _CURRENT + d, current)
        store(state, s + _REFRACTORY + d, where_at_least(distance, zero, rest, larger(refractory - one, zero)))
        store(fired, lo + d, spike)
        if keep:
            store(record, q + _SLOPE + d, distance)
            store(record, q + _FREE + d, where_at_least(refractory, one, zero, one))
            store(record, q + _PULL + d, v - current)
            store(record, q + _CURRENT_BEFORE + d, before)
        else:
            store_first(spikes, at + d, n - d, spike)
            if keep_v:
                store_first(v_seq, at + d, n - d, after)


@njit(**_COMPILE)
def _step_back(
    grad_spikes, given_v_seq, grad_v_seq, grad_x, at, n, state, s, grad_fired, grad_current, lo, record, q,
    beta_sums, beta_mem, beta_syn,
):  # fmt: skip
    """The same step backwards; the cascade's part comes in as ``grad_fired``."""
    keeps_v, keeps_i = splat(record, beta_mem), splat(record, beta_syn)
    lets_in = splat(record, 1) - keeps_v
    grad_beta_mem, grad_beta_syn = load(beta_sums, 0), load(beta_sums, WIDTH)
    for d in range(0, n, WIDTH):
        grad_v = load(state, s + _GRAD_V + d)
        if given_v_seq:
            grad_v = grad_v + load_first(grad_v_seq, at + d, n - d)
        from_above = load_first(grad_spikes, at + d, n - d) + load(grad_fired, lo + d)
        grad_spike = from_above - load(state, s + _THRESHOLD + d) * grad_v
        through = grad_spike * load(record, q + _SLOPE + d)
        grad_u = (grad_v + through) * load(record, q + _FREE + d)
        grad_i = load(grad_current, lo + d) + lets_in * grad_u
        grad_beta_mem = grad_beta_mem + grad_u * load(record, q + _PULL + d)
        grad_beta_syn = grad_beta_syn + grad_i * load(record, q + _CURRENT_BEFORE + d)
        store(state, s + _GRAD_THRESHOLD + d, load(state, s + _GRAD_THRESHOLD + d) - through)
        store(state, s + _GRAD_V + d, keeps_v * grad_u)
        store(grad_current, lo + d, keeps_i * grad_i)
        store_first(grad_x, at + d, n - d, grad_i)
    store(beta_sums, 0, grad_beta_mem)
    store(beta_sums, WIDTH, grad_beta_syn)


@njit(**_COMPILE)
def _slopes(surrogate, alpha, record, q, n):
    """Surrogate derivative in place of membrane minus threshold."""
    one, zero = splat(record, 1), splat(record, 0)
    if surrogate == 0:
        scale, peak = splat(record, alpha), splat(record, alpha / (2 * np.pi))
        for d in range(0, n, WIDTH):
            z = scale * load(record, q + d)
            store(record, q + d, peak / (one + z * z))
    elif surrogate == 1:
        scale, peak = splat(record, alpha * np.pi / 2), splat(record, alpha / 2)
        for d in range(0, n, WIDTH):
            z = scale * load(record, q + d)
            store(record, q + d, peak / (one + z * z))
    elif surrogate == 2:
        for d in range(-(-n // WIDTH) * WIDTH):  # to the end of the last vector, whose rest must be finite
            record[q + d] = np.exp(-abs(alpha * record[q + d]))  # an even function: the side that cannot overflow
        for d in range(0, n, WIDTH):
            z = load(record, q + d)
            store(record, q + d, splat(record, alpha) * z / ((one + z) * (one + z)))
    else:
        scale = splat(record, alpha)
        for d in range(0, n, WIDTH):
            distance = load(record, q + d)
            z = one + scale * larger(distance, zero - distance)
            store(record, q + d, one / (z * z))


@njit(**_COMPILE)
def _product(sums, at, coupling, c, clusters, width):
    """``sums[at:] @ coupling[:, c:]`` for WIDTH columns; four sums, since one would wait for itself."""
    first, second, third, fourth = splat(sums, 0), splat(sums, 0), splat(sums, 0), splat(sums, 0)
    fours = clusters - clusters % 4
    for k in range(0, fours, 4):
        first = fused(splat(sums, sums[at + k]), load(coupling, k * width + c), first)
        second = fused(splat(sums, sums[at + k + 1]), load(coupling, (k + 1) * width + c), second)
        third = fused(splat(sums, sums[at + k + 2]), load(coupling, (k + 2) * width + c), third)
        fourth = fused(splat(sums, sums[at + k + 3]), load(coupling, (k + 3) * width + c), fourth)
    for k in range(fours, clusters):
        first = fused(splat(sums, sums[at + k]), load(coupling, k * width + c), first)
    return (first + second) + (third + fourth)


@njit(**_COMPILE)
def _couple(source, rows, members, clusters, coupling, width, sums, at, current, target):
    """Per row: the sums over the members of each cluster, ``sums @ coupling``, and that to every member of each cluster.

    ``coupling [clusters, width]`` and ``sums [rows, width]`` are padded to whole vectors. What a vector writes beyond a
    member's clusters is overwritten by the next, and what the last one leaves is cleared.
    """
    for row in range(rows):
        begin, out = row * members * clusters, at + row * width
        for c in range(0, width, WIDTH):
            even, odd = splat(sums, 0), splat(sums, 0)
            for m in range(0, members - 1, 2):
                even = even + load(source, begin + m * clusters + c)
                odd = odd + load(source, begin + (m + 1) * clusters + c)
            if members % 2:
                even = even + load(source, begin + (members - 1) * clusters + c)
            store(sums, out + c, even + odd)
        for c in range(0, width, WIDTH):
            store(current, c, _product(sums, out, coupling, c, clusters, width))
        for m in range(members):
            for c in range(0, width, WIDTH):
                store(target, begin + m * clusters + c, load(current, c))
    store(target, rows * members * clusters, splat(target, 0))


@njit(**_COMPILE)
def _multiply(grad_sums, sums, rows, clusters, width, grad_coupling):
    """``grad_coupling [clusters, width] += grad_sums.T @ sums``, over ``rows`` rows of each; four clusters at a time."""
    fours = clusters - clusters % 4
    for k in range(0, width, WIDTH):
        for c in range(0, fours, 4):
            at = c * width + k
            first, second = load(grad_coupling, at), load(grad_coupling, at + width)
            third, fourth = load(grad_coupling, at + 2 * width), load(grad_coupling, at + 3 * width)
            for row in range(0, rows * width, width):
                sums_of_row = load(sums, row + k)
                first = fused(splat(sums, grad_sums[row + c]), sums_of_row, first)
                second = fused(splat(sums, grad_sums[row + c + 1]), sums_of_row, second)
                third = fused(splat(sums, grad_sums[row + c + 2]), sums_of_row, third)
                fourth = fused(splat(sums, grad_sums[row + c + 3]), sums_of_row, fourth)
            store(grad_coupling, at, first)
            store(grad_coupling, at + width, second)
            store(grad_coupling, at + 2 * width, third)
            store(grad_coupling, at + 3 * width, fourth)
        for c in range(fours, clusters):
            product = load(grad_coupling, c * width + k)
            for row in range(0, rows * width, width):
                product = fused(splat(sums, grad_sums[row + c]), load(sums, row + k), product)
            store(grad_coupling, c * width + k, product)


@njit(**_COMPILE)
def _forward_rows(
    first, last, rows, x, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, v_reset, refractory_steps,
    keep_v, spikes, v_seq, v_last, i_last, refractory_last, state, buffers, sums, current,
):  # fmt: skip
    """Blocks ``first`` to ``last`` of ``rows`` rows each."""
    T, N, D, (clusters, width) = x.shape[0], x.shape[1], threshold.shape[0], coupling.shape
    members, tiles = D // max(clusters, 1), len(state) // _STATE
    state, felt, fired, sums, current = (
        pointer(state), pointer(buffers[0]), pointer(buffers[1]), pointer(sums), pointer(current)
    )  # fmt: skip
    x_, v_, i_, refractory_, coupling_ = pointer(x), pointer(v), pointer(i_syn), pointer(refractory), pointer(coupling)
    spikes_, v_seq_ = pointer(spikes), pointer(v_seq)
    v_last_, i_last_, refractory_last_ = pointer(v_last), pointer(i_last), pointer(refractory_last)
    for d in range(rows * D):
        state[d // _TILE * _STATE + _THRESHOLD + d % _TILE] = threshold[d % D]
    for block in range(first, last):
        start = block * rows * D
        length = min(rows * D, N - start)
        buffers[0, :] = 0
        for tile in range(tiles):
            lo, s = tile * _TILE, tile * _STATE
            n = min(_TILE, length - lo)
            _read(len(v) > 0, v_, start + lo, n, state, s + _V)
            _read(len(i_syn) > 0, i_, start + lo, n, state, s + _CURRENT)
            _read(len(refractory) > 0, refractory_, start + lo, n, state, s + _REFRACTORY)
        for t in range(T):
            for tile in range(tiles):
                lo = tile * _TILE
                n = min(_TILE, length - lo)
                _ask_for(x_, min(t + 1, T - 1) * N + start + lo, n)
                _ask_for(spikes_, t * N + start + lo, n)
                _step(
                    x_, spikes_, v_seq_, t * N + start + lo, n, state, tile * _STATE, felt, fired, lo, state, 0,
                    keep_v, False, v_reset, refractory_steps, beta_mem, beta_syn,
                )  # fmt: skip
            if clusters:
                _couple(fired, length // D, members, clusters, coupling_, width, sums, 0, current, felt)
        for tile in range(tiles):
            lo, s = tile * _TILE, tile * _STATE
            n = min(_TILE, length - lo)
            for d in range(0, n, WIDTH):
                store_first(v_last_, start + lo + d, n - d, load(state, s + _V + d))
                store_first(i_last_, start + lo + d, n - d, load(state, s + _CURRENT + d) + load(felt, lo + d))
            for d in range(n):
                refractory_last_[start + lo + d] = state[s + _REFRACTORY + d]


@njit(**_COMPILE)
def _backward_rows(
    first, last, rows, grad_spikes, grad_v_seq, grad_v_last, grad_i_last, x, v, i_syn, refractory, threshold,
    beta_mem, beta_syn, coupling, coupling_back, v_reset, refractory_steps, surrogate, alpha, record, state,
    buffers, sums, grad_sums, current, beta_sums, coupling_sums, grad_x, grad_v, grad_i, grad_threshold, grad_betas,
    grad_coupling,
):  # fmt: skip
    """Blocks ``first`` to ``last``; gradients of what all rows share are summed into this chunk's own part.

    Such a sum is long and may nearly cancel: the shares of a block, or of a few, are added up in float64.
    """
    T, N, D, (clusters, width) = x.shape[0], x.shape[1], threshold.shape[0], coupling.shape
    members, tiles = D // max(clusters, 1), len(state) // _STATE
    state, felt, fired = pointer(state), pointer(buffers[0]), pointer(buffers[1])
    grad_fired, grad_current = pointer(buffers[2]), pointer(buffers[3])
    sums_, grad_sums_, current = pointer(sums), pointer(grad_sums), pointer(current)
    beta_sums_, coupling_sums_ = pointer(beta_sums), pointer(coupling_sums)
    x_, v_, i_, refractory_ = pointer(x), pointer(v), pointer(i_syn), pointer(refractory)
    coupling_, coupling_back_ = pointer(coupling), pointer(coupling_back)
    grad_spikes_, grad_v_seq_, grad_x_ = pointer(grad_spikes), pointer(grad_v_seq), pointer(grad_x)
    grad_v_last_, grad_i_last_, record_ = pointer(grad_v_last), pointer(grad_i_last), pointer(record)
    for d in range(rows * D):
        state[d // _TILE * _STATE + _THRESHOLD + d % _TILE] = threshold[d % D]
    for block in range(first, last):
        start = block * rows * D
        length = min(rows * D, N - start)
        count = length // D
        buffers[0, :] = 0
        for tile in range(tiles):
            lo, s = tile * _TILE, tile * _STATE
            n = min(_TILE, length - lo)
            _read(len(v) > 0, v_, start + lo, n, state, s + _V)
            _read(len(i_syn) > 0, i_, start + lo, n, state, s + _CURRENT)
            _read(len(refractory) > 0, refractory_, start + lo, n, state, s + _REFRACTORY)
            _read(len(grad_v_last) > 0, grad_v_last_, start + lo, n, state, s + _GRAD_V)
            _read(len(grad_i_last) > 0, grad_i_last_, start + lo, n, grad_current, lo)
        for t in range(T):
            for tile in range(tiles):
                lo, q = tile * _TILE, (t * tiles + tile) * _RECORD
                n = min(_TILE, length - lo)
                _ask_for(x_, min(t + 1, T - 1) * N + start + lo, n)
                _step(
                    x_, x_, x_, t * N + start + lo, n, state, tile * _STATE, felt, fired, lo, record_, q,
                    False, True, v_reset, refractory_steps, beta_mem, beta_syn,
                )  # fmt: skip
                _slopes(surrogate, alpha, record_, q + _SLOPE, n)
            if clusters:
                _couple(fired, count, members, clusters, coupling_, width, sums_, t * count * width, current, felt)
        for t in range(T - 1, -1, -1):
            if clusters:
                _couple(
                    grad_current, count, members, clusters, coupling_back_, width, grad_sums_, t * count * width,
                    current, grad_fired,
                )  # fmt: skip
            for tile in range(tiles):
                lo = tile * _TILE
                n = min(_TILE, length - lo)
                _ask_for(grad_spikes_, max(t - 1, 0) * N + start + lo, n)
                _ask_for(grad_x_, t * N + start + lo, n)
                _step_back(
                    grad_spikes_, len(grad_v_seq) > 0, grad_v_seq_, grad_x_, t * N + start + lo, n, state,
                    tile * _STATE, grad_fired, grad_current, lo, record_, (t * tiles + tile) * _RECORD,
                    beta_sums_, beta_mem, beta_syn,
                )  # fmt: skip
        for tile in range(tiles):
            lo, s = tile * _TILE, tile * _STATE
            for d in range(min(_TILE, length - lo) if len(grad_v) else 0):
                grad_v[start + lo + d] = state[s + _GRAD_V + d]
                grad_i[start + lo + d] = grad_current[lo + d]
        for kind in range(2):
            grad_betas[kind] += total(load(beta_sums_, kind * WIDTH))
        beta_sums[:] = 0
        _multiply(grad_sums_, sums_, T * count, clusters, width, coupling_sums_)
        if (block - first) % _TOGETHER == 0 or block == last - 1:
            for c in range(len(coupling_sums)):
                grad_coupling[c] += coupling_sums[c]
                coupling_sums[c] = 0
    for tile in range(tiles):
        lo, s = tile * _TILE, tile * _STATE
        for d in range(min(_TILE, rows * D - lo)):
            grad_threshold[(lo + d) % D] += state[s + _GRAD_THRESHOLD + d]


@njit(parallel=True, **_COMPILE)
def _forward(
    chunks, blocks, rows, x, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, v_reset, refractory_steps,
    keep_v, spikes, v_seq, v_last, i_last, refractory_last, state, buffers, sums, current,
):  # fmt: skip
    for c in prange(chunks):
        _forward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, rows, x, v, i_syn, refractory, threshold,
            beta_mem, beta_syn, coupling, v_reset, refractory_steps, keep_v, spikes, v_seq, v_last, i_last,
            refractory_last, state[c], buffers[c], sums[c], current[c],
        )  # fmt: skip


@njit(parallel=True, **_COMPILE)
def _backward(
    chunks, blocks, rows, grad_spikes, grad_v_seq, grad_v_last, grad_i_last, x, v, i_syn, refractory, threshold,
    beta_mem, beta_syn, coupling, coupling_back, v_reset, refractory_steps, surrogate, alpha, record, state,
    buffers, sums, grad_sums, current, beta_sums, coupling_sums, grad_x, grad_v, grad_i, grad_threshold, grad_betas,
    grad_coupling,
):  # fmt: skip
    for c in prange(chunks):
        _backward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, rows, grad_spikes, grad_v_seq, grad_v_last, grad_i_last,
            x, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, coupling_back, v_reset, refractory_steps,
            surrogate, alpha, record[c], state[c], buffers[c], sums[c], grad_sums[c], current[c], beta_sums[c],
            coupling_sums[c], grad_x, grad_v, grad_i, grad_threshold[c], grad_betas[c], grad_coupling[c],
        )  # fmt: skip


def _deal(n_rows: int, n_features: int, threads: int) -> tuple[int, int, int, int]:
    """Rows of a block, two tiles or more; the blocks that this makes; the chunks of blocks, two for each thread; and the
    tiles of a block.
    """
    rows = max(1, 2 * _TILE // n_features)
    blocks = -(-n_rows // rows)
    return rows, blocks, min(blocks, 2 * threads), -(-rows * n_features // _TILE)


def _array(x: Tensor | None, like: Tensor, *shape: int) -> Any:
    """What Numba sees of a tensor: an array in the dtype of ``like``, of length 0 along every axis where there is none."""
    if x is None:
        return np.empty([0] * len(shape), like.numpy().dtype)
    return x.detach().to(like.dtype).contiguous().view(shape).numpy()


def _width(coupling: Tensor | None) -> int:
    """Clusters, rounded up to whole vectors."""
    return 0 if coupling is None else -(-coupling.shape[0] // WIDTH) * WIDTH


def _coupling(coupling: Tensor | None, like: Tensor) -> Any:
    """``[C, width]``, filled up with zeros."""
    if coupling is None:
        return _array(None, like, 0, 0)
    return _array(
        torch.nn.functional.pad(coupling, (0, _width(coupling) - coupling.shape[0])), like, -1, _width(coupling)
    )


def _scratch(chunks: int, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    """Zeros for every chunk: allocated here, since a thread would pay for fresh pages in every call."""
    return [torch.zeros(chunks, *shape, dtype=dtype).numpy() for shape in shapes]


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
    width = _width(coupling)
    spikes, v_seq = torch.empty(T, N, D, dtype=dtype), torch.empty(T if keep_v else 0, N, D, dtype=dtype)
    v_last, i_last = torch.empty(N, D, dtype=dtype), torch.empty(N, D, dtype=dtype)
    refractory_last = torch.empty(N, D, dtype=torch.int32)
    with as_many_threads_as_torch() as threads:
        rows, blocks, chunks, tiles = _deal(N, D, threads)
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
            _coupling(None if coupling is None else coupling.T, like),
            scalar(v_reset),
            scalar(refractory_steps),
            keep_v,
            spikes.flatten(1).numpy(),
            v_seq.flatten(1).numpy(),
            v_last.flatten().numpy(),
            i_last.flatten().numpy(),
            refractory_last.flatten().numpy(),
            *_scratch(chunks, (tiles * _STATE,), (2, tiles * _TILE + WIDTH), (rows * width,), (width,), dtype=dtype),
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
    C, width = 0 if coupling is None else coupling.shape[0], _width(coupling)
    grad_x = torch.empty(T, N, D, dtype=dtype)
    grad_v, grad_i = (torch.empty(0 if v is None else N, D, dtype=dtype) for _ in range(2))
    with as_many_threads_as_torch() as threads:
        rows, blocks, chunks, tiles = _deal(N, D, threads)
        record = torch.empty(chunks, T, tiles * _RECORD, dtype=dtype)
        shared = grad_threshold, grad_betas, grad_coupling = [
            torch.zeros(chunks, n, dtype=torch.float64) for n in (D, 2, C * width)
        ]
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
            _coupling(None if coupling is None else coupling.T, like),
            _coupling(coupling, like),
            scalar(v_reset),
            scalar(refractory_steps),
            SURROGATE_IDS[surrogate],
            scalar(alpha),
            record.numpy(),
            *_scratch(
                chunks,
                (tiles * _STATE,),
                (4, tiles * _TILE + WIDTH),
                (T * rows * width,),
                (T * rows * width,),
                (width,),
                (2 * WIDTH,),
                (C * width,),
                dtype=dtype,
            ),
            grad_x.flatten(1).numpy(),
            grad_v.flatten().numpy(),
            grad_i.flatten().numpy(),
            *(x.numpy() for x in shared),
        )
    grad_beta_mem, grad_beta_syn = (grad_betas[:, i].sum().to(dtype).reshape(1) for i in range(2))
    return (
        grad_x.to(x.dtype),
        grad_v,
        grad_i,
        grad_threshold.sum(0).to(dtype),
        grad_beta_mem,
        grad_beta_syn,
        grad_coupling.sum(0).to(dtype).view(C, width)[:, :C].contiguous(),
    )
