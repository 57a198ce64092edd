"""Which implementation of an op runs.

Every op runs in plain PyTorch, the backend ``"torch"``: its reference, and the resonance block by block. It may have fused
kernels beside it. ``"auto"`` takes the fastest that can run the call at hand and logs, once, why the others cannot (logger
``nord_snn``, level INFO); a backend asked for by name either runs or raises and says why it cannot.

The environment variable ``NORD_SNN_BACKEND``, read whenever a backend is chosen, stands in for ``"auto"``:
``NORD_SNN_BACKEND=torch`` runs everything in plain PyTorch. Code that torch.compile has made keeps the backend that was chosen
while it was traced.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch

from nord_snn._compat.torch import constant_when_compiled

__all__ = ["BACKENDS", "Backend", "BackendChoice", "Call", "choose_backend", "chooser", "implementations_of"]

#: Every name that ``backend=`` takes, besides ``"auto"``, slowest first.
BACKENDS = ("torch", "numba", "cupy", "triton")

_ENVIRONMENT = "NORD_SNN_BACKEND"

_logger = logging.getLogger("nord_snn")
_logged: set[tuple[str, str]] = set()
_remembered: dict[tuple[Any, ...], str] = {}

Verdict = tuple[bool, str]


class Call(NamedTuple):
    """What a backend looks at before it takes a call: plain values, so that the choice is a constant to torch.compile.

    Attributes:
        device: type of the device, such as ``"cuda"``.
        dtype: of the input.
        n_features: D.
        n_clusters: C of the cascade, 0 for none.
        surrogate: its name; ``"callable"`` for one of the caller's own, empty where spikes play no part.
    """

    device: str
    dtype: torch.dtype
    n_features: int
    n_clusters: int = 0
    surrogate: str = ""


class Backend(NamedTuple):
    """One implementation of an op.

    Attributes:
        device: the type of device that ``"auto"`` takes it for, or ``"any"``.
        available: can it run here at all? ``(answer, reason)``.
        accepts: can it run this call? ``(answer, reason)``.
        kernel: imports the file with its functions, ``forward`` and ``backward`` of a kernel.
    """

    device: str
    available: Callable[[], Verdict]
    accepts: Callable[[Call], Verdict]
    kernel: Callable[[], Any]


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
    default = _default()
    if requested == "auto" and default != "auto":
        requested, asked = default, f"{_ENVIRONMENT}={default}"
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


def chooser(op: str, implementations: Mapping[str, Backend]) -> Callable[..., str]:
    """What an op asks in every call: the name that :func:`choose_backend` gives for ``(requested, *call)``, remembered."""

    @constant_when_compiled
    def choose(requested: str, *call: Any) -> str:
        key = (op, requested, _default(), _triton_interprets(), call)
        if key not in _remembered:
            _remembered[key] = choose_backend(op, implementations, requested, Call(*call)).name
        return _remembered[key]

    return choose


def _default() -> str:
    """What stands in for ``"auto"``."""
    return os.environ.get(_ENVIRONMENT, "auto")


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


def implementations_of(op: str, *kernels: str, plain: str = "reference") -> dict[str, Backend]:
    """The backend ``torch``, whose file is ``plain``, and these kernels of an op, all in the folder of its name."""

    def kernel(name: str) -> Callable[[], ModuleType]:
        return lambda: importlib.import_module(f"nord_snn.ops.{op}.{_FILES.get(name, plain)}")

    runs = (True, "plain PyTorch")
    made = {"torch": Backend("any", lambda: runs, lambda call: runs, kernel("torch"))}
    for name in kernels:
        load = kernel(name)
        accepts = functools.partial(_accepts, name, load)
        made[name] = Backend(_DEVICES[name], _AVAILABLE[name], accepts, load)
    return made


def _accepts(name: str, load: Callable[[], ModuleType], call: Call) -> Verdict:
    device = "cpu" if name == "triton" and _triton_interprets() else _DEVICES[name]
    if call.device != device:
        return False, f"it runs on {device} tensors, and these are on {call.device}"
    if device == "cuda" and call.dtype == torch.float64:
        return False, "it computes in float32, and these are float64"
    if call.n_features == 0:
        return False, "there is nothing to compute"
    try:
        kernel = load()
    except Exception as error:  # say it: Numba, for one, wants a folder to keep what it compiles, see NUMBA_CACHE_DIR
        return False, f"its kernels do not load ({type(error).__name__}: {error})"
    if call.surrogate and call.surrogate not in kernel.SURROGATE_IDS:
        return False, f"it does not know the surrogate {call.surrogate!r}: it has {sorted(kernel.SURROGATE_IDS)}"
    if hasattr(kernel, "accepts"):
        return kernel.accepts(call.n_features, call.n_clusters)
    return True, "runs"


@functools.cache
def _numba_available() -> Verdict:
    """Is Numba installed, and does it import?"""
    return _imports("numba", "Numba", "pip install 'nord-snn[cpu]'")


@functools.cache
def _triton_available() -> Verdict:
    """Is Triton there, and a GPU that it compiles for (or its interpreter switched on, for tests)?"""
    runs, reason = (True, "") if _triton_interprets() else _has_gpu()
    return _imports("triton", "Triton", "it comes with PyTorch's CUDA builds for Linux") if runs else (runs, reason)


@functools.cache
def _cupy_available() -> Verdict:
    """Is CuPy installed for the CUDA version of this PyTorch, and is there a GPU?"""
    runs, reason = _has_gpu()
    major = (torch.version.cuda or "").split(".")[0]
    return _imports("cupy", "CuPy", f"pip install 'nord-snn[cuda{major}]'") if runs else (runs, reason)


def _triton_interprets() -> bool:
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


_FILES = {"numba": "cpu", "cupy": "cupy", "triton": "triton"}
_DEVICES = {"numba": "cpu", "cupy": "cuda", "triton": "cuda"}
_AVAILABLE = {"numba": _numba_available, "cupy": _cupy_available, "triton": _triton_available}
