"""Resonance of new positions with cached keys on the CPU; coincidences are counted on the packed bits."""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from nord_snn.ops._numba.compiling import kernel, parallel_kernel
from nord_snn.ops._numba.scores import pack, penalize, select_best, softmax, weighted_values
from nord_snn.ops._numba.simd import (
    WIDTH,
    advance,
    as_pointer,
    count_bits,
)
from nord_snn.ops._numba.tensors import NUMPY_TYPES, as_contiguous, data_pointer
from nord_snn.ops._numba.threads import as_many_threads_as_torch
from nord_snn.ops.checks import compute_dtype

__all__ = ["forward"]

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@kernel
def _forward_heads(
    first, last, q, shape, keys, n_all, values, v_head_dim, temperature, recency, has_recency, starts, window,
    n_heads, top_k, int_max, words, bits, counts, scores, selected, weights, context,
):  # fmt: skip
    """Compute heads ``first`` to ``last`` for the last S of ``n_all`` positions; keys before ``starts`` are masked."""
    _, _, S, D = shape
    width = D // n_heads
    for head in range(first, last):
        b, h = head // n_heads, head % n_heads
        pack(q, shape, b, h, width, bits, 1, words)
        slope = recency[h] if has_recency else temperature * 0
        for row in range(S):
            i, out = n_all - S + row, ((b * S + row) * n_heads + h) * v_head_dim
            oldest = max(starts[b], i - window + 1)
            n_visible = i + 1 - oldest
            for j in range(n_visible):
                counts[j] = 0
                for w in range(words):
                    counts[j] += count_bits(bits[row * words + w] & keys[(head * n_all + oldest + j) * words + w])
                scores[j] = counts[j]
            if n_visible > 0:
                penalize(scores, i - oldest, n_visible, temperature, slope)
                n = select_best(scores, n_visible, top_k, int_max, counts, selected)
                softmax(scores, selected, n, weights)
                weighted_values(
                    values, (head * n_all + oldest) * v_head_dim, v_head_dim, v_head_dim, selected, weights, n, context,
                    out
                )  # fmt: skip
            else:
                for c in range(v_head_dim):
                    context[out + c] = 0


@parallel_kernel
def _forward(
    like, chunks, q, T, B, S, D, keys, n_all, values, v_head_dim, temperature, recency, starts, window, n_heads,
    top_k, int_max, words, bits, counts, scores, selected, weights, context,
):  # fmt: skip
    """Run chunks of heads in parallel; tensors are addresses, 0 for a ``recency`` of None."""
    heads, like_int64, like_int32 = B * n_heads, np.int64(0), np.int32(0)
    for c in prange(chunks):
        _forward_heads(
            c * heads // chunks, (c + 1) * heads // chunks, as_pointer(q, like), (T, B, S, D),
            as_pointer(keys, like_int64), n_all, as_pointer(values, like), v_head_dim, temperature,
            as_pointer(recency, like), recency != 0, as_pointer(starts, like_int64), window, n_heads, top_k, int_max,
            words, advance(as_pointer(bits, like_int64), c * S * words),
            advance(as_pointer(counts, like_int64), c * n_all),
            advance(as_pointer(scores, like), c * (n_all + WIDTH)),
            advance(as_pointer(selected, like_int32), c * (top_k + 1)),
            advance(as_pointer(weights, like), c * (top_k + 1)), as_pointer(context, like),
        )  # fmt: skip


def forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    top_k: int,
    temperature: float | Tensor,
    recency: Tensor | None,
    lengths: Tensor | None,
    window: int,
) -> Tensor:
    """Return the context of the last positions from packed keys; the arguments are those of ``resonance_cached``."""
    dtype, out_dtype = compute_dtype(values), values.dtype
    scalar_type = NUMPY_TYPES[dtype]
    T, B, S, D = q.shape
    H, n_all, n_bytes = keys.shape[1:]
    words, top_k = n_bytes // 8, min(top_k, n_all)
    v_head_dim = values.shape[3]
    context = torch.empty(B, S, H * v_head_dim, dtype=dtype)
    starts = torch.zeros(B, dtype=torch.int64) if lengths is None else (n_all - lengths).clamp(min=0)
    q, keys, values, starts = (
        as_contiguous(q, dtype),
        as_contiguous(keys, torch.uint8),
        as_contiguous(values, dtype),
        as_contiguous(starts, torch.int64),
    )
    slopes = None if recency is None else as_contiguous(recency, dtype)
    with as_many_threads_as_torch() as threads:
        chunks = max(1, min(B * H, 2 * threads))
        scratch = (
            torch.empty(chunks, S * words, dtype=torch.int64),
            torch.empty(chunks, n_all, dtype=torch.int64),
            torch.empty(chunks, n_all + WIDTH, dtype=dtype),
            torch.empty(chunks, top_k + 1, dtype=torch.int32),
            torch.empty(chunks, top_k + 1, dtype=dtype),
        )
        _forward(
            scalar_type(0),
            chunks,
            data_pointer(q),
            T,
            B,
            S,
            D,
            data_pointer(keys),
            n_all,
            data_pointer(values),
            v_head_dim,
            scalar_type(float(temperature)),
            data_pointer(slopes),
            data_pointer(starts),
            min(window, n_all),
            H,
            top_k,
            np.int64(torch.iinfo(_INTEGERS[dtype]).max),
            words,
            *map(data_pointer, scratch),
            data_pointer(context),
        )
    return context.to(out_dtype)
