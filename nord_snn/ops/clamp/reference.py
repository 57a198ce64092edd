"""The leaky clamp in plain PyTorch. All other backends are tested against it."""

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(x: Tensor, branch: Tensor | None, gain: Tensor | None, leak: Tensor, floor: Tensor) -> Tensor:
    """Return :func:`nord_snn.ops.leaky_clamp` of ``x, branch [*, D]`` with ``gain, leak, floor [D]``."""
    z = x if branch is None or gain is None else x + gain * branch
    return torch.where(z >= 0, z, torch.maximum(leak * z, floor))
