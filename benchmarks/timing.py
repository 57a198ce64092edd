"""How everything here is timed: contestants take turns, so that a slow moment of the machine hits all of them alike.

A turn is four calls, of which the first is not counted: it finds the caches as the contestant before has left them, which is
an accident of their order.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Row", "copy_bandwidth", "peak_bytes", "race", "race_apart"]


@dataclass
class Row:
    """One line of a table: the median time, and the median over the rounds of how much faster than the first contestant."""

    name: str
    milliseconds: float
    speedup: float


def race(contestants: dict[str, Callable[[], object]], seconds: float) -> list[Row]:
    """Let the contestants run in turns for about that long; the first one is what the others are compared with."""
    for run in contestants.values():  # compile and allocate
        run()
    return _take_turns({name: lambda run=run: _turn(run) for name, run in contestants.items()}, seconds)


def race_apart(builders: dict[str, Callable[[], Callable[[], object]]], seconds: float) -> list[Row]:
    """The same, but each contestant is built and run in a process of its own, with its own settings and its own memory."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []

    def turn(name: str) -> float:
        pipes[name].send(True)
        return _answer(pipes[name], name)

    try:
        for name, build in builders.items():
            pipes[name], end = context.Pipe()
            processes.append(context.Process(target=_work, args=(end, build, torch.get_num_threads()), daemon=True))
            processes[-1].start()
            end.close()  # the other side alone holds it now, so its death is noticed
            _answer(pipes[name], name)  # one after another: while one gets ready, nobody else runs
        return _take_turns({name: lambda name=name: turn(name) for name in builders}, seconds)
    finally:
        for process in processes:
            process.kill()


def _answer(pipe: Any, name: str) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"the process of {name!r} ended before its turn; what it said stands above") from None


def _work(pipe: Any, build: Callable[[], Callable[[], object]], threads: int) -> None:
    torch.set_num_threads(threads)
    run = build()
    for _ in range(8):  # until memory that is freed and taken again has found its place
        run()
    pipe.send(None)
    while pipe.recv():
        pipe.send(_turn(run))


def _turn(run: Callable[[], object]) -> float:
    run()
    return statistics.median(_clock(run) for _ in range(3))


def _take_turns(turns: dict[str, Callable[[], float]], seconds: float, min_rounds: int = 5) -> list[Row]:
    times: dict[str, list[float]] = {name: [] for name in turns}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times[next(iter(times))]) < min_rounds:
        for name, turn in turns.items():
            times[name].append(turn())
    first = next(iter(times.values()))
    return [
        Row(
            name,
            statistics.median(own) * 1e3,
            statistics.median(a / b for a, b in zip(first, own, strict=True)),
        )
        for name, own in times.items()
    ]


def _clock(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes per second that a plain copy of ``size`` bytes reads and writes, best of many: what no kernel can beat."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(_clock(lambda: target.copy_(source)) for _ in range(30))


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once during ``run``, above those at its start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak
