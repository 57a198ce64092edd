"""How everything here is timed: contestants take turns, so that a slow moment of the machine hits all of them alike.

A turn is four calls, of which the first is not counted: it finds the caches as the contestant before has left them, which is
an accident of their order.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Row", "copy_bandwidth", "peak_bytes", "race"]


@dataclass
class Row:
    """One line of a table: the median time, and the median over the rounds of how much faster than the first contestant."""

    name: str
    milliseconds: float
    speedup: float


def race(contestants: dict[str, Callable[[], object]], seconds: float, min_rounds: int = 5) -> list[Row]:
    """Let the contestants run in turns for about that long; the first one is what the others are compared with."""
    for run in contestants.values():  # compile and allocate
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times[next(iter(times))]) < min_rounds:
        for name, run in contestants.items():
            run()
            times[name].append(statistics.median(_clock(run) for _ in range(3)))
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
