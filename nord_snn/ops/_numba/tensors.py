"""How tensors reach a Numba kernel: by their addresses, which cost nothing to pass where an array costs microseconds."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["NUMPY_TYPES", "as_contiguous", "data_pointer"]

#: What a kernel computes in. By a number of that type it knows what lies at an address.
NUMPY_TYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


def as_contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in this dtype and contiguous; itself, where it is. The caller keeps it while a kernel works with its address.

    Raises:
        ValueError: it lies elsewhere than on the CPU, where its address means nothing.
    """
    if not x.is_cpu:
        raise ValueError(f"expected all tensors on the device of the input, the CPU, got one on {x.device}")
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def data_pointer(x: Tensor | None) -> int:
    """Where the elements of a contiguous tensor begin; 0 for none."""
    return 0 if x is None else x.data_ptr()
