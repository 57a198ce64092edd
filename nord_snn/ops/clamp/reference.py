"""The leaky clamp in plain PyTorch: the truth that every other backend is tested against."""

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(x: Tensor, branch: Tensor | None, gain: Tensor | None, leak: Tensor, floor: Tensor) -> Tensor:
    """``x`` and ``branch [*, D]``; ``gain``, ``leak``, ``floor [D]`` -> ``[*, D]``; see :func:`nord_snn.ops.leaky_clamp`."""
    z = x if branch is None or gain is None else x + gain * branch
    return torch.where(z >= 0, z, torch.maximum(leak * z, floor))
