"""Pass tensors to Numba kernels as addresses, which costs nothing; converting to an array costs microseconds.

Python passes plain tuples to a kernel, which makes NamedTuples of them: Numba needs 2 µs more to recognise the type of a
NamedTuple.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["NUMPY_TYPES", "addresses", "as_contiguous", "data_pointer"]

#: NumPy scalar type for each dtype that kernels compute in. Kernels get raw addresses; a scalar of this type gives
#: Numba the element type.
NUMPY_TYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}

#: Addresses below are looked at: without storage, the address of a tensor is its offset. The elements of others are above on
#: most systems, so that the look at the storage costs nothing there.
_LOWEST = 1 << 40


def as_contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` if it is contiguous and of this dtype, else a copy; the caller must keep a reference while a kernel runs.

    Raises:
        ValueError: ``x`` is not on the CPU, or its storage was freed.
    """
    if not x.is_cpu:
        raise ValueError(f"expected all tensors on the CPU, the device of the input, got one on {x.device}")
    if x.dtype is dtype and x.is_contiguous():
        return x
    _check_storage(x)
    return x.to(dtype).contiguous()


def data_pointer(x: Tensor | None) -> int:
    """Return the address of the elements of a contiguous tensor; 0 for None.

    Raises:
        ValueError: its storage was freed.
    """
    if x is None:
        return 0
    address = x.data_ptr()
    if address < _LOWEST:
        _check_storage(x)
    return address


def _check_storage(x: Tensor) -> None:
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    needed = (x.storage_offset() + last + 1) * x.element_size() if x.numel() else 0
    if x.untyped_storage().nbytes() < needed:
        raise ValueError(
            f"expected a tensor {list(x.shape)} with its data, got one whose storage was freed, as FSDP does between uses"
        )


def addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    """Return the address of each tensor, 0 for None."""
    return tuple(map(data_pointer, tensors))
