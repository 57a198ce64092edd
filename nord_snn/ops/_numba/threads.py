"""Run CPU kernels with as many Numba threads as torch uses."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch

__all__ = ["as_many_threads_as_torch"]

#: Not all thread pools of Numba are safe for two concurrent callers.
_caller_lock = threading.Lock()


@contextmanager
def as_many_threads_as_torch() -> Iterator[int]:
    """Set the number of threads of Numba's parallel loops to that of torch, one caller at a time; yield the number.

    Numba may share the OpenMP library with torch, and changes its number of threads when it starts its own threads. The
    number of torch threads is restored.
    """
    n_torch_threads = torch.get_num_threads()
    with _caller_lock:
        numba.set_num_threads(min(n_torch_threads, numba.config.NUMBA_NUM_THREADS))
        try:
            yield numba.get_num_threads()
        finally:
            if torch.get_num_threads() != n_torch_threads:
                torch.set_num_threads(n_torch_threads)
