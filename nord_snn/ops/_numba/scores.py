"""Kernels that resonance and cached resonance share: pack spikes, compute scores, select keys, average values."""

import numpy as np

from nord_snn.ops._numba.compiling import kernel
from nord_snn.ops._numba.simd import (
    WIDTH,
    as_integers,
    broadcast,
    fused,
    iota,
    load,
    masked_load,
    masked_store,
    maximum,
    ne_mask,
    prefetch,
    reduce_sum,
    store,
)

__all__ = ["pack", "penalize", "select_best", "softmax", "weighted_values"]

#: Prefetch distance in positions: the strides are too large for the hardware prefetcher.
_PREFETCH_POSITIONS = 8


@kernel
def pack(x, shape, b, h, width, bits, across, along):
    """Pack the spikes of head h of sequence b of ``x [T, B, S, D]``, ``width`` neurons; return whether all are 0 or 1.

    Word w of position s is ``bits[w * across + s * along]``; ``shape`` is ``(T, B, S, D)``.
    """
    T, B, S, D = shape
    zero, one = broadcast(x, 0), broadcast(x, 1)
    non_binary = 0
    for s in range(S):
        word, n_bits, w = 0, 0, 0
        for t in range(T):
            at = ((t * B + b) * S + s) * D + h * width
            for c in range(0, width, WIDTH):
                prefetch(x, at + _PREFETCH_POSITIONS * D + c)
                spikes = masked_load(x, at + c, width - c)
                nonzero = ne_mask(spikes, zero)
                non_binary |= nonzero & ne_mask(spikes, one)
                word |= nonzero << n_bits
                n_bits += WIDTH
                if n_bits == 64:
                    bits[w * across + s * along] = word
                    word, n_bits, w = 0, 0, w + 1
        if n_bits:
            bits[w * across + s * along] = word
    return non_binary == 0


@kernel
def penalize(scores, i, keys, temperature, slope):
    """Convert the counts of query i and the first ``keys`` keys to scores, in place, bit for bit as the reference does."""
    per_count, per_position, zero = broadcast(scores, temperature), broadcast(scores, slope), broadcast(scores, 0)
    for j in range(0, keys, WIDTH):
        distance = broadcast(scores, i - j) - iota(scores)
        penalty = per_position * maximum(distance, zero - distance)
        store(scores, j, load(scores, j) * per_count - penalty)


@kernel
def select_best(scores, keys, top_k, int_max, order, selected):
    """Write the positions of the ``top_k`` best of ``keys`` scores to ``selected``, in ascending order; return their number.

    Of equal scores the highest positions are selected. ``order`` is scratch memory for ``keys`` integers; ``int_max`` is the
    largest integer with the size of a score.
    """
    if keys <= top_k:
        for j in range(keys):
            selected[j] = j
        return keys
    patterns = as_integers(scores)
    for j in range(keys):
        pattern = np.int64(patterns[j])
        ordered = pattern if pattern >= 0 else -(pattern & int_max)  # the order of the floats; -0 equals 0
        order[j] = ordered if scores[j] == scores[j] else int_max  # NaN is largest, as in torch.topk
    low = high = order[0]
    for j in range(keys):
        low, high = min(low, order[j]), max(high, order[j])
    while low < high:  # at least top_k are >= low, fewer than top_k are > high
        middle = (low | high) - ((low ^ high) >> 1)
        n_reached = 0
        for j in range(keys):
            n_reached += order[j] >= middle
        if n_reached >= top_k:
            low = middle
        else:
            high = middle - 1
        if n_reached == top_k:
            break
    above = 0
    for j in range(keys):
        above += order[j] > low
    # If the bisection ended early, exactly top_k are >= ``low``, and all of them are selected.
    oldest, n_tied = keys, top_k - above
    while n_tied > 0:
        oldest -= 1
        n_tied -= order[oldest] == low
    n = 0
    for j in range(keys):
        selected[n] = j
        n += (order[j] > low) | ((order[j] == low) & (j >= oldest))
    return top_k


@kernel
def softmax(scores, selected, n, weights):
    """Write the softmax of the n selected scores to ``weights``."""
    best = scores[selected[0]]
    for m in range(1, n):
        best = max(best, scores[selected[m]])
    for m in range(n):
        weights[m] = np.exp(scores[selected[m]] - best)
    sums = broadcast(weights, 0)
    for m in range(0, n, WIDTH):
        sums = sums + masked_load(weights, m, n - m)
    scale = broadcast(weights, 1) / broadcast(weights, reduce_sum(sums))
    for m in range(0, n, WIDTH):
        masked_store(weights, m, n - m, masked_load(weights, m, n - m) * scale)


@kernel
def weighted_sum(rows, at, stride, count, selected, weights, n):
    """Return the weighted sum of n selected rows, WIDTH columns; four accumulators hide the latency of ``fused``."""
    a, b, c, d = broadcast(rows, 0), broadcast(rows, 0), broadcast(rows, 0), broadcast(rows, 0)
    n_unrolled = n - n % 4
    for m in range(0, n_unrolled, 4):
        a = fused(broadcast(rows, weights[m]), masked_load(rows, at + selected[m] * stride, count), a)
        b = fused(broadcast(rows, weights[m + 1]), masked_load(rows, at + selected[m + 1] * stride, count), b)
        c = fused(broadcast(rows, weights[m + 2]), masked_load(rows, at + selected[m + 2] * stride, count), c)
        d = fused(broadcast(rows, weights[m + 3]), masked_load(rows, at + selected[m + 3] * stride, count), d)
    for m in range(n_unrolled, n):
        a = fused(broadcast(rows, weights[m]), masked_load(rows, at + selected[m] * stride, count), a)
    return (a + b) + (c + d)


@kernel
def weighted_values(v, at, n_features, width, selected, weights, n, context, to):
    """Write the weighted sum of n selected values of one head to ``context[to:]``."""
    for c in range(0, width, WIDTH):
        value = weighted_sum(v, at + c, n_features, width - c, selected, weights, n)
        masked_store(context, to + c, width - c, value)
