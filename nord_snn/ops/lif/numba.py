"""The associative LIF neuron on the CPU: Numba kernels that pass over memory once, with rows in parallel.

A block of rows is computed for all time steps while its state stays in the cache. The backward pass recomputes the
block forward and then goes through the steps in reverse. The README of this folder explains the explicit vectors and
pointers.
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
from nord_snn.ops.dispatch import CallSignature, Support
from nord_snn.ops.lif.support import knows_surrogate

__all__ = ["SURROGATE_IDS", "accepts", "backward", "forward"]

#: Surrogates that ``_surrogate_derivative`` implements; names as in :data:`nord_snn.ops.SURROGATES`.
SURROGATE_IDS = {"nord_atan": 0, "atan": 1, "sigmoid": 2, "fast_sigmoid": 3}


def accepts(call: CallSignature) -> Support:
    """Return whether the kernels can run a call."""
    return knows_surrogate(call, SURROGATE_IDS)


_TILE = 512  # neurons per tile: their state fits into the first-level cache
_ROW = _TILE + 16  # not a power of two, multiples of which share the same few sets of the cache
# Offsets in the scratch of a tile: state carried between time steps, then values that the forward sweep saves for the
# backward sweep.
_V, _CURRENT, _REFRACTORY, _THRESHOLD, _GRAD_V, _GRAD_THRESHOLD = range(0, 6 * _ROW, _ROW)
_STATE = 6 * _ROW
_DISTANCE_OR_SLOPE, _V_MINUS_CURRENT, _CURRENT_BEFORE = range(0, 3 * _ROW, _ROW)
_RECORD = 3 * _ROW
_MASKS = _TILE // WIDTH  # bit masks of refractory neurons saved per tile and time step, one bit per neuron
_BLOCKS_PER_SUM = 16  # blocks whose coupling gradients are summed in the kernel's dtype, before the float64 sum


@kernel
def _load_or_zero(has_source, source, at, n, target, offset):
    """Set ``target[offset:] = source[at:]``, or zeros without a source; pad with zeros to whole vectors."""
    zero = broadcast(target, 0)
    for d in range(0, n, WIDTH):
        store(target, offset + d, masked_load(source, at + d, n - d) if has_source else zero)


@kernel
def _step(
    x, spikes, v_seq, at, prefetch_distance, n, state, s, cascade_in, step_spikes, lo, record, q, refractory_masks,
    keep_v, save, v_reset, refractory_steps, beta_mem, beta_syn,
):  # fmt: skip
    """Compute one time step of one tile, see ``reference.py``; ``cascade_in`` is the cascade of the step before.

    Prefetch the next time step, ``prefetch_distance`` elements on: the stride is too large for the hardware prefetcher.
    """
    one, zero, reset, refractory_period = (
        broadcast(x, 1),
        broadcast(x, 0),
        broadcast(x, v_reset),
        broadcast(x, refractory_steps),
    )
    mem_decay, syn_decay = broadcast(x, beta_mem), broadcast(x, beta_syn)
    mem_input_weight = one - mem_decay
    for d in range(0, n, WIDTH):
        prefetch(x, at + prefetch_distance + d)
        before = load(state, s + _CURRENT + d) + load(cascade_in, lo + d)
        current = syn_decay * before + masked_load(x, at + d, n - d)
        v = load(state, s + _V + d)
        refractory = load(state, s + _REFRACTORY + d)
        is_refractory = ge_mask(refractory, one)
        threshold = load(state, s + _THRESHOLD + d)
        u = where(is_refractory, reset, mem_decay * v + mem_input_weight * current)
        distance = u - threshold
        fires = ge_mask(distance, zero)
        spike = where(fires, one, zero)
        after = u - spike * threshold
        store(state, s + _V + d, after)
        store(state, s + _CURRENT + d, current)
        store(state, s + _REFRACTORY + d, where(fires, refractory_period, maximum(refractory - one, zero)))
        store(step_spikes, lo + d, spike)
        if save:
            store(record, q + _DISTANCE_OR_SLOPE + d, distance)
            store(record, q + _V_MINUS_CURRENT + d, v - current)
            store(record, q + _CURRENT_BEFORE + d, before)
            refractory_masks[(lo + d) // WIDTH] = is_refractory
        else:
            prefetch(spikes, at + prefetch_distance + d)
            masked_store(spikes, at + d, n - d, spike)
            if keep_v:
                masked_store(v_seq, at + d, n - d, after)


@kernel
def _step_back(
    grad_spikes, has_grad_v_seq, grad_v_seq, grad_x, at, prefetch_distance, n, state, s, grad_cascade, grad_current,
    lo, record, q, refractory_masks, beta_sums, beta_mem, beta_syn,
):  # fmt: skip
    """Backward of ``_step``; ``grad_cascade`` is the gradient of the spikes through the cascade."""
    mem_decay, syn_decay = broadcast(record, beta_mem), broadcast(record, beta_syn)
    zero, mem_input_weight = broadcast(record, 0), broadcast(record, 1) - mem_decay
    grad_beta_mem, grad_beta_syn = load(beta_sums, 0), load(beta_sums, WIDTH)
    for d in range(0, n, WIDTH):
        prefetch(grad_spikes, at + prefetch_distance + d)
        prefetch(grad_x, at + prefetch_distance + d)
        grad_v = load(state, s + _GRAD_V + d)
        if has_grad_v_seq:
            grad_v = grad_v + masked_load(grad_v_seq, at + d, n - d)
        grad_out = masked_load(grad_spikes, at + d, n - d) + load(grad_cascade, lo + d)
        grad_spike = grad_out - load(state, s + _THRESHOLD + d) * grad_v
        grad_distance = grad_spike * load(record, q + _DISTANCE_OR_SLOPE + d)
        grad_u = where(refractory_masks[(lo + d) // WIDTH], zero, grad_v + grad_distance)
        grad_i = load(grad_current, lo + d) + mem_input_weight * grad_u
        grad_beta_mem = grad_beta_mem + grad_u * load(record, q + _V_MINUS_CURRENT + d)
        grad_beta_syn = grad_beta_syn + grad_i * load(record, q + _CURRENT_BEFORE + d)
        store(state, s + _GRAD_THRESHOLD + d, load(state, s + _GRAD_THRESHOLD + d) - grad_distance)
        store(state, s + _GRAD_V + d, mem_decay * grad_u)
        store(grad_current, lo + d, syn_decay * grad_i)
        masked_store(grad_x, at + d, n - d, grad_i)
    store(beta_sums, 0, grad_beta_mem)
    store(beta_sums, WIDTH, grad_beta_syn)


@kernel
def _surrogate_derivative(surrogate, alpha, record, q, n):
    """Replace membrane minus threshold by the surrogate derivative, in place."""
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
        for d in range(-(-n // WIDTH) * WIDTH):  # up to the end of the last vector, whose padding must be finite
            record[q + d] = np.exp(-abs(alpha * record[q + d]))  # even function: use the side that cannot overflow
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
def _product(sums, at, matrix, c, clusters, width):
    """Return ``sums[at:] @ matrix[:, c:]``, WIDTH columns; four accumulators hide the latency of the FMA."""
    first, second, third, fourth = broadcast(sums, 0), broadcast(sums, 0), broadcast(sums, 0), broadcast(sums, 0)
    n_unrolled = clusters - clusters % 4
    for k in range(0, n_unrolled, 4):
        first = fused(broadcast(sums, sums[at + k]), load(matrix, k * width + c), first)
        second = fused(broadcast(sums, sums[at + k + 1]), load(matrix, (k + 1) * width + c), second)
        third = fused(broadcast(sums, sums[at + k + 2]), load(matrix, (k + 2) * width + c), third)
        fourth = fused(broadcast(sums, sums[at + k + 3]), load(matrix, (k + 3) * width + c), fourth)
    for k in range(n_unrolled, clusters):
        first = fused(broadcast(sums, sums[at + k]), load(matrix, k * width + c), first)
    return (first + second) + (third + fourth)


@kernel
def _couple(source, rows, members, clusters, matrix, width, sums, at, current, target):
    """For each row, sum over the members of each cluster, multiply by ``matrix``, copy the result to all members.

    ``matrix [clusters, width]`` and ``sums [rows, width]`` are padded to whole vectors. Lanes written past the clusters
    of a member are overwritten by the next member; those of the last member are cleared.
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
            store(current, c, _product(sums, out, matrix, c, clusters, width))
        for m in range(members):
            for c in range(0, width, WIDTH):
                store(target, begin + m * clusters + c, load(current, c))
    store(target, rows * members * clusters, broadcast(target, 0))


@kernel
def _add_outer_products(grad_sums, sums, rows, clusters, width, grad_coupling):
    """Add ``grad_sums.T @ sums`` over ``rows`` rows to ``grad_coupling [clusters, width]``, four clusters at a time."""
    n_unrolled = clusters - clusters % 4
    for k in range(0, width, WIDTH):
        for c in range(0, n_unrolled, 4):
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
        for c in range(n_unrolled, clusters):
            product = load(grad_coupling, c * width + k)
            for row in range(0, rows * width, width):
                product = fused(broadcast(sums, grad_sums[row + c]), load(sums, row + k), product)
            store(grad_coupling, c * width + k, product)


@kernel
def _load_state(start, length, tiles, has_state, v, i_syn, refractory, state, cascade_in):
    """Load the initial state of a block of rows, or zeros for rest."""
    for tile in range(tiles):
        lo, s = tile * _TILE, tile * _STATE
        n = min(_TILE, length - lo)
        _load_or_zero(has_state, v, start + lo, n, state, s + _V)
        _load_or_zero(has_state, i_syn, start + lo, n, state, s + _CURRENT)
        _load_or_zero(has_state, refractory, start + lo, n, state, s + _REFRACTORY)
    for d in range(0, tiles * _TILE + WIDTH, WIDTH):
        store(cascade_in, d, broadcast(cascade_in, 0))


@kernel
def _forward_rows(
    first, last, rows, tiles, T, N, D, clusters, width, x, has_state, v, i_syn, refractory, threshold, beta_mem,
    beta_syn, coupling_t, v_reset, refractory_steps, keep_v, spikes, v_seq, v_last, i_last, refractory_last, scratch,
):  # fmt: skip
    """Compute blocks ``first`` to ``last`` of ``rows`` rows each."""
    members, padded_length = D // max(clusters, 1), tiles * _TILE + WIDTH
    nothing = as_pointer(0, np.uint16(0))
    state = scratch
    cascade_in = advance(state, tiles * _STATE)
    step_spikes = advance(cascade_in, padded_length)
    sums = advance(step_spikes, padded_length)
    current = advance(sums, rows * width)
    for d in range(rows * D):
        state[d // _TILE * _STATE + _THRESHOLD + d % _TILE] = threshold[d % D]
    for block in range(first, last):
        start = block * rows * D
        length = min(rows * D, N - start)
        _load_state(start, length, tiles, has_state, v, i_syn, refractory, state, cascade_in)
        for t in range(T):
            # To the next time step, or to the first one of the next block.
            prefetch_distance = N if t < T - 1 else rows * D - (T - 1) * N
            for tile in range(tiles):
                lo = tile * _TILE
                n = min(_TILE, length - lo)
                _step(
                    x, spikes, v_seq, t * N + start + lo, prefetch_distance, n, state, tile * _STATE, cascade_in,
                    step_spikes, lo, state, 0, nothing, keep_v, False, v_reset, refractory_steps, beta_mem, beta_syn,
                )  # fmt: skip
            if clusters:
                _couple(step_spikes, length // D, members, clusters, coupling_t, width, sums, 0, current, cascade_in)
        for tile in range(tiles):
            lo, s = tile * _TILE, tile * _STATE
            n = min(_TILE, length - lo)
            for d in range(0, n, WIDTH):
                masked_store(v_last, start + lo + d, n - d, load(state, s + _V + d))
                masked_store(i_last, start + lo + d, n - d, load(state, s + _CURRENT + d) + load(cascade_in, lo + d))
            for d in range(n):
                refractory_last[start + lo + d] = state[s + _REFRACTORY + d]


@kernel
def _backward_rows(
    first, last, rows, tiles, T, N, D, clusters, width, grad_spikes, has_grad_v_seq, grad_v_seq, has_grad_v_last,
    grad_v_last, has_grad_i_last, grad_i_last, x, has_state, v, i_syn, refractory, threshold, beta_mem, beta_syn,
    coupling_t, coupling, v_reset, refractory_steps, surrogate, alpha, record, refractory_masks, scratch, grad_x,
    grad_v, grad_i, shared,
):  # fmt: skip
    """Compute blocks ``first`` to ``last``; add the gradients of parameters to ``shared``, separate for each chunk.

    ``shared`` has the gradients of the D thresholds, of both decays, and of the coupling, in float64, because these
    sums are long and may nearly cancel. Gradients of the decays are added to it per block, of the coupling per few
    blocks, of the thresholds per chunk.
    """
    members, padded_length = D // max(clusters, 1), tiles * _TILE + WIDTH
    state = scratch
    cascade_in = advance(state, tiles * _STATE)
    step_spikes = advance(cascade_in, padded_length)
    grad_cascade = advance(step_spikes, padded_length)
    grad_current = advance(grad_cascade, padded_length)
    sums = advance(grad_current, padded_length)
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
        _load_state(start, length, tiles, has_state, v, i_syn, refractory, state, cascade_in)
        for tile in range(tiles):
            lo = tile * _TILE
            n = min(_TILE, length - lo)
            _load_or_zero(has_grad_v_last, grad_v_last, start + lo, n, state, tile * _STATE + _GRAD_V)
            _load_or_zero(has_grad_i_last, grad_i_last, start + lo, n, grad_current, lo)
        for t in range(T):
            prefetch_distance = N if t < T - 1 else rows * D - (T - 1) * N
            for tile in range(tiles):
                lo, q = tile * _TILE, (t * tiles + tile) * _RECORD
                n = min(_TILE, length - lo)
                _step(
                    x, x, x, t * N + start + lo, prefetch_distance, n, state, tile * _STATE, cascade_in, step_spikes,
                    lo, record, q, advance(refractory_masks, t * tiles * _MASKS), False, True, v_reset,
                    refractory_steps, beta_mem, beta_syn,
                )  # fmt: skip
                _surrogate_derivative(surrogate, alpha, record, q + _DISTANCE_OR_SLOPE, n)
            if clusters:
                _couple(
                    step_spikes, count, members, clusters, coupling_t, width, sums, t * count * width,
                    current, cascade_in,
                )  # fmt: skip
        for t in range(T - 1, -1, -1):
            if clusters:
                _couple(
                    grad_current, count, members, clusters, coupling, width, grad_sums, t * count * width,
                    current, grad_cascade,
                )  # fmt: skip
            for tile in range(tiles):
                lo = tile * _TILE
                n = min(_TILE, length - lo)
                _step_back(
                    grad_spikes, has_grad_v_seq, grad_v_seq, grad_x, t * N + start + lo, -N if t else 0, n, state,
                    tile * _STATE, grad_cascade, grad_current, lo, record, (t * tiles + tile) * _RECORD,
                    advance(refractory_masks, t * tiles * _MASKS), beta_sums, beta_mem, beta_syn,
                )  # fmt: skip
        for tile in range(tiles if has_state else 0):
            lo, s = tile * _TILE, tile * _STATE
            for d in range(min(_TILE, length - lo)):
                grad_v[start + lo + d] = state[s + _GRAD_V + d]
                grad_i[start + lo + d] = grad_current[lo + d]
        for kind in range(2):
            grad_betas[kind] += reduce_sum(load(beta_sums, kind * WIDTH))
            store(beta_sums, kind * WIDTH, broadcast(beta_sums, 0))
        _add_outer_products(grad_sums, sums, T * count, clusters, width, coupling_sums)
        if (block - first) % _BLOCKS_PER_SUM == 0 or block == last - 1:
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
    coupling_t, v_reset, refractory_steps, keep_v, spikes, v_seq, v_last, i_last, refractory_last, scratch,
    scratch_size,
):  # fmt: skip
    """Run chunks of blocks in parallel. Tensors are addresses, 0 for None; numbers have their element type."""
    like, like_int32 = v_reset, np.int32(0)
    for c in prange(chunks):
        _forward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, rows, tiles, T, N, D, clusters, width,
            as_pointer(x, like), v != 0, as_pointer(v, like), as_pointer(i_syn, like),
            as_pointer(refractory, like), as_pointer(threshold, like), beta_mem, beta_syn,
            as_pointer(coupling_t, like), v_reset, refractory_steps, keep_v, as_pointer(spikes, like),
            as_pointer(v_seq, like), as_pointer(v_last, like), as_pointer(i_last, like),
            as_pointer(refractory_last, like_int32), advance(as_pointer(scratch, like), c * scratch_size),
        )  # fmt: skip


@parallel_kernel
def _backward(
    chunks, blocks, rows, tiles, T, N, D, clusters, width, grad_spikes, grad_v_seq, grad_v_last, grad_i_last, x, v,
    i_syn, refractory, threshold, beta_mem, beta_syn, coupling_t, coupling, v_reset, refractory_steps, surrogate,
    alpha, record, refractory_masks, scratch, scratch_size, grad_x, grad_v, grad_i, shared,
):  # fmt: skip
    like, like_uint16, like_float64 = v_reset, np.uint16(0), np.float64(0)
    shared_size = D + 2 + clusters * width
    for c in prange(chunks):
        _backward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, rows, tiles, T, N, D, clusters, width,
            as_pointer(grad_spikes, like), grad_v_seq != 0, as_pointer(grad_v_seq, like), grad_v_last != 0,
            as_pointer(grad_v_last, like), grad_i_last != 0, as_pointer(grad_i_last, like), as_pointer(x, like),
            v != 0, as_pointer(v, like), as_pointer(i_syn, like), as_pointer(refractory, like),
            as_pointer(threshold, like), beta_mem, beta_syn, as_pointer(coupling_t, like),
            as_pointer(coupling, like), v_reset, refractory_steps, surrogate, alpha,
            advance(as_pointer(record, like), c * T * tiles * _RECORD),
            advance(as_pointer(refractory_masks, like_uint16), c * T * tiles * _MASKS),
            advance(as_pointer(scratch, like), c * scratch_size), as_pointer(grad_x, like),
            as_pointer(grad_v, like), as_pointer(grad_i, like),
            advance(as_pointer(shared, like_float64), c * shared_size),
        )  # fmt: skip


def _call_sizes(x: Tensor, coupling: Tensor | None, threads: int) -> tuple[int, ...]:
    """Return the sizes of a call, in the order of the kernel arguments.

    These are chunks (two per thread), blocks, rows per block (as many as fill a tile), tiles per block, time steps T,
    neurons N * D, features D, clusters C, and C rounded up to whole vectors.
    """
    T, N, D = x.shape
    rows = max(1, _TILE // D)
    blocks = -(-N // rows)
    C = 0 if coupling is None else coupling.shape[0]
    return min(blocks, 2 * threads), blocks, rows, -(-rows * D // _TILE), T, N * D, D, C, -(-C // WIDTH) * WIDTH


def _contiguous_inputs(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else as_contiguous(x, dtype) for x in tensors]


def _padded(coupling: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the coupling padded with zeros to ``[C, width]``."""
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
    """Return spikes, membranes (empty unless ``keep_v``) and the last state; arguments as in ``op.py``."""
    T, N, D = x.shape
    dtype = compute_dtype(x)
    scalar_type = NUMPY_TYPES[dtype]
    spikes, v_seq = torch.empty(T, N, D, dtype=dtype), torch.empty(T if keep_v else 0, N, D, dtype=dtype)
    v_last, i_last = torch.empty(N, D, dtype=dtype), torch.empty(N, D, dtype=dtype)
    refractory_last = torch.empty(N, D, dtype=torch.int32)
    inputs = _contiguous_inputs(x, v, i_syn, refractory, threshold, dtype=dtype)
    coupling_t = None if coupling is None else _padded(coupling.T, dtype)
    with as_many_threads_as_torch() as threads:
        sizes = chunks, _, rows, tiles, *_, width = _call_sizes(x, coupling, threads)
        # Allocated here: memory allocated in the threads causes page faults in every call.
        scratch = torch.zeros(chunks, tiles * _STATE + 2 * (tiles * _TILE + WIDTH) + (rows + 1) * width, dtype=dtype)
        _forward(
            *sizes,
            *map(data_pointer, inputs),
            scalar_type(beta_mem.item()),
            scalar_type(beta_syn.item()),
            data_pointer(coupling_t),
            scalar_type(v_reset),
            scalar_type(refractory_steps),
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
    """Return the gradients of x, v and i_syn (empty without a state), threshold, both betas, coupling (or empty)."""
    T, N, D = x.shape
    dtype = compute_dtype(x)
    scalar_type = NUMPY_TYPES[dtype]
    grad_x = torch.empty(T, N, D, dtype=dtype)
    grad_v, grad_i = (torch.empty(0 if v is None else N, D, dtype=dtype) for _ in range(2))
    inputs = _contiguous_inputs(
        grad_spikes, grad_v_seq, grad_v_last, grad_i_last, x, v, i_syn, refractory, threshold, dtype=dtype
    )
    coupling_t, padded_coupling = None if coupling is None else _padded(coupling.T, dtype), _padded(coupling, dtype)
    with as_many_threads_as_torch() as threads:
        sizes = chunks, _, rows, tiles, *_, C, width = _call_sizes(x, coupling, threads)
        record = torch.empty(chunks, T * tiles * _RECORD, dtype=dtype)
        refractory_masks = torch.empty(chunks, T * tiles * _MASKS, dtype=torch.int16)
        scratch_size = tiles * _STATE + 4 * (tiles * _TILE + WIDTH) + 2 * T * rows * width + (C + 1) * width + 2 * WIDTH
        scratch = torch.zeros(chunks, scratch_size, dtype=dtype)
        shared = torch.zeros(chunks, D + 2 + C * width, dtype=torch.float64)
        _backward(
            *sizes,
            *map(data_pointer, inputs),
            scalar_type(beta_mem.item()),
            scalar_type(beta_syn.item()),
            data_pointer(coupling_t),
            data_pointer(padded_coupling),
            scalar_type(v_reset),
            scalar_type(refractory_steps),
            SURROGATE_IDS[surrogate],
            scalar_type(alpha),
            *map(data_pointer, (record, refractory_masks, scratch)),
            scratch_size,
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
