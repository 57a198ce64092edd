"""Memory that a thread's kernels use again in every call.

Fresh memory costs page faults, which take longer than a small kernel.
"""

import threading

import torch
from torch import Tensor

__all__ = ["whole_lines", "workspace"]

_LINE = 64  # bytes of a cache line
_KEPT = 1 << 20  # bytes that a thread keeps at most

_of_thread = threading.local()


def workspace(n_bytes: int) -> tuple[int, Tensor]:
    """Return the address of ``n_bytes`` at the start of a cache line, and the tensor that owns them.

    The caller must keep a reference to the tensor while a kernel runs. The contents are arbitrary, and the next call of this
    thread may return the same memory.
    """
    owner = getattr(_of_thread, "owner", None)
    if owner is None or owner.numel() < n_bytes + _LINE:
        owner = torch.empty(n_bytes + _LINE, dtype=torch.uint8, device="cpu")
        if n_bytes <= _KEPT:
            _of_thread.owner = owner
    return whole_lines(owner.data_ptr()), owner


def whole_lines(n_bytes: int) -> int:
    """Return a number of bytes rounded up to whole cache lines."""
    return -(-n_bytes // _LINE) * _LINE
