"""Operations and bytes of the resonance of new positions with cached keys."""

from typing import Any

import torch
from torch import Tensor

from nord_snn.ops.cached_resonance.reference import masked_scores
from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.costs import OpCost, is_binary
from nord_snn.ops.topk_resonance.cost import selection_cost

__all__ = ["resonance_cached_cost"]


def resonance_cached_cost(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    top_k: int,
    temperature: float | Tensor,
    recency: Tensor | None,
    lengths: Tensor | None,
    window: int,
    *options: Any,
    **more_options: Any,
) -> OpCost:
    """Return the cost of one call; the arguments are those of the op. Padding and keys outside the window cost nothing."""
    scores = masked_scores(q, keys, temperature, recency, lengths, window, compute_dtype(values))
    binary_keys = keys.dtype == torch.uint8 or is_binary(keys)
    return selection_cost(q, binary_keys, values, scores, top_k, recency is not None)
