"""Temporal co-firing resonance in blocks of queries: the results of ``reference.py`` with memory linear in S positions.

The forward pass saves two numbers per query: the lowest selected score, and the lowest position of a selected key
with that score. The backward pass recomputes the scores block by block and finds the selected keys from these numbers.
For short sequences, whose attention weights take no more memory than the queries, the weights are saved as well.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.topk_resonance.support import Arguments

__all__ = ["backward", "forward", "saved_shapes"]

#: Queries per block.
BLOCK = 64
#: Number of scores that are computed at a time, for all heads and as many sequences as fit (at least one). On the CPU that
#: many fit into the cache of a core; other devices need more scores at a time for full utilisation.
SCORES = {"cpu": 2**16}
SCORES_ELSEWHERE = 2**24


def forward(arguments: Arguments, save_weights: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the context ``[B, S, V]``, and three tensors for ``backward``.

    These are, for each query, the lowest position of a selected key with the lowest selected score, and that score, each
    ``[B * H, S, 1]``, and the weights ``[B * H, S, S]`` or an empty tensor.
    """
    q, k, v, temperature, recency, n_heads, top_k, causal = arguments
    B, S, _ = v.shape
    context = torch.empty_like(v, memory_format=torch.contiguous_format)
    worst = temperature.new_full((B * n_heads, S, 1), -torch.inf)
    oldest = torch.zeros_like(worst, dtype=torch.int32)
    saved_weights = temperature.new_zeros(saved_shapes(q, n_heads, top_k, save_weights)[2])
    _, penalty = _tables(S, recency, causal, v)
    for batch, rows in _batches(v, n_heads):
        q_heads, k_heads = _split_heads(q[:, batch], n_heads, v), _split_heads(k[:, batch], n_heads, v)
        values = _split_heads(v[None, batch], n_heads, v)
        for queries, keys, offsets in _blocks(S, causal):
            scores = _scores(q_heads[:, queries], k_heads[:, keys], temperature, penalty[..., offsets])
            if keys.stop > top_k:
                worst[rows, queries], oldest[rows, queries] = _select(scores, top_k)
                _mask_unselected(scores, worst[rows, queries], oldest[rows, queries])
            weights = scores.softmax(-1)
            _merge_heads(weights @ values[:, keys], context[None, batch, queries], n_heads)
            if len(saved_weights):
                saved_weights[rows, queries, keys] = weights
    return context, oldest, worst, saved_weights


def backward(
    grad: Tensor, arguments: Arguments, saved: tuple[Tensor, Tensor, Tensor], needs_spike_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q and k (empty unless ``needs_spike_grad``), v, temperature and recency (empty if None).

    With w the weights of a query and ``g = grad . v`` the gradients of the weights, the gradient of the scores is
    ``w * (g - sum(w * g))``.
    """
    q, k, v, temperature, recency, n_heads, top_k, causal = arguments
    oldest, worst, saved_weights = saved
    S = v.shape[1]
    grad_q, grad_k = (x.new_empty(x.shape if needs_spike_grad else 0) for x in (q, k))
    grad_v = torch.empty_like(v, memory_format=torch.contiguous_format)
    grad_temperature = torch.zeros_like(temperature)
    grad_recency = temperature.new_zeros(0 if recency is None else n_heads)
    distance, penalty = _tables(S, recency, causal, v)
    for batch, rows in _batches(v, n_heads):
        q_heads, k_heads = _split_heads(q[:, batch], n_heads, v), _split_heads(k[:, batch], n_heads, v)
        values, grad_heads = _split_heads(v[None, batch], n_heads, v), _split_heads(grad[None, batch], n_heads, v)
        q_sum, k_sum, v_sum = torch.empty_like(q_heads), torch.zeros_like(k_heads), torch.zeros_like(values)
        for queries, keys, offsets in _blocks(S, causal):
            if len(saved_weights):
                weights = saved_weights[rows, queries, keys]
            else:
                scores = _scores(q_heads[:, queries], k_heads[:, keys], temperature, penalty[..., offsets])
                if keys.stop > top_k:
                    _mask_unselected(scores, worst[rows, queries], oldest[rows, queries])
                weights = scores.softmax(-1)
            v_sum[:, keys].baddbmm_(weights.mT, grad_heads[:, queries])
            grad_scores = (grad_heads[:, queries] @ values[:, keys].mT).mul_(weights)
            grad_scores.addcmul_(weights, grad_scores.sum(-1, keepdim=True), value=-1)
            torch.bmm(grad_scores, k_heads[:, keys], out=q_sum[:, queries])
            if needs_spike_grad:
                k_sum[:, keys].baddbmm_(grad_scores.mT, q_heads[:, queries])
            if recency is not None:
                distances = distance[: weights.shape[1], offsets].flatten()
                grad_recency -= (grad_scores.view(-1, n_heads, len(distances)) @ distances).sum(0)
        # scores = temperature * counts and counts = q . k, so sum(grad * counts) = sum(q * (grad . k)).
        grad_temperature += torch.dot(q_heads.flatten(), q_sum.flatten())
        _merge_heads(v_sum, grad_v[None, batch], n_heads)
        if needs_spike_grad:
            _merge_heads(q_sum.mul_(temperature), grad_q[:, batch], n_heads)
            _merge_heads(k_sum.mul_(temperature), grad_k[:, batch], n_heads)
    return grad_q, grad_k, grad_v, grad_temperature, grad_recency


def saved_shapes(q: Tensor, n_heads: int, top_k: int, save_weights: bool) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the tensors that ``forward`` returns for ``backward``.

    The weights are ``[B * H, S, S]`` for short sequences, where they take no more memory than the queries; the backward
    pass then recomputes no scores. Otherwise they are ``[0, 0, 0]``.
    """
    T, B, S, D = q.shape
    short = save_weights and T * D // n_heads >= S
    return (B * n_heads, S, 1), (B * n_heads, S, 1), (B * n_heads, S, S) if short else (0, 0, 0)


def _batches(v: Tensor, n_heads: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the sequences that are computed together, and of the heads of these sequences among all ``B * H``."""
    B, S, _ = v.shape
    size = max(1, SCORES.get(v.device.type, SCORES_ELSEWHERE) // max(1, n_heads * min(BLOCK, S) * S))
    for start in range(0, B, size):
        stop = min(start + size, B)
        yield slice(start, stop), slice(start * n_heads, stop * n_heads)


def _blocks(S: int, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of the queries, of their visible keys, and of the columns of ``_tables`` for these keys."""
    for start in range(0, S, BLOCK):
        stop = min(start + BLOCK, S)
        n_keys = stop if causal else S
        yield slice(start, stop), slice(0, n_keys), slice(S - start, S - start + n_keys)


def _tables(S: int, recency: Tensor | None, causal: bool, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances ``[BLOCK, 2S]`` and penalties ``[H or 1, BLOCK, 2S]``, infinite for masked keys.

    Row i and column j belong to query i of a block and the key ``S + i - j`` positions before it. For a block whose
    first query is at position a, the columns start at ``S - a``.
    """
    rows = torch.arange(min(BLOCK, S), device=v.device, dtype=compute_dtype(v))
    distance_back = S + rows[:, None] - torch.arange(2 * S, device=v.device, dtype=rows.dtype)
    distance = distance_back.abs()
    penalty = torch.zeros_like(distance)[None] if recency is None else recency[:, None, None] * distance
    return distance, penalty.masked_fill_(distance_back < 0, torch.inf) if causal else penalty


def _scores(q_heads: Tensor, k_heads: Tensor, temperature: Tensor, penalty: Tensor) -> Tensor:
    """Return the scores of one block, bit for bit those of the reference: ``[rows, queries, keys]``."""
    scores = (q_heads @ k_heads.mT).mul_(temperature)
    scores.unflatten(0, (-1, penalty.shape[0])).sub_(penalty[:, : scores.shape[1]])
    return scores


def _select(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the lowest selected score of each query, and the lowest position of a selected key with that score.

    ``n_tied`` keys with that score are selected, those at the highest positions. The cumulative count of keys with that score
    is sorted, so a binary search finds the lowest of these positions.
    """
    worst = scores.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
    n_tied = top_k - (scores > worst).sum(-1, keepdim=True, dtype=torch.int32)
    tied = (scores == worst).cumsum(-1, dtype=torch.int32)
    return worst, torch.searchsorted(tied, tied[..., -1:] - n_tied + 1, out_int32=True)


def _mask_unselected(scores: Tensor, worst: Tensor, oldest: Tensor) -> None:
    """Set unselected scores to minus infinity: those below ``worst``, and those equal to it before position ``oldest``."""
    position = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.int32)
    scores.masked_fill_(torch.where(position < oldest, scores <= worst, scores < worst), -torch.inf)


def _split_heads(x: Tensor, n_heads: int, v: Tensor) -> Tensor:
    """Return ``x [T, B, S, D]`` as ``[B * H, S, T * D/H]`` in the dtype of the sums for values ``v``, with a single copy."""
    heads = x.unflatten(-1, (n_heads, -1)).permute(1, 3, 2, 0, 4)
    copy = heads.to(compute_dtype(v), copy=True, memory_format=torch.contiguous_format)
    return copy.flatten(3).flatten(0, 1)


def _merge_heads(heads: Tensor, target: Tensor, n_heads: int) -> None:
    """Write ``heads [B * H, S, T * D/H]`` into ``target [T, B, S, D]``, the inverse of ``_split_heads``."""
    view = target.unflatten(-1, (n_heads, -1)).permute(1, 3, 2, 0, 4)
    view.copy_(heads.view(view.shape))
