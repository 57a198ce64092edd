"""Memory that a thread's kernels use again in every call.

Fresh memory costs page faults, which take longer than a small kernel.
"""

import threading
from typing import NamedTuple

import numpy as np

__all__ = ["Workspace", "workspace"]

_LINE = 64  # bytes of a cache line
_KEPT = 1 << 20  # bytes that a thread keeps at most


class _Memory:
    """Bytes from the start of a cache line on, of NumPy: modes and transforms of torch change what it allocates."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._owner = np.empty(n_bytes + _LINE, np.uint8)
        self.address = _whole_lines(self._owner.ctypes.data)


_of_thread = threading.local()


class Workspace(NamedTuple):
    """Addresses of parts of a memory, and the memory, which must be referenced while a kernel runs."""

    parts: tuple[int, ...]
    memory: _Memory


def workspace(*n_bytes: int) -> Workspace:
    """Return memory in parts of ``n_bytes`` each, every one from the start of a cache line on.

    The contents are arbitrary, and the next call of this thread may return the same memory.
    """
    offsets, total = [], 0
    for n in n_bytes:
        offsets.append(total)
        total += _whole_lines(n)
    memory = getattr(_of_thread, "memory", None)
    if memory is None or memory.n_bytes < total:
        memory = _Memory(total)
        if total <= _KEPT:
            _of_thread.memory = memory
    return Workspace(tuple([memory.address + offset for offset in offsets]), memory)


def _whole_lines(n_bytes: int) -> int:
    return -(-n_bytes // _LINE) * _LINE
