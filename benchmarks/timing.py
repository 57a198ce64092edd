"""Time functions in interleaved turns, so that a temporary slowdown of the machine affects all of them equally.

A turn is four calls of one function; a round has one turn of every function. The first call of a turn is not counted, because
the processor's caches contain the data of the previous function.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Row", "copy_bandwidth", "peak_bytes", "time_in_processes", "time_in_turns"]


@dataclass
class Row:
    """Row of a table: median time of a call, and the median speed-up over the first function of the same round."""

    name: str
    milliseconds: float
    speedup: float


def time_in_turns(functions: dict[str, Callable[[], object]], seconds: float) -> list[Row]:
    """Call the functions in interleaved turns for about ``seconds``; speed-ups are relative to the first function."""
    for run in functions.values():  # compile and allocate
        run()
    return _time_rounds({name: lambda run=run: _time_turn(run) for name, run in functions.items()}, seconds)


def time_in_processes(builders: dict[str, Callable[[], Callable[[], object]]], seconds: float) -> list[Row]:
    """Build and time each function in a process of its own; see :func:`time_in_turns`.

    Therefore the memory of a function and its global settings of torch do not affect the other functions.

    Args:
        builders: name -> function that builds the function to time, in the process.
        seconds: time of the measurement.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []

    def turn(name: str) -> float:
        pipes[name].send(True)
        return _receive(pipes[name], name)

    try:
        for name, build in builders.items():
            pipes[name], end = context.Pipe()
            processes.append(context.Process(target=_serve, args=(end, build, torch.get_num_threads()), daemon=True))
            processes[-1].start()
            end.close()  # only the new process has this end open now, so recv raises EOFError if the process ends
            _receive(pipes[name], name)  # wait, so that no other process runs during the warm-up
        return _time_rounds({name: lambda name=name: turn(name) for name in builders}, seconds)
    finally:
        for process in processes:
            process.kill()


def _receive(pipe: Any, name: str) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"the process of {name!r} ended without a result; its error message is above") from None


def _serve(pipe: Any, build: Callable[[], Callable[[], object]], threads: int) -> None:
    torch.set_num_threads(threads)
    run = build()
    for _ in range(8):  # until the allocator reuses freed memory
        run()
    pipe.send(None)
    while pipe.recv():
        pipe.send(_time_turn(run))


def _time_turn(run: Callable[[], object]) -> float:
    run()
    return statistics.median(_time_call(run) for _ in range(3))


def _time_rounds(turns: dict[str, Callable[[], float]], seconds: float, min_rounds: int = 5) -> list[Row]:
    times: dict[str, list[float]] = {name: [] for name in turns}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[next(iter(times))]) < min_rounds:
        for name, turn in turns.items():
            times[name].append(turn())
    first = next(iter(times.values()))
    return [
        Row(
            name,
            statistics.median(seconds_of_turns) * 1e3,
            statistics.median(a / b for a, b in zip(first, seconds_of_turns, strict=True)),
        )
        for name, seconds_of_turns in times.items()
    ]


def _time_call(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_bandwidth(device: str, size: int) -> float:
    """Return the bytes per second that a copy of ``size`` bytes reads and writes, the best of 30 copies."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(_time_call(lambda: target.copy_(source)) for _ in range(30))


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak memory of CPU tensors during ``run`` in bytes, above that at its start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    allocated = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak
