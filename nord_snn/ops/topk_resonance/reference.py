"""Temporal co-firing resonance in plain PyTorch. All other backends are tested against it."""

import torch
from torch import Tensor

__all__ = ["coincidences", "keep_best", "reference", "resonance_scores"]


def coincidences(q: Tensor, k: Tensor, n_heads: int) -> Tensor:
    """Return, per head, the number of (time step, neuron) pairs that fire in q and k ``[T, B, S, D]``: ``[B, H, S, S]``.

    Counts are integers and exact in float32 up to 2^24; in half precision only up to 2^11.
    """

    def heads(spikes: Tensor) -> Tensor:  # [T, B, S, D] -> [B, H, S, T * D/H]
        return spikes.unflatten(-1, (n_heads, -1)).permute(1, 3, 2, 0, 4).flatten(-2)

    return heads(q) @ heads(k).mT


def resonance_scores(counts: Tensor, temperature: float | Tensor, recency: Tensor | None, causal: bool) -> Tensor:
    """Return ``counts * temperature - recency[h] * |a - b|``, minus infinity for masked keys.

    If there are fewer queries than keys, they are the last positions.
    """
    queries, keys = counts.shape[-2:]
    position = torch.arange(keys, device=counts.device)
    distance = position[keys - queries :, None] - position[None, :]
    scores = counts * temperature
    if recency is not None:
        scores = scores - recency[:, None, None] * distance.abs()
    return scores.masked_fill(distance < 0, -torch.inf) if causal else scores


def keep_best(scores: Tensor, top_k: int) -> Tensor:
    """Return a mask of the ``top_k`` best keys of each query; of equal scores the highest positions are selected.

    ``torch.topk`` does not define which of equal scores are selected. Here all keys above the k-th best score are selected,
    and of the keys with that score those at the highest positions.
    """
    if top_k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    kth_best = scores.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tied = scores > kth_best, scores == kth_best
    n_tied = top_k - above.sum(-1, keepdim=True)
    tied_from_here = tied.flip(-1).cumsum(-1).flip(-1)
    return above | (tied & (tied_from_here <= n_tied))


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_heads: int,
    top_k: int,
    temperature: float | Tensor,
    recency: Tensor | None,
    causal: bool,
) -> Tensor:
    """Return :func:`nord_snn.ops.resonance` of ``q, k [T, B, S, D]`` and ``v [B, S, V]``, the context ``[B, S, V]``."""
    scores = resonance_scores(coincidences(q, k, n_heads), temperature, recency, causal)
    with torch.no_grad():
        selected = keep_best(scores, top_k)
    weights = scores.masked_fill(~selected, -torch.inf).softmax(-1)
    values = v.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # [B, H, S, V/H]
    return (weights @ values).transpose(1, 2).flatten(-2)
