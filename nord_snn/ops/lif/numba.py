"""The associative LIF neuron on the CPU: Numba kernels that pass over memory once, rows in parallel.

A block of rows walks through all time steps while its state stays in the cache; the backward pass walks there again and
then back. Why the loops are written sixteen neurons at a time, and with pointers, the README of this folder says.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from nord_snn.ops._numba.compiling import kernel, parallel_kernel
from nord_snn.ops._numba.simd import (
    WIDTH,
    advance,
    as_pointer,
    broadcast,
    fused,
    ge_mask,
    load,
    masked_load,
    masked_store,
    maximum,
    prefetch,
    reduce_sum,
    store,
    where,
)
from nord_snn.ops._numba.tensors import NUMPY_TYPES, as_contiguous, data_pointer
from nord_snn.ops._numba.threads import as_many_threads_as_torch
from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.dispatch import Call, Support
from nord_snn.ops.lif.support import knows_surrogate

__all__ = ["SURROGATE_IDS", "accepts", "backward", "forward"]

#: The rows of :data:`nord_snn.ops.SURROGATES` that ``_slopes`` knows.
SURROGATE_IDS = {"nord_atan": 0, "atan": 1, "sigmoid": 2, "fast_sigmoid": 3}


def accepts(call: Call) -> Support:
    """Return whether the kernels can run a call."""
    return knows_surrogate(call, SURROGATE_IDS)


_TILE = 512  # neurons that one loop handles: their state fits into the first-level cache
_ROW = _TILE + 16  # a little off the powers of two, whose multiples share the same few sets of the cache
# What a tile carries from step to step, and what the way there records for the way back.
_V, _CURRENT, _REFRACTORY, _THRESHOLD, _GRAD_V, _GRAD_THRESHOLD = range(0, 6 * _ROW, _ROW)
_STATE = 6 * _ROW
_SLOPE, _PULL, _CURRENT_BEFORE = range(0, 3 * _ROW, _ROW)
_RECORD = 3 * _ROW
_HELD = _TILE // WIDTH  # and, of each vector, which neurons were held: one bit a neuron
_TOGETHER = (
    16  # blocks whose share of the coupling's gradient, which may be large, is added up in the kernel's own dtype
)


@kernel
def _read(given, source, at, n, target, offset):
    """``target[offset:] = source[at:]``, or zeros where nothing is given; zeros also up to the end of the last vector."""
    zero = broadcast(target, 0)
    for d in range(0, n, WIDTH):
        store(target, offset + d, masked_load(source, at + d, n - d) if given else zero)


@kernel
def _step(
    x, spikes, v_seq, at, ahead, n, state, s, felt, fired, lo, record, q, held, keep_v, keep, v_reset, refractory_steps,
    beta_mem, beta_syn,
):  # fmt: skip
    """One time step of one tile: the equations of ``reference.py``, the cascade of the step before in ``felt``.

    What is needed next, ``ahead`` of this, is fetched meanwhile: every time step lies elsewhere, which no cache guesses.
    """
    one, zero, reset, rest = broadcast(x, 1), broadcast(x, 0), broadcast(x, v_reset), broadcast(x, refractory_steps)
    keeps_v, keeps_i = broadcast(x, beta_mem), broadcast(x, beta_syn)
    lets_in = one - keeps_v
    for d in range(0, n, WIDTH):
        prefetch(x, at + ahead + d)
        before = load(state, s + _CURRENT + d) + load(felt, lo + d)
        current = keeps_i * before + masked_load(x, at + d, n - d)
        v = load(state, s + _V + d)
        refractory = load(state, s + _REFRACTORY + d)
        resting = ge_mask(refractory, one)
        threshold = load(state, s + _THRESHOLD + d)
        u = where(resting, reset, keeps_v * v + lets_in * current)
        distance = u - threshold
        fires = ge_mask(distance, zero)
        spike = where(fires, one, zero)
        after = u - spike * threshold
        store(state, s + _V + d, after)
        store(state, s + _CURRENT + d, current)
        store(state, s + _REFRACTORY + d, where(fires, rest, maximum(refractory - one, zero)))
        store(fired, lo + d, spike)
        if keep:
            store(record, q + _SLOPE + d, distance)
            store(record, q + _PULL + d, v - current)
            store(record, q + _CURRENT_BEFORE + d, before)
            held[(lo + d) // WIDTH] = resting
        else:
            prefetch(spikes, at + ahead + d)
            masked_store(spikes, at + d, n - d, spike)
            if keep_v:
                masked_store(v_seq, at + d, n - d, after)


@kernel
def _step_back(
    grad_spikes, given_v_seq, grad_v_seq, grad_x, at, ahead, n, state, s, grad_fired, grad_current, lo, record, q, held,
    beta_sums, beta_mem, beta_syn,
):  # fmt: skip
    """The same step backwards; the cascade's part comes in as ``grad_fired``."""
    keeps_v, keeps_i = broadcast(record, beta_mem), broadcast(record, beta_syn)
    zero, lets_in = broadcast(record, 0), broadcast(record, 1) - keeps_v
    grad_beta_mem, grad_beta_syn = load(beta_sums, 0), load(beta_sums, WIDTH)
    for d in range(0, n, WIDTH):
        prefetch(grad_spikes, at + ahead + d)
        prefetch(grad_x, at + ahead + d)
        grad_v = load(state, s + _GRAD_V + d)
        if given_v_seq:
            grad_v = grad_v + masked_load(grad_v_seq, at + d, n - d)
        from_above = masked_load(grad_spikes, at + d, n - d) + load(grad_fired, lo + d)
        grad_spike = from_above - load(state, s + _THRESHOLD + d) * grad_v
        through = grad_spike * load(record, q + _SLOPE + d)
        grad_u = where(held[(lo + d) // WIDTH], zero, grad_v + through)
        grad_i = load(grad_current, lo + d) + lets_in * grad_u
        grad_beta_mem = grad_beta_mem + grad_u * load(record, q + _PULL + d)
        grad_beta_syn = grad_beta_syn + grad_i * load(record, q + _CURRENT_BEFORE + d)
        store(state, s + _GRAD_THRESHOLD + d, load(state, s + _GRAD_THRESHOLD + d) - through)
        store(state, s + _GRAD_V + d, keeps_v * grad_u)
        store(grad_current, lo + d, keeps_i * grad_i)
        masked_store(grad_x, at + d, n - d, grad_i)
    store(beta_sums, 0, grad_beta_mem)
    store(beta_sums, WIDTH, grad_beta_syn)


@kernel
def _slopes(surrogate, alpha, record, q, n):
    """Surrogate derivative in place of membrane minus threshold."""
    one, zero = broadcast(record, 1), broadcast(record, 0)
    if surrogate == 0:
        scale, peak = broadcast(record, alpha), broadcast(record, alpha / (2 * np.pi))
        for d in range(0, n, WIDTH):
            z = scale * load(record, q + d)
            store(record, q + d, peak / (one + z * z))
    elif surrogate == 1:
        scale, peak = broadcast(record, alpha * np.pi / 2), broadcast(record, alpha / 2)
        for d in range(0, n, WIDTH):
            z = scale * load(record, q + d)
            store(record, q + d, peak / (one + z * z))
    elif surrogate == 2:
        for d in range(-(-n // WIDTH) * WIDTH):  # to the end of the last vector, whose rest must be finite
            record[q + d] = np.exp(-abs(alpha * record[q + d]))  # an even function: the side that cannot overflow
        for d in range(0, n, WIDTH):
            z = load(record, q + d)
            store(record, q + d, broadcast(record, alpha) * z / ((one + z) * (one + z)))
    else:
        scale = broadcast(record, alpha)
        for d in range(0, n, WIDTH):
            distance = load(record, q + d)
            z = one + scale * maximum(distance, zero - distance)
            store(record, q + d, one / (z * z))


@kernel
def _product(sums, at, coupling, c, clusters, width):
    """``sums[at:] @ coupling[:, c:]`` for WIDTH columns; four sums, since one would wait for itself."""
    first, second, third, fourth = broadcast(sums, 0), broadcast(sums, 0), broadcast(sums, 0), broadcast(sums, 0)
    fours = clusters - clusters % 4
    for k in range(0, fours, 4):
        first = fused(broadcast(sums, sums[at + k]), load(coupling, k * width + c), first)
        second = fused(broadcast(sums, sums[at + k + 1]), load(coupling, (k + 1) * width + c), second)
        third = fused(broadcast(sums, sums[at + k + 2]), load(coupling, (k + 2) * width + c), third)
        fourth = fused(broadcast(sums, sums[at + k + 3]), load(coupling, (k + 3) * width + c), fourth)
    for k in range(fours, clusters):
        first = fused(broadcast(sums, sums[at + k]), load(coupling, k * width + c), first)
    return (first + second) + (third + fourth)


@kernel
def _couple(source, rows, members, clusters, coupling, width, sums, at, current, target):
    """Per row: the sums over the members of each cluster, ``sums @ coupling``, and that to every member of each cluster.

    ``coupling [clusters, width]`` and ``sums [rows, width]`` are padded to whole vectors. What a vector writes beyond a
    member's clusters is overwritten by the next, and what the last one leaves is cleared.
    """
    for row in range(rows):
        begin, out = row * members * clusters, at + row * width
        for c in range(0, width, WIDTH):
            even, odd = broadcast(sums, 0), broadcast(sums, 0)
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
    store(target, rows * members * clusters, broadcast(target, 0))


@kernel
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
                first = fused(broadcast(sums, grad_sums[row + c]), sums_of_row, first)
                second = fused(broadcast(sums, grad_sums[row + c + 1]), sums_of_row, second)
                third = fused(broadcast(sums, grad_sums[row + c + 2]), sums_of_row, third)
                fourth = fused(broadcast(sums, grad_sums[row + c + 3]), sums_of_row, fourth)
            store(grad_coupling, at, first)
            store(grad_coupling, at + width, second)
            store(grad_coupling, at + 2 * width, third)
            store(grad_coupling, at + 3 * width, fourth)
        for c in range(fours, clusters):
            product = load(grad_coupling, c * width + k)
            for row in range(0, rows * width, width):
                product = fused(broadcast(sums, grad_sums[row + c]), load(sums, row + k), product)
            store(grad_coupling, c * width + k, product)


@kernel
def _begin(start, length, tiles, given, v, i_syn, refractory, state, felt):
    """The state that a block of rows starts from: rest, where none is given."""
    for tile in range(tiles):
        lo, s = tile * _TILE, tile * _STATE
        n = min(_TILE, length - lo)
        _read(given, v, start + lo, n, state, s + _V)
        _read(given, i_syn, start + lo, n, state, s + _CURRENT)
        _read(given, refractory, start + lo, n, state, s + _REFRACTORY)
    for d in range(0, tiles * _TILE + WIDTH, WIDTH):
        store(felt, d, broadcast(felt, 0))


@kernel
def _forward_rows(
    first, last, rows, tiles, T, N, D, clusters, width, x, given, v, i_syn, refractory, threshold, beta_mem, beta_syn,
    coupling, v_reset, refractory_steps, keep_v, spikes, v_seq, v_last, i_last, refractory_last, scratch,
):  # fmt: skip
    """Blocks ``first`` to ``last`` of ``rows`` rows each."""
    members, reach = D // max(clusters, 1), tiles * _TILE + WIDTH
    nothing = as_pointer(0, np.uint16(0))
    state = scratch
    felt = advance(state, tiles * _STATE)
    fired = advance(felt, reach)
    sums = advance(fired, reach)
    current = advance(sums, rows * width)
    for d in range(rows * D):
        state[d // _TILE * _STATE + _THRESHOLD + d % _TILE] = threshold[d % D]
    for block in range(first, last):
        start = block * rows * D
        length = min(rows * D, N - start)
        _begin(start, length, tiles, given, v, i_syn, refractory, state, felt)
        for t in range(T):
            ahead = N if t < T - 1 else rows * D - (T - 1) * N  # the next step, or the first of the next block
            for tile in range(tiles):
                lo = tile * _TILE
                n = min(_TILE, length - lo)
                _step(
                    x, spikes, v_seq, t * N + start + lo, ahead, n, state, tile * _STATE, felt, fired, lo, state, 0,
                    nothing, keep_v, False, v_reset, refractory_steps, beta_mem, beta_syn,
                )  # fmt: skip
            if clusters:
                _couple(fired, length // D, members, clusters, coupling, width, sums, 0, current, felt)
        for tile in range(tiles):
            lo, s = tile * _TILE, tile * _STATE
            n = min(_TILE, length - lo)
            for d in range(0, n, WIDTH):
                masked_store(v_last, start + lo + d, n - d, load(state, s + _V + d))
                masked_store(i_last, start + lo + d, n - d, load(state, s + _CURRENT + d) + load(felt, lo + d))
            for d in range(n):
                refractory_last[start + lo + d] = state[s + _REFRACTORY + d]


@kernel
def _backward_rows(
    first, last, rows, tiles, T, N, D, clusters, width, grad_spikes, given_v_seq, grad_v_seq, given_v_last, grad_v_last,
    given_i_last, grad_i_last, x, given, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, coupling_back,
    v_reset, refractory_steps, surrogate, alpha, record, held, scratch, grad_x, grad_v, grad_i, shared,
):  # fmt: skip
    """Blocks ``first`` to ``last``; gradients of what all rows share are summed into this chunk's own part.

    ``shared``: of the D thresholds, of both decays, and of the coupling. Such a sum is long and may nearly cancel: of the
    decays and the coupling, the shares of a block, or of a few, are added up in float64; of a threshold, those of a chunk.
    """
    members, reach = D // max(clusters, 1), tiles * _TILE + WIDTH
    state = scratch
    felt = advance(state, tiles * _STATE)
    fired = advance(felt, reach)
    grad_fired = advance(fired, reach)
    grad_current = advance(grad_fired, reach)
    sums = advance(grad_current, reach)
    grad_sums = advance(sums, T * rows * width)
    current = advance(grad_sums, T * rows * width)
    beta_sums = advance(current, width)
    coupling_sums = advance(beta_sums, 2 * WIDTH)
    grad_threshold, grad_betas, grad_coupling = shared, advance(shared, D), advance(shared, D + 2)
    for d in range(rows * D):
        state[d // _TILE * _STATE + _THRESHOLD + d % _TILE] = threshold[d % D]
    for block in range(first, last):
        start = block * rows * D
        length = min(rows * D, N - start)
        count = length // D
        _begin(start, length, tiles, given, v, i_syn, refractory, state, felt)
        for tile in range(tiles):
            lo = tile * _TILE
            n = min(_TILE, length - lo)
            _read(given_v_last, grad_v_last, start + lo, n, state, tile * _STATE + _GRAD_V)
            _read(given_i_last, grad_i_last, start + lo, n, grad_current, lo)
        for t in range(T):
            ahead = N if t < T - 1 else rows * D - (T - 1) * N
            for tile in range(tiles):
                lo, q = tile * _TILE, (t * tiles + tile) * _RECORD
                n = min(_TILE, length - lo)
                _step(
                    x, x, x, t * N + start + lo, ahead, n, state, tile * _STATE, felt, fired, lo, record, q,
                    advance(held, t * tiles * _HELD), False, True, v_reset, refractory_steps, beta_mem, beta_syn,
                )  # fmt: skip
                _slopes(surrogate, alpha, record, q + _SLOPE, n)
            if clusters:
                _couple(fired, count, members, clusters, coupling, width, sums, t * count * width, current, felt)
        for t in range(T - 1, -1, -1):
            if clusters:
                _couple(
                    grad_current, count, members, clusters, coupling_back, width, grad_sums, t * count * width,
                    current, grad_fired,
                )  # fmt: skip
            for tile in range(tiles):
                lo = tile * _TILE
                n = min(_TILE, length - lo)
                _step_back(
                    grad_spikes, given_v_seq, grad_v_seq, grad_x, t * N + start + lo, -N if t else 0, n, state,
                    tile * _STATE, grad_fired, grad_current, lo, record, (t * tiles + tile) * _RECORD,
                    advance(held, t * tiles * _HELD), beta_sums, beta_mem, beta_syn,
                )  # fmt: skip
        for tile in range(tiles if given else 0):
            lo, s = tile * _TILE, tile * _STATE
            for d in range(min(_TILE, length - lo)):
                grad_v[start + lo + d] = state[s + _GRAD_V + d]
                grad_i[start + lo + d] = grad_current[lo + d]
        for kind in range(2):
            grad_betas[kind] += reduce_sum(load(beta_sums, kind * WIDTH))
            store(beta_sums, kind * WIDTH, broadcast(beta_sums, 0))
        _multiply(grad_sums, sums, T * count, clusters, width, coupling_sums)
        if (block - first) % _TOGETHER == 0 or block == last - 1:
            for c in range(clusters * width):
                grad_coupling[c] += coupling_sums[c]
                coupling_sums[c] = 0
    for tile in range(tiles):
        lo, s = tile * _TILE, tile * _STATE
        for d in range(min(_TILE, rows * D - lo)):
            grad_threshold[(lo + d) % D] += state[s + _GRAD_THRESHOLD + d]


@parallel_kernel
def _forward(
    chunks, blocks, rows, tiles, T, N, D, clusters, width, x, v, i_syn, refractory, threshold, beta_mem, beta_syn,
    coupling, v_reset, refractory_steps, keep_v, spikes, v_seq, v_last, i_last, refractory_last, scratch, own,
):  # fmt: skip
    """Tensors are addresses, 0 where there is none; ``v_reset``, and every other number, is of the type that lies there."""
    like, integer = v_reset, np.int32(0)
    for c in prange(chunks):
        _forward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, rows, tiles, T, N, D, clusters, width,
            as_pointer(x, like), v != 0, as_pointer(v, like), as_pointer(i_syn, like), as_pointer(refractory, like),
            as_pointer(threshold, like), beta_mem, beta_syn, as_pointer(coupling, like), v_reset, refractory_steps,
            keep_v, as_pointer(spikes, like), as_pointer(v_seq, like), as_pointer(v_last, like),
            as_pointer(i_last, like), as_pointer(refractory_last, integer), advance(as_pointer(scratch, like), c * own),
        )  # fmt: skip


@parallel_kernel
def _backward(
    chunks, blocks, rows, tiles, T, N, D, clusters, width, grad_spikes, grad_v_seq, grad_v_last, grad_i_last, x, v,
    i_syn, refractory, threshold, beta_mem, beta_syn, coupling, coupling_back, v_reset, refractory_steps, surrogate,
    alpha, record, held, scratch, own, grad_x, grad_v, grad_i, shared,
):  # fmt: skip
    like, bits, wide = v_reset, np.uint16(0), np.float64(0)
    summed = D + 2 + clusters * width
    for c in prange(chunks):
        _backward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, rows, tiles, T, N, D, clusters, width,
            as_pointer(grad_spikes, like), grad_v_seq != 0, as_pointer(grad_v_seq, like), grad_v_last != 0,
            as_pointer(grad_v_last, like), grad_i_last != 0, as_pointer(grad_i_last, like), as_pointer(x, like),
            v != 0, as_pointer(v, like), as_pointer(i_syn, like), as_pointer(refractory, like),
            as_pointer(threshold, like), beta_mem, beta_syn, as_pointer(coupling, like),
            as_pointer(coupling_back, like), v_reset, refractory_steps, surrogate, alpha,
            advance(as_pointer(record, like), c * T * tiles * _RECORD),
            advance(as_pointer(held, bits), c * T * tiles * _HELD), advance(as_pointer(scratch, like), c * own),
            as_pointer(grad_x, like), as_pointer(grad_v, like), as_pointer(grad_i, like),
            advance(as_pointer(shared, wide), c * summed),
        )  # fmt: skip


def _sizes(x: Tensor, coupling: Tensor | None, threads: int) -> tuple[int, ...]:
    """Chunks of blocks, two for each thread; blocks of rows; rows of a block, as many as fill a tile; tiles of a block; steps;
    neurons; features; clusters, and the same rounded up to whole vectors.
    """
    T, N, D = x.shape
    rows = max(1, _TILE // D)
    blocks = -(-N // rows)
    C = 0 if coupling is None else coupling.shape[0]
    return min(blocks, 2 * threads), blocks, rows, -(-rows * D // _TILE), T, N * D, D, C, -(-C // WIDTH) * WIDTH


def _ready(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else as_contiguous(x, dtype) for x in tensors]


def _padded(coupling: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``[C, width]``, filled up with zeros."""
    if coupling is None:
        return None
    missing = -coupling.shape[0] % WIDTH
    return as_contiguous(torch.nn.functional.pad(coupling, (0, missing)) if missing else coupling, dtype)


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
    """Spikes, membranes (empty unless ``keep_v``) and the last state; the arguments are those of the op in ``op.py``."""
    T, N, D = x.shape
    dtype = compute_dtype(x)
    number = NUMPY_TYPES[dtype]
    spikes, v_seq = torch.empty(T, N, D, dtype=dtype), torch.empty(T if keep_v else 0, N, D, dtype=dtype)
    v_last, i_last = torch.empty(N, D, dtype=dtype), torch.empty(N, D, dtype=dtype)
    refractory_last = torch.empty(N, D, dtype=torch.int32)
    given = _ready(x, v, i_syn, refractory, threshold, dtype=dtype)
    ahead = None if coupling is None else _padded(coupling.T, dtype)
    with as_many_threads_as_torch() as threads:
        sizes = chunks, _, rows, tiles, *_, width = _sizes(x, coupling, threads)
        # Allocated here, since a thread would pay for fresh pages in every call.
        scratch = torch.zeros(chunks, tiles * _STATE + 2 * (tiles * _TILE + WIDTH) + (rows + 1) * width, dtype=dtype)
        _forward(
            *sizes,
            *map(data_pointer, given),
            number(beta_mem.item()),
            number(beta_syn.item()),
            data_pointer(ahead),
            number(v_reset),
            number(refractory_steps),
            keep_v,
            *map(data_pointer, (spikes, v_seq, v_last, i_last, refractory_last, scratch)),
            scratch.shape[1],
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
    number = NUMPY_TYPES[dtype]
    grad_x = torch.empty(T, N, D, dtype=dtype)
    grad_v, grad_i = (torch.empty(0 if v is None else N, D, dtype=dtype) for _ in range(2))
    given = _ready(grad_spikes, grad_v_seq, grad_v_last, grad_i_last, x, v, i_syn, refractory, threshold, dtype=dtype)
    ahead, back = None if coupling is None else _padded(coupling.T, dtype), _padded(coupling, dtype)
    with as_many_threads_as_torch() as threads:
        sizes = chunks, _, rows, tiles, *_, C, width = _sizes(x, coupling, threads)
        record = torch.empty(chunks, T * tiles * _RECORD, dtype=dtype)
        held = torch.empty(chunks, T * tiles * _HELD, dtype=torch.int16)
        of_a_chunk = tiles * _STATE + 4 * (tiles * _TILE + WIDTH) + 2 * T * rows * width + (C + 1) * width + 2 * WIDTH
        scratch = torch.zeros(chunks, of_a_chunk, dtype=dtype)
        shared = torch.zeros(chunks, D + 2 + C * width, dtype=torch.float64)
        _backward(
            *sizes,
            *map(data_pointer, given),
            number(beta_mem.item()),
            number(beta_syn.item()),
            data_pointer(ahead),
            data_pointer(back),
            number(v_reset),
            number(refractory_steps),
            SURROGATE_IDS[surrogate],
            number(alpha),
            *map(data_pointer, (record, held, scratch)),
            of_a_chunk,
            *map(data_pointer, (grad_x, grad_v, grad_i, shared)),
        )
    sums = shared.sum(0)
    grad_threshold, grad_beta_mem, grad_beta_syn, grad_coupling = (
        part.to(dtype, copy=True) for part in sums.split((D, 1, 1, C * width))
    )
    return (
        grad_x.to(x.dtype),
        grad_v,
        grad_i,
        grad_threshold,
        grad_beta_mem,
        grad_beta_syn,
        grad_coupling.view(C, width)[:, :C].contiguous(),
    )
