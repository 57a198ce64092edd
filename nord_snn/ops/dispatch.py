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

__all__ = [
    "BACKENDS",
    "OPS",
    "Backend",
    "BackendChoice",
    "Call",
    "Support",
    "backend_selector",
    "choose_backend",
    "register_backends",
]

#: Every name that ``backend=`` takes, besides ``"auto"``, slowest first.
BACKENDS = ("torch", "numba", "cupy", "triton")

_ENVIRONMENT = "NORD_SNN_BACKEND"

_logger = logging.getLogger("nord_snn")
_logged: set[tuple[str, str]] = set()
_choice_cache: dict[tuple[Any, ...], str] = {}


class Support(NamedTuple):
    """Whether a backend can run, and its version or the reason why not."""

    runs: bool
    reason: str


class Call(NamedTuple):
    """What a backend is chosen by: plain values, so that the choice is a constant to torch.compile.

    Attributes:
        device: type of the device, such as ``"cuda"``.
        dtype: of the input.
        n_features: width of the input, D.
        options: what else the kernels of an op look at, as its ``op.py`` names it, such as ``("n_clusters", 64)``.
    """

    device: str
    dtype: torch.dtype
    n_features: int
    options: tuple[tuple[str, Any], ...] = ()


class Backend(NamedTuple):
    """One implementation of an op.

    Attributes:
        device: the type of device that ``"auto"`` takes it for, or ``"any"``.
        available: whether it can run on this machine.
        accepts: whether it can run a call.
        kernel: imports its file.
    """

    device: str
    available: Callable[[], Support]
    accepts: Callable[[Call], Support]
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


def backend_selector(op: str, implementations: Mapping[str, Backend]) -> Callable[[str, Call], str]:
    """Return a cached function ``(requested, call) -> name`` for :func:`choose_backend`."""

    @constant_when_compiled
    def select(requested: str, *call: Any) -> str:
        key = (op, requested, _default(), _triton_interprets(), call)
        if key not in _choice_cache:
            _choice_cache[key] = choose_backend(op, implementations, requested, Call(*call)).name
        return _choice_cache[key]

    return lambda requested, call: select(requested, *call)


def _default() -> str:
    """What stands in for ``"auto"``."""
    return os.environ.get(_ENVIRONMENT) or "auto"


def _verdict(op: str, implementations: Mapping[str, Backend], name: str, call: Call) -> Support:
    if name not in implementations:
        return Support(False, f"nord-snn has no {name} kernel for {op}")
    backend = implementations[name]
    runs, reason = backend.available()
    return backend.accepts(call) if runs else Support(runs, reason)


def _log_once(op: str, choice: BackendChoice) -> None:
    line = f"{op} runs on {choice.name!r}. " + " ".join(f"{name}: {why}." for name, why in choice.others.items())
    if (op, line) not in _logged:
        _logged.add((op, line))
        _logger.info(line)


#: Every op and its backends, by name; filled by :func:`register_backends`.
OPS: dict[str, dict[str, Backend]] = {}


def register_backends(op: str, folder: str, *kernels: str, plain: str = "reference") -> dict[str, Backend]:
    """Enter an op with its backends into :data:`OPS`, and return them by name.

    Args:
        op: name of the public function.
        folder: of ``nord_snn/ops``, where the files are.
        kernels: backends besides ``"torch"``, each in a file of its name. Such a file may have a function
            ``accepts(call: Call) -> Support``.
        plain: file of the backend ``"torch"``.
    """
    runs = Support(True, "plain PyTorch")
    made = {"torch": Backend("any", lambda: runs, lambda call: runs, _importer(folder, plain))}
    for name in kernels:
        load = _importer(folder, name)
        made[name] = Backend(_DEVICES[name], _AVAILABLE[name], functools.partial(_accepts, name, load), load)
    OPS[op] = made
    return made


def _importer(folder: str, file: str) -> Callable[[], ModuleType]:
    return lambda: importlib.import_module(f"nord_snn.ops.{folder}.{file}")


def _accepts(name: str, load: Callable[[], ModuleType], call: Call) -> Support:
    device = "cpu" if name == "triton" and _triton_interprets() else _DEVICES[name]
    if call.device != device:
        return Support(False, f"it runs on {device} tensors, and these are on {call.device}")
    if device == "cuda" and call.dtype == torch.float64:
        return Support(False, "it computes in float32, and these are float64")
    if call.n_features == 0:
        return Support(False, "there is nothing to compute")
    try:
        kernel = load()
    except Exception as error:  # say it: Numba, for one, wants a folder to keep what it compiles, see NUMBA_CACHE_DIR
        return Support(False, f"its kernels do not load ({type(error).__name__}: {error})")
    return kernel.accepts(call) if hasattr(kernel, "accepts") else Support(True, "runs")


@functools.cache
def _numba_available() -> Support:
    """Is Numba installed, and does it import?"""
    return _imports("numba", "Numba", "pip install 'nord-snn[cpu]'")


@functools.cache
def _triton_available() -> Support:
    """Is Triton there, and a GPU that it compiles for (or its interpreter switched on, for tests)?"""
    gpu = Support(True, "") if _triton_interprets() else _has_gpu()
    return _imports("triton", "Triton", "it comes with PyTorch's CUDA builds for Linux") if gpu.runs else gpu


@functools.cache
def _cupy_available() -> Support:
    """Is CuPy installed for the CUDA version of this PyTorch, and is there a GPU?"""
    gpu = _has_gpu()
    major = (torch.version.cuda or "").split(".")[0]
    return _imports("cupy", "CuPy", f"pip install 'nord-snn[cuda{major}]'") if gpu.runs else gpu


def _triton_interprets() -> bool:
    """Whether Triton runs kernels on the CPU in its interpreter; it decides when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _imports(module: str, title: str, cure: str) -> Support:
    if importlib.util.find_spec(module) is None:
        return Support(False, f"{title} is not installed: {cure}")
    try:
        version = getattr(importlib.import_module(module), "__version__", "")
    except Exception as error:  # a broken installation must not break the others
        return Support(False, f"{title} is installed but does not import ({type(error).__name__}: {error}): {cure}")
    return Support(True, f"{title} {version}")


def _has_gpu() -> Support:
    if not torch.cuda.is_available():
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch sees none"
        return Support(False, f"it needs a CUDA GPU, and {why}")
    return Support(True, torch.cuda.get_device_name())


_DEVICES = {"numba": "cpu", "cupy": "cuda", "triton": "cuda"}
_AVAILABLE = {"numba": _numba_available, "cupy": _cupy_available, "triton": _triton_available}
