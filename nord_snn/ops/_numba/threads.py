"""Run CPU kernels with as many Numba threads as torch uses."""

import threading
from types import TracebackType

import numba
import torch

__all__ = ["as_many_threads_as_torch"]

#: Not all thread pools of Numba are safe for two concurrent callers.
_caller_lock = threading.Lock()


#: Elements worth a thread of their own. With fewer, waiting for the other threads takes longer than the work, above all on
#: a machine with other load.
_GRAIN = 16384


class _AsManyThreadsAsTorch:
    """Context of a kernel; a class, since entering a generator takes longer than setting the threads."""

    def __init__(self, n_elements: int | None) -> None:
        self._most = None if n_elements is None else 1 + n_elements // _GRAIN

    def __enter__(self) -> int:
        self._n_torch_threads = torch.get_num_threads()
        n = min(self._n_torch_threads, numba.config.NUMBA_NUM_THREADS)
        if self._most is not None:
            n = min(n, self._most)
        _caller_lock.acquire()
        try:
            if numba.get_num_threads() != n:
                numba.set_num_threads(n)
        except BaseException:
            _caller_lock.release()
            raise
        return n

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.get_num_threads() != self._n_torch_threads:
            torch.set_num_threads(self._n_torch_threads)
        _caller_lock.release()


def as_many_threads_as_torch(n_elements: int | None = None) -> _AsManyThreadsAsTorch:
    """Set the number of threads of Numba's parallel loops to that of torch, one caller at a time; yield the number.

    Small work gets fewer threads: one more for every 16,384 of ``n_elements``, if that is given.
    Numba may share the OpenMP library with torch, and changes its number of threads when it starts its own threads. The
    number of torch threads is restored.
    """
    return _AsManyThreadsAsTorch(n_elements)
