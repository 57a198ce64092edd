"""The leaky clamp in plain PyTorch: the truth that every other backend is tested against."""

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(x: Tensor, leak: Tensor, floor: Tensor) -> Tensor:
    """``x [*, D]``, ``leak [D]``, ``floor [D]`` -> ``[*, D]``; see :func:`nord_snn.ops.leaky_clamp`."""
    return torch.where(x >= 0, x, torch.maximum(leak * x, floor))
