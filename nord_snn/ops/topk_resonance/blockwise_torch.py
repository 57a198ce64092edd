"""Temporal co-firing resonance in blocks of queries: the results of ``reference.py`` in memory linear in S.

A block of queries meets the keys that it may see, and of its scores two numbers per query remain: the worst score kept,
and the position of the oldest key kept among those that have just that score. The backward pass counts again, block by
block, and knows from these two which keys were kept. Sequences so short that their weights take no more room than
the queries keep the weights instead.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nord_snn.ops.checks import compute_dtype

__all__ = ["backward", "forward", "saved_shapes"]

#: Queries of a block.
BLOCK = 64
#: Scores of a block, for all heads and as many sequences as fit (at least one): on the CPU what a core's cache holds,
#: elsewhere what keeps a device busy.
SCORES = {"cpu": 2**16}
SCORES_ELSEWHERE = 2**24


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
    """``q, k [T, B, S, D]``, ``v [B, S, V]`` -> context ``[B, S, V]``, and for ``backward``: the oldest position kept at the
    worst score and that score, ``[B * H, S, 1]`` each, and the weights if they are to be remembered.

    ``temperature`` and ``recency`` come in the dtype of the sums, the others in any.
    """
    B, S, _ = v.shape
    context = torch.empty_like(v, memory_format=torch.contiguous_format)
    worst = temperature.new_full((B * n_heads, S, 1), -torch.inf)
    oldest = torch.zeros_like(worst, dtype=torch.int32)
    remembered = temperature.new_zeros(saved_shapes(q, n_heads, top_k, remember)[2])
    _, penalty = _tables(S, recency, causal, v)
    for batch, rows in _batches(v, n_heads):
        q_heads, k_heads = _split(q[:, batch], n_heads, v), _split(k[:, batch], n_heads, v)
        values = _split(v[None, batch], n_heads, v)
        for queries, keys, offsets in _blocks(S, causal):
            scores = _scores(q_heads[:, queries], k_heads[:, keys], temperature, penalty[..., offsets])
            if keys.stop > top_k:
                worst[rows, queries], oldest[rows, queries] = _select(scores, top_k)
                _drop(scores, worst[rows, queries], oldest[rows, queries])
            weights = scores.softmax(-1)
            _merge(weights @ values[:, keys], context[None, batch, queries], n_heads)
            if len(remembered):
                remembered[rows, queries, keys] = weights
    return context, oldest, worst, remembered


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    recency: Tensor | None,
    oldest: Tensor,
    worst: Tensor,
    remembered: Tensor,
    n_heads: int,
    top_k: int,
    causal: bool,
    spikes_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q and k (empty unless ``spikes_too``), v, temperature and recency (empty without one).

    With w the weights of a query and g = grad . v their gradients, that of the scores is ``w * (g - sum(w * g))``.
    """
    S = v.shape[1]
    grad_q, grad_k = (x.new_empty(x.shape if spikes_too else 0) for x in (q, k))
    grad_v = torch.empty_like(v, memory_format=torch.contiguous_format)
    grad_temperature = torch.zeros_like(temperature)
    grad_recency = temperature.new_zeros(0 if recency is None else n_heads)
    distance, penalty = _tables(S, recency, causal, v)
    for batch, rows in _batches(v, n_heads):
        q_heads, k_heads = _split(q[:, batch], n_heads, v), _split(k[:, batch], n_heads, v)
        values, grad_heads = _split(v[None, batch], n_heads, v), _split(grad[None, batch], n_heads, v)
        q_sum, k_sum, v_sum = torch.empty_like(q_heads), torch.zeros_like(k_heads), torch.zeros_like(values)
        for queries, keys, offsets in _blocks(S, causal):
            if len(remembered):
                weights = remembered[rows, queries, keys]
            else:
                scores = _scores(q_heads[:, queries], k_heads[:, keys], temperature, penalty[..., offsets])
                if keys.stop > top_k:
                    _drop(scores, worst[rows, queries], oldest[rows, queries])
                weights = scores.softmax(-1)
            v_sum[:, keys].baddbmm_(weights.mT, grad_heads[:, queries])
            grad_scores = (grad_heads[:, queries] @ values[:, keys].mT).mul_(weights)
            grad_scores.addcmul_(weights, grad_scores.sum(-1, keepdim=True), value=-1)
            torch.bmm(grad_scores, k_heads[:, keys], out=q_sum[:, queries])
            if spikes_too:
                k_sum[:, keys].baddbmm_(grad_scores.mT, q_heads[:, queries])
            if recency is not None:
                steps = distance[: weights.shape[1], offsets].flatten()
                grad_recency -= (grad_scores.view(-1, n_heads, len(steps)) @ steps).sum(0)
        # The scores are temperature * counts, and the counts q . k: so sum(grad * counts) is sum(q * (grad . k)).
        grad_temperature += torch.dot(q_heads.flatten(), q_sum.flatten())
        _merge(v_sum, grad_v[None, batch], n_heads)
        if spikes_too:
            _merge(q_sum.mul_(temperature), grad_q[:, batch], n_heads)
            _merge(k_sum.mul_(temperature), grad_k[:, batch], n_heads)
    return grad_q, grad_k, grad_v, grad_temperature, grad_recency


def saved_shapes(q: Tensor, n_heads: int, top_k: int, remember: bool) -> tuple[tuple[int, ...], ...]:
    """Shapes of what ``forward`` returns for ``backward``.

    The weights are ``[B * H, S, S]`` for short sequences, where they take no more room than the queries and spare the
    backward pass the counting, and otherwise ``[0, 0, 0]``.
    """
    T, B, S, D = q.shape
    short = remember and T * D // n_heads >= S
    return (B * n_heads, S, 1), (B * n_heads, S, 1), (B * n_heads, S, S) if short else (0, 0, 0)


def _batches(v: Tensor, n_heads: int) -> Iterator[tuple[slice, slice]]:
    """Sequences that are worked on together, and where their heads lie among all ``B * H``."""
    B, S, _ = v.shape
    size = max(1, SCORES.get(v.device.type, SCORES_ELSEWHERE) // max(1, n_heads * min(BLOCK, S) * S))
    for start in range(0, B, size):
        stop = min(start + size, B)
        yield slice(start, stop), slice(start * n_heads, stop * n_heads)


def _blocks(S: int, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Queries, the keys that they may see, and the columns of ``_tables`` that belong to these keys."""
    for start in range(0, S, BLOCK):
        stop = min(start + BLOCK, S)
        n_keys = stop if causal else S
        yield slice(start, stop), slice(0, n_keys), slice(S - start, S - start + n_keys)


def _tables(S: int, recency: Tensor | None, causal: bool, v: Tensor) -> tuple[Tensor, Tensor]:
    """Distances ``[BLOCK, 2S]`` and penalties ``[H or 1, BLOCK, 2S]``, infinite where a key is not to be seen.

    Row i and column j stand for a query i positions into its block and a key ``S + i - j`` positions before it, so that
    the columns of a block that begins at a start at ``S - a``.
    """
    rows = torch.arange(min(BLOCK, S), device=v.device, dtype=compute_dtype(v))
    before = S + rows[:, None] - torch.arange(2 * S, device=v.device, dtype=rows.dtype)
    distance = before.abs()
    penalty = torch.zeros_like(distance)[None] if recency is None else recency[:, None, None] * distance
    return distance, penalty.masked_fill_(before < 0, torch.inf) if causal else penalty


def _scores(q_heads: Tensor, k_heads: Tensor, temperature: Tensor, penalty: Tensor) -> Tensor:
    """``resonance_scores`` of the reference for one block, to the bit: ``[rows, queries, keys]``."""
    scores = (q_heads @ k_heads.mT).mul_(temperature)
    scores.unflatten(0, (-1, penalty.shape[0])).sub_(penalty[:, : scores.shape[1]])
    return scores


def _select(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The worst score kept of each query, and the position of the oldest key kept at that score.

    The running count of the tied keys is sorted, so the oldest of the newest ``room`` is found by bisection.
    """
    worst = scores.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
    room = top_k - (scores > worst).sum(-1, keepdim=True, dtype=torch.int32)
    tied = (scores == worst).cumsum(-1, dtype=torch.int32)
    return worst, torch.searchsorted(tied, tied[..., -1:] - room + 1, out_int32=True)


def _drop(scores: Tensor, worst: Tensor, oldest: Tensor) -> None:
    """Put minus infinity where ``_select`` did not keep: an older key must be better than the worst, a newer one as good."""
    position = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.int32)
    scores.masked_fill_(torch.where(position < oldest, scores <= worst, scores < worst), -torch.inf)


def _split(x: Tensor, n_heads: int, v: Tensor) -> Tensor:
    """``[T, B, S, D]`` -> ``[B * H, S, T * D/H]`` in the dtype of the sums, by a single copy."""
    heads = x.unflatten(-1, (n_heads, -1)).permute(1, 3, 2, 0, 4)
    copy = heads.to(compute_dtype(v), copy=True, memory_format=torch.contiguous_format)
    return copy.flatten(3).flatten(0, 1)


def _merge(heads: Tensor, target: Tensor, n_heads: int) -> None:
    """The way back: write ``[B * H, S, T * D/H]`` into ``target [T, B, S, D]``."""
    view = target.unflatten(-1, (n_heads, -1)).permute(1, 3, 2, 0, 4)
    view.copy_(heads.view(view.shape))
