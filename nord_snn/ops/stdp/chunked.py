"""Pair-based STDP in chunks of time: what ``reference.py`` computes step by step, here by matrix products.

Within a chunk the recursion ``p[t] = p[t-1] * decay + x[t]`` is a product with the lower triangle ``decay^(t-s)``, whose
powers never grow; from chunk to chunk the last trace is handed on. Rows never influence each other, so a chunk takes
only some of them, and beside inputs and outputs a call holds the traces of one chunk.
"""

import torch
from torch import Tensor

from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.stdp.reference import STDPState

__all__ = ["chunked"]

#: Steps of a chunk: the triangle costs so many multiplications per step and neuron.
CHUNK = 64
#: Steps times rows of a chunk: few enough to stay in the cache, and to sum in one go without float32 losing digits.
SUMMANDS = 1024


def chunked(
    pre: Tensor, post: Tensor, state: STDPState, decay_plus: float, decay_minus: float, a_plus: float, a_minus: float
) -> tuple[Tensor, STDPState]:
    """``pre [T, N, n_in]``, ``post [T, N, n_out]`` -> ``[n_out, n_in]`` summed over N, and the last traces."""
    dtype = compute_dtype(pre)
    T, N, _ = pre.shape
    steps = min(CHUNK, T)
    n_rows = SUMMANDS // steps
    last = STDPState(*(trace.to(dtype, copy=True) for trace in state))
    plus, minus = (_powers(decay, steps, last.pre) for decay in (decay_plus, decay_minus))
    delta = last.pre.new_zeros(post.shape[-1], pre.shape[-1])
    for row in range(0, N, n_rows):
        rows = slice(row, row + n_rows)
        for start in range(0, T, steps):
            x, y = (spikes[start : start + steps, rows].to(dtype).contiguous() for spikes in (pre, post))
            p, q = _traces(x, last.pre[rows], plus), _traces(y, last.post[rows], minus)
            delta += a_plus * (y.flatten(0, 1).mT @ p.flatten(0, 1)) - a_minus * (q.flatten(0, 1).mT @ x.flatten(0, 1))
            last.pre[rows], last.post[rows] = p[-1], q[-1]
    return delta, last


def _powers(decay: float, steps: int, like: Tensor) -> Tensor:
    """``decay^(t - s)`` for t in 0..steps-1 and s in -1..t, zero above: ``[steps, steps + 1]`` in the dtype of ``like``."""
    step = torch.arange(-1, steps, device=like.device, dtype=torch.float64)
    lag = step[1:, None] - step
    return (decay ** lag.clamp(min=0)).tril(1).to(like.dtype)


def _traces(x: Tensor, before: Tensor, powers: Tensor) -> Tensor:
    """Traces ``[t, N, n]`` of the inputs ``[t, N, n]`` of a chunk, from the trace before it."""
    steps = len(x)
    from_before = powers[:steps, :1] * before.flatten()
    return torch.addmm(from_before, powers[:steps, 1 : steps + 1], x.flatten(1)).view(x.shape)
