"""Run CPU kernels on as many threads as torch uses.

Numba's own parallel loops need a threading layer, and none fits every process: GNU OpenMP ends a forked process that runs a
loop, the work queue aborts where two threads run loops at the same time, TBB may not be installed. So a kernel is compiled for
one thread and called for a share of the work, here and by worker threads, without the GIL. Workers of the parent do not exist in
a forked process, which starts its own. Callers in several threads share the workers; none waits for another.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from operator import length_hint
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numba
import torch

__all__ = ["as_many_threads_as_torch", "run_shares"]

#: Elements worth a thread of their own. With fewer, waiting for another thread takes longer than the work.
_GRAIN = 65536

_of_thread = threading.local()


class _AsManyThreadsAsTorch:
    """Context of a kernel; a class, since entering a generator takes longer than a small kernel."""

    def __init__(self, n_elements: int | None) -> None:
        self._most = None if n_elements is None else 1 + n_elements // _GRAIN

    def __enter__(self) -> int:
        n = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if self._most is not None:
            n = min(n, self._most)
        _of_thread.shares = n
        return n

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _of_thread.shares = 1


def as_many_threads_as_torch(n_elements: int | None = None) -> _AsManyThreadsAsTorch:
    """Run the parallel kernels of a ``with`` block on as many threads as torch has; yield the number.

    Small work gets fewer threads: one more for every 65,536 of ``n_elements``, if that is given.
    """
    return _AsManyThreadsAsTorch(n_elements)


def run_shares(function: Callable[..., Any]) -> Callable[..., None]:
    """Return a function that calls ``function(share, *arguments)`` for every share of the work, in parallel.

    ``share`` is ``(k, n, finishes)``: share k of n. The last of all calls has ``finishes = 1`` and, unless it is the only one, no
    work but that which needs the results of all shares.
    """

    def run(*arguments: Any) -> None:
        n = getattr(_of_thread, "shares", 1)
        if n > 1:
            n = _workers.start(n - 1) + 1
        if n == 1:
            function((0, 1, 1), *arguments)
            return
        _run_in_parallel(function, n, arguments)
        function((n, n, 1), *arguments)

    return run


def _run_in_parallel(function: Callable[..., Any], n: int, arguments: tuple[Any, ...]) -> None:
    """Run n shares and return when all have ended: arguments are addresses, whose owners an exception would free."""
    done: SimpleQueue[None] = SimpleQueue()
    results: list[BaseException | None] = []
    tasks = iter([(function, ((k, n, 0), *arguments), results, done) for k in range(1, n)])
    error: BaseException | None = None
    try:
        deque(
            map(_workers.tasks.put, tasks), maxlen=0
        )  # no bytecode, so no Ctrl-C, between taking a task and handing it on
        function((0, n, 0), *arguments)
    except BaseException as raised:
        error = raised
    while len(results) < n - 1 - length_hint(tasks):
        try:
            done.get()
        except BaseException as raised:  # Ctrl-C
            error = raised
    for failure in (error, *results):
        if failure is not None:
            raise failure


class _Workers:
    """Threads that run shares of kernels."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[Any] = SimpleQueue()
        self._n = 0
        self._starting = threading.Lock()

    def start(self, n: int) -> int:
        """Start threads until there are ``n``; return how many of them there are."""
        if self._n < n:
            with self._starting:
                try:
                    while self._n < n:
                        threading.Thread(target=_work, args=(self.tasks,), name="nord_snn", daemon=True).start()
                        self._n += 1
                except RuntimeError:  # the system has no more threads, or the interpreter ends
                    pass
        return min(self._n, n)


def _work(tasks: "SimpleQueue[Any]") -> None:
    while True:
        function, arguments, results, done = tasks.get()
        try:
            function(*arguments)
            results.append(None)
        except BaseException as error:
            results.append(error)
        done.put(None)
        del function, arguments, results, done


_workers = _Workers()

if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=lambda: _workers.__init__())  # type: ignore[misc]
