"""STDP in chunks of time: what ``reference.py`` computes step by step, here by matrix products and convolutions.

Within a chunk the recursion ``p[t] = p[t-1] * decay + x[t]`` is a product with the lower triangle ``decay^(t-s)``, whose
powers never grow; from chunk to chunk the last trace is handed on. Rows never influence each other, so a chunk takes
only some of them, and beside inputs and outputs a call holds the traces of one chunk.
"""

import torch
from torch import Tensor

from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.plasticity.reference import Correlate, Pairing, Traces

__all__ = ["chunked"]

#: Steps of a chunk: the triangle costs so many multiplications per step and neuron.
CHUNK = 64
#: Steps times rows of a chunk: few enough to stay in the cache, and to sum in one go without float32 losing digits.
SUMMANDS = 1024
#: Numbers in a chunk of a convolution's input, whose rows are images.
NUMBERS = 1 << 22


def chunked(
    pre: Tensor,
    post: Tensor,
    traces: Traces,
    pairing: Pairing,
    correlate: Correlate,
    row_factor: Tensor | None = None,
    step_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Traces]:
    """As the reference: what strengthens, what weakens, and the last traces."""
    dtype = compute_dtype(pre)
    T, N = pre.shape[:2]
    steps = min(CHUNK, T)
    n_rows = max(1, min(SUMMANDS // steps, NUMBERS // (steps * max(1, pre[0, :1].numel()))))
    own = [None if trace is None else trace.to(dtype, copy=True) for trace in traces]
    last = Traces(*own)  # type: ignore[arg-type]  # the first two are there
    decays = {pairing.decay_plus, pairing.decay_minus}
    if last.slow_pre is not None:
        decays |= {pairing.decay_x, pairing.decay_y}
    powers = _powers(decays, steps, dtype, pre.device)
    plus, minus = powers[pairing.decay_plus], powers[pairing.decay_minus]
    slow_x, slow_y = powers.get(pairing.decay_x, plus), powers.get(pairing.decay_y, plus)
    strengthening = weakening = correlate(last.post[:0], last.pre[:0])  # zeros of the right shape
    for row in range(0, N, n_rows):
        rows = slice(row, row + n_rows)
        factor = row_factor[rows] if row_factor is not None and len(row_factor) == N else row_factor
        for start in range(0, T, steps):
            x, y = (spikes[start : start + steps, rows].to(dtype).contiguous() for spikes in (pre, post))
            p, q = _traces(x, last.pre[rows], plus), _traces(y, last.post[rows], minus)
            last.pre[rows], last.post[rows] = p[-1], q[-1]
            late, early = pairing.a_plus * y, pairing.a_minus * x
            if last.slow_pre is not None and last.slow_post is not None:
                late = late + pairing.a3_plus * y * _before(y, last.slow_post[rows], slow_y, pairing.decay_y)
                early = early + pairing.a3_minus * x * _before(x, last.slow_pre[rows], slow_x, pairing.decay_x)
            if factor is not None:
                late, q = late * factor, q * factor
            if step_factor is not None:
                by_step = step_factor[start : start + steps].to(dtype).view(-1, *[1] * (y.ndim - 1))
                late, q = late * by_step, q * by_step
            strengthening = strengthening + correlate(late.flatten(0, 1), p.flatten(0, 1))
            weakening = weakening + correlate(q.flatten(0, 1), early.flatten(0, 1))
    return strengthening, weakening, last


def _powers(decays: set[float], steps: int, dtype: torch.dtype, device: torch.device) -> dict[float, Tensor]:
    """For each decay ``decay^(t - s)`` for t in 0..steps-1 and s in -1..t, zero above: ``[steps, steps + 1]``."""
    if steps == 1:  # a learner that is called step by step spends most of its time around the arithmetic
        return {decay: torch.tensor([[decay, 1.0]], dtype=dtype, device=device) for decay in decays}
    step = torch.arange(steps + 1, dtype=torch.float64, device=device)
    lag = (step[1:, None] - step).clamp_(min=0)
    return {decay: (decay**lag).tril_(1).to(dtype) for decay in decays}


def _traces(x: Tensor, before: Tensor, powers: Tensor) -> Tensor:
    """Traces ``[t, N, *]`` of the inputs ``[t, N, *]`` of a chunk, from the trace before it."""
    steps = len(x)
    from_before = powers[:steps, :1] * before.flatten()
    return torch.addmm(from_before, powers[:steps, 1 : steps + 1], x.flatten(1)).view(x.shape)


def _before(x: Tensor, last: Tensor, powers: Tensor, decay: float) -> Tensor:
    """Traces as the spike of each step finds them; moves ``last`` on to the end of the chunk."""
    after = _traces(x, last, powers)
    found = torch.cat((last[None], after[:-1])) * decay
    last.copy_(after[-1])
    return found
