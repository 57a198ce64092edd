"""Masks of a resonance: which keys a query may see."""

import torch
from torch import Tensor

from nord_snn.ops.checks import compute_dtype, without_autocast
from nord_snn.ops.topk_resonance.reference import coincidences, keep_best, resonance_scores

__all__ = ["masked_resonance", "visible_keys"]


def visible_keys(mask: Tensor | None, key_mask: Tensor | None, n_sequences: int, n_positions: int) -> Tensor | None:
    """Return which keys each query may see, ``[B or 1, 1, S or 1, S]``, or None if there is no mask.

    Args:
        mask: ``[S, S]``, whether query a may see key b, or None.
        key_mask: ``[B, S]``, whether any query may see key b, or None.
        n_sequences: B.
        n_positions: S.

    Raises:
        TypeError: a mask is not a tensor of booleans.
        ValueError: a mask has another shape.
    """
    visible = None
    for name, layout, given, shape in (
        ("mask", "[S, S]", mask, (n_positions, n_positions)),
        ("key_mask", "[B, S]", key_mask, (n_sequences, n_positions)),
    ):
        if given is None:
            continue
        if not isinstance(given, Tensor) or given.dtype != torch.bool:
            got = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"{name} must be a tensor of booleans, True where a key may be seen, got {got}")
        if given.shape != shape:
            raise ValueError(f"{name} must have shape {layout} = {list(shape)}, got {list(given.shape)}")
        part = given[None, None] if name == "mask" else given[:, None, None]
        visible = part if visible is None else visible & part
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
    """Return :func:`nord_snn.ops.resonance` in which each query sees only its ``visible`` keys.

    Keys are masked before the best are selected, so a masked key takes no place among them. The context of a query that
    sees no key is zero. This is plain PyTorch; its memory grows with the square of the sequence length.

    Args:
        q: query spikes ``[T, B, S, D]``.
        k: key spikes ``[T, B, S, D]``.
        v: values ``[B, S, V]``.
        visible: booleans that broadcast to ``[B, H, S, S]``, see :func:`visible_keys`.
        n_heads: H.
        top_k: keys selected per query.
        temperature: a tensor of one element.
        recency: penalty per position of distance, for each head ``[H]``, or None.
        causal: whether a query sees only its own and earlier positions, of those that are visible.

    Returns:
        ``[B, S, V]`` in the dtype of ``v``.
    """
    dtype = compute_dtype(v)
    with without_autocast(v):
        counts = coincidences(q.to(dtype), k.to(dtype), n_heads)
        scores = resonance_scores(counts, temperature.to(dtype), recency, causal).masked_fill(~visible, -torch.inf)
        with torch.no_grad():
            sees_no_key = scores.amax(-1, keepdim=True) == -torch.inf
            selected = keep_best(scores, top_k)
        # Weights of a row of minus infinities would be NaN, and so would their gradients.
        weights = scores.masked_fill(~selected, -torch.inf).masked_fill(sees_no_key, 0).softmax(-1)
        values = v.to(dtype).unflatten(-1, (n_heads, -1)).transpose(1, 2)  # [B, H, S, V/H]
        context = weights.masked_fill(sees_no_key, 0) @ values
        return context.transpose(1, 2).flatten(-2).to(v.dtype)
