"""The threshold of neurons that fire only above their threshold, as in snnTorch and NIR."""

import torch
from torch import Tensor

__all__ = ["firing_above"]


def firing_above(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the next number of ``dtype`` above the threshold, with the gradient of the threshold.

    Our neurons fire at ``v >= threshold``; with this threshold they fire at ``v > threshold``.

    Args:
        threshold: ``[D]``.
        dtype: dtype of the membrane potentials.

    Example:
        >>> threshold = torch.ones(2)
        >>> bool((firing_above(threshold, torch.float32) > threshold).all())
        True
    """
    threshold = threshold.to(dtype)
    with torch.no_grad():
        above = torch.nextafter(threshold, threshold.new_full((), torch.inf))
    if not (threshold.requires_grad and torch.is_grad_enabled()):
        return above
    return threshold + (above - threshold.detach())
