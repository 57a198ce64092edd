"""Resonance of new positions with cached keys in plain PyTorch: unpack the bits, then compute as without a cache."""

import torch
from torch import Tensor

from nord_snn.ops.cached_resonance.packing import unpack_spikes
from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.topk_resonance.reference import keep_best, resonance_scores

__all__ = ["forward", "masked_scores"]


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
    """Return the context ``[B, S, V]`` of the new positions; the arguments are those of ``resonance_cached``."""
    dtype = compute_dtype(values)
    scores = masked_scores(q, keys, temperature, recency, lengths, window, dtype)
    weights = scores.masked_fill(~keep_best(scores, top_k), -torch.inf).softmax(-1)
    weights = weights.masked_fill(
        (scores == -torch.inf).all(-1, keepdim=True), 0
    )  # padding queries have no visible key
    return (weights @ values.to(dtype)).transpose(1, 2).flatten(-2).to(values.dtype)


def masked_scores(
    q: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    recency: Tensor | None,
    lengths: Tensor | None,
    window: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the scores ``[B, H, S, S_all]`` of the new positions, minus infinity for masked keys."""
    n_steps, _, S, _ = q.shape
    H, n_all = keys.shape[1:3]
    width = q.shape[-1] // H
    queries = q.to(dtype).unflatten(-1, (H, width)).permute(1, 3, 2, 0, 4).flatten(-2)  # [B, H, S, T * D/H]
    keys = keys if keys.is_floating_point() else unpack_spikes(keys, n_steps, width)
    counts = queries @ keys.to(dtype).mT
    scores = resonance_scores(counts, temperature, None if recency is None else recency.to(dtype), causal=True)
    position = torch.arange(n_all, device=q.device)
    masked = position[n_all - S :, None] - position >= window
    if lengths is not None:
        masked = masked | (position < n_all - lengths[:, None, None, None])
    return scores.masked_fill(masked, -torch.inf)
