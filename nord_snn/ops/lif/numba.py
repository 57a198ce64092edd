"""The associative LIF neuron on the CPU: Numba kernels that read inputs and write outputs once, with rows in parallel.

A block of rows is computed for all time steps while its state stays in the cache. The backward pass computes the block
forward again and then processes the time steps in reverse. The README of this folder explains why vectors and pointers
are explicit.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nord_snn.ops._numba.compiling import chunks_of, kernel, parallel_kernel
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
from nord_snn.ops._numba.tensors import NUMPY_TYPES, addresses, as_contiguous
from nord_snn.ops._numba.threads import n_threads
from nord_snn.ops._numba.workspace import workspace
from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.dispatch import CallSignature, Support
from nord_snn.ops.lif.reference import Dynamics
from nord_snn.ops.lif.support import Arguments, OutputGradients, supports_surrogate

__all__ = ["SURROGATE_IDS", "accepts", "backward", "forward"]

#: Surrogates that ``_surrogate_derivative`` implements; names as in :data:`nord_snn.ops.SURROGATES`.
SURROGATE_IDS = {"nord_atan": 0, "atan": 1, "sigmoid": 2, "fast_sigmoid": 3}


def accepts(call: CallSignature) -> Support:
    """Return whether the kernels can run a call."""
    return supports_surrogate(call, SURROGATE_IDS)


_TILE = 512  # neurons per tile: their state fits into the first-level cache
_ROW = _TILE + 16  # not a power of two: rows at multiples of a power of two share few sets of the cache
# Offsets in the scratch memory of a tile: state between time steps, parameters, gradients.
_V, _CURRENT, _REFRACTORY, _THRESHOLD, _MEM, _SYN, _GRAD_V, _GRAD_THRESHOLD, _GRAD_MEM, _GRAD_SYN = range(
    0, 10 * _ROW, _ROW
)
_STATE = 10 * _ROW
# Offsets of the values that the forward sweep saves for the backward sweep, ``_MEMBRANE`` for a hard reset only.
_DISTANCE_OR_SLOPE, _V_MINUS_CURRENT, _CURRENT_BEFORE, _MEMBRANE = range(0, 4 * _ROW, _ROW)
_MASKS = _TILE // WIDTH  # bit masks of refractory neurons saved per tile and time step, one bit per neuron
_BLOCKS_PER_SUM = 16  # blocks whose coupling gradients are summed in the kernel's dtype, before the float64 sum


class _Sizes(NamedTuple):
    """Sizes of a call.

    Attributes:
        chunks: number of parts of the work, at most two per thread.
        blocks: number of blocks of neurons.
        block_length: neurons per block: with a cascade whole rows, at least one and as many as fit into a tile, else a tile.
        tiles: tiles per block.
        T: number of time steps.
        N: number of neurons in all rows, the product N * D * M of the shape ``[T, N, D, M]``.
        D: number of neurons or channels with their own parameters in a row.
        places: number M of positions that share these parameters.
        n_decays: D if every neuron has its own decays, else 1.
        clusters: number of clusters C, 0 without a cascade.
        width: C rounded up to whole vectors.
        record: number of values saved per tile and time step.
    """

    chunks: int
    blocks: int
    block_length: int
    tiles: int
    T: int
    N: int
    D: int
    places: int
    n_decays: int
    clusters: int
    width: int
    record: int


class _Modes(NamedTuple):
    """Equations of a call, see ``Dynamics`` in ``reference.py``.

    Attributes:
        relaxes: whether the charge is "relax".
        leaks: whether the charge is "leak".
        averages: whether the charge is "average".
        own_decays: whether every neuron has its own decays.
        hard_reset: whether a spike sets the membrane potential to the resting potential.
        detach_reset: whether the spike is detached in the reset.
    """

    relaxes: int
    leaks: int
    averages: int
    own_decays: int
    hard_reset: int
    detach_reset: int


class _Constants(NamedTuple):
    """Numbers of a call, in the type that the kernels compute in; the betas are 0 until :func:`_with_decays` sets them."""

    beta_mem: Any
    beta_syn: Any
    v_reset: Any
    refractory_steps: Any
    tau: Any
    v_rest: Any
    reset_scale: Any


class _Inputs(NamedTuple):
    """Addresses of the inputs, 0 for None (a decay of 0); ``coupling`` and its transpose ``coupling_t`` are ``[C, width]``."""

    x: int
    v: int
    i_syn: int
    refractory: int
    threshold: int
    beta_mem: int
    beta_syn: int
    coupling: int
    coupling_t: int


class _Outputs(NamedTuple):
    """Addresses of the outputs, 0 for outputs that are not needed; ``spikes`` and ``v_last`` are always needed."""

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
    """Addresses of the gradients of x and of the initial state; ``shared`` has the gradients of parameters in a chunk."""

    x: int
    v: int
    i_syn: int
    shared: int


class _ParameterGradients(NamedTuple):
    """Addresses of the gradients of the parameters, 0 for gradients that are not needed; the coupling's is ``[C, C]``.

    ``one`` is 1 in the kernel's dtype if the decays' gradients are those of their logits, else 0.
    """

    threshold: int
    beta_mem: int
    beta_syn: int
    coupling: int
    one: Any


class _Block(NamedTuple):
    """Scratch memory of a block of rows.

    Attributes:
        state: state of each tile between time steps.
        cascade_in: current that the cascade adds at the next time step.
        step_spikes: spikes of this time step.
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
        at: index of its first neuron in x and in the outputs.
        next_step: distance to the same neuron at the time step that is processed next, for prefetching.
        n: number of neurons.
        first: index of its first neuron in the block.
        state: index of its state in ``_Block.state``.
        record: index of its values in ``_Block.record``.
        masks: index of the time step's masks in ``_Block.refractory_masks``.
    """

    at: int
    next_step: int
    n: int
    first: int
    state: int
    record: int
    masks: int


@kernel
def _with_decays(constants, sizes, inputs):
    """Return the constants with both decays; without them if every neuron has its own."""
    like = constants.v_reset
    beta_mem, beta_syn = constants.beta_mem, constants.beta_syn
    if sizes.n_decays == 1:
        if inputs.beta_mem != 0:
            beta_mem = as_pointer(inputs.beta_mem, like)[0]
        if inputs.beta_syn != 0:
            beta_syn = as_pointer(inputs.beta_syn, like)[0]
    return _Constants(
        beta_mem, beta_syn, constants.v_reset, constants.refractory_steps, constants.tau, constants.v_rest,
        constants.reset_scale,
    )  # fmt: skip


@kernel
def _clear(target, n):
    """Set ``target[:n]``, whole vectors, to zero."""
    for d in range(0, n, WIDTH):
        store(target, d, broadcast(target, 0))


@kernel
def _load_or_zero(has_source, source, at, n, target, offset):
    """Set ``target[offset:] = source[at:]``, or zeros without a source; pad with zeros to whole vectors."""
    zero = broadcast(target, 0)
    for d in range(0, n, WIDTH):
        store(target, offset + d, masked_load(source, at + d, n - d) if has_source else zero)


@kernel
def _step(x, spikes, v_seq, keep_v, save, tile, block, constants, modes):
    """Compute one time step of one tile, see ``reference.py``, and prefetch the next time step.

    With ``save``, write the values that the backward sweep needs instead of the outputs. The stride between time steps is
    too large for the hardware prefetcher.
    """
    at, next_step, n, offset, state_at, record_at, masks = tile
    state, cascade_in, step_spikes, record, refractory_masks = block
    one, zero, reset, refractory_period = (
        broadcast(x, 1),
        broadcast(x, 0),
        broadcast(x, constants.v_reset),
        broadcast(x, constants.refractory_steps),
    )
    mem_decay, syn_decay = broadcast(x, constants.beta_mem), broadcast(x, constants.beta_syn)
    tau, rest, reset_scale = (
        broadcast(x, constants.tau),
        broadcast(x, constants.v_rest),
        broadcast(x, constants.reset_scale),
    )
    for d in range(0, n, WIDTH):
        prefetch(x, at + next_step + d)
        if modes.own_decays:
            mem_decay, syn_decay = load(state, state_at + _MEM + d), load(state, state_at + _SYN + d)
        before = load(state, state_at + _CURRENT + d) + load(cascade_in, offset + d)
        current = syn_decay * before + masked_load(x, at + d, n - d)
        v = load(state, state_at + _V + d)
        if modes.relaxes:
            charged = v + (current - (v - rest)) / tau
        elif modes.leaks:
            charged = v - (v - rest) / tau + current
        elif modes.averages:
            charged = mem_decay * v + (one - mem_decay) * (current + rest)
        else:
            charged = mem_decay * v + (one - mem_decay) * rest + current
        refractory = load(state, state_at + _REFRACTORY + d)
        is_refractory = ge_mask(refractory, one)
        threshold = load(state, state_at + _THRESHOLD + d)
        u = where(is_refractory, reset, charged)
        distance = u - threshold
        fires = ge_mask(distance, zero)
        spike = where(fires, one, zero)
        if modes.hard_reset:
            after = where(fires, rest, u)
        else:
            after = u - spike * (threshold * reset_scale)
        store(state, state_at + _V + d, after)
        store(state, state_at + _CURRENT + d, current)
        store(state, state_at + _REFRACTORY + d, where(fires, refractory_period, maximum(refractory - one, zero)))
        store(step_spikes, offset + d, spike)
        if save:
            store(record, record_at + _DISTANCE_OR_SLOPE + d, distance)
            store(record, record_at + _V_MINUS_CURRENT + d, v - rest - current if modes.averages else v - rest)
            store(record, record_at + _CURRENT_BEFORE + d, before)
            if modes.hard_reset:
                store(record, record_at + _MEMBRANE + d, u)
            refractory_masks[masks + (offset + d) // WIDTH] = is_refractory
        else:
            prefetch(spikes, at + next_step + d)
            masked_store(spikes, at + d, n - d, spike)
            if keep_v:
                masked_store(v_seq, at + d, n - d, after)


@kernel
def _step_back(
    grad_spikes, has_grad_v_seq, grad_v_seq, grad_x, grad_cascade, grad_current, beta_sums, tile, block, constants,
    modes,
):  # fmt: skip
    """Compute the backward pass of ``_step``; ``grad_cascade`` is the gradient of the spikes through the cascade."""
    at, next_step, n, offset, state_at, record_at, masks = tile
    state, _, _, record, refractory_masks = block
    one, zero, rest = broadcast(record, 1), broadcast(record, 0), broadcast(record, constants.v_rest)
    mem_decay, syn_decay = broadcast(record, constants.beta_mem), broadcast(record, constants.beta_syn)
    reset_scale = broadcast(record, constants.reset_scale)
    v_weight, current_weight = mem_decay, one - mem_decay if modes.averages else one
    if modes.relaxes or modes.leaks:
        share = one / broadcast(record, constants.tau)
        v_weight, current_weight = one - share, share if modes.relaxes else one
    grad_beta_mem, grad_beta_syn = load(beta_sums, 0), load(beta_sums, WIDTH)
    for d in range(0, n, WIDTH):
        prefetch(grad_spikes, at + next_step + d)
        prefetch(grad_x, at + next_step + d)
        if modes.own_decays:
            mem_decay, syn_decay = load(state, state_at + _MEM + d), load(state, state_at + _SYN + d)
            if not (modes.relaxes or modes.leaks):
                v_weight, current_weight = mem_decay, one - mem_decay if modes.averages else one
        grad_v = load(state, state_at + _GRAD_V + d)
        if has_grad_v_seq:
            grad_v = grad_v + masked_load(grad_v_seq, at + d, n - d)
        grad_spike = masked_load(grad_spikes, at + d, n - d) + load(grad_cascade, offset + d)
        threshold, through_u = load(state, state_at + _THRESHOLD + d), grad_v
        if modes.hard_reset:
            u = load(record, record_at + _MEMBRANE + d)
            through_u = where(ge_mask(u - threshold, zero), zero, grad_v)
            if not modes.detach_reset:
                grad_spike = grad_spike + (rest - u) * grad_v
        elif not modes.detach_reset:
            grad_spike = grad_spike - threshold * reset_scale * grad_v
        grad_distance = grad_spike * load(record, record_at + _DISTANCE_OR_SLOPE + d)
        grad_u = where(refractory_masks[masks + (offset + d) // WIDTH], zero, through_u + grad_distance)
        grad_i = load(grad_current, offset + d) + current_weight * grad_u
        by_mem, by_syn = (
            grad_u * load(record, record_at + _V_MINUS_CURRENT + d),
            grad_i * load(record, record_at + _CURRENT_BEFORE + d),
        )
        if modes.own_decays:
            store(state, state_at + _GRAD_MEM + d, load(state, state_at + _GRAD_MEM + d) + by_mem)
            store(state, state_at + _GRAD_SYN + d, load(state, state_at + _GRAD_SYN + d) + by_syn)
        else:
            grad_beta_mem, grad_beta_syn = grad_beta_mem + by_mem, grad_beta_syn + by_syn
        store(state, state_at + _GRAD_THRESHOLD + d, load(state, state_at + _GRAD_THRESHOLD + d) - grad_distance)
        store(state, state_at + _GRAD_V + d, v_weight * grad_u)
        store(grad_current, offset + d, syn_decay * grad_i)
        masked_store(grad_x, at + d, n - d, grad_i)
    store(beta_sums, 0, grad_beta_mem)
    store(beta_sums, WIDTH, grad_beta_syn)


@kernel
def _surrogate_derivative(surrogate, alpha, record, record_at, n):
    """Replace membrane potential minus threshold by the surrogate derivative, in place."""
    one, zero = broadcast(record, 1), broadcast(record, 0)
    if surrogate == 0:
        scale, peak = broadcast(record, alpha), broadcast(record, alpha / (2 * np.pi))
        for d in range(0, n, WIDTH):
            z = scale * load(record, record_at + d)
            store(record, record_at + d, peak / (one + z * z))
    elif surrogate == 1:
        scale, peak = broadcast(record, alpha * np.pi / 2), broadcast(record, alpha / 2)
        for d in range(0, n, WIDTH):
            z = scale * load(record, record_at + d)
            store(record, record_at + d, peak / (one + z * z))
    elif surrogate == 2:
        for d in range(-(-n // WIDTH) * WIDTH):  # up to the end of the last vector, whose padding must be finite
            record[record_at + d] = np.exp(
                -abs(alpha * record[record_at + d])
            )  # even function: use the side that cannot overflow
        for d in range(0, n, WIDTH):
            z = load(record, record_at + d)
            store(record, record_at + d, broadcast(record, alpha) * z / ((one + z) * (one + z)))
    else:
        scale = broadcast(record, alpha)
        for d in range(0, n, WIDTH):
            distance = load(record, record_at + d)
            z = one + scale * maximum(distance, zero - distance)
            store(record, record_at + d, one / (z * z))


@kernel
def _product(sums, at, matrix, c, clusters, width):
    """Return ``sums[at:] @ matrix[:, c:]``, WIDTH columns; four accumulators hide the latency of ``fused``."""
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
    """Sum ``source`` over the members of each cluster, multiply by ``matrix``, copy the result to all members in ``target``.

    ``sums`` keeps the sums of each row; ``current`` is scratch memory for the product of one row.

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
    """Load the initial state of a block of neurons, or zeros for rest."""
    state, cascade_in, _, _, _ = block
    v, i_syn = as_pointer(inputs.v, like), as_pointer(inputs.i_syn, like)
    refractory = as_pointer(inputs.refractory, np.int32(0))
    for tile in range(tiles):
        offset, state_at = tile * _TILE, tile * _STATE
        n = min(_TILE, length - offset)
        _load_or_zero(inputs.v != 0, v, start + offset, n, state, state_at + _V)
        _load_or_zero(inputs.i_syn != 0, i_syn, start + offset, n, state, state_at + _CURRENT)
        if inputs.refractory != 0:
            for d in range(n):
                state[state_at + _REFRACTORY + d] = refractory[start + offset + d]
        for d in range(n if inputs.refractory != 0 else 0, -(-n // WIDTH) * WIDTH):
            state[state_at + _REFRACTORY + d] = 0
    for d in range(0, tiles * _TILE + WIDTH, WIDTH):
        store(cascade_in, d, broadcast(cascade_in, 0))


@kernel
def _load_parameter(source, sizes, start, n, state, row):
    """Write the parameter of each of the n neurons from ``start`` on to ``state[row:]``."""
    places, D = sizes.places, sizes.D
    c, place, d = start // places % D, start % places, 0
    while d < n:
        if places == 1:
            run = min(D - c, n - d)
            for j in range(run):
                state[row + d + j] = source[c + j]
            c = 0
        else:
            run = min(places - place, n - d)
            for j in range(run):
                state[row + d + j] = source[c]
            c, place = c + 1 if c + 1 < D else 0, 0
        d += run


@kernel
def _add_gradient(state, row, sizes, start, n, target):
    """Add ``state[row:]``, the gradients of the parameters of n neurons from ``start`` on, to ``target``; clear them."""
    places, D = sizes.places, sizes.D
    c, place, d = start // places % D, start % places, 0
    while d < n:
        if places == 1:
            run = min(D - c, n - d)
            for j in range(run):
                target[c + j] += state[row + d + j]
            c = 0
        else:
            run = min(places - place, n - d)
            total = broadcast(state, 0)
            for j in range(0, run, WIDTH):
                total = total + masked_load(state, row + d + j, run - j)
            target[c] += reduce_sum(total)
            c, place = c + 1 if c + 1 < D else 0, 0
        d += run
    for d in range(0, n, WIDTH):
        store(state, row + d, broadcast(state, 0))


@kernel
def _load_parameters(start, length, sizes, inputs, like, state):
    """Load the thresholds of a block of neurons, and their decays if every neuron has its own."""
    for tile in range(sizes.tiles):
        at, state_at, n = start + tile * _TILE, tile * _STATE, min(_TILE, length - tile * _TILE)
        _load_parameter(as_pointer(inputs.threshold, like), sizes, at, n, state, state_at + _THRESHOLD)
        if sizes.n_decays > 1 and inputs.beta_mem != 0:
            _load_parameter(as_pointer(inputs.beta_mem, like), sizes, at, n, state, state_at + _MEM)
        if sizes.n_decays > 1 and inputs.beta_syn != 0:
            _load_parameter(as_pointer(inputs.beta_syn, like), sizes, at, n, state, state_at + _SYN)


@kernel
def _add_gradients(start, length, sizes, state, grad_threshold, grad_betas):
    """Add the gradients of a block's thresholds, and of its decays if every neuron has its own; clear them."""
    for tile in range(sizes.tiles):
        at, state_at, n = start + tile * _TILE, tile * _STATE, min(_TILE, length - tile * _TILE)
        _add_gradient(state, state_at + _GRAD_THRESHOLD, sizes, at, n, grad_threshold)
        if sizes.n_decays > 1:
            _add_gradient(state, state_at + _GRAD_MEM, sizes, at, n, grad_betas)
            _add_gradient(state, state_at + _GRAD_SYN, sizes, at, n, advance(grad_betas, sizes.n_decays))


@kernel
def _has_same_parameters(sizes):
    """Return whether all blocks have the parameters of the first block, neuron by neuron."""
    return sizes.block_length % (sizes.D * sizes.places) == 0


@kernel
def _forward_rows(first, last, sizes, inputs, outputs, keep_v, constants, modes, scratch):
    """Run the forward pass of the blocks ``first`` to ``last - 1``."""
    block_length, tiles, T, N, D, clusters, width = (
        sizes.block_length, sizes.tiles, sizes.T, sizes.N, sizes.D, sizes.clusters, sizes.width
    )  # fmt: skip
    like = constants.v_reset
    x = as_pointer(inputs.x, like)
    spikes, v_seq = as_pointer(outputs.spikes, like), as_pointer(outputs.v_seq, like)
    v_last, i_last = as_pointer(outputs.v_last, like), as_pointer(outputs.i_last, like)
    refractory_last = as_pointer(outputs.refractory_last, np.int32(0))
    coupling_t = as_pointer(inputs.coupling_t, like)
    members, padded_length = D // max(clusters, 1), tiles * _TILE + WIDTH
    state = scratch
    cascade_in = advance(state, tiles * _STATE)
    step_spikes = advance(cascade_in, padded_length)
    sums = advance(step_spikes, padded_length)
    current = advance(sums, block_length // D * width)
    scratch_of_block = _Block(state, cascade_in, step_spikes, state, as_pointer(0, np.uint16(0)))
    for block in range(first, last):
        start = block * block_length
        length = min(block_length, N - start)
        if block == first or not _has_same_parameters(sizes):
            _load_parameters(start, block_length, sizes, inputs, like, state)
        _load_state(start, length, tiles, inputs, like, scratch_of_block)
        for t in range(T):
            # To the next time step, or to the first one of the next block.
            next_step = N if t < T - 1 else block_length - (T - 1) * N
            for tile in range(tiles):
                offset = tile * _TILE
                n = min(_TILE, length - offset)
                place = _Tile(t * N + start + offset, next_step, n, offset, tile * _STATE, 0, 0)
                _step(x, spikes, v_seq, keep_v, False, place, scratch_of_block, constants, modes)
            if clusters:
                _couple(step_spikes, length // D, members, clusters, coupling_t, width, sums, 0, current, cascade_in)
        for tile in range(tiles):
            offset, state_at = tile * _TILE, tile * _STATE
            n = min(_TILE, length - offset)
            for d in range(0, n, WIDTH):
                masked_store(v_last, start + offset + d, n - d, load(state, state_at + _V + d))
            if outputs.i_last != 0:
                for d in range(0, n, WIDTH):
                    current_last = load(state, state_at + _CURRENT + d) + load(cascade_in, offset + d)
                    masked_store(i_last, start + offset + d, n - d, current_last)
            if outputs.refractory_last != 0:
                for d in range(n):
                    refractory_last[start + offset + d] = state[state_at + _REFRACTORY + d]


class _Surrogate(NamedTuple):
    """Number of the surrogate in :data:`SURROGATE_IDS`, and its sharpness."""

    number: int
    alpha: Any


@kernel
def _backward_rows(first, last, sizes, grads, inputs, constants, modes, surrogate, record, masks, scratch, results):
    """Run the backward pass of the blocks ``first`` to ``last - 1``; add the gradients of parameters to ``results.shared``.

    ``shared`` has the gradients of the thresholds, of both decays, and of the coupling, in float64, because these sums
    are long and may nearly cancel. Gradients of decays that all neurons share are added to it after each block, those of
    the coupling after several blocks, and those of thresholds and neurons' own decays after each block, or at the end if
    the parameters of all blocks are the same.
    """
    block_length, tiles, T, N, D, clusters, width = (
        sizes.block_length, sizes.tiles, sizes.T, sizes.N, sizes.D, sizes.clusters, sizes.width
    )  # fmt: skip
    like = constants.v_reset
    x = as_pointer(inputs.x, like)
    coupling, coupling_t = as_pointer(inputs.coupling, like), as_pointer(inputs.coupling_t, like)
    grad_spikes, grad_v_seq = as_pointer(grads.spikes, like), as_pointer(grads.v_seq, like)
    grad_v_last, grad_i_last = as_pointer(grads.v_last, like), as_pointer(grads.i_last, like)
    grad_x, grad_v, grad_i = as_pointer(results.x, like), as_pointer(results.v, like), as_pointer(results.i_syn, like)
    members, padded_length, n_rows = D // max(clusters, 1), tiles * _TILE + WIDTH, block_length // D
    state = scratch
    cascade_in = advance(state, tiles * _STATE)
    step_spikes = advance(cascade_in, padded_length)
    grad_cascade = advance(step_spikes, padded_length)
    grad_current = advance(grad_cascade, padded_length)
    sums = advance(grad_current, padded_length)
    grad_sums = advance(sums, T * n_rows * width)
    current = advance(grad_sums, T * n_rows * width)
    beta_sums = advance(current, width)
    coupling_sums = advance(beta_sums, 2 * WIDTH)
    grad_threshold = as_pointer(results.shared, np.float64(0))
    grad_betas = advance(grad_threshold, D)
    grad_coupling = advance(grad_betas, 2 * sizes.n_decays)
    scratch_of_block = _Block(state, cascade_in, step_spikes, record, masks)
    for block in range(first, last):
        start = block * block_length
        length = min(block_length, N - start)
        count = length // D
        if block == first or not _has_same_parameters(sizes):
            _load_parameters(start, block_length, sizes, inputs, like, state)
        _load_state(start, length, tiles, inputs, like, scratch_of_block)
        for tile in range(tiles):
            offset = tile * _TILE
            n = min(_TILE, length - offset)
            _load_or_zero(grads.v_last != 0, grad_v_last, start + offset, n, state, tile * _STATE + _GRAD_V)
            _load_or_zero(grads.i_last != 0, grad_i_last, start + offset, n, grad_current, offset)
        for t in range(T):
            next_step = N if t < T - 1 else block_length - (T - 1) * N
            for tile in range(tiles):
                offset, record_at = tile * _TILE, (t * tiles + tile) * sizes.record
                n = min(_TILE, length - offset)
                place = _Tile(
                    t * N + start + offset, next_step, n, offset, tile * _STATE, record_at, t * tiles * _MASKS
                )
                _step(x, x, x, False, True, place, scratch_of_block, constants, modes)
                _surrogate_derivative(surrogate.number, surrogate.alpha, record, record_at + _DISTANCE_OR_SLOPE, n)
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
                offset, record_at = tile * _TILE, (t * tiles + tile) * sizes.record
                n = min(_TILE, length - offset)
                place = _Tile(
                    t * N + start + offset, -N if t else 0, n, offset, tile * _STATE, record_at, t * tiles * _MASKS
                )
                _step_back(
                    grad_spikes, grads.v_seq != 0, grad_v_seq, grad_x, grad_cascade, grad_current, beta_sums, place,
                    scratch_of_block, constants, modes,
                )  # fmt: skip
        for tile in range(tiles if inputs.v != 0 else 0):
            offset, state_at = tile * _TILE, tile * _STATE
            n = min(_TILE, length - offset)
            for d in range(n):
                grad_v[start + offset + d] = state[state_at + _GRAD_V + d]
            if inputs.i_syn != 0:
                for d in range(n):
                    grad_i[start + offset + d] = grad_current[offset + d]
        if sizes.n_decays == 1:
            for kind in range(2):
                grad_betas[kind] += reduce_sum(load(beta_sums, kind * WIDTH))
                store(beta_sums, kind * WIDTH, broadcast(beta_sums, 0))
        if clusters:
            _add_outer_products(grad_sums, sums, T * count, clusters, width, coupling_sums)
            if (block - first) % _BLOCKS_PER_SUM == 0 or block == last - 1:
                for c in range(clusters * width):
                    grad_coupling[c] += coupling_sums[c]
                    coupling_sums[c] = 0
        if not _has_same_parameters(sizes):
            _add_gradients(start, length, sizes, state, grad_threshold, grad_betas)
    if first < last and _has_same_parameters(sizes):
        _add_gradients(0, block_length, sizes, state, grad_threshold, grad_betas)


@kernel
def _write_decay_gradient(sums, n, beta, one, target):
    """Write the gradient of a decay, or, if ``one`` is 1, times the derivative of the sigmoid, that of its logit."""
    for k in range(n):
        target[k] = sums[k]
        if one != 0:
            target[k] = target[k] * (one - beta[k]) * beta[k]


@kernel
def _add_chunks(sizes, shared, inputs, results):
    """Add the gradients ``shared`` of all chunks, and write the sums to the gradients of the parameters."""
    D, n, clusters, width = sizes.D, sizes.n_decays, sizes.clusters, sizes.width
    length = D + 2 * n + clusters * width
    for c in range(1, sizes.chunks):
        for k in range(length):
            shared[k] += shared[c * length + k]
    one = results.one
    threshold = as_pointer(results.threshold, one)
    beta_mem, beta_syn = as_pointer(results.beta_mem, one), as_pointer(results.beta_syn, one)
    coupling = as_pointer(results.coupling, one)
    for k in range(D):
        threshold[k] = shared[k]
    if results.beta_mem != 0:
        _write_decay_gradient(advance(shared, D), n, as_pointer(inputs.beta_mem, one), one, beta_mem)
    if results.beta_syn != 0:
        _write_decay_gradient(advance(shared, D + n), n, as_pointer(inputs.beta_syn, one), one, beta_syn)
    for c in range(clusters):
        for k in range(clusters):
            coupling[c * clusters + k] = shared[D + 2 * n + c * width + k]


@parallel_kernel
def _forward(share, sizes, inputs, outputs, keep_v, constants, modes, scratch, scratch_size):
    """Run the forward pass of the chunks of a share; tuples have the fields of the classes above."""
    chunks, blocks = sizes[0], sizes[1]
    for c in chunks_of(share, chunks):
        numbers = _with_decays(_Constants(*constants), _Sizes(*sizes), _Inputs(*inputs))
        scratch_of_chunk = advance(as_pointer(scratch, numbers.v_reset), c * scratch_size)
        _clear(scratch_of_chunk, scratch_size)
        _forward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, _Sizes(*sizes), _Inputs(*inputs), _Outputs(*outputs),
            keep_v, numbers, _Modes(*modes), scratch_of_chunk,
        )  # fmt: skip


@parallel_kernel
def _backward(
    share,
    sizes,
    grads,
    inputs,
    constants,
    modes,
    surrogate,
    recorded,
    scratch,
    scratch_size,
    of_inputs,
    of_parameters,
):
    """Run the backward pass of the chunks of a share; tuples have the fields of the classes above."""
    chunks, blocks, _, tiles, T, _, D, _, n_decays, clusters, width, record_of_tile = sizes
    record, refractory_masks = recorded
    record_size, masks_size = T * tiles * record_of_tile, T * tiles * _MASKS
    shared_size = D + 2 * n_decays + clusters * width
    for c in chunks_of(share, chunks):
        grad_x, grad_v, grad_i, shared = of_inputs
        numbers = _with_decays(_Constants(*constants), _Sizes(*sizes), _Inputs(*inputs))
        like = numbers.v_reset
        scratch_of_chunk = advance(as_pointer(scratch, like), c * scratch_size)
        _clear(scratch_of_chunk, scratch_size)
        sums_of_chunk = advance(as_pointer(shared, np.float64(0)), c * shared_size)
        for k in range(shared_size):
            sums_of_chunk[k] = 0
        _backward_rows(
            c * blocks // chunks, (c + 1) * blocks // chunks, _Sizes(*sizes), _OutputGradients(*grads),
            _Inputs(*inputs), numbers, _Modes(*modes), _Surrogate(*surrogate),
            advance(as_pointer(record, like), c * record_size),
            advance(as_pointer(refractory_masks, np.uint16(0)), c * masks_size),
            scratch_of_chunk,
            _Gradients(grad_x, grad_v, grad_i, shared + 8 * c * shared_size),
        )  # fmt: skip
    if share[2] == 1 and of_parameters[0] != 0:
        sums = as_pointer(of_inputs[3], np.float64(0))
        _add_chunks(_Sizes(*sizes), sums, _Inputs(*inputs), _ParameterGradients(*of_parameters))


@functools.lru_cache(maxsize=1024)
def _sizes(shape: tuple[int, ...], n_decays: int, clusters: int, hard_reset: bool, threads: int) -> _Sizes:
    T, N, D, *others = shape
    places = math.prod(others)
    block_length = max(1, _TILE // D) * D if clusters else _TILE
    blocks = -(-N * D * places // block_length)
    return _Sizes(
        chunks=max(1, min(blocks, 2 * threads)),
        blocks=blocks,
        block_length=block_length,
        tiles=-(-block_length // _TILE),
        T=T,
        N=N * D * places,
        D=D,
        places=places,
        n_decays=n_decays,
        clusters=clusters,
        width=-(-clusters // WIDTH) * WIDTH,
        record=(4 if hard_reset else 3) * _ROW,
    )


def _sizes_of(arguments: Arguments, threads: int) -> _Sizes:
    coupling = arguments.coupling
    clusters = 0 if coupling is None else coupling.shape[0]
    return _sizes(arguments.shape, _n_decays(arguments), clusters, arguments.dynamics.hard_reset, threads)


def _n_decays(arguments: Arguments) -> int:
    """Return the number of elements of ``beta_mem`` and of ``beta_syn``, 1 if both are None."""
    beta = arguments.beta_syn if arguments.beta_mem is None else arguments.beta_mem
    return 1 if beta is None else beta.shape[0]


@functools.lru_cache(maxsize=1024)
def _modes(dynamics: Dynamics, own_decays: bool) -> tuple[int, ...]:
    """Return the numbers of :class:`_Modes`."""
    charge, _, _, hard_reset, _, detach_reset = dynamics
    flags = charge == "relax", charge == "leak", charge == "average", own_decays
    return tuple(map(int, (*flags, hard_reset, detach_reset)))


@functools.lru_cache(maxsize=1024)
def _constants(v_reset: float, refractory_steps: int, dynamics: Dynamics, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the numbers of :class:`_Constants`."""
    _, tau, v_rest, _, reset_scale, _ = dynamics
    return tuple(map(NUMPY_TYPES[dtype], (0.0, 0.0, v_reset, refractory_steps, tau, v_rest, reset_scale)))


def _contiguous(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else as_contiguous(x, dtype) for x in tensors]


def _input_tensors(arguments: Arguments, dtype: torch.dtype) -> list[Tensor | None]:
    """Return the tensors of :class:`_Inputs`, contiguous."""
    x, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, *_ = arguments
    couplings = [None, None] if coupling is None else [_padded(coupling, dtype), _padded(coupling.T, dtype)]
    state = [*_contiguous(x, v, i_syn, dtype=dtype), *_contiguous(refractory, dtype=torch.int32)]
    return [*state, *_contiguous(threshold, beta_mem, beta_syn, dtype=dtype), *couplings]


def _padded(coupling: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the coupling padded with zeros to ``[C, width]``."""
    missing = -coupling.shape[0] % WIDTH
    return as_contiguous(torch.nn.functional.pad(coupling, (0, missing)) if missing else coupling, dtype)


def forward(
    arguments: Arguments, keep_v: bool, membrane_only: bool = False
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Return spikes, membrane potentials (None unless ``keep_v``) and the last state (v alone if ``membrane_only``)."""
    dtype = compute_dtype(arguments.x)
    inputs = _input_tensors(arguments, dtype)
    x: Any = inputs[0]
    # empty_like takes a third of the time of torch.empty.
    spikes = torch.empty_like(x)
    v_seq = torch.empty_like(x) if keep_v else None
    v_last = torch.empty_like(x) if x.shape == arguments.step else x.new_empty(arguments.step)
    i_last = None if membrane_only else torch.empty_like(v_last)
    refractory_last = None if membrane_only else torch.empty_like(v_last, dtype=torch.int32)
    threads = n_threads(x.numel())
    sizes = _sizes_of(arguments, threads)
    tiles, width = sizes.tiles, sizes.width
    # Allocated here: memory allocated in the threads causes page faults in every call.
    scratch_size = tiles * _STATE + 2 * (tiles * _TILE + WIDTH) + (sizes.block_length // sizes.D + 1) * width
    scratch = workspace(sizes.chunks * dtype.itemsize * scratch_size)
    _forward(
        threads,
        tuple(sizes),
        addresses(inputs),
        addresses((spikes, v_seq, v_last, i_last, refractory_last)),
        keep_v,
        _constants(arguments.v_reset, arguments.refractory_steps, arguments.dynamics, dtype),
        _modes(arguments.dynamics, sizes.n_decays > 1),
        scratch.parts[0],
        scratch_size,
    )
    if arguments.x.dtype is not dtype:
        spikes, v_seq = spikes.to(arguments.x.dtype), None if v_seq is None else v_seq.to(arguments.x.dtype)
    return spikes, v_seq, v_last, i_last, refractory_last


def backward(
    grads: OutputGradients,
    arguments: Arguments,
    surrogate: str,
    alpha: float,
    parameters: bool = True,
    logits: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, v, i_syn, threshold, both betas and coupling, None for inputs that are None.

    Without ``parameters`` all but the first three are None. With ``logits``, the gradients of the betas are those of their
    logits.
    """
    dtype = compute_dtype(arguments.x)
    inputs, grad_outputs = _input_tensors(arguments, dtype), _contiguous(*grads, dtype=dtype)
    x: Any
    x, v, i_syn, _, threshold, beta_mem, beta_syn, *_ = inputs
    grad_x, grad_v, grad_i = _empty_like(x, v, i_syn)
    of_parameters = _empty_like(threshold, beta_mem, beta_syn, arguments.coupling) if parameters else [None] * 4
    threads = n_threads(x.numel())
    sizes = _sizes_of(arguments, threads)
    chunks, _, block_length, tiles, T, _, D, _, n_decays, C, width, record_of_tile = sizes
    scratch_size = tiles * _STATE + 4 * (tiles * _TILE + WIDTH) + 2 * WIDTH
    scratch_size += (2 * T * (block_length // D) + C + 1) * width
    memory = workspace(
        8 * chunks * (D + 2 * n_decays + C * width),  # sums in float64
        chunks * dtype.itemsize * scratch_size,
        chunks * T * tiles * record_of_tile * dtype.itemsize,
        chunks * T * tiles * _MASKS * 2,
    )
    sums, scratch, record, masks = memory.parts
    _backward(
        threads,
        tuple(sizes),
        addresses(grad_outputs),
        addresses(inputs),
        _constants(arguments.v_reset, arguments.refractory_steps, arguments.dynamics, dtype),
        _modes(arguments.dynamics, n_decays > 1),
        (SURROGATE_IDS[surrogate], NUMPY_TYPES[dtype](alpha)),
        (record, masks),
        scratch,
        scratch_size,
        (*addresses((grad_x, grad_v, grad_i)), sums),
        (*addresses(of_parameters), NUMPY_TYPES[dtype](logits)),
    )
    if arguments.x.dtype is not dtype:
        grad_x = grad_x.to(arguments.x.dtype)
    return grad_x, grad_v, grad_i, *of_parameters


def _empty_like(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
