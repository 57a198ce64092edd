"""Temporal co-firing resonance in plain PyTorch: the truth that every other backend is tested against."""

import torch
from torch import Tensor

__all__ = ["coincidences", "keep_best", "reference", "resonance_scores"]


def coincidences(q: Tensor, k: Tensor, n_heads: int) -> Tensor:
    """Count, per head, the (step, neuron) pairs that fire in both: ``[T, B, S, D]`` twice -> ``[B, H, S, S]``.

    The counts are integers, so the sums must be exact: float32 holds them up to 2^24, half precision only to 2^11.
    """

    def heads(spikes: Tensor) -> Tensor:  # [T, B, S, D] -> [B, H, S, T * D/H]
        return spikes.unflatten(-1, (n_heads, -1)).permute(1, 3, 2, 0, 4).flatten(-2)

    return heads(q) @ heads(k).mT


def resonance_scores(counts: Tensor, temperature: float | Tensor, recency: Tensor | None, causal: bool) -> Tensor:
    """``counts * temperature - recency[h] * |a - b|``, minus infinity where the key is not to be seen.

    Fewer queries than keys are those of the last positions.
    """
    queries, keys = counts.shape[-2:]
    position = torch.arange(keys, device=counts.device)
    distance = position[keys - queries :, None] - position[None, :]
    scores = counts * temperature
    if recency is not None:
        scores = scores - recency[:, None, None] * distance.abs()
    return scores.masked_fill(distance < 0, -torch.inf) if causal else scores


def keep_best(scores: Tensor, top_k: int) -> Tensor:
    """Mask of the ``top_k`` best keys of each query; among equal scores the most recent position wins.

    ``torch.topk`` leaves ties to chance. Here everything above the k-th best score is in, and of those that equal it
    as many as there is room for, counted from the most recent one.
    """
    if top_k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    last = scores.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tied = scores > last, scores == last
    room = top_k - above.sum(-1, keepdim=True)
    newer = tied.flip(-1).cumsum(-1).flip(-1)
    return above | (tied & (newer <= room))


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
    """``q, k [T, B, S, D]``, ``v [B, S, V]`` -> ``[B, S, V]``; see :func:`nord_snn.ops.resonance`."""
    scores = resonance_scores(coincidences(q, k, n_heads), temperature, recency, causal)
    with torch.no_grad():
        kept = keep_best(scores, top_k)
    weights = scores.masked_fill(~kept, -torch.inf).softmax(-1)
    values = v.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # [B, H, S, V/H]
    return (weights @ values).transpose(1, 2).flatten(-2)
