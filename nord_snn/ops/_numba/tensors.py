"""Pass tensors to Numba kernels as addresses: reading one takes 0.2 µs, converting a tensor to an array 4 µs.

Python passes plain tuples to a kernel, which converts them to NamedTuples: Numba needs 2 µs longer to recognise the type of a
NamedTuple.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["NUMPY_TYPES", "addresses", "as_contiguous", "data_pointer"]

#: NumPy scalar type for each dtype that kernels compute in. Kernels get addresses, and a scalar of this type, from which
#: Numba infers the element type.
NUMPY_TYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}

#: The storage of tensors with a lower address is checked: the address of a tensor without storage is its offset. On most
#: systems tensors with storage have higher addresses, so they are not checked, which saves time.
_LOWEST_UNCHECKED = 1 << 40


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
    if address < _LOWEST_UNCHECKED:
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
