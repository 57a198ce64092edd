"""Run CPU kernels on as many threads as torch uses.

A kernel is compiled for one thread and called for a share of the work, in all threads of the OpenMP team of torch: threads of
another pool, also those of Numba's parallel loops, would compete for the cores with torch's, which spin after an operation.
OpenMP does not work in a forked process. There, and where torch is built without OpenMP, worker threads of Python run the shares,
without the GIL. A forked process starts its own. Callers in several threads share the workers; none waits for another.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable
from operator import length_hint
from queue import SimpleQueue
from typing import Any

import numba
import torch

from nord_snn._compat.torch import openmp_functions

__all__ = ["n_threads", "run_shares"]

#: Elements worth a thread of their own. With fewer, waiting for another thread takes longer than the work.
_GRAIN = 65536


def n_threads(n_elements: int | None = None) -> int:
    """Return the number of threads for a kernel: as many as torch has, but at most one for every 65,536 elements, if given."""
    n = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    return n if n_elements is None else min(n, 1 + n_elements // _GRAIN)


def run_shares(function: Callable[..., Any], in_team: Callable[..., Any]) -> Callable[..., None]:
    """Return a function of a number of threads and arguments that calls ``function(share, *arguments)`` on them.

    ``share`` is ``(k, n, finishes)``: share k of n. The last of all calls has ``finishes = 1`` and, unless it is the only one, no
    work but that which needs the results of all shares. ``in_team(openmp, n, arguments)`` does the same with OpenMP.
    """

    def run(threads: int, *arguments: Any) -> None:
        if threads == 1:
            function((0, 1, 1), *arguments)
        elif _openmp is not None:
            in_team(_openmp, threads, arguments)
        elif (n := _workers.start(threads - 1) + 1) == 1:
            function((0, 1, 1), *arguments)
        else:
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
        # In one call of C, so that no Ctrl-C comes between taking a task and handing it on.
        deque(map(_workers.tasks.put, tasks), maxlen=0)
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
_openmp = openmp_functions("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def _after_fork() -> None:
    global _openmp
    _openmp = None
    _workers.__init__()  # type: ignore[misc]


if multiprocessing.parent_process() is not None:  # perhaps forked before this module was imported
    _openmp = None
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)
