"""Resonance of new positions with cached keys on the CPU; coincidences are counted on the packed bits."""

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
    count_bits,
)
from nord_snn.ops._numba.tensors import NUMPY_TYPES, addresses, as_contiguous, data_pointer
from nord_snn.ops._numba.threads import n_threads
from nord_snn.ops._numba.workspace import workspace
from nord_snn.ops.checks import compute_dtype

__all__ = ["forward"]

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


class _Sizes(NamedTuple):
    """Sizes of a call.

    Attributes:
        chunks: number of parts of the work, at most two per thread.
        T: number of time steps.
        B: number of sequences.
        S: number of new positions.
        D: number of neurons at a position.
        n_all: number of positions, new and earlier.
        n_heads: number of heads.
        v_head_dim: width of the values of a head.
        top_k: number of keys that each query selects, at most ``n_all``.
        window: number of positions that a query can attend to, at most ``n_all``.
        words: number of 64-bit words for the spikes of a head at a position.
    """

    chunks: int
    T: int
    B: int
    S: int
    D: int
    n_all: int
    n_heads: int
    v_head_dim: int
    top_k: int
    window: int
    words: int


class _Inputs(NamedTuple):
    """Addresses of the inputs, 0 for None; ``starts`` has the position of each sequence's first token, None for 0."""

    q: int
    keys: int
    values: int
    recency: int
    starts: int


class _Scratch(NamedTuple):
    """Scratch memory of one query: addresses of all chunks, or pointers of one.

    Attributes:
        bits: packed spikes of all queries of a head.
        counts: coincidences with each key.
        scores: score of each key.
        selected: indices of the selected keys.
        weights: attention weights of the selected keys.
    """

    bits: Any
    counts: Any
    scores: Any
    selected: Any
    weights: Any


@kernel
def _forward_heads(first, last, sizes, inputs, temperature, int_max, scratch, context):
    """Compute the heads ``first`` to ``last - 1`` of ``B * H`` for the new positions; keys before ``starts`` are masked."""
    _, T, B, S, D, n_all, n_heads, v_head_dim, top_k, window, words = sizes
    bits, counts, scores, selected, weights = scratch
    q, keys = as_pointer(inputs.q, temperature), as_pointer(inputs.keys, np.int64(0))
    values, recency = as_pointer(inputs.values, temperature), as_pointer(inputs.recency, temperature)
    starts = as_pointer(inputs.starts, np.int64(0))
    width = D // n_heads
    for head in range(first, last):
        b, h = head // n_heads, head % n_heads
        pack(q, (T, B, S, D), b, h, width, bits, 1, words)
        slope = recency[h] if inputs.recency != 0 else temperature * 0
        start = starts[b] if inputs.starts != 0 else 0
        for row in range(S):
            i, out = n_all - S + row, ((b * S + row) * n_heads + h) * v_head_dim
            oldest = max(start, i - window + 1)
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


@kernel
def _scratch_of_chunk(c, sizes, scratch, like):
    """Return the pointers of chunk c from the addresses of all chunks."""
    bits, counts, scores, selected, weights = scratch
    return _Scratch(
        advance(as_pointer(bits, np.int64(0)), c * sizes.S * sizes.words),
        advance(as_pointer(counts, np.int64(0)), c * sizes.n_all),
        advance(as_pointer(scores, like), c * (sizes.n_all + WIDTH)),
        advance(as_pointer(selected, np.int32(0)), c * (sizes.top_k + 1)),
        advance(as_pointer(weights, like), c * (sizes.top_k + 1)),
    )


@parallel_kernel
def _forward(share, sizes, inputs, temperature, int_max, scratch, context):
    """Run the chunks of a share; ``sizes``, ``inputs`` and ``scratch`` have the fields of the classes above."""
    chunks, heads = sizes[0], sizes[2] * sizes[6]
    for c in chunks_of(share, chunks):
        named_sizes = _Sizes(*sizes)
        _forward_heads(
            c * heads // chunks, (c + 1) * heads // chunks, named_sizes, _Inputs(*inputs), temperature, int_max,
            _scratch_of_chunk(c, named_sizes, scratch, temperature), as_pointer(context, temperature),
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
    """Return the context of the new positions from packed keys; the arguments are those of ``resonance_cached``."""
    dtype, out_dtype = compute_dtype(values), values.dtype
    T, B, S, D = q.shape
    H, n_all, n_bytes = keys.shape[1:]
    top_k, v_head_dim = min(top_k, n_all), values.shape[3]
    context = torch.empty(B, S, H * v_head_dim, dtype=dtype, device="cpu")
    inputs = (
        as_contiguous(q, dtype),
        as_contiguous(keys, torch.uint8),
        as_contiguous(values, dtype),
        None if recency is None else as_contiguous(recency, dtype),
        None if lengths is None else as_contiguous((n_all - lengths).clamp(min=0), torch.int64),
    )
    threads = n_threads()
    chunks = max(1, min(B * H, 2 * threads))
    sizes = _Sizes(chunks, T, B, S, D, n_all, H, v_head_dim, top_k, min(window, n_all), n_bytes // 8)
    scratch = workspace(
        8 * chunks * S * sizes.words,
        8 * chunks * n_all,
        dtype.itemsize * chunks * (n_all + WIDTH),
        4 * chunks * (top_k + 1),
        dtype.itemsize * chunks * (top_k + 1),
    )
    _forward(
        threads,
        tuple(sizes),
        addresses(inputs),
        NUMPY_TYPES[dtype](float(temperature)),
        np.int64(torch.iinfo(_INTEGERS[dtype]).max),
        scratch.parts,
        data_pointer(context),
    )
    return context.to(out_dtype)
