"""The threshold of neurons that fire only above it, as those of snnTorch and of NIR."""

import torch
from torch import Tensor

from nord_snn.ops.checks import compute_dtype

__all__ = ["firing_above"]


def firing_above(threshold: Tensor) -> Tensor:
    """Return the next number above the threshold, at which our neurons fire, with the gradient of the threshold.

    Args:
        threshold: ``[D]``.

    Example:
        >>> threshold = torch.ones(2)
        >>> bool((firing_above(threshold) > threshold).all())
        True
    """
    threshold = threshold.to(compute_dtype(threshold))
    with torch.no_grad():
        above = torch.nextafter(threshold, threshold.new_full((), torch.inf))
    if not (threshold.requires_grad and torch.is_grad_enabled()):
        return above
    return threshold + (above - threshold.detach())
