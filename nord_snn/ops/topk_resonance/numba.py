"""Temporal co-firing resonance on the CPU: Numba kernels that count coincidences on packed bits, one head at a time.

The spikes of a head over all time steps are packed into a few machine words; the coincidences of two positions are the
bits that are set in both. If q or k contains other values than zeros and ones, products are summed instead. The best keys
of a query are found by bisection over the bit patterns of the scores, which have the order of the scores. The result is a
short list of keys and weights per query. The backward pass processes these lists one time step after the other, so that
the keys of a time step and their gradients stay in the cache.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nord_snn.ops._numba.compiling import chunks_of, kernel, parallel_kernel
from nord_snn.ops._numba.scores import pack, penalize, select_best, softmax, weighted_values
from nord_snn.ops._numba.simd import (
    WIDTH,
    advance,
    as_pointer,
    broadcast,
    count_bits,
    fused,
    masked_load,
    masked_store,
    ne_mask,
    prefetch,
    reduce_sum,
)
from nord_snn.ops._numba.tensors import NUMPY_TYPES, addresses, as_contiguous, data_pointer
from nord_snn.ops._numba.threads import n_threads
from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.topk_resonance.support import Arguments

__all__ = ["backward", "forward", "saved_shapes"]

_BLOCK = 64  # number of queries whose lists the backward pass processes together at each time step
_RECENT = 256  # number of the most recent keys, which are prefetched for the next time step


class _Sizes(NamedTuple):
    """Sizes of a call.

    Attributes:
        chunks: number of parts of the work, at most two per thread.
        T: number of time steps.
        B: number of sequences.
        S: number of positions.
        D: number of neurons at a position.
        V: width of the values.
        n_heads: number of heads.
        top_k: number of keys that each query selects, at most S.
        words: number of 64-bit words for the spikes of a head at a position.
    """

    chunks: int
    T: int
    B: int
    S: int
    D: int
    V: int
    n_heads: int
    top_k: int
    words: int


class _Constants(NamedTuple):
    """Numbers of a call; ``int_max`` is the largest integer with the size of a score."""

    temperature: Any
    causal: bool
    int_max: Any


class _Inputs(NamedTuple):
    """Addresses of the inputs; the address of recency is 0 for None."""

    q: int
    k: int
    v: int
    recency: int


class _Lists(NamedTuple):
    """Selected keys and their weights, ``top_k + 1`` per query: addresses of all chunks, or pointers of one."""

    selected: Any
    weights: Any


class _Scratch(NamedTuple):
    """Scratch memory for the scores of a query: addresses of all chunks, or pointers of one.

    Attributes:
        bits: packed spikes of all queries of a head, then of all keys.
        counts: coincidences with each key.
        scores: score of each key.
    """

    bits: Any
    counts: Any
    scores: Any


class _Groups(NamedTuple):
    """Scratch memory of the backward pass for a block, in groups of four queries: addresses of all chunks, or pointers of one.

    Attributes:
        grad_scores: score gradients of the block's lists.
        slot_of_key: index of each key in the list of a group, or -1.
        n_keys: number of keys of each group.
        keys: keys of each group.
        key_grads: score gradients of each group, four per key.
    """

    grad_scores: Any
    slot_of_key: Any
    n_keys: Any
    keys: Any
    key_grads: Any


class _Results(NamedTuple):
    """Addresses of the gradients; the gradients of temperature and recency are sums per head, in float64."""

    q: int
    k: int
    v: int
    temperature: int
    recency: int


class _Head(NamedTuple):
    """The spikes of one head: head ``h`` of sequence ``b``, ``width`` neurons of ``q, k [T, B, S, D]``."""

    q: Any
    k: Any
    shape: tuple[int, int, int, int]
    b: int
    h: int
    width: int


class _Spikes(NamedTuple):
    """Pointers to queries and keys, and to their gradients."""

    q: Any
    k: Any
    grad_q: Any
    grad_k: Any


@kernel
def _count_coincidences(q_bits, k_bits, i, keys, words, S, counts, scores):
    """Set ``scores[j]`` to the coincidences of query i and key j, for the first ``keys`` keys, from packed words."""
    for j in range(keys):
        counts[j] = 0
    for w in range(words):
        word = q_bits[i * words + w]
        if word != 0:  # firing is sparse
            for j in range(keys):
                counts[j] += count_bits(word & k_bits[w * S + j])
    for j in range(keys):
        scores[j] = counts[j]


@kernel
def _sum_products(head, i, keys, scores):
    """Set ``scores[j]`` to the sum of products of query i and key j, for q or k with other values than 0 and 1."""
    q, k, (T, B, S, D), b, h, width = head
    last = keys - 1
    for j in range(0, keys, 4):  # four accumulators hide the latency of ``fused``
        sum_0, sum_1, sum_2, sum_3 = (
            broadcast(scores, 0),
            broadcast(scores, 0),
            broadcast(scores, 0),
            broadcast(scores, 0),
        )
        for t in range(T):
            at = (t * B + b) * S * D + h * width
            for w in range(0, width, WIDTH):
                spikes = masked_load(q, at + i * D + w, width - w)
                sum_0 = fused(spikes, masked_load(k, at + j * D + w, width - w), sum_0)
                sum_1 = fused(spikes, masked_load(k, at + min(j + 1, last) * D + w, width - w), sum_1)
                sum_2 = fused(spikes, masked_load(k, at + min(j + 2, last) * D + w, width - w), sum_2)
                sum_3 = fused(spikes, masked_load(k, at + min(j + 3, last) * D + w, width - w), sum_3)
        # If fewer than four keys are left, the last key is computed several times.
        scores[j], scores[min(j + 1, last)] = reduce_sum(sum_0), reduce_sum(sum_1)
        scores[min(j + 2, last)], scores[min(j + 3, last)] = reduce_sum(sum_2), reduce_sum(sum_3)


@kernel
def _pack_head(head, words, bits):
    """Pack the spikes of a head; return whether all are 0 or 1."""
    q, k, shape, b, h, width = head
    S = shape[2]
    binary = pack(q, shape, b, h, width, bits, 1, words)
    return binary & pack(k, shape, b, h, width, advance(bits, words * S), S, 1)


@kernel
def _select_keys(i, binary, head, sizes, slope, constants, scratch, selected, weights):
    """Write the selected keys of query i and their weights; return the number of keys."""
    bits, counts, scores = scratch
    S, words = sizes.S, sizes.words
    keys = i + 1 if constants.causal else S
    if binary:
        _count_coincidences(bits, advance(bits, words * S), i, keys, words, S, counts, scores)
    else:
        _sum_products(head, i, keys, scores)
    penalize(scores, i, keys, constants.temperature, slope)
    n = select_best(scores, keys, sizes.top_k, constants.int_max, counts, selected)
    softmax(scores, selected, n, weights)
    return n


@kernel
def _forward_heads(first, last, sizes, inputs, constants, scratch, lists, save_lists, context):
    """Run the forward pass of the heads ``first`` to ``last - 1`` of ``B * H``; with ``save_lists``, store all lists."""
    _, T, B, S, D, V, n_heads, top_k, words = sizes
    like = constants.temperature
    q, k, v = as_pointer(inputs.q, like), as_pointer(inputs.k, like), as_pointer(inputs.v, like)
    recency, context_ = as_pointer(inputs.recency, like), as_pointer(context, like)
    width, v_head_dim, stride = D // n_heads, V // n_heads, top_k + 1
    for number in range(first, last):
        b, h = number // n_heads, number % n_heads
        head = _Head(q, k, (T, B, S, D), b, h, width)
        binary = _pack_head(head, words, scratch.bits)
        at, slope = b * S * V + h * v_head_dim, recency[h] if inputs.recency != 0 else like * 0
        for i in range(S):
            row = (number * S + i) * stride if save_lists else 0
            keys, key_weights = advance(lists.selected, row), advance(lists.weights, row)
            n = _select_keys(i, binary, head, sizes, slope, constants, scratch, keys, key_weights)
            weighted_values(v, at, V, v_head_dim, keys, key_weights, n, context_, at + i * V)


@kernel
def _score_gradients(grad, v, grad_v, at, n_features, width, i, selected, weights, n, grad_scores):
    """Write the score gradients ``w * (g - sum(w * g))`` of a query, with ``g = grad . v``; add the value gradients.

    Return the sum of distance times score gradient, the negative gradient of the recency slope.
    """
    weighted = broadcast(v, 0)
    for m in range(n):
        product = broadcast(v, 0)
        for c in range(0, width, WIDTH):
            grad_out = masked_load(grad, at + i * n_features + c, width - c)
            value = at + selected[m] * n_features + c
            product = fused(grad_out, masked_load(v, value, width - c), product)
            share = fused(broadcast(v, weights[m]), grad_out, masked_load(grad_v, value, width - c))
            masked_store(grad_v, value, width - c, share)
        grad_scores[m] = reduce_sum(product)
    for m in range(0, n, WIDTH):
        weighted = fused(masked_load(weights, m, n - m), masked_load(grad_scores, m, n - m), weighted)
    mean_grad = broadcast(v, reduce_sum(weighted))
    for m in range(0, n, WIDTH):
        centred = masked_load(grad_scores, m, n - m) - mean_grad
        masked_store(grad_scores, m, n - m, masked_load(weights, m, n - m) * centred)
    by_distance = 0.0
    for m in range(n):
        by_distance += grad_scores[m] * abs(i - selected[m])
    return by_distance


@kernel
def _merge_lists(selected, grad_scores, stride, i, last, S, top_k, causal, slot_of_key, keys, key_grads):
    """Merge the lists of the queries i to ``last - 1`` (at most four) into one; return its number of keys.

    It has every selected key, with four score gradients, 0 for queries that did not select the key.
    """
    n_keys = 0
    for r in range(last - i):
        for m in range(r * stride, r * stride + min(i + r + 1 if causal else S, top_k)):
            key = selected[m]
            if slot_of_key[key] < 0:
                slot_of_key[key] = n_keys
                keys[n_keys] = key
                for other in range(4):
                    key_grads[4 * n_keys + other] = 0
                n_keys += 1
            key_grads[4 * slot_of_key[key] + r] = grad_scores[m]
    for m in range(n_keys):
        slot_of_key[keys[m]] = -1
    return n_keys


@kernel
def _spike_gradients(spikes, at, n_features, width, i, last, keys, key_grads, n, temperature, needs_spike_grad):
    """Add the gradients of the spikes of the queries i to ``last - 1`` (at most four), and of their keys, at one time step.

    Each key is read and written once for four queries. Return the gradient of the temperature,
    ``q . (sum of score gradients times k)``: the sum of score gradient times count, where counts are ``q . k``.
    """
    q, k, grad_q, grad_k = spikes
    scale, zero, grad_temperature = broadcast(q, temperature), broadcast(q, 0), broadcast(q, 0)
    a, b, c, d = at + i * n_features, at + (i + 1) * n_features, at + (i + 2) * n_features, at + (i + 3) * n_features
    for w in range(0, width, WIDTH):
        # For missing queries the width is 0, so that nothing is read or written.
        n_a, n_b, n_c, n_d = (
            width - w, width - w if last > i + 1 else 0, width - w if last > i + 2 else 0,
            width - w if last > i + 3 else 0
        )  # fmt: skip
        q_a, q_b = masked_load(q, a + w, n_a), masked_load(q, b + w, n_b)
        q_c, q_d = masked_load(q, c + w, n_c), masked_load(q, d + w, n_d)
        any_spikes = ne_mask(q_a, zero) | ne_mask(q_b, zero) | ne_mask(q_c, zero) | ne_mask(q_d, zero)
        if any_spikes == 0 and not needs_spike_grad:
            continue
        sum_a, sum_b, sum_c, sum_d = zero, zero, zero, zero
        for m in range(n):
            grad_a, grad_b = broadcast(q, key_grads[4 * m]), broadcast(q, key_grads[4 * m + 1])
            grad_c, grad_d = broadcast(q, key_grads[4 * m + 2]), broadcast(q, key_grads[4 * m + 3])
            key = at + keys[m] * n_features + w
            key_spikes = masked_load(k, key, width - w)
            sum_a, sum_b = fused(grad_a, key_spikes, sum_a), fused(grad_b, key_spikes, sum_b)
            sum_c, sum_d = fused(grad_c, key_spikes, sum_c), fused(grad_d, key_spikes, sum_d)
            if needs_spike_grad and any_spikes != 0:  # silent queries give their keys no gradient
                grad_key = fused(grad_a, q_a, grad_b * q_b) + fused(grad_c, q_c, grad_d * q_d)
                masked_store(grad_k, key, width - w, fused(scale, grad_key, masked_load(grad_k, key, width - w)))
        if needs_spike_grad:
            masked_store(grad_q, a + w, n_a, scale * sum_a)
            masked_store(grad_q, b + w, n_b, scale * sum_b)
            masked_store(grad_q, c + w, n_c, scale * sum_c)
            masked_store(grad_q, d + w, n_d, scale * sum_d)
        grad_temperature = fused(q_a, sum_a, fused(q_b, sum_b, fused(q_c, sum_c, fused(q_d, sum_d, grad_temperature))))
    return reduce_sum(grad_temperature)


@kernel
def _prefetch_rows(rows, at, first, last, n_features, width):
    """Prefetch the positions ``first`` to ``last - 1`` of a head for the next time step."""
    for i in range(first, last):
        for c in range(0, width, WIDTH):
            prefetch(rows, at + i * n_features + c)


@kernel
def _backward_heads(
    first, last, sizes, grad, inputs, constants, scratch, lists, has_saved_lists, groups, results, needs_spike_grad
):
    """Run the backward pass of the heads ``first`` to ``last - 1``; recompute the lists unless ``has_saved_lists``."""
    _, T, B, S, D, V, n_heads, top_k, words = sizes
    like = constants.temperature
    q, k, v = as_pointer(inputs.q, like), as_pointer(inputs.k, like), as_pointer(inputs.v, like)
    recency, grad_out, grad_v = as_pointer(inputs.recency, like), as_pointer(grad, like), as_pointer(results.v, like)
    spikes = _Spikes(q, k, as_pointer(results.q, like), as_pointer(results.k, like))
    grad_temperature = as_pointer(results.temperature, np.float64(0))
    grad_recency = as_pointer(results.recency, np.float64(0))
    width, v_head_dim, stride, max_keys = D // n_heads, V // n_heads, top_k + 1, min(4 * top_k, S)
    for number in range(first, last):
        b, h = number // n_heads, number % n_heads
        head = _Head(q, k, (T, B, S, D), b, h, width)
        at, at_v = b * S * D + h * width, b * S * V + h * v_head_dim
        slope = recency[h] if inputs.recency != 0 else like * 0
        binary = has_saved_lists or _pack_head(head, words, scratch.bits)
        for start in range(0, S, _BLOCK):
            stop = min(start + _BLOCK, S)
            for i in range(start, stop):
                row = (number * S + i if has_saved_lists else i - start) * stride
                keys, key_weights = advance(lists.selected, row), advance(lists.weights, row)
                n = min(i + 1 if constants.causal else S, top_k)
                if not has_saved_lists:
                    _select_keys(i, binary, head, sizes, slope, constants, scratch, keys, key_weights)
                grad_recency[number] -= _score_gradients(
                    grad_out, v, grad_v, at_v, V, v_head_dim, i, keys, key_weights, n,
                    advance(groups.grad_scores, (i - start) * stride),
                )  # fmt: skip
            for i in range(start, stop, 4):
                row, group = (number * S + i if has_saved_lists else i - start) * stride, (i - start) // 4
                groups.n_keys[group] = _merge_lists(
                    advance(lists.selected, row), advance(groups.grad_scores, (i - start) * stride), stride, i,
                    min(i + 4, stop), S, top_k, constants.causal, groups.slot_of_key,
                    advance(groups.keys, group * max_keys), advance(groups.key_grads, 4 * group * max_keys),
                )  # fmt: skip
            for t in range(T):
                next_step = min(t + 1, T - 1) * B * S * D + at
                recent = max(0, stop - _RECENT)
                _prefetch_rows(q, next_step, start, stop, D, width)
                _prefetch_rows(k, next_step, recent, stop, D, width)
                if needs_spike_grad:
                    _prefetch_rows(spikes.grad_q, next_step, start, stop, D, width)
                    _prefetch_rows(spikes.grad_k, next_step, recent, stop, D, width)
                for i in range(start, stop, 4):
                    group = (i - start) // 4
                    grad_temperature[number] += _spike_gradients(
                        spikes, t * B * S * D + at, D, width, i, min(i + 4, stop),
                        advance(groups.keys, group * max_keys), advance(groups.key_grads, 4 * group * max_keys),
                        groups.n_keys[group], constants.temperature, needs_spike_grad,
                    )  # fmt: skip


@kernel
def _scratch_of_chunk(c, sizes, scratch, like):
    """Return the pointers of chunk c from the addresses of all chunks."""
    bits, counts, scores = scratch
    return _Scratch(
        advance(as_pointer(bits, np.int64(0)), c * 2 * sizes.words * sizes.S),
        advance(as_pointer(counts, np.int64(0)), c * sizes.S),
        advance(as_pointer(scores, like), c * (sizes.S + WIDTH)),
    )


@kernel
def _groups_of_chunk(c, sizes, groups, like):
    """Return the pointers of chunk c from the addresses of all chunks."""
    grad_scores, slot_of_key, n_keys, keys, key_grads = groups
    n_groups, max_keys = _BLOCK // 4, min(4 * sizes.top_k, sizes.S)
    return _Groups(
        advance(as_pointer(grad_scores, like), c * _BLOCK * (sizes.top_k + 1)),
        advance(as_pointer(slot_of_key, np.int32(0)), c * sizes.S),
        advance(as_pointer(n_keys, np.int32(0)), c * n_groups),
        advance(as_pointer(keys, np.int32(0)), c * n_groups * max_keys),
        advance(as_pointer(key_grads, like), c * n_groups * 4 * max_keys),
    )


@kernel
def _lists_of_chunk(c, size, saved, lists, like):
    """Return pointers to the lists of all queries if they are ``saved``, else to the ``size`` entries of chunk c."""
    selected, weights = lists
    first = 0 if saved else c * size
    return _Lists(advance(as_pointer(selected, np.int32(0)), first), advance(as_pointer(weights, like), first))


@parallel_kernel
def _forward(share, sizes, inputs, constants, scratch, lists, save_lists, context):
    """Run the forward pass of the chunks of a share; tuples have the fields of the classes above."""
    chunks, heads = sizes[0], sizes[2] * sizes[6]
    for c in chunks_of(share, chunks):
        named_sizes, named_constants = _Sizes(*sizes), _Constants(*constants)
        like = named_constants.temperature
        _forward_heads(
            c * heads // chunks, (c + 1) * heads // chunks, named_sizes, _Inputs(*inputs), named_constants,
            _scratch_of_chunk(c, named_sizes, scratch, like), _lists_of_chunk(c, named_sizes.top_k + 1, save_lists, lists, like),
            save_lists, context,
        )  # fmt: skip


@parallel_kernel
def _backward(
    share, sizes, grad, inputs, constants, scratch, lists, has_saved_lists, groups, results, needs_spike_grad
):
    """Run the backward pass of the chunks of a share; tuples have the fields of the classes above."""
    chunks, heads = sizes[0], sizes[2] * sizes[6]
    for c in chunks_of(share, chunks):
        named_sizes, named_constants = _Sizes(*sizes), _Constants(*constants)
        like = named_constants.temperature
        _backward_heads(
            c * heads // chunks, (c + 1) * heads // chunks, named_sizes, grad, _Inputs(*inputs), named_constants,
            _scratch_of_chunk(c, named_sizes, scratch, like),
            _lists_of_chunk(c, _BLOCK * (named_sizes.top_k + 1), has_saved_lists, lists, like), has_saved_lists,
            _groups_of_chunk(c, named_sizes, groups, like), _Results(*results), needs_spike_grad,
        )  # fmt: skip


def _sizes(arguments: Arguments, threads: int) -> _Sizes:
    T, B, S, D = arguments.q.shape
    n_heads = arguments.n_heads
    chunks = max(1, min(B * n_heads, 2 * threads))
    words = -(-T * -(-D // n_heads // WIDTH) * WIDTH // 64)
    return _Sizes(chunks, T, B, S, D, arguments.v.shape[2], n_heads, min(arguments.top_k, S), words)


def _constants(arguments: Arguments, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the numbers of :class:`_Constants`."""
    int_max = np.int64(torch.iinfo(_INTEGERS[dtype]).max)
    return (NUMPY_TYPES[dtype](arguments.temperature.item()), arguments.causal, int_max)


def _input_tensors(arguments: Arguments, dtype: torch.dtype) -> list[Tensor | None]:
    """Return the tensors of :class:`_Inputs`, contiguous."""
    inputs = arguments.q, arguments.k, arguments.v, arguments.recency
    return [None if x is None else as_contiguous(x, dtype) for x in inputs]


def _scratch_tensors(sizes: _Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors of :class:`_Scratch` for all chunks."""
    return (
        torch.empty(sizes.chunks, 2, sizes.words * sizes.S, dtype=torch.int64, device="cpu"),
        torch.empty(sizes.chunks, sizes.S, dtype=torch.int64, device="cpu"),
        torch.empty(sizes.chunks, sizes.S + WIDTH, dtype=dtype, device="cpu"),
    )


def _group_tensors(sizes: _Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the tensors of :class:`_Groups` for all chunks."""
    chunks, n_groups, max_keys = sizes.chunks, _BLOCK // 4, min(4 * sizes.top_k, sizes.S)
    return (
        torch.empty(chunks, _BLOCK * (sizes.top_k + 1), dtype=dtype, device="cpu"),
        torch.full((chunks, sizes.S), -1, dtype=torch.int32, device="cpu"),
        torch.empty(chunks, n_groups, dtype=torch.int32, device="cpu"),
        torch.empty(chunks, n_groups, max_keys, dtype=torch.int32, device="cpu"),
        torch.empty(chunks, n_groups, 4 * max_keys, dtype=dtype, device="cpu"),
    )


def _list_tensors(saved: tuple[Tensor, Tensor], sizes: _Sizes, queries: int) -> tuple[Tensor, Tensor]:
    """Return the saved lists or, if these are empty, memory for the lists of ``queries`` queries per chunk.

    A list has ``top_k + 1`` entries: the selection writes the next candidate before it decides whether to keep it.
    """
    selected, weights = saved
    if len(selected):
        return selected, weights
    shape = sizes.chunks * queries, sizes.top_k + 1
    return selected.new_empty(shape), weights.new_empty(shape)


def saved_shapes(q: Tensor, n_heads: int, top_k: int, save_weights: bool) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the tensors that ``forward`` returns for ``backward``: selected keys, an empty one, weights.

    Keys and weights are ``[B * H * S, top_k + 1]`` if together they have no more elements than the queries. Otherwise
    they are ``[0, 0]``, and the backward pass recomputes them.
    """
    T, B, S, D = q.shape
    n_selected = min(top_k, S) + 1
    lists = (B * n_heads * S, n_selected) if save_weights and 2 * n_selected * n_heads <= T * D else (0, 0)
    return lists, (0,), lists


def forward(arguments: Arguments, save_weights: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the context, and for ``backward`` the selected keys, an empty tensor and the weights."""
    q, _, v, _, _, n_heads, top_k, _ = arguments
    dtype = compute_dtype(v)
    context, no_scores = torch.empty(v.shape, dtype=dtype, device="cpu"), torch.empty(0, dtype=dtype, device="cpu")
    shape, *_ = saved_shapes(q, n_heads, top_k, save_weights)
    selected, weights = (
        torch.zeros(shape, dtype=torch.int32, device="cpu"),
        torch.zeros(shape, dtype=dtype, device="cpu"),
    )
    if not context.numel():
        return context.to(v.dtype), selected, no_scores, weights
    inputs = _input_tensors(arguments, dtype)
    threads = n_threads()
    sizes = _sizes(arguments, threads)
    scratch, lists = _scratch_tensors(sizes, dtype), _list_tensors((selected, weights), sizes, 1)
    _forward(
        threads,
        tuple(sizes),
        addresses(inputs),
        _constants(arguments, dtype),
        addresses(scratch),
        addresses(lists),
        len(selected) > 0,
        data_pointer(context),
    )
    return context.to(v.dtype), selected, no_scores, weights


def backward(
    grad: Tensor, arguments: Arguments, saved: tuple[Tensor, Tensor, Tensor], needs_spike_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q and k (empty unless ``needs_spike_grad``), v, temperature and recency (empty if None)."""
    q, k, v, _, recency, n_heads, *_ = arguments
    selected, _, weights = saved
    dtype = compute_dtype(v)
    shape = q.shape if needs_spike_grad else (0,) * 4
    grad_q, grad_k = torch.empty(shape, dtype=dtype, device="cpu"), torch.zeros(shape, dtype=dtype, device="cpu")
    grad_v = torch.zeros(v.shape, dtype=dtype, device="cpu")
    by_head = torch.zeros(2, v.shape[0] * n_heads, dtype=torch.float64, device="cpu")
    if v.numel():
        grad, inputs = as_contiguous(grad, dtype), _input_tensors(arguments, dtype)
        threads = n_threads()
        sizes = _sizes(arguments, threads)
        lists = _list_tensors((selected, weights), sizes, _BLOCK)
        scratch, groups = _scratch_tensors(sizes, dtype), _group_tensors(sizes, dtype)
        _backward(
            threads,
            tuple(sizes),
            data_pointer(grad),
            addresses(inputs),
            _constants(arguments, dtype),
            addresses(scratch),
            addresses(lists),
            len(selected) > 0,
            addresses(groups),
            addresses((grad_q, grad_k, grad_v, by_head[0], by_head[1])),
            needs_spike_grad,
        )
    grad_temperature, grad_recency = by_head[0].sum().to(dtype), by_head[1].view(-1, n_heads).sum(0).to(dtype)
    return (
        grad_q.to(q.dtype) if needs_spike_grad else q.new_empty(0),
        grad_k.to(k.dtype) if needs_spike_grad else k.new_empty(0),
        grad_v.to(v.dtype),
        grad_temperature,
        grad_recency if recency is not None else torch.empty(0, dtype=dtype, device="cpu"),
    )


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
