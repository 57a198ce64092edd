"""The associative LIF neuron on the CPU: Numba kernels that pass over memory once, with rows in parallel.

A block of rows is computed for all time steps while its state stays in the cache. The backward pass recomputes the
block forward and then goes through the steps in reverse. The README of this folder explains the explicit vectors and
pointers.
"""

from typing import Any, NamedTuple

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
from nord_snn.ops._numba.tensors import NUMPY_TYPES, addresses, as_contiguous, data_pointer
from nord_snn.ops._numba.threads import as_many_threads_as_torch
from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.dispatch import CallSignature, Support
from nord_snn.ops.lif.support import Arguments, OutputGradients, supports_surrogate

__all__ = ["SURROGATE_IDS", "accepts", "backward", "forward"]

#: Surrogates that ``_surrogate_derivative`` implements; names as in :data:`nord_snn.ops.SURROGATES`.
SURROGATE_IDS = {"nord_atan": 0, "atan": 1, "sigmoid": 2, "fast_sigmoid": 3}


def accepts(call: CallSignature) -> Support:
    """Return whether the kernels can run a call."""
    return supports_surrogate(call, SURROGATE_IDS)


_TILE = 512  # neurons per tile: their state fits into the first-level cache
_ROW = _TILE + 16  # not a power of two: rows at multiples of a power of two share few sets of the cache
# Offsets in the scratch of a tile: state carried between time steps, then values that the forward sweep saves for the
# backward sweep.
_V, _CURRENT, _REFRACTORY, _THRESHOLD, _GRAD_V, _GRAD_THRESHOLD = range(0, 6 * _ROW, _ROW)
_STATE = 6 * _ROW
_DISTANCE_OR_SLOPE, _V_MINUS_CURRENT, _CURRENT_BEFORE = range(0, 3 * _ROW, _ROW)
_RECORD = 3 * _ROW
_MASKS = _TILE // WIDTH  # bit masks of refractory neurons saved per tile and time step, one bit per neuron
_BLOCKS_PER_SUM = 16  # blocks whose coupling gradients are summed in the kernel's dtype, before the float64 sum


class _Sizes(NamedTuple):
    """Sizes of a call.

    Attributes:
        chunks: parts of the work, two per thread.
        blocks: blocks of rows.
        rows: rows per block, as many as fill a tile.
        tiles: tiles per block.
        T: time steps.
        N: neurons of all rows, N * D.
        D: neurons of a row.
        clusters: clusters C, 0 without a cascade.
        width: C rounded up to whole vectors.
    """

    chunks: int
    blocks: int
    rows: int
    tiles: int
    T: int
    N: int
    D: int
    clusters: int
    width: int


class _Constants(NamedTuple):
    """Numbers of a call, in the type that the kernels compute in."""

    beta_mem: Any
    beta_syn: Any
    v_reset: Any
    refractory_steps: Any


class _Inputs(NamedTuple):
    """Addresses of the inputs, 0 for None; both couplings are ``[C, width]``."""

    x: int
    v: int
    i_syn: int
    refractory: int
    threshold: int
    coupling: int
    coupling_t: int


class _Outputs(NamedTuple):
    """Addresses of the outputs."""

    spikes: int
    v_seq: int
    v_last: int
    i_last: int
    refractory_last: int


class _OutputGradients(NamedTuple):
    """Addresses of the gradients of the outputs, 0 for None."""

    spikes: int
    v_seq: int
    v_last: int
    i_last: int


class _Gradients(NamedTuple):
    """Addresses of the gradients of x and of the initial state, and of the sums ``shared`` of each chunk."""

    x: int
    v: int
    i_syn: int
    shared: int


class _Block(NamedTuple):
    """Scratch memory of a block of rows.

    Attributes:
        state: state of each tile between time steps.
        cascade_in: current that the cascade adds in the next time step.
        step_spikes: spikes of the current time step.
        record: values of every time step that the backward sweep needs.
        refractory_masks: bit masks of refractory neurons of every time step.
    """

    state: Any
    cascade_in: Any
    step_spikes: Any
    record: Any
    refractory_masks: Any


class _Tile(NamedTuple):
    """One tile at one time step.

    Attributes:
        at: its first neuron in x and in the outputs.
        next_step: distance to the same neuron at the time step that comes next, for prefetching.
        n: number of neurons.
        first: its first neuron in the block.
        state: its state in ``_Block.state``.
        record: its values in ``_Block.record``.
        masks: the time step's masks in ``_Block.refractory_masks``.
    """

    at: int
    next_step: int
    n: int
    first: int
    state: int
    record: int
    masks: int


@kernel
def _load_or_zero(has_source, source, at, n, target, offset):
    """Set ``target[offset:] = source[at:]``, or zeros without a source; pad with zeros to whole vectors."""
    zero = broadcast(target, 0)
    for d in range(0, n, WIDTH):
        store(target, offset + d, masked_load(source, at + d, n - d) if has_source else zero)


@kernel
def _step(x, spikes, v_seq, keep_v, save, tile, block, constants):
    """Compute one time step of one tile, see ``reference.py``.

    With ``save``, write what the backward sweep needs instead of the outputs. Prefetch the next time step: the stride
    is too large for the hardware prefetcher.
    """
    at, next_step, n, lo, s, q, masks = tile
    state, cascade_in, step_spikes, record, refractory_masks = block
    one, zero, reset, refractory_period = (
        broadcast(x, 1),
        broadcast(x, 0),
        broadcast(x, constants.v_reset),
        broadcast(x, constants.refractory_steps),
    )
    mem_decay, syn_decay = broadcast(x, constants.beta_mem), broadcast(x, constants.beta_syn)
    mem_input_weight = one - mem_decay
    for d in range(0, n, WIDTH):
        prefetch(x, at + next_step + d)
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
            refractory_masks[masks + (lo + d) // WIDTH] = is_refractory
        else:
            prefetch(spikes, at + next_step + d)
            masked_store(spikes, at + d, n - d, spike)
            if keep_v:
                masked_store(v_seq, at + d, n - d, after)


@kernel
def _step_back(
    grad_spikes, has_grad_v_seq, grad_v_seq, grad_x, grad_cascade, grad_current, beta_sums, tile, block, constants
):
    """Backward of ``_step``; ``grad_cascade`` is the gradient of the spikes through the cascade."""
    at, next_step, n, lo, s, q, masks = tile
    state, _, _, record, refractory_masks = block
    mem_decay, syn_decay = broadcast(record, constants.beta_mem), broadcast(record, constants.beta_syn)
    zero, mem_input_weight = broadcast(record, 0), broadcast(record, 1) - mem_decay
    grad_beta_mem, grad_beta_syn = load(beta_sums, 0), load(beta_sums, WIDTH)
    for d in range(0, n, WIDTH):
        prefetch(grad_spikes, at + next_step + d)
        prefetch(grad_x, at + next_step + d)
        grad_v = load(state, s + _GRAD_V + d)
        if has_grad_v_seq:
            grad_v = grad_v + masked_load(grad_v_seq, at + d, n - d)
        grad_out = masked_load(grad_spikes, at + d, n - d) + load(grad_cascade, lo + d)
        grad_spike = grad_out - load(state, s + _THRESHOLD + d) * grad_v
        grad_distance = grad_spike * load(record, q + _DISTANCE_OR_SLOPE + d)
        grad_u = where(refractory_masks[masks + (lo + d) // WIDTH], zero, grad_v + grad_distance)
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
    """Replace membrane potential minus threshold by the surrogate derivative, in place."""
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
def _load_state(start, length, tiles, inputs, like, block):
    """Load the initial state of a block of rows, or zeros for rest."""
    state, cascade_in, _, _, _ = block
    v, i_syn = as_pointer(inputs.v, like), as_pointer(inputs.i_syn, like)
    refractory = as_pointer(inputs.refractory, like)
    has_state = inputs.v != 0
    for tile in range(tiles):
        lo, s = tile * _TILE, tile * _STATE
        n = min(_TILE, length - lo)
        _load_or_zero(has_state, v, start + lo, n, state, s + _V)
        _load_or_zero(has_state, i_syn, start + lo, n, state, s + _CURRENT)
        _load_or_zero(has_state, refractory, start + lo, n, state, s + _REFRACTORY)
    for d in range(0, tiles * _TILE + WIDTH, WIDTH):
        store(cascade_in, d, broadcast(cascade_in, 0))


@kernel
def _forward_rows(first, last, sizes, inputs, outputs, keep_v, constants, scratch):
    """Compute blocks ``first`` to ``last`` of ``rows`` rows each."""
    _, _, rows, tiles, T, N, D, clusters, width = sizes
    like = constants.v_reset
    x, threshold = as_pointer(inputs.x, like), as_pointer(inputs.threshold, like)
    spikes, v_seq = as_pointer(outputs.spikes, like), as_pointer(outputs.v_seq, like)
    v_last, i_last = as_pointer(outputs.v_last, like), as_pointer(outputs.i_last, like)
    refractory_last = as_pointer(outputs.refractory_last, np.int32(0))
    coupling_t = as_pointer(inputs.coupling_t, like)
    members, padded_length = D // max(clusters, 1), tiles * _TILE + WIDTH
    state = scratch
    cascade_in = advance(state, tiles * _STATE)
    step_spikes = advance(cascade_in, padded_length)
    sums = advance(step_spikes, padded_length)
    current = advance(sums, rows * width)
    scratch_of_block = _Block(state, cascade_in, step_spikes, state, as_pointer(0, np.uint16(0)))
    for d in range(rows * D):
        state[d // _TILE * _STATE + _THRESHOLD + d % _TILE] = threshold[d % D]
    for block in range(first, last):
        start = block * rows * D
        length = min(rows * D, N - start)
        _load_state(start, length, tiles, inputs, like, scratch_of_block)
        for t in range(T):
            # To the next time step, or to the first one of the next block.
            next_step = N if t < T - 1 else rows * D - (T - 1) * N
            for tile in range(tiles):
                lo = tile * _TILE
                n = min(_TILE, length - lo)
                place = _Tile(t * N + start + lo, next_step, n, lo, tile * _STATE, 0, 0)
                _step(x, spikes, v_seq, keep_v, False, place, scratch_of_block, constants)
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
def _backward_rows(first, last, sizes, grads, inputs, constants, surrogate, alpha, record, masks, scratch, results):
    """Compute blocks ``first`` to ``last``; add the gradients of parameters to ``results.shared``.

    ``shared`` has the gradients of the D thresholds, of both decays, and of the coupling, in float64, because these
    sums are long and may nearly cancel. Gradients of the decays are added to it per block, of the coupling per few
    blocks, of the thresholds per chunk.
    """
    _, _, rows, tiles, T, N, D, clusters, width = sizes
    like = constants.v_reset
    x, threshold = as_pointer(inputs.x, like), as_pointer(inputs.threshold, like)
    coupling, coupling_t = as_pointer(inputs.coupling, like), as_pointer(inputs.coupling_t, like)
    grad_spikes, grad_v_seq = as_pointer(grads.spikes, like), as_pointer(grads.v_seq, like)
    grad_v_last, grad_i_last = as_pointer(grads.v_last, like), as_pointer(grads.i_last, like)
    grad_x, grad_v, grad_i = as_pointer(results.x, like), as_pointer(results.v, like), as_pointer(results.i_syn, like)
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
    grad_threshold = as_pointer(results.shared, np.float64(0))
    grad_betas, grad_coupling = advance(grad_threshold, D), advance(grad_threshold, D + 2)
    scratch_of_block = _Block(state, cascade_in, step_spikes, record, masks)
    for d in range(rows * D):
        state[d // _TILE * _STATE + _THRESHOLD + d % _TILE] = threshold[d % D]
    for block in range(first, last):
        start = block * rows * D
        length = min(rows * D, N - start)
        count = length // D
        _load_state(start, length, tiles, inputs, like, scratch_of_block)
        for tile in range(tiles):
            lo = tile * _TILE
            n = min(_TILE, length - lo)
            _load_or_zero(grads.v_last != 0, grad_v_last, start + lo, n, state, tile * _STATE + _GRAD_V)
            _load_or_zero(grads.i_last != 0, grad_i_last, start + lo, n, grad_current, lo)
        for t in range(T):
            next_step = N if t < T - 1 else rows * D - (T - 1) * N
            for tile in range(tiles):
                lo, q = tile * _TILE, (t * tiles + tile) * _RECORD
                n = min(_TILE, length - lo)
                place = _Tile(t * N + start + lo, next_step, n, lo, tile * _STATE, q, t * tiles * _MASKS)
                _step(x, x, x, False, True, place, scratch_of_block, constants)
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
                lo, q = tile * _TILE, (t * tiles + tile) * _RECORD
                n = min(_TILE, length - lo)
                place = _Tile(t * N + start + lo, -N if t else 0, n, lo, tile * _STATE, q, t * tiles * _MASKS)
                _step_back(
                    grad_spikes, grads.v_seq != 0, grad_v_seq, grad_x, grad_cascade, grad_current, beta_sums, place,
                    scratch_of_block, constants,
                )  # fmt: skip
        for tile in range(tiles if inputs.v != 0 else 0):
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
def _forward(sizes, inputs, outputs, keep_v, constants, scratch, scratch_size):
    """Run chunks of blocks in parallel; the first three and ``constants`` are the tuples of the classes above."""
    chunks, blocks = sizes[0], sizes[1]
    for c in prange(chunks):
        numbers = _Constants(*constants)
        _forward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, _Sizes(*sizes), _Inputs(*inputs), _Outputs(*outputs),
            keep_v, numbers, advance(as_pointer(scratch, numbers.v_reset), c * scratch_size),
        )  # fmt: skip


@parallel_kernel
def _backward(
    sizes, grads, inputs, constants, surrogate, alpha, record, refractory_masks, scratch, scratch_size, results
):
    """Run chunks of blocks in parallel; arguments as in ``_forward``."""
    chunks, blocks, _, tiles, T, _, D, clusters, width = sizes
    record_size, masks_size = T * tiles * _RECORD, T * tiles * _MASKS
    shared_bytes = 8 * (D + 2 + clusters * width)
    for c in prange(chunks):
        grad_x, grad_v, grad_i, shared = results
        _backward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, _Sizes(*sizes), _OutputGradients(*grads),
            _Inputs(*inputs), _Constants(*constants), surrogate, alpha,
            advance(as_pointer(record, alpha), c * record_size),
            advance(as_pointer(refractory_masks, np.uint16(0)), c * masks_size),
            advance(as_pointer(scratch, alpha), c * scratch_size),
            _Gradients(grad_x, grad_v, grad_i, shared + c * shared_bytes),
        )  # fmt: skip


def _sizes(x: Tensor, coupling: Tensor | None, threads: int) -> _Sizes:
    T, N, D = x.shape
    rows = max(1, _TILE // D)
    blocks = -(-N // rows)
    C = 0 if coupling is None else coupling.shape[0]
    return _Sizes(min(blocks, 2 * threads), blocks, rows, -(-rows * D // _TILE), T, N * D, D, C, -(-C // WIDTH) * WIDTH)


def _contiguous(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else as_contiguous(x, dtype) for x in tensors]


def _input_tensors(arguments: Arguments, dtype: torch.dtype) -> list[Tensor | None]:
    """Return the tensors of :class:`_Inputs`, contiguous."""
    coupling = arguments.coupling
    couplings = [None, None] if coupling is None else [_padded(coupling, dtype), _padded(coupling.T, dtype)]
    x, v, i_syn, refractory, threshold, *_ = arguments
    return [*_contiguous(x, v, i_syn, refractory, threshold, dtype=dtype), *couplings]


def _constants(arguments: Arguments, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the numbers of :class:`_Constants`."""
    numbers = arguments.beta_mem.item(), arguments.beta_syn.item(), arguments.v_reset, arguments.refractory_steps
    return tuple(map(NUMPY_TYPES[dtype], numbers))


def _padded(coupling: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the coupling padded with zeros to ``[C, width]``."""
    missing = -coupling.shape[0] % WIDTH
    return as_contiguous(torch.nn.functional.pad(coupling, (0, missing)) if missing else coupling, dtype)


def forward(arguments: Arguments, keep_v: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return spikes, membrane potentials (empty unless ``keep_v``) and the last state."""
    x = arguments.x
    T, N, D = x.shape
    dtype = compute_dtype(x)
    spikes, v_seq = torch.empty(T, N, D, dtype=dtype), torch.empty(T if keep_v else 0, N, D, dtype=dtype)
    v_last, i_last = torch.empty(N, D, dtype=dtype), torch.empty(N, D, dtype=dtype)
    refractory_last = torch.empty(N, D, dtype=torch.int32)
    inputs = _input_tensors(arguments, dtype)
    with as_many_threads_as_torch() as threads:
        sizes = _sizes(x, arguments.coupling, threads)
        rows, tiles, width = sizes.rows, sizes.tiles, sizes.width
        # Allocated here: memory allocated in the threads causes page faults in every call.
        scratch_size = tiles * _STATE + 2 * (tiles * _TILE + WIDTH) + (rows + 1) * width
        scratch = torch.zeros(sizes.chunks, scratch_size, dtype=dtype)
        _forward(
            tuple(sizes),
            addresses(inputs),
            addresses((spikes, v_seq, v_last, i_last, refractory_last)),
            keep_v,
            _constants(arguments, dtype),
            data_pointer(scratch),
            scratch_size,
        )
    return spikes.to(x.dtype), v_seq.to(x.dtype), v_last, i_last, refractory_last


def backward(
    grads: OutputGradients, arguments: Arguments, surrogate: str, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, v and i_syn (empty without a state), threshold, both betas, coupling (or empty)."""
    x = arguments.x
    T, N, D = x.shape
    dtype = compute_dtype(x)
    grad_x = torch.empty(T, N, D, dtype=dtype)
    grad_v, grad_i = (torch.empty(0 if arguments.v is None else N, D, dtype=dtype) for _ in range(2))
    inputs, grad_outputs = _input_tensors(arguments, dtype), _contiguous(*grads, dtype=dtype)
    with as_many_threads_as_torch() as threads:
        sizes = _sizes(x, arguments.coupling, threads)
        chunks, _, rows, tiles, *_, C, width = sizes
        record = torch.empty(chunks, T * tiles * _RECORD, dtype=dtype)
        refractory_masks = torch.empty(chunks, T * tiles * _MASKS, dtype=torch.int16)
        scratch_size = tiles * _STATE + 4 * (tiles * _TILE + WIDTH) + 2 * T * rows * width + (C + 1) * width + 2 * WIDTH
        scratch = torch.zeros(chunks, scratch_size, dtype=dtype)
        shared = torch.zeros(chunks, D + 2 + C * width, dtype=torch.float64)
        _backward(
            tuple(sizes),
            addresses(grad_outputs),
            addresses(inputs),
            _constants(arguments, dtype),
            SURROGATE_IDS[surrogate],
            NUMPY_TYPES[dtype](alpha),
            *addresses((record, refractory_masks, scratch)),
            scratch_size,
            addresses((grad_x, grad_v, grad_i, shared)),
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
