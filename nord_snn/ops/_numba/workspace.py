"""Scratch memory for kernels, which each thread keeps between calls.

New memory causes page faults, which take longer than a small kernel.
"""

import threading
from typing import NamedTuple

import numpy as np

__all__ = ["Workspace", "workspace"]

_LINE = 64  # bytes of a cache line
_KEPT = 1 << 20  # bytes that a thread keeps at most


class _Memory:
    """Bytes that begin at a cache line. NumPy allocates them: modes and transforms of torch change what torch allocates."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._owner = np.empty(n_bytes + _LINE, np.uint8)
        self.address = _whole_lines(self._owner.ctypes.data)


_of_thread = threading.local()


class Workspace(NamedTuple):
    """Addresses of the parts of a memory, and the memory, to which the caller must keep a reference while a kernel runs."""

    parts: tuple[int, ...]
    memory: _Memory


def workspace(*n_bytes: int) -> Workspace:
    """Return memory with a part for each number of bytes; every part begins at a cache line.

    The contents are arbitrary, and the next call in this thread may return the same memory.
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
