"""Temporal co-firing resonance on the CPU: Numba kernels that count coincidences bit by bit, one head at a time.

Spikes are bits: a head's neurons over all steps fit into a few machine words, and the coincidences of two positions are the
bits that both have. A query's best keys are found by bisection over the scores' bit patterns, which are ordered as the
scores are. What remains is a short list per query, of keys and weights; the backward pass walks over these lists, step by
step, so that a step's keys and their gradients stay in the cache. Where q or k is not made of zeros and ones,
products are summed instead of bits.
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

_BLOCK = 64  # queries whose lists are walked over together, step by step
_NEAR = 256  # the most recent keys, which are fetched a step ahead


@kernel
def _count(q_bits, k_bits, i, keys, words, S, counts, scores):
    """``scores[j]``: coincidences of query i with each of the first keys, from their words."""
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
def _multiply(q, k, shape, b, h, width, i, keys, scores):
    """The same for real numbers in the place of spikes."""
    T, B, S, D = shape
    last = keys - 1
    for j in range(0, keys, 4):  # four sums, since one would wait for itself
        a, b_, c_, d = broadcast(scores, 0), broadcast(scores, 0), broadcast(scores, 0), broadcast(scores, 0)
        for t in range(T):
            at = (t * B + b) * S * D + h * width
            for w in range(0, width, WIDTH):
                spikes = masked_load(q, at + i * D + w, width - w)
                a = fused(spikes, masked_load(k, at + j * D + w, width - w), a)
                b_ = fused(spikes, masked_load(k, at + min(j + 1, last) * D + w, width - w), b_)
                c_ = fused(spikes, masked_load(k, at + min(j + 2, last) * D + w, width - w), c_)
                d = fused(spikes, masked_load(k, at + min(j + 3, last) * D + w, width - w), d)
        # Beyond the last key it is the last one again.
        scores[j], scores[min(j + 1, last)] = reduce_sum(a), reduce_sum(b_)
        scores[min(j + 2, last)], scores[min(j + 3, last)] = reduce_sum(c_), reduce_sum(d)


@kernel
def _list_keys(
    i, binary, q, k, shape, b, h, width, q_bits, k_bits, words, temperature, slope, top_k, causal, most,
    counts, scores, kept, weights,
):  # fmt: skip
    """Keys and weights of query i; how many."""
    S = shape[2]
    keys = i + 1 if causal else S
    if binary:
        _count(q_bits, k_bits, i, keys, words, S, counts, scores)
    else:
        _multiply(q, k, shape, b, h, width, i, keys, scores)
    penalize(scores, i, keys, temperature, slope)
    n = select_best(scores, keys, top_k, most, counts, kept)
    softmax(scores, kept, n, weights)
    return n


@kernel
def _forward_heads(
    first, last, q, k, v, temperature, recency, n_heads, top_k, causal, most, words, bits, counts, scores, kept,
    weights, remember, context,
):  # fmt: skip
    """Heads ``first`` to ``last`` of all ``B * H``; with a row for every query in ``kept`` and ``weights``, they stay there."""
    shape, (_, S, V) = q.shape, v.shape
    width, of_v = shape[3] // n_heads, V // n_heads
    kept_, weights_, stride = pointer(kept), pointer(weights), kept.shape[1]
    q_, k_, v_, context_ = pointer(q), pointer(k), pointer(v), pointer(context)
    q_bits, k_bits, counts_, scores_ = pointer(bits[0]), pointer(bits[1]), pointer(counts), pointer(scores)
    for head in range(first, last):
        b, h = head // n_heads, head % n_heads
        binary = pack(q_, shape, b, h, width, q_bits, 1, words)
        binary &= pack(k_, shape, b, h, width, k_bits, S, 1)
        at, slope = b * S * V + h * of_v, recency[h] if len(recency) else temperature * 0
        for i in range(S):
            row = (head * S + i) * stride if remember else 0
            n = _list_keys(
                i, binary, q_, k_, shape, b, h, width, q_bits, k_bits, words, temperature, slope, top_k, causal, most,
                counts_, scores_, advance(kept_, row), advance(weights_, row),
            )  # fmt: skip
            weighted_values(v_, at, V, of_v, advance(kept_, row), advance(weights_, row), n, context_, at + i * V)


@kernel
def _back_to_scores(grad, v, grad_v, at, n_features, width, i, kept, weights, n, grad_scores):
    """Of one query: the scores' gradients ``w * (g - sum(w * g))``, where ``g = grad . v``; adds to the values' gradients.

    Returns the sum of distance times gradient, which is what the slope gets, turned around.
    """
    mean = broadcast(v, 0)
    for m in range(n):
        product = broadcast(v, 0)
        for c in range(0, width, WIDTH):
            from_above = masked_load(grad, at + i * n_features + c, width - c)
            value = at + kept[m] * n_features + c
            product = fused(from_above, masked_load(v, value, width - c), product)
            share = fused(broadcast(v, weights[m]), from_above, masked_load(grad_v, value, width - c))
            masked_store(grad_v, value, width - c, share)
        grad_scores[m] = reduce_sum(product)
    for m in range(0, n, WIDTH):
        mean = fused(masked_load(weights, m, n - m), masked_load(grad_scores, m, n - m), mean)
    middle = broadcast(v, reduce_sum(mean))
    for m in range(0, n, WIDTH):
        off = masked_load(grad_scores, m, n - m) - middle
        masked_store(grad_scores, m, n - m, masked_load(weights, m, n - m) * off)
    by_distance = 0.0
    for m in range(n):
        by_distance += grad_scores[m] * abs(i - kept[m])
    return by_distance


@kernel
def _gather(kept, grad_scores, stride, i, last, S, top_k, causal, place, keys, shares):
    """One list for the queries i to ``last``, at most four: every key that one of them keeps, with the four scores'
    gradients (0 where it is not kept). How many keys.
    """
    found = 0
    for r in range(last - i):
        for m in range(r * stride, r * stride + min(i + r + 1 if causal else S, top_k)):
            key = kept[m]
            if place[key] < 0:
                place[key] = found
                keys[found] = key
                for other in range(4):
                    shares[4 * found + other] = 0
                found += 1
            shares[4 * place[key] + r] = grad_scores[m]
    for m in range(found):
        place[keys[m]] = -1
    return found


@kernel
def _back_to_spikes(q, k, grad_q, grad_k, at, n_features, width, i, last, keys, shares, n, temperature, spikes_too):
    """Of one step and the queries i to ``last``, at most four: the gradients of their spikes and of their keys' spikes.

    Four queries share what is read and written of a key. Returns ``q . (sum of scores' gradients times k)``, what the
    temperature gets: its gradient is the sum of gradient times count, and the counts are ``q . k``.
    """
    scale, zero, counted = broadcast(q, temperature), broadcast(q, 0), broadcast(q, 0)
    a, b, c, d = at + i * n_features, at + (i + 1) * n_features, at + (i + 2) * n_features, at + (i + 3) * n_features
    for w in range(0, width, WIDTH):
        # Where there are fewer than four queries, nothing is read, and nothing written, of the others.
        of_a, of_b, of_c, of_d = (
            width - w, width - w if last > i + 1 else 0, width - w if last > i + 2 else 0, width - w if last > i + 3 else 0
        )  # fmt: skip
        q_a, q_b = masked_load(q, a + w, of_a), masked_load(q, b + w, of_b)
        q_c, q_d = masked_load(q, c + w, of_c), masked_load(q, d + w, of_d)
        fired = ne_mask(q_a, zero) | ne_mask(q_b, zero) | ne_mask(q_c, zero) | ne_mask(q_d, zero)
        if fired == 0 and not spikes_too:
            continue
        sum_a, sum_b, sum_c, sum_d = zero, zero, zero, zero
        for m in range(n):
            share_a, share_b = broadcast(q, shares[4 * m]), broadcast(q, shares[4 * m + 1])
            share_c, share_d = broadcast(q, shares[4 * m + 2]), broadcast(q, shares[4 * m + 3])
            key = at + keys[m] * n_features + w
            spikes = masked_load(k, key, width - w)
            sum_a, sum_b = fused(share_a, spikes, sum_a), fused(share_b, spikes, sum_b)
            sum_c, sum_d = fused(share_c, spikes, sum_c), fused(share_d, spikes, sum_d)
            if spikes_too and fired != 0:  # silent queries leave their keys alone
                pushed = fused(share_a, q_a, share_b * q_b) + fused(share_c, q_c, share_d * q_d)
                masked_store(grad_k, key, width - w, fused(scale, pushed, masked_load(grad_k, key, width - w)))
        if spikes_too:
            masked_store(grad_q, a + w, of_a, scale * sum_a)
            masked_store(grad_q, b + w, of_b, scale * sum_b)
            masked_store(grad_q, c + w, of_c, scale * sum_c)
            masked_store(grad_q, d + w, of_d, scale * sum_d)
        counted = fused(q_a, sum_a, fused(q_b, sum_b, fused(q_c, sum_c, fused(q_d, sum_d, counted))))
    return reduce_sum(counted)


@kernel
def _ask_for(rows, at, first, last, n_features, width):
    """Fetch these rows of a head for the next step while this one is worked on."""
    for i in range(first, last):
        for c in range(0, width, WIDTH):
            prefetch(rows, at + i * n_features + c)


@kernel
def _backward_heads(
    first, last, grad, q, k, v, temperature, recency, n_heads, top_k, causal, spikes_too, most, words, bits, counts,
    scores, kept, weights, remembered, grad_scores, place, found, keys, shares, grad_q, grad_k, grad_v,
    grad_temperature, grad_recency,
):  # fmt: skip
    """Heads ``first`` to ``last``; lists that were not kept, too few rows for that, are made again block by block."""
    (T, B, S, D), V, shape = q.shape, v.shape[2], q.shape
    width, of_v = D // n_heads, V // n_heads
    q_, k_, v_, grad_ = pointer(q), pointer(k), pointer(v), pointer(grad)
    grad_q_, grad_k_, grad_v_, grad_scores_ = pointer(grad_q), pointer(grad_k), pointer(grad_v), pointer(grad_scores)
    q_bits, k_bits, counts_, scores_ = pointer(bits[0]), pointer(bits[1]), pointer(counts), pointer(scores)
    kept_, weights_, stride = pointer(kept), pointer(weights), kept.shape[1]
    place_, found_, keys_, shares_, reach = (
        pointer(place),
        pointer(found),
        pointer(keys),
        pointer(shares),
        keys.shape[1],
    )
    for head in range(first, last):
        b, h = head // n_heads, head % n_heads
        at, at_v = b * S * D + h * width, b * S * V + h * of_v
        slope = recency[h] if len(recency) else temperature * 0
        binary = True
        if not remembered:
            binary = pack(q_, shape, b, h, width, q_bits, 1, words)
            binary &= pack(k_, shape, b, h, width, k_bits, S, 1)
        for start in range(0, S, _BLOCK):
            stop = min(start + _BLOCK, S)
            for i in range(start, stop):
                row = (head * S + i if remembered else i - start) * stride
                n = min(i + 1 if causal else S, top_k)
                if not remembered:
                    _list_keys(
                        i, binary, q_, k_, shape, b, h, width, q_bits, k_bits, words, temperature, slope, top_k, causal,
                        most, counts_, scores_, advance(kept_, row), advance(weights_, row),
                    )  # fmt: skip
                grad_recency[head] -= _back_to_scores(
                    grad_, v_, grad_v_, at_v, V, of_v, i, advance(kept_, row), advance(weights_, row), n,
                    advance(grad_scores_, (i - start) * stride),
                )  # fmt: skip
            for i in range(start, stop, 4):
                row, group = (head * S + i if remembered else i - start) * stride, (i - start) // 4
                found_[group] = _gather(
                    advance(kept_, row), advance(grad_scores_, (i - start) * stride), stride, i, min(i + 4, stop), S, top_k,
                    causal, place_, advance(keys_, group * reach), advance(shares_, 4 * group * reach),
                )  # fmt: skip
            for t in range(T):
                after = min(t + 1, T - 1) * B * S * D + at
                near = max(0, stop - _NEAR)
                _ask_for(q_, after, start, stop, D, width)
                _ask_for(k_, after, near, stop, D, width)
                if spikes_too:
                    _ask_for(grad_q_, after, start, stop, D, width)
                    _ask_for(grad_k_, after, near, stop, D, width)
                for i in range(start, stop, 4):
                    group = (i - start) // 4
                    grad_temperature[head] += _back_to_spikes(
                        q_, k_, grad_q_, grad_k_, t * B * S * D + at, D, width, i, min(i + 4, stop),
                        advance(keys_, group * reach), advance(shares_, 4 * group * reach), found_[group], temperature,
                        spikes_too,
                    )  # fmt: skip


@parallel_kernel
def _forward(
    chunks, q, k, v, temperature, recency, n_heads, top_k, causal, most, words, bits, counts, scores, kept, weights,
    remember, context,
):  # fmt: skip
    heads = q.shape[1] * n_heads
    for c in prange(chunks):
        lists = slice(0, kept.shape[0]) if remember else slice(c, c + 1)
        _forward_heads(
            c * heads // chunks, (c + 1) * heads // chunks, q, k, v, temperature, recency, n_heads, top_k, causal, most,
            words, bits[c], counts[c], scores[c], kept[lists], weights[lists], remember, context,
        )  # fmt: skip


@parallel_kernel
def _backward(
    chunks, grad, q, k, v, temperature, recency, n_heads, top_k, causal, spikes_too, most, words, bits, counts, scores,
    kept, weights, remembered, grad_scores, place, found, keys, shares, grad_q, grad_k, grad_v, grad_temperature,
    grad_recency,
):  # fmt: skip
    heads = q.shape[1] * n_heads
    for c in prange(chunks):
        lists = slice(0, kept.shape[0]) if remembered else slice(c * _BLOCK, (c + 1) * _BLOCK)
        _backward_heads(
            c * heads // chunks, (c + 1) * heads // chunks, grad, q, k, v, temperature, recency, n_heads, top_k, causal,
            spikes_too, most, words, bits[c], counts[c], scores[c], kept[lists], weights[lists], remembered,
            grad_scores[c], place[c], found[c], keys[c], shares[c], grad_q, grad_k, grad_v, grad_temperature, grad_recency,
        )  # fmt: skip


class _Sizes:
    """What both passes have to know of a call."""

    def __init__(self, q: Tensor, v: Tensor, n_heads: int, top_k: int, threads: int) -> None:
        T, B, self.length, D = q.shape
        self.chunks = max(1, min(B * n_heads, 2 * threads))
        self.words = -(-T * -(-D // n_heads // WIDTH) * WIDTH // 64)
        self.top_k = min(top_k, self.length)
        self.stride = self.top_k + 1  # the key that is looked at last is written before it is known to be kept

    def scratch(self, dtype: torch.dtype) -> tuple[Any, Any, Any]:
        """Bits of queries and keys, counts, and scores, for each chunk."""
        return (
            torch.empty(self.chunks, 2, self.words * self.length, dtype=torch.int64).numpy(),
            torch.empty(self.chunks, self.length, dtype=torch.int64).numpy(),
            torch.empty(self.chunks, self.length + WIDTH, dtype=dtype).numpy(),
        )

    def lists_of_four(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """For a block of queries: gradients of scores; a mark for each key; and what ``_gather`` finds."""
        groups, reach = _BLOCK // 4, min(4 * self.top_k, self.length)
        return (
            torch.empty(self.chunks, _BLOCK * self.stride, dtype=dtype).numpy(),
            torch.full((self.chunks, self.length), -1, dtype=torch.int32).numpy(),
            torch.empty(self.chunks, groups, dtype=torch.int32).numpy(),
            torch.empty(self.chunks, groups, reach, dtype=torch.int32).numpy(),
            torch.empty(self.chunks, groups, 4 * reach, dtype=dtype).numpy(),
        )


def saved_shapes(q: Tensor, n_heads: int, top_k: int, remember: bool) -> tuple[tuple[int, ...], ...]:
    """Shapes of what ``forward`` returns for ``backward``: kept keys, nothing, and weights.

    Keys and weights are ``[B * H * S, top_k + 1]`` where together they are no more numbers than the queries, and
    otherwise ``[0, 0]``: then the backward pass counts again.
    """
    T, B, S, D = q.shape
    kept = min(top_k, S) + 1
    lists = (B * n_heads * S, kept) if remember and 2 * kept * n_heads <= T * D else (0, 0)
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
    remember: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Context in the shape of ``v``, and for ``backward`` the kept keys and their weights; the arguments are the op's."""
    dtype = compute_dtype(v)
    like = torch.empty(0, dtype=dtype)
    context = torch.empty(v.shape, dtype=dtype)
    shape, *_ = saved_shapes(q, n_heads, top_k, remember)
    kept, weights = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=dtype)
    if not context.numel():
        return context.to(v.dtype), kept, like, weights
    with as_many_threads_as_torch() as threads:
        sizes = _Sizes(q, v, n_heads, top_k, threads)
        lists = kept, weights
        if not len(kept):
            lists = kept.new_empty(sizes.chunks, sizes.stride), weights.new_empty(sizes.chunks, sizes.stride)
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
            len(kept) > 0,
            context.numpy(),
        )
    return context.to(v.dtype), kept, like, weights


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    recency: Tensor | None,
    kept: Tensor,
    _: Tensor,
    weights: Tensor,
    n_heads: int,
    top_k: int,
    causal: bool,
    spikes_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q and k (empty unless ``spikes_too``), v, temperature and recency (empty without one)."""
    dtype = compute_dtype(v)
    like = torch.empty(0, dtype=dtype)
    shape = q.shape if spikes_too else (0,) * 4
    grad_q, grad_k = torch.empty(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    grad_v = torch.zeros(v.shape, dtype=dtype)
    by_head = torch.zeros(2, v.shape[0] * n_heads, dtype=torch.float64)
    if v.numel():
        with as_many_threads_as_torch() as threads:
            sizes = _Sizes(q, v, n_heads, top_k, threads)
            lists = kept, weights
            if not len(kept):
                rows = sizes.chunks * _BLOCK
                lists = kept.new_empty(rows, sizes.stride), weights.new_empty(rows, sizes.stride)
            _backward(
                sizes.chunks,
                *(_array(x, like) for x in (grad, q, k, v)),
                like.numpy().dtype.type(temperature.item()),
                _array(like if recency is None else recency, like),
                n_heads,
                sizes.top_k,
                causal,
                spikes_too,
                np.int64(torch.iinfo(_INTEGERS[dtype]).max),
                sizes.words,
                *sizes.scratch(dtype),
                *(x.numpy() for x in lists),
                len(kept) > 0,
                *sizes.lists_of_four(dtype),
                grad_q.numpy(),
                grad_k.numpy(),
                grad_v.numpy(),
                *by_head.numpy(),
            )
    grad_temperature, grad_recency = by_head[0].sum().to(dtype), by_head[1].view(-1, n_heads).sum(0).to(dtype)
    return (
        grad_q.to(q.dtype) if spikes_too else q.new_empty(0),
        grad_k.to(k.dtype) if spikes_too else k.new_empty(0),
        grad_v.to(v.dtype),
        grad_temperature,
        grad_recency if recency is not None else like,
    )


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _array(x: Tensor, like: Tensor) -> Any:
    """What Numba sees of a tensor: a contiguous array in the dtype of ``like``."""
    return x.detach().to(like.dtype).contiguous().numpy()
