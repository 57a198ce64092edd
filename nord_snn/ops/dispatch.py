"""Which implementation of an op runs.

Every op has a reference in plain PyTorch, the backend ``"torch"``, and may have fused kernels beside it. ``"auto"`` takes
the fastest that can run the call at hand; a backend asked for by name either runs or raises and says why it cannot.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["BACKENDS", "Backend", "BackendChoice", "choose_backend"]

#: Every name that ``backend=`` takes, besides ``"auto"``, slowest first.
BACKENDS = ("torch", "numba", "cupy", "triton")


class Backend(NamedTuple):
    """One implementation of an op: ``verify`` answers ``(can it run this call, reason)``, ``run`` does it."""

    verify: Callable[..., tuple[bool, str]]
    run: Callable[..., Any]


class BackendChoice(NamedTuple):
    """What would run, and for each other backend why it would not."""

    name: str
    others: dict[str, str]

    def __str__(self) -> str:
        """One line a backend."""
        return "\n".join([f"{self.name}: runs", *(f"{name}: {reason}" for name, reason in self.others.items())])


def choose_backend(op: str, implementations: Mapping[str, Backend], requested: str, *call: Any) -> BackendChoice:
    """Choose the backend for one call.

    Args:
        op: the op's name, for messages.
        implementations: what this op has, by backend name; ``"torch"`` is always there.
        requested: ``"auto"`` or a name from :data:`BACKENDS`.
        call: what the verifiers look at, usually the input tensor.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend asked for cannot run this call; the message says why and what to do.
    """
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"unknown backend {requested!r} for {op}: expected 'auto' or one of {list(BACKENDS)}")
    verdicts = {name: _verdict(op, implementations, name, call) for name in BACKENDS}
    if requested == "auto":
        name = next(name for name in reversed(BACKENDS) if verdicts[name][0])
    else:
        name = requested
        runs, reason = verdicts[name]
        if not runs:
            raise RuntimeError(f"backend {name!r} cannot run {op}: {reason}; backend='auto' takes one that can")
    others = {other: "slower" if runs else reason for other, (runs, reason) in verdicts.items() if other != name}
    return BackendChoice(name, others)


def _verdict(op: str, implementations: Mapping[str, Backend], name: str, call: tuple[Any, ...]) -> tuple[bool, str]:
    if name not in implementations:
        return False, f"nord-snn has no {name} kernel for {op}"
    return implementations[name].verify(*call)
