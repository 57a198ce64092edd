"""Which implementation of an op runs.

Every op has a reference in plain PyTorch, the backend ``"torch"``, and may have fused kernels beside it. ``"auto"`` takes
the fastest that can run the call at hand and logs, once, why the others cannot (logger ``nord_snn``, level INFO); a backend
asked for by name either runs or raises and says why it cannot.

The environment variable ``NORD_SNN_BACKEND``, read when nord_snn is imported, stands in for ``"auto"``:
``NORD_SNN_BACKEND=torch`` runs everything on the reference.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

__all__ = ["BACKENDS", "Backend", "BackendChoice", "Call", "cupy_available", "numba_available", "triton_available"]
__all__ += ["always", "choose_backend", "triton_interprets"]

#: Every name that ``backend=`` takes, besides ``"auto"``, slowest first.
BACKENDS = ("torch", "numba", "cupy", "triton")

_ENVIRONMENT = "NORD_SNN_BACKEND"
_DEFAULT = os.environ.get(_ENVIRONMENT, "auto")

_logger = logging.getLogger("nord_snn")
_logged: set[tuple[str, str]] = set()

Verdict = tuple[bool, str]


class Call(NamedTuple):
    """What a backend looks at before it takes a call: plain values, so that the choice is a constant to torch.compile."""

    device: str
    dtype: torch.dtype
    surrogate: str | None = "nord_atan"  # None: a callable
    n_features: int = 1
    n_clusters: int = 0


class Backend(NamedTuple):
    """One implementation of an op.

    Attributes:
        device: the type of device that ``"auto"`` takes it for, or ``"any"``.
        available: can it run here at all? ``(answer, reason)``.
        accepts: can it run this call? ``(answer, reason)``.
    """

    device: str
    available: Callable[[], Verdict]
    accepts: Callable[[Call], Verdict]


class BackendChoice(NamedTuple):
    """What would run, and for each other backend why it would not."""

    name: str
    others: dict[str, str]

    def __str__(self) -> str:
        """One line a backend."""
        return "\n".join([f"{self.name}: runs", *(f"{name}: {reason}" for name, reason in self.others.items())])


def choose_backend(op: str, implementations: Mapping[str, Backend], requested: str, call: Call) -> BackendChoice:
    """Choose the backend for one call.

    Args:
        op: the op's name, for messages.
        implementations: what this op has, by backend name; ``"torch"`` is always there.
        requested: ``"auto"`` or a name from :data:`BACKENDS`.
        call: what the backends look at.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend asked for cannot run this call; the message says why and what to do.
    """
    if requested == "auto" and _DEFAULT != "auto":
        requested, asked = _DEFAULT, f"{_ENVIRONMENT}={_DEFAULT}"
    else:
        asked = f"backend {requested!r}"
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"unknown {asked} for {op}: expected 'auto' or one of {list(BACKENDS)}")
    verdicts = {name: _verdict(op, implementations, name, call) for name in BACKENDS}
    if requested == "auto":
        name = next(
            name
            for name in reversed(BACKENDS)
            if verdicts[name][0] and implementations[name].device in ("any", call.device)
        )
    else:
        name = requested
        runs, reason = verdicts[name]
        if not runs:
            raise RuntimeError(f"{asked} cannot run {op}: {reason}; backend='auto' takes one that can")
    others = {other: "slower" if runs else reason for other, (runs, reason) in verdicts.items() if other != name}
    choice = BackendChoice(name, others)
    if requested == "auto":
        _log_once(op, choice)
    return choice


def _verdict(op: str, implementations: Mapping[str, Backend], name: str, call: Call) -> Verdict:
    if name not in implementations:
        return False, f"nord-snn has no {name} kernel for {op}"
    backend = implementations[name]
    runs, reason = backend.available()
    return backend.accepts(call) if runs else (runs, reason)


def _log_once(op: str, choice: BackendChoice) -> None:
    line = f"{op} runs on {choice.name!r}. " + " ".join(f"{name}: {why}." for name, why in choice.others.items())
    if (op, line) not in _logged:
        _logged.add((op, line))
        _logger.info(line)


def always() -> Verdict:
    """Plain PyTorch is there."""
    return True, "plain PyTorch"


@functools.cache
def numba_available() -> Verdict:
    """Is Numba installed, and does it import?"""
    return _imports("numba", "Numba", "pip install 'nord-snn[cpu]'")


@functools.cache
def triton_available() -> Verdict:
    """Is Triton there, and a GPU that it compiles for (or its interpreter switched on, for tests)?"""
    runs, reason = (True, "") if triton_interprets() else _has_gpu()
    return _imports("triton", "Triton", "it comes with PyTorch's CUDA builds for Linux") if runs else (runs, reason)


@functools.cache
def cupy_available() -> Verdict:
    """Is CuPy installed for the CUDA version of this PyTorch, and is there a GPU?"""
    runs, reason = _has_gpu()
    major = (torch.version.cuda or "").split(".")[0]
    return _imports("cupy", "CuPy", f"pip install 'nord-snn[cuda{major}]'") if runs else (runs, reason)


def triton_interprets() -> bool:
    """Whether Triton runs kernels on the CPU in its interpreter; it decides when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _imports(module: str, title: str, cure: str) -> Verdict:
    if importlib.util.find_spec(module) is None:
        return False, f"{title} is not installed: {cure}"
    try:
        version = getattr(importlib.import_module(module), "__version__", "")
    except Exception as error:  # a broken installation must not break the others
        return False, f"{title} is installed but does not import ({type(error).__name__}: {error}): {cure}"
    return True, f"{title} {version}"


def _has_gpu() -> Verdict:
    if not torch.cuda.is_available():
        return False, "it needs a CUDA GPU, and " + (
            "this PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch sees none"
        )
    return True, torch.cuda.get_device_name()
