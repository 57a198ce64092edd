"""Compile kernels with a cache on disk that is invalidated when their file or this folder changes."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nord_snn._compat import numba as compat
from nord_snn._compat.numba import cached_njit
from nord_snn.ops._numba.threads import run_shares

__all__ = ["chunks_of", "kernel", "parallel_kernel"]


def _digest() -> str:
    """Return a hash of the code that all kernels share."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(compat.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


_STAMP = _digest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a single-threaded function that releases the GIL; a division by zero gives IEEE infinity or NaN."""
    return cached_njit(function, _STAMP, nogil=True, error_model="numpy")


def parallel_kernel(function: Callable[..., Any]) -> Any:
    """Compile a function of a share of the work and arguments; return a function of the arguments that runs it on threads.

    See :func:`nord_snn.ops._numba.threads.run_shares`; :func:`chunks_of` returns the chunks of a share.
    """
    return run_shares(kernel(function))


@kernel
def chunks_of(share, chunks):
    """Return the range of the chunks that belong to a share."""
    return range(share[0] * chunks // share[1], min(share[0] + 1, share[1]) * chunks // share[1])
