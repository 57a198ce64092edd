"""Memory that a thread's kernels use again in every call.

Fresh memory costs page faults, which take longer than a small kernel.
"""

import threading

import torch
from torch import Tensor

__all__ = ["workspace"]

_LINE = 64  # bytes of a cache line
_KEPT = 1 << 20  # bytes that a thread keeps at most

_of_thread = threading.local()


def workspace(*n_bytes: int) -> tuple[tuple[int, ...], Tensor]:
    """Return the addresses of parts of ``n_bytes`` each, every one at the start of a cache line, and the tensor that owns them.

    The caller must keep a reference to the tensor while a kernel runs. The contents are arbitrary, and the next call of this
    thread may return the same memory.
    """
    offsets, total = [], 0
    for n in n_bytes:
        offsets.append(total)
        total += _whole_lines(n)
    total += _LINE  # to start at a line
    owner = getattr(_of_thread, "owner", None)
    if owner is None or owner.numel() < total:
        owner = torch.empty(total, dtype=torch.uint8, device="cpu")
        if total <= _KEPT:
            _of_thread.owner = owner
    first = _whole_lines(owner.data_ptr())
    return tuple([first + offset for offset in offsets]), owner


def _whole_lines(n_bytes: int) -> int:
    return -(-n_bytes // _LINE) * _LINE
