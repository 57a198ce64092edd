"""Numba's threads, as many as torch may use: what every CPU kernel runs in."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch

__all__ = ["as_many_threads_as_torch"]

#: Not every thread pool of Numba takes two callers at a time.
_one_caller = threading.Lock()


@contextmanager
def as_many_threads_as_torch() -> Iterator[int]:
    """Let Numba's parallel loops use as many threads as torch, one caller at a time; gives that number.

    Numba may share its OpenMP library with torch, and sets the number of threads there when it starts its own: that is
    put back.
    """
    wanted = torch.get_num_threads()
    with _one_caller:
        numba.set_num_threads(min(wanted, numba.config.NUMBA_NUM_THREADS))
        try:
            yield numba.get_num_threads()
        finally:
            if torch.get_num_threads() != wanted:
                torch.set_num_threads(wanted)
