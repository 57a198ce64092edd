"""Operations and bytes of the resonance: coincidences with visible keys, and values of the selected keys."""

from math import ceil
from typing import Any

import torch
from torch import Tensor

from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.costs import OpCost, ProductCount, is_binary, spike_bytes
from nord_snn.ops.topk_resonance.reference import coincidences, keep_best, resonance_scores

__all__ = ["resonance_cost", "selection_cost"]


def resonance_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: float | Tensor,
    recency: Tensor | None,
    n_heads: int,
    top_k: int,
    causal: bool,
    *options: Any,
    **more_options: Any,
) -> OpCost:
    """Return the cost of one call; the arguments are those of the op, whose other options do not change the cost."""
    dtype = compute_dtype(v)
    scores = resonance_scores(coincidences(q.to(dtype), k.to(dtype), n_heads), temperature, recency, causal)
    values = v.unflatten(-1, (n_heads, -1)).transpose(1, 2)
    return selection_cost(q, is_binary(k), values, scores, top_k, recency is not None)


def selection_cost(
    q: Tensor, binary_keys: bool, values: Tensor, scores: Tensor, top_k: int, has_recency: bool
) -> OpCost:
    """Return the cost of a resonance with these scores.

    Each score of a visible key is scaled, and with recency lowered; the softmax computes one weight for each selected key.
    These are elementwise operations that run once for all time steps.

    Args:
        q: queries ``[T, B, S, D]``.
        binary_keys: whether the keys are spikes.
        values: ``[B, H, n_keys, V/H]``.
        scores: ``[B, H, S, n_keys]``, minus infinity for masked keys.
        top_k: number of keys that each query selects.
        has_recency: whether scores are lowered by distance.
    """
    visible = scores > -torch.inf
    selected = keep_best(scores, top_k) & visible
    n_scores = int(visible.sum())
    return OpCost(
        products=(_coincidences(q, binary_keys, visible), _values(selected, values, q)),
        elementwise_once=n_scores * (2 if has_recency else 1) + int(selected.sum()),
    )


def _coincidences(q: Tensor, binary_keys: bool, visible: Tensor) -> ProductCount:
    """Return the cost of the coincidences of queries with their visible keys, ``visible [B, H, S, n_keys]``."""
    T, B, _, D = q.shape
    H, n_keys = visible.shape[1], visible.shape[3]
    dense = int(visible.sum()) * T * D // H
    macs, acs = dense, 0
    if binary_keys and is_binary(q):
        active = q.unflatten(-1, (H, -1)).count_nonzero(dim=(0, 4)).transpose(1, 2)  # [B, H, S]
        macs, acs = 0, int((active * visible.sum(-1)).sum())
    keys = T * B * n_keys * D
    key_bytes = ceil(keys / 8) if binary_keys else keys * q.element_size()
    return ProductCount(
        "coincidences",
        dense,
        macs,
        acs,
        activation_bytes=spike_bytes(q) + key_bytes,
        dense_activation_bytes=(q.numel() + keys) * q.element_size(),
        time_steps=T,
    )


def _values(selected: Tensor, values: Tensor, q: Tensor) -> ProductCount:
    """Return the cost of the sum of ``values [B, H, n_keys, V/H]`` over selected keys, ``selected [B, H, S, n_keys]``."""
    width, n_heads = values.shape[-1], values.shape[1]
    dense = int(selected.sum()) * width
    read, written = (n * values.element_size() for n in (dense, selected[..., 0].numel() * width))
    binary = is_binary(values)
    return ProductCount(
        "values",
        dense,
        macs=0 if binary else dense,
        acs=int((selected.sum(2) * values.count_nonzero(-1)).sum()) if binary else 0,
        activation_bytes=written + (ceil(dense / 8) if binary else read),
        dense_activation_bytes=read + written,
        time_steps=len(q) if width * n_heads > q.shape[-1] else 1,  # if V > D, each time step has its own values
    )
