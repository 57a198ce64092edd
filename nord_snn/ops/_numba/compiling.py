"""Compile kernels with a cache on disk that is invalidated when the kernel's file or this folder changes."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

from nord_snn._compat import numba as compat
from nord_snn._compat.numba import cached_njit, call_in_team
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
    """Compile ``function(share, *arguments)``; return a function ``(threads, *arguments)`` that runs it in these threads.

    :func:`nord_snn.ops._numba.threads.run_shares` describes a share; :func:`chunks_of` returns its chunks.
    """
    compiled = kernel(function)
    return run_shares(compiled, kernel(_team_function(function, compiled)))


def _team_function(function: Callable[..., Any], compiled: Any) -> Callable[..., Any]:
    """Return the Python code that runs a compiled kernel in an OpenMP team.

    The code refers to the kernel by a global name, because Numba would compile a closure in every process. It has the file and
    the name of the kernel, which decide where Numba caches it on disk.
    """
    code = _run_in_team.__code__.replace(
        co_filename=function.__code__.co_filename, co_firstlineno=function.__code__.co_firstlineno
    )
    in_team = FunctionType(code, {"COMPILED": compiled, "call_in_team": call_in_team})
    in_team.__module__, in_team.__qualname__ = function.__module__, f"{function.__qualname__}_in_team"
    return in_team


def _run_in_team(openmp, n, arguments):
    call_in_team(COMPILED, openmp, n, arguments)  # noqa: F821
    COMPILED((n, n, 1), *arguments)  # noqa: F821


@kernel
def chunks_of(share, chunks):
    """Return the range of the chunks that belong to a share of ``chunks`` chunks."""
    return range(share[0] * chunks // share[1], min(share[0] + 1, share[1]) * chunks // share[1])
