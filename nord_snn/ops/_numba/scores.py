"""What the resonances of whole and of growing sequences share: spikes as bits, scores, the best keys, their mean value."""

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

_AHEAD = 8  # positions to fetch ahead: a head's neurons are short pieces of memory far apart, which no cache guesses


@kernel
def pack(x, shape, b, h, width, bits, across, along):
    """Spikes of one head as words, word w of position s at ``bits[w * across + s * along]``; true if all are 0 or 1."""
    T, B, S, D = shape
    zero, one = broadcast(x, 0), broadcast(x, 1)
    strange = 0
    for s in range(S):
        word, filled, w = 0, 0, 0
        for t in range(T):
            at = ((t * B + b) * S + s) * D + h * width
            for c in range(0, width, WIDTH):
                prefetch(x, at + _AHEAD * D + c)
                spikes = masked_load(x, at + c, width - c)
                fired = ne_mask(spikes, zero)
                strange |= fired & ne_mask(spikes, one)
                word |= fired << filled
                filled += WIDTH
                if filled == 64:
                    bits[w * across + s * along] = word
                    word, filled, w = 0, 0, w + 1
        if filled:
            bits[w * across + s * along] = word
    return strange == 0


@kernel
def penalize(scores, i, keys, temperature, slope):
    """From counts to scores, to the bit as the reference has them."""
    per_count, per_step, zero = broadcast(scores, temperature), broadcast(scores, slope), broadcast(scores, 0)
    for j in range(0, keys, WIDTH):
        before = broadcast(scores, i - j) - iota(scores)
        penalty = per_step * maximum(before, zero - before)
        store(scores, j, load(scores, j) * per_count - penalty)


@kernel
def select_best(scores, keys, top_k, most, order, kept):
    """Write the positions of the best ``top_k`` of ``keys`` scores, ascending; among equals the most recent. How many."""
    if keys <= top_k:
        for j in range(keys):
            kept[j] = j
        return keys
    patterns = as_integers(scores)
    for j in range(keys):
        pattern = np.int64(patterns[j])
        ordered = pattern if pattern >= 0 else -(pattern & most)  # as the floats are ordered; -0 equals 0
        order[j] = ordered if scores[j] == scores[j] else most  # NaN is best, as to torch.topk
    low = high = order[0]
    for j in range(keys):
        low, high = min(low, order[j]), max(high, order[j])
    while low < high:  # at least top_k are as good as low, fewer are better than high
        middle = (low | high) - ((low ^ high) >> 1)
        better = 0
        for j in range(keys):
            better += order[j] >= middle
        if better >= top_k:
            low = middle
        else:
            high = middle - 1
        if better == top_k:
            break
    above = 0
    for j in range(keys):
        above += order[j] > low
    # Where the bisection ended early, exactly top_k are as good as ``low`` and none of them is to be left out.
    oldest, room = keys, top_k - above
    while room > 0:
        oldest -= 1
        room -= order[oldest] == low
    n = 0
    for j in range(keys):
        kept[n] = j
        n += (order[j] > low) | ((order[j] == low) & (j >= oldest))
    return top_k


@kernel
def softmax(scores, kept, n, weights):
    """Softmax over the kept scores."""
    best = scores[kept[0]]
    for m in range(1, n):
        best = max(best, scores[kept[m]])
    for m in range(n):
        weights[m] = np.exp(scores[kept[m]] - best)
    sums = broadcast(weights, 0)
    for m in range(0, n, WIDTH):
        sums = sums + masked_load(weights, m, n - m)
    share = broadcast(weights, 1) / broadcast(weights, reduce_sum(sums))
    for m in range(0, n, WIDTH):
        masked_store(weights, m, n - m, masked_load(weights, m, n - m) * share)


@kernel
def weighted_sum(rows, at, stride, count, kept, weights, n):
    """The weighted sum of the kept rows, of WIDTH columns; four sums, since one would wait for itself."""
    a, b, c, d = broadcast(rows, 0), broadcast(rows, 0), broadcast(rows, 0), broadcast(rows, 0)
    fours = n - n % 4
    for m in range(0, fours, 4):
        a = fused(broadcast(rows, weights[m]), masked_load(rows, at + kept[m] * stride, count), a)
        b = fused(broadcast(rows, weights[m + 1]), masked_load(rows, at + kept[m + 1] * stride, count), b)
        c = fused(broadcast(rows, weights[m + 2]), masked_load(rows, at + kept[m + 2] * stride, count), c)
        d = fused(broadcast(rows, weights[m + 3]), masked_load(rows, at + kept[m + 3] * stride, count), d)
    for m in range(fours, n):
        a = fused(broadcast(rows, weights[m]), masked_load(rows, at + kept[m] * stride, count), a)
    return (a + b) + (c + d)


@kernel
def weighted_values(v, at, n_features, width, kept, weights, n, context, to):
    """The weighted sum of the kept values of one head."""
    for c in range(0, width, WIDTH):
        mixed = weighted_sum(v, at + c, n_features, width - c, kept, weights, n)
        masked_store(context, to + c, width - c, mixed)
