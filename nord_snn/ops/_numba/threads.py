"""Run CPU kernels on as many threads as torch uses.

A kernel is compiled for one thread and called for a share of the work, in all threads of torch's OpenMP team. Other threads,
such as those of Numba's parallel loops, would compete for the cores with torch's threads, which spin after an operation.
OpenMP does not work in a forked process. There, and if torch is built without OpenMP, worker threads of Python run the shares,
without the GIL. A forked process starts its own workers. Callers in several threads use the same workers, without waiting for
each other.
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

#: Number of elements per additional thread. With fewer, waiting for that thread takes longer than the work.
_GRAIN = 65536


def n_threads(n_elements: int | None = None) -> int:
    """Return the number of threads for a kernel: that of torch, and at most ``1 + n_elements // 65536`` if that is passed."""
    n = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    return n if n_elements is None else min(n, 1 + n_elements // _GRAIN)


def run_shares(function: Callable[..., Any], in_team: Callable[..., Any]) -> Callable[..., None]:
    """Return a function ``(threads, *arguments)`` that calls ``function(share, *arguments)`` for each share of the work.

    ``share`` is ``(k, n, finishes)``, share k of n. The last call has ``finishes = 1``, and computes what needs the results of
    all shares. With several threads the last call is ``(n, n, 1)``, which has no other work. ``in_team(openmp, n, arguments)``
    makes the same calls with OpenMP.
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
    """Run n shares; return or raise only when all have ended, because the caller then frees the memory of their arguments."""
    done: SimpleQueue[None] = SimpleQueue()
    results: list[BaseException | None] = []
    tasks = iter([(function, ((k, n, 0), *arguments), results, done) for k in range(1, n)])
    error: BaseException | None = None
    try:
        # One call of C, so that Ctrl-C cannot interrupt between taking a task from the iterator and putting it into the queue.
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
    """Run shares of kernels in threads."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[Any] = SimpleQueue()
        self._n = 0
        self._starting = threading.Lock()

    def start(self, n: int) -> int:
        """Start threads until there are ``n``; return the number of threads, at most ``n``: the system may refuse some."""
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
