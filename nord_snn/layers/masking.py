"""Masks of a resonance: to which keys a query may attend."""

import torch
from torch import Tensor

from nord_snn.ops.checks import compute_dtype, without_autocast
from nord_snn.ops.topk_resonance.reference import coincidences, keep_best, resonance_scores

__all__ = ["masked_resonance", "visible_keys"]


def visible_keys(mask: Tensor | None, key_mask: Tensor | None, n_sequences: int, n_positions: int) -> Tensor | None:
    """Return to which keys each query may attend, ``[B or 1, 1, S or 1, S]``, or None if there is no mask.

    Args:
        mask: booleans ``[S, S]``, True where query a may attend to key b, or None.
        key_mask: booleans ``[B, S]``, True for keys to which queries may attend, or None.
        n_sequences: B.
        n_positions: S.

    Raises:
        TypeError: a mask is not a tensor of booleans.
        ValueError: a mask has another shape.
    """
    visible = None
    for name, layout, allowed, shape in (
        ("mask", "[S, S]", mask, (n_positions, n_positions)),
        ("key_mask", "[B, S]", key_mask, (n_sequences, n_positions)),
    ):
        if allowed is None:
            continue
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            got = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
            raise TypeError(f"{name} must be a tensor of booleans, True where a query may attend to a key, got {got}")
        if allowed.shape != shape:
            raise ValueError(f"{name} must have shape {layout} = {list(shape)}, got {list(allowed.shape)}")
        broadcastable = allowed[None, None] if name == "mask" else allowed[:, None, None]
        visible = broadcastable if visible is None else visible & broadcastable
    return visible


def masked_resonance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    n_heads: int,
    top_k: int,
    temperature: Tensor,
    recency: Tensor | None,
    causal: bool,
) -> Tensor:
    """Return :func:`nord_snn.ops.resonance` in which each query attends only to its ``visible`` keys.

    Keys are masked before the ``top_k`` best are selected, so the selection is among visible keys. The context of a query
    without a visible key is zero. This is plain PyTorch; its memory grows with the square of the sequence length.

    Args:
        q: query spikes ``[T, B, S, D]``.
        k: key spikes ``[T, B, S, D]``.
        v: values ``[B, S, V]``.
        visible: booleans that broadcast to ``[B, H, S, S]``, see :func:`visible_keys`.
        n_heads: H.
        top_k: number of keys that each query selects.
        temperature: factor of the coincidence counts, a tensor of one element.
        recency: penalty per position of distance, for each head ``[H]``, or None.
        causal: whether to mask the keys after each query as well.

    Returns:
        ``[B, S, V]`` in the dtype of ``v``.
    """
    dtype = compute_dtype(v)
    with without_autocast(v):
        counts = coincidences(q.to(dtype), k.to(dtype), n_heads)
        scores = resonance_scores(counts, temperature.to(dtype), recency, causal).masked_fill(~visible, -torch.inf)
        with torch.no_grad():
            has_no_key = scores.amax(-1, keepdim=True) == -torch.inf
            selected = keep_best(scores, top_k)
        # The softmax of minus infinities alone is NaN, as is its gradient.
        weights = scores.masked_fill(~selected, -torch.inf).masked_fill(has_no_key, 0).softmax(-1)
        values = v.to(dtype).unflatten(-1, (n_heads, -1)).transpose(1, 2)  # [B, H, S, V/H]
        context = weights.masked_fill(has_no_key, 0) @ values
        return context.transpose(1, 2).flatten(-2).to(v.dtype)
