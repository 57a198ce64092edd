"""Temporal co-firing resonance on the CPU: Numba kernels that count coincidences on packed bits, one head at a time.

The spikes of a head over all time steps are packed into a few machine words; the coincidences of two positions are the
bits that are set in both. The best keys of a query are found by bisection over the bit patterns of the scores, which
have the order of the scores. The result is a short list of keys and weights per query. The backward pass goes through
these lists time step by time step, so that the keys of a step and their gradients stay in the cache. If q or k is not
made of zeros and ones, products are summed instead.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from nord_snn.ops._numba.compiling import kernel, parallel_kernel
from nord_snn.ops._numba.scores import pack, penalize, select_best, softmax, weighted_values
from nord_snn.ops._numba.simd import (
    WIDTH,
    advance,
    broadcast,
    count_bits,
    fused,
    masked_load,
    masked_store,
    ne_mask,
    pointer,
    prefetch,
    reduce_sum,
)
from nord_snn.ops._numba.threads import as_many_threads_as_torch
from nord_snn.ops.checks import compute_dtype

__all__ = ["backward", "forward", "saved_shapes"]

_BLOCK = 64  # queries whose lists the backward pass processes together, time step by time step
_RECENT = 256  # most recent keys, prefetched for the next time step


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
def _sum_products(q, k, shape, b, h, width, i, keys, scores):
    """Set ``scores[j]`` to the products of query i and key j, if q or k is not binary."""
    T, B, S, D = shape
    last = keys - 1
    for j in range(0, keys, 4):  # four accumulators hide the latency of the FMA
        a, b_, c_, d = broadcast(scores, 0), broadcast(scores, 0), broadcast(scores, 0), broadcast(scores, 0)
        for t in range(T):
            at = (t * B + b) * S * D + h * width
            for w in range(0, width, WIDTH):
                spikes = masked_load(q, at + i * D + w, width - w)
                a = fused(spikes, masked_load(k, at + j * D + w, width - w), a)
                b_ = fused(spikes, masked_load(k, at + min(j + 1, last) * D + w, width - w), b_)
                c_ = fused(spikes, masked_load(k, at + min(j + 2, last) * D + w, width - w), c_)
                d = fused(spikes, masked_load(k, at + min(j + 3, last) * D + w, width - w), d)
        # Past the last key, the last key is computed again.
        scores[j], scores[min(j + 1, last)] = reduce_sum(a), reduce_sum(b_)
        scores[min(j + 2, last)], scores[min(j + 3, last)] = reduce_sum(c_), reduce_sum(d)


@kernel
def _select_keys(
    i, binary, q, k, shape, b, h, width, q_bits, k_bits, words, temperature, slope, top_k, causal, int_max,
    counts, scores, selected, weights,
):  # fmt: skip
    """Write the selected keys of query i and their weights; return their number."""
    S = shape[2]
    keys = i + 1 if causal else S
    if binary:
        _count_coincidences(q_bits, k_bits, i, keys, words, S, counts, scores)
    else:
        _sum_products(q, k, shape, b, h, width, i, keys, scores)
    penalize(scores, i, keys, temperature, slope)
    n = select_best(scores, keys, top_k, int_max, counts, selected)
    softmax(scores, selected, n, weights)
    return n


@kernel
def _forward_heads(
    first, last, q, k, v, temperature, recency, n_heads, top_k, causal, int_max, words, bits, counts, scores, selected,
    weights, save_lists, context,
):  # fmt: skip
    """Compute heads ``first`` to ``last`` of ``B * H``; with ``save_lists``, store the lists of all queries."""
    shape, (_, S, V) = q.shape, v.shape
    width, v_head_dim = shape[3] // n_heads, V // n_heads
    selected_, weights_, stride = pointer(selected), pointer(weights), selected.shape[1]
    q_, k_, v_, context_ = pointer(q), pointer(k), pointer(v), pointer(context)
    q_bits, k_bits, counts_, scores_ = pointer(bits[0]), pointer(bits[1]), pointer(counts), pointer(scores)
    for head in range(first, last):
        b, h = head // n_heads, head % n_heads
        binary = pack(q_, shape, b, h, width, q_bits, 1, words)
        binary &= pack(k_, shape, b, h, width, k_bits, S, 1)
        at, slope = b * S * V + h * v_head_dim, recency[h] if len(recency) else temperature * 0
        for i in range(S):
            row = (head * S + i) * stride if save_lists else 0
            n = _select_keys(
                i, binary, q_, k_, shape, b, h, width, q_bits, k_bits, words, temperature, slope, top_k, causal,
                int_max, counts_, scores_, advance(selected_, row), advance(weights_, row),
            )  # fmt: skip
            weighted_values(
                v_, at, V, v_head_dim, advance(selected_, row), advance(weights_, row), n, context_, at + i * V
            )


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
    """Merge the lists of queries i to ``last`` (at most four) into one: every selected key, with four score gradients.

    The gradient is 0 for queries that did not select the key. Return the number of keys.
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
def _spike_gradients(
    q, k, grad_q, grad_k, at, n_features, width, i, last, keys, key_grads, n, temperature, needs_spike_grad
):
    """Add the gradients of the spikes of queries i to ``last`` (at most four), and of their keys, at one time step.

    Each key is read and written once for four queries. Return the gradient of the temperature,
    ``q . (sum of score gradients times k)``: the sum of score gradient times count, where counts are ``q . k``.
    """
    scale, zero, grad_temperature = broadcast(q, temperature), broadcast(q, 0), broadcast(q, 0)
    a, b, c, d = at + i * n_features, at + (i + 1) * n_features, at + (i + 2) * n_features, at + (i + 3) * n_features
    for w in range(0, width, WIDTH):
        # Width 0 for missing queries, so that nothing is read or written for them.
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
            spikes = masked_load(k, key, width - w)
            sum_a, sum_b = fused(grad_a, spikes, sum_a), fused(grad_b, spikes, sum_b)
            sum_c, sum_d = fused(grad_c, spikes, sum_c), fused(grad_d, spikes, sum_d)
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
    """Prefetch rows ``first`` to ``last`` of a head for the next time step."""
    for i in range(first, last):
        for c in range(0, width, WIDTH):
            prefetch(rows, at + i * n_features + c)


@kernel
def _backward_heads(
    first, last, grad, q, k, v, temperature, recency, n_heads, top_k, causal, needs_spike_grad, int_max, words, bits,
    counts, scores, selected, weights, has_saved_lists, grad_scores, slot_of_key, n_keys, keys, key_grads, grad_q,
    grad_k, grad_v, grad_temperature, grad_recency,
):  # fmt: skip
    """Compute heads ``first`` to ``last``; unless ``has_saved_lists``, the lists are recomputed block by block."""
    (T, B, S, D), V, shape = q.shape, v.shape[2], q.shape
    width, v_head_dim = D // n_heads, V // n_heads
    q_, k_, v_, grad_ = pointer(q), pointer(k), pointer(v), pointer(grad)
    grad_q_, grad_k_, grad_v_, grad_scores_ = pointer(grad_q), pointer(grad_k), pointer(grad_v), pointer(grad_scores)
    q_bits, k_bits, counts_, scores_ = pointer(bits[0]), pointer(bits[1]), pointer(counts), pointer(scores)
    selected_, weights_, stride = pointer(selected), pointer(weights), selected.shape[1]
    slot_of_key_, n_keys_, keys_, key_grads_, max_keys = (
        pointer(slot_of_key),
        pointer(n_keys),
        pointer(keys),
        pointer(key_grads),
        keys.shape[1],
    )
    for head in range(first, last):
        b, h = head // n_heads, head % n_heads
        at, at_v = b * S * D + h * width, b * S * V + h * v_head_dim
        slope = recency[h] if len(recency) else temperature * 0
        binary = True
        if not has_saved_lists:
            binary = pack(q_, shape, b, h, width, q_bits, 1, words)
            binary &= pack(k_, shape, b, h, width, k_bits, S, 1)
        for start in range(0, S, _BLOCK):
            stop = min(start + _BLOCK, S)
            for i in range(start, stop):
                row = (head * S + i if has_saved_lists else i - start) * stride
                n = min(i + 1 if causal else S, top_k)
                if not has_saved_lists:
                    _select_keys(
                        i, binary, q_, k_, shape, b, h, width, q_bits, k_bits, words, temperature, slope, top_k, causal,
                        int_max, counts_, scores_, advance(selected_, row), advance(weights_, row),
                    )  # fmt: skip
                grad_recency[head] -= _score_gradients(
                    grad_, v_, grad_v_, at_v, V, v_head_dim, i, advance(selected_, row), advance(weights_, row), n,
                    advance(grad_scores_, (i - start) * stride),
                )  # fmt: skip
            for i in range(start, stop, 4):
                row, group = (head * S + i if has_saved_lists else i - start) * stride, (i - start) // 4
                n_keys_[group] = _merge_lists(
                    advance(selected_, row), advance(grad_scores_, (i - start) * stride), stride, i, min(i + 4, stop),
                    S, top_k, causal, slot_of_key_, advance(keys_, group * max_keys),
                    advance(key_grads_, 4 * group * max_keys),
                )  # fmt: skip
            for t in range(T):
                next_step = min(t + 1, T - 1) * B * S * D + at
                recent = max(0, stop - _RECENT)
                _prefetch_rows(q_, next_step, start, stop, D, width)
                _prefetch_rows(k_, next_step, recent, stop, D, width)
                if needs_spike_grad:
                    _prefetch_rows(grad_q_, next_step, start, stop, D, width)
                    _prefetch_rows(grad_k_, next_step, recent, stop, D, width)
                for i in range(start, stop, 4):
                    group = (i - start) // 4
                    grad_temperature[head] += _spike_gradients(
                        q_, k_, grad_q_, grad_k_, t * B * S * D + at, D, width, i, min(i + 4, stop),
                        advance(keys_, group * max_keys), advance(key_grads_, 4 * group * max_keys), n_keys_[group],
                        temperature, needs_spike_grad,
                    )  # fmt: skip


@parallel_kernel
def _forward(
    chunks, q, k, v, temperature, recency, n_heads, top_k, causal, int_max, words, bits, counts, scores, selected,
    weights, save_lists, context,
):  # fmt: skip
    heads = q.shape[1] * n_heads
    for c in prange(chunks):
        lists = slice(0, selected.shape[0]) if save_lists else slice(c, c + 1)
        _forward_heads(
            c * heads // chunks, (c + 1) * heads // chunks, q, k, v, temperature, recency, n_heads, top_k, causal,
            int_max, words, bits[c], counts[c], scores[c], selected[lists], weights[lists], save_lists, context,
        )  # fmt: skip


@parallel_kernel
def _backward(
    chunks, grad, q, k, v, temperature, recency, n_heads, top_k, causal, needs_spike_grad, int_max, words, bits,
    counts, scores, selected, weights, has_saved_lists, grad_scores, slot_of_key, n_keys, keys, key_grads, grad_q,
    grad_k, grad_v, grad_temperature, grad_recency,
):  # fmt: skip
    heads = q.shape[1] * n_heads
    for c in prange(chunks):
        lists = slice(0, selected.shape[0]) if has_saved_lists else slice(c * _BLOCK, (c + 1) * _BLOCK)
        _backward_heads(
            c * heads // chunks, (c + 1) * heads // chunks, grad, q, k, v, temperature, recency, n_heads, top_k,
            causal, needs_spike_grad, int_max, words, bits[c], counts[c], scores[c], selected[lists], weights[lists],
            has_saved_lists, grad_scores[c], slot_of_key[c], n_keys[c], keys[c], key_grads[c], grad_q, grad_k, grad_v,
            grad_temperature, grad_recency,
        )  # fmt: skip


class _Sizes:
    """Sizes and scratch memory that both passes need."""

    def __init__(self, q: Tensor, v: Tensor, n_heads: int, top_k: int, threads: int) -> None:
        T, B, self.length, D = q.shape
        self.chunks = max(1, min(B * n_heads, 2 * threads))
        self.words = -(-T * -(-D // n_heads // WIDTH) * WIDTH // 64)
        self.top_k = min(top_k, self.length)
        self.stride = self.top_k + 1  # +1: the selection writes a candidate before deciding whether to keep it

    def scratch(self, dtype: torch.dtype) -> tuple[Any, Any, Any]:
        """Return the bits of queries and keys, counts and scores, for each chunk."""
        return (
            torch.empty(self.chunks, 2, self.words * self.length, dtype=torch.int64).numpy(),
            torch.empty(self.chunks, self.length, dtype=torch.int64).numpy(),
            torch.empty(self.chunks, self.length + WIDTH, dtype=dtype).numpy(),
        )

    def lists_of_four(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return arrays for a block: score gradients, slots of keys; number, keys and gradients of each group."""
        groups, max_keys = _BLOCK // 4, min(4 * self.top_k, self.length)
        return (
            torch.empty(self.chunks, _BLOCK * self.stride, dtype=dtype).numpy(),
            torch.full((self.chunks, self.length), -1, dtype=torch.int32).numpy(),
            torch.empty(self.chunks, groups, dtype=torch.int32).numpy(),
            torch.empty(self.chunks, groups, max_keys, dtype=torch.int32).numpy(),
            torch.empty(self.chunks, groups, 4 * max_keys, dtype=dtype).numpy(),
        )


def saved_shapes(q: Tensor, n_heads: int, top_k: int, save_weights: bool) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the tensors that ``forward`` returns for ``backward``: selected keys, nothing, and weights.

    Keys and weights are ``[B * H * S, top_k + 1]`` if together they have no more elements than the queries. Otherwise
    they are ``[0, 0]`` and the backward pass recomputes them.
    """
    T, B, S, D = q.shape
    n_selected = min(top_k, S) + 1
    lists = (B * n_heads * S, n_selected) if save_weights and 2 * n_selected * n_heads <= T * D else (0, 0)
    return lists, (0,), lists


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    recency: Tensor | None,
    n_heads: int,
    top_k: int,
    causal: bool,
    save_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the context, and for ``backward`` the selected keys and weights; the arguments are those of the op."""
    dtype = compute_dtype(v)
    like = torch.empty(0, dtype=dtype)
    context = torch.empty(v.shape, dtype=dtype)
    shape, *_ = saved_shapes(q, n_heads, top_k, save_weights)
    selected, weights = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=dtype)
    if not context.numel():
        return context.to(v.dtype), selected, like, weights
    with as_many_threads_as_torch() as threads:
        sizes = _Sizes(q, v, n_heads, top_k, threads)
        lists = selected, weights
        if not len(selected):
            lists = selected.new_empty(sizes.chunks, sizes.stride), weights.new_empty(sizes.chunks, sizes.stride)
        _forward(
            sizes.chunks,
            *(_array(x, like) for x in (q, k, v)),
            like.numpy().dtype.type(temperature.item()),
            _array(like if recency is None else recency, like),
            n_heads,
            sizes.top_k,
            causal,
            np.int64(torch.iinfo(_INTEGERS[dtype]).max),
            sizes.words,
            *sizes.scratch(dtype),
            *(x.numpy() for x in lists),
            len(selected) > 0,
            context.numpy(),
        )
    return context.to(v.dtype), selected, like, weights


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    recency: Tensor | None,
    selected: Tensor,
    _: Tensor,
    weights: Tensor,
    n_heads: int,
    top_k: int,
    causal: bool,
    needs_spike_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k (empty unless ``needs_spike_grad``), v, temperature and recency (or empty)."""
    dtype = compute_dtype(v)
    like = torch.empty(0, dtype=dtype)
    shape = q.shape if needs_spike_grad else (0,) * 4
    grad_q, grad_k = torch.empty(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    grad_v = torch.zeros(v.shape, dtype=dtype)
    by_head = torch.zeros(2, v.shape[0] * n_heads, dtype=torch.float64)
    if v.numel():
        with as_many_threads_as_torch() as threads:
            sizes = _Sizes(q, v, n_heads, top_k, threads)
            lists = selected, weights
            if not len(selected):
                n_rows = sizes.chunks * _BLOCK
                lists = selected.new_empty(n_rows, sizes.stride), weights.new_empty(n_rows, sizes.stride)
            _backward(
                sizes.chunks,
                *(_array(x, like) for x in (grad, q, k, v)),
                like.numpy().dtype.type(temperature.item()),
                _array(like if recency is None else recency, like),
                n_heads,
                sizes.top_k,
                causal,
                needs_spike_grad,
                np.int64(torch.iinfo(_INTEGERS[dtype]).max),
                sizes.words,
                *sizes.scratch(dtype),
                *(x.numpy() for x in lists),
                len(selected) > 0,
                *sizes.lists_of_four(dtype),
                grad_q.numpy(),
                grad_k.numpy(),
                grad_v.numpy(),
                *by_head.numpy(),
            )
    grad_temperature, grad_recency = by_head[0].sum().to(dtype), by_head[1].view(-1, n_heads).sum(0).to(dtype)
    return (
        grad_q.to(q.dtype) if needs_spike_grad else q.new_empty(0),
        grad_k.to(k.dtype) if needs_spike_grad else k.new_empty(0),
        grad_v.to(v.dtype),
        grad_temperature,
        grad_recency if recency is not None else like,
    )


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _array(x: Tensor, like: Tensor) -> Any:
    """Return a contiguous NumPy array in the dtype of ``like``."""
    return x.detach().to(like.dtype).contiguous().numpy()
