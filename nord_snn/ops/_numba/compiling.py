"""Compile kernels with a cache on disk that is invalidated when their file or this folder changes."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nord_snn._compat import numba as compat
from nord_snn._compat.numba import cached_njit

__all__ = ["kernel", "parallel_kernel"]


def _digest() -> str:
    """Return a hash of the code that all kernels share."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(compat.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


_STAMP = _digest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a single-threaded function that releases the GIL; a division by zero gives IEEE infinity or NaN."""
    return cached_njit(function, _STAMP, nogil=True, error_model="numpy")


def parallel_kernel(function: Callable[..., Any]) -> Any:
    """Compile a function whose ``prange`` loops use several threads."""
    return cached_njit(function, _STAMP, nogil=True, error_model="numpy", parallel=True)
