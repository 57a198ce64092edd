"""STDP in chunks of time steps: the results of ``reference.py``, computed by matrix products and convolutions.

Within a chunk the recursion ``p[t] = p[t-1] * decay + x[t]`` is a product with the lower triangular matrix
``decay^(t-s)``, whose entries are at most 1. The last trace of a chunk is the initial trace of the next chunk. Rows are
independent, so a chunk also has only some rows: besides inputs and outputs, a call needs memory for the traces of one
chunk.
"""

import torch
from torch import Tensor

from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.plasticity.reference import Correlate, Pairing, Traces

__all__ = ["chunked"]

#: Time steps per chunk. The triangular product takes this number of multiplications per time step and neuron.
CHUNK = 64
#: Time steps times rows per chunk: inputs fit into the cache, and a float32 sum over this many summands is accurate.
SUMMANDS = 1024
#: Upper limit on the input elements per chunk, for convolutions, in which a row is an image.
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
    """Return potentiation, depression and the last traces; arguments and results are those of ``reference``."""
    dtype = compute_dtype(pre)
    T, N = pre.shape[:2]
    steps = min(CHUNK, T)
    n_rows = max(1, min(SUMMANDS // steps, NUMBERS // (steps * max(1, pre[0, :1].numel()))))
    copies = [None if trace is None else trace.to(dtype, copy=True) for trace in traces]
    last = Traces(*copies)  # type: ignore[arg-type]  # pre and post are never None
    decays = {pairing.decay_plus, pairing.decay_minus}
    if last.slow_pre is not None:
        decays |= {pairing.decay_x, pairing.decay_y}
    powers = _powers(decays, steps, dtype, pre.device)
    plus, minus = powers[pairing.decay_plus], powers[pairing.decay_minus]
    slow_x, slow_y = powers.get(pairing.decay_x, plus), powers.get(pairing.decay_y, plus)
    potentiation = depression = correlate(last.post[:0], last.pre[:0])  # zeros in the shape of the weight
    for row in range(0, N, n_rows):
        rows = slice(row, row + n_rows)
        factor = row_factor[rows] if row_factor is not None and len(row_factor) == N else row_factor
        for start in range(0, T, steps):
            inputs, outputs = (x[start : start + steps, rows].to(dtype).contiguous() for x in (pre, post))
            p, q = _traces(inputs, last.pre[rows], plus), _traces(outputs, last.post[rows], minus)
            last.pre[rows], last.post[rows] = p[-1], q[-1]
            post_term, pre_term = pairing.a_plus * outputs, pairing.a_minus * inputs
            if last.slow_pre is not None and last.slow_post is not None:
                slow_post = _pre_spike_traces(outputs, last.slow_post[rows], slow_y, pairing.decay_y)
                slow_pre = _pre_spike_traces(inputs, last.slow_pre[rows], slow_x, pairing.decay_x)
                post_term = post_term + pairing.a3_plus * outputs * slow_post
                pre_term = pre_term + pairing.a3_minus * inputs * slow_pre
            if factor is not None:
                post_term, q = post_term * factor, q * factor
            if step_factor is not None:
                chunk_factor = step_factor[start : start + steps].to(dtype).view(-1, *[1] * (outputs.ndim - 1))
                post_term, q = post_term * chunk_factor, q * chunk_factor
            potentiation = potentiation + correlate(post_term.flatten(0, 1), p.flatten(0, 1))
            depression = depression + correlate(q.flatten(0, 1), pre_term.flatten(0, 1))
    return potentiation, depression, last


def _powers(decays: set[float], steps: int, dtype: torch.dtype, device: torch.device) -> dict[float, Tensor]:
    """Return, for each decay, ``decay^(t - s)`` for t in 0..steps-1 and s in -1..t, else 0: ``[steps, steps + 1]``."""
    if steps == 1:  # a shortcut for updates at every time step, in which overhead takes most of the time
        return {decay: torch.tensor([[decay, 1.0]], dtype=dtype, device=device) for decay in decays}
    step = torch.arange(steps + 1, dtype=torch.float64, device=device)
    lag = (step[1:, None] - step).clamp_(min=0)
    return {decay: (decay**lag).tril_(1).to(dtype) for decay in decays}


def _traces(x: Tensor, initial: Tensor, powers: Tensor) -> Tensor:
    """Return the traces of a chunk of spikes ``x [t, N, *]``, in its shape; ``initial`` is the trace before the chunk."""
    steps = len(x)
    from_initial = powers[:steps, :1] * initial.flatten()
    return torch.addmm(from_initial, powers[:steps, 1 : steps + 1], x.flatten(1)).view(x.shape)


def _pre_spike_traces(x: Tensor, last: Tensor, powers: Tensor, decay: float) -> Tensor:
    """Return the traces before the spike of each time step is added; write the last trace to ``last``."""
    traces = _traces(x, last, powers)
    pre_spike = torch.cat((last[None], traces[:-1])) * decay
    last.copy_(traces[-1])
    return pre_spike
