"""Pass tensors to Numba kernels as addresses: reading one takes 0.2 µs, converting a tensor to an array 4 µs.

Python passes plain tuples to a kernel, which converts them to NamedTuples: Numba needs 2 µs longer to recognise the type of a
NamedTuple.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nord_snn.ops.checks import check_storage

__all__ = ["NUMPY_TYPES", "addresses", "as_contiguous", "data_pointer"]

#: NumPy scalar type for each dtype that kernels compute in. Kernels get addresses, and a scalar of this type, from which
#: Numba infers the element type.
NUMPY_TYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


def as_contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` if it is contiguous and of this dtype, else a copy; the caller must keep a reference while a kernel runs.

    Raises:
        ValueError: ``x`` is not on the CPU, or its storage was freed or shrunk.
    """
    if not x.is_cpu:
        raise ValueError(f"expected all tensors on the CPU, the device of the input, got one on {x.device}")
    check_storage(x)
    if x.dtype is dtype and x.is_contiguous() and not x.is_neg():
        return x
    return x.resolve_neg().to(dtype).contiguous()


def data_pointer(x: Tensor | None) -> int:
    """Return the address of the elements of a contiguous tensor of :func:`as_contiguous`; 0 for None."""
    return 0 if x is None else x.data_ptr()


def addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    """Return the address of each tensor, 0 for None."""
    return tuple(map(data_pointer, tensors))
