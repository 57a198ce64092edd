"""Choose the backend that runs an op.

Every op has the backend ``"torch"``, plain PyTorch: the reference of the op or, for resonance and STDP, a version that
computes it in blocks. An op may also have fused kernels. ``"auto"`` takes the fastest backend that can run the call,
and logs once why the other backends were not chosen (logger ``nord_snn``, level INFO). A backend requested by name runs,
or raises an error with the reason.

The environment variable ``NORD_SNN_BACKEND`` replaces ``"auto"``; it is read whenever a backend is chosen.
``NORD_SNN_BACKEND=torch`` runs everything in plain PyTorch. Code compiled by torch.compile keeps the backend that was
chosen during tracing.

Transforms of torch.func, forward-mode derivatives and the tracer of TorchScript, which exports to ONNX, cannot trace a
kernel: with them ``"auto"`` takes ``"torch"``.
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

from nord_snn._compat.torch import constant_when_compiled, kernels_are_opaque
from nord_snn.ops.checks import describe

__all__ = [
    "BACKENDS",
    "OPS",
    "Backend",
    "BackendChoice",
    "CallSignature",
    "Support",
    "backend_selector",
    "check_backend",
    "check_kernel",
    "choose_backend",
    "register_backends",
]

#: All values of ``backend=`` except ``"auto"``, slowest first.
BACKENDS = ("torch", "numba", "cupy", "triton")

_ENVIRONMENT_VARIABLE = "NORD_SNN_BACKEND"

_logger = logging.getLogger("nord_snn")
_logged: set[tuple[str, str]] = set()
_choice_cache: dict[tuple[Any, ...], str] = {}


class Support(NamedTuple):
    """Answer whether a backend can run.

    Attributes:
        runs: whether it can.
        reason: if it cannot, why; otherwise its version or another remark.
    """

    runs: bool
    reason: str


class CallSignature(NamedTuple):
    """The properties of a call that the choice of a backend depends on.

    None of them is a tensor, so the choice is a constant under torch.compile.

    Attributes:
        device: device type, such as ``"cuda"``.
        dtype: dtype of the input.
        n_features: width D of the input.
        options: further ``(name, value)`` pairs that the kernels of this op check, such as ``("n_clusters", 64)``; each
            ``op.py`` defines its own.
    """

    device: str
    dtype: torch.dtype
    n_features: int
    options: tuple[tuple[str, Any], ...] = ()


class Backend(NamedTuple):
    """One implementation of an op.

    Attributes:
        device: device type of the tensors for which ``"auto"`` may choose the backend, or ``"any"``.
        available: function that returns whether the backend can run on this machine.
        accepts: function that returns whether the backend can run a call.
        kernel: function that imports and returns the module of the implementation.
    """

    device: str
    available: Callable[[], Support]
    accepts: Callable[[CallSignature], Support]
    kernel: Callable[[], Any]


class BackendChoice(NamedTuple):
    """The ``name`` of the chosen backend, and for each of the ``others`` the reason why it was not chosen."""

    name: str
    others: dict[str, str]

    def __str__(self) -> str:
        """Return one line per backend."""
        return "\n".join([f"{self.name}: runs", *(f"{name}: {reason}" for name, reason in self.others.items())])


def choose_backend(
    op: str, implementations: Mapping[str, Backend], requested: str, call: CallSignature
) -> BackendChoice:
    """Choose the backend for one call.

    Args:
        op: name of the op, for messages.
        implementations: the backends of this op by name; always includes ``"torch"``.
        requested: ``"auto"`` or a name from :data:`BACKENDS`.
        call: the properties of the call that the backends check.

    Raises:
        TypeError: ``requested`` is not a name.
        ValueError: the requested name is unknown.
        RuntimeError: the requested backend cannot run this call; the message has the reason and a remedy.
    """
    if not isinstance(requested, str):
        raise TypeError(f"backend must be a name, got {describe(requested)}")
    default = _default_backend()
    if requested == "auto" and default != "auto":
        requested, label = default, f"{_ENVIRONMENT_VARIABLE}={default}"
    else:
        label = f"backend {requested!r}"
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"unknown {label} for {op}: expected 'auto' or one of {list(BACKENDS)}")
    supports = {name: _support(op, implementations, name, call) for name in BACKENDS}
    if requested == "auto":
        name = next(
            name
            for name in reversed(BACKENDS)
            if supports[name][0] and implementations[name].device in ("any", call.device)
        )
    else:
        name = requested
        runs, reason = supports[name]
        if not runs:
            raise RuntimeError(f"{label} cannot run {op}: {reason}; backend='auto' takes one that can")
    others = {other: "slower" if runs else reason for other, (runs, reason) in supports.items() if other != name}
    choice = BackendChoice(name, others)
    if requested == "auto":
        _log_once(op, choice)
    return choice


def check_backend(backend: str) -> None:
    """Raise unless this is the name of a backend, or ``"auto"``; whether it can run is not checked.

    Raises:
        TypeError: it is not a name.
        ValueError: the name is unknown.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a name, got {describe(backend)}")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}")


def check_kernel(op: str, backend: str, device: str) -> None:
    """Raise a ValueError unless ``backend`` is a kernel of this op, available here, for tensors on this type of device.

    Args:
        op: name of the op.
        backend: name of the backend; ``"auto"`` is none.
        device: type of the device of the tensors.
    """
    chosen = OPS[op].get(backend)
    if chosen is None or not chosen.available().runs or not hasattr(chosen.kernel(), "forward"):
        raise ValueError(f"backend must be an available kernel of {op}, got {backend!r}")
    wanted = "cpu" if backend == "triton" and _triton_interprets() else chosen.device
    if wanted not in ("any", device):
        raise ValueError(f"backend {backend!r} of {op} needs {wanted} tensors, got tensors on {device}")


def backend_selector(op: str, implementations: Mapping[str, Backend]) -> Callable[[str, CallSignature], str]:
    """Return a cached function ``(requested, call) -> name`` for :func:`choose_backend`."""
    has_triton = "triton" in implementations

    @constant_when_compiled
    def select(requested: str, *call: Any) -> str:
        if not isinstance(requested, str):
            raise TypeError(f"backend must be a name, got {describe(requested)}")
        if requested == "auto" and kernels_are_opaque() and _default_backend() == "auto":
            return "torch"
        key = (op, requested, _default_backend(), has_triton and _triton_interprets(), call)
        if key not in _choice_cache:
            _choice_cache[key] = choose_backend(op, implementations, requested, CallSignature(*call)).name
        return _choice_cache[key]

    return lambda requested, call: select(requested, *call)


def _default_backend() -> str:
    """Return the backend that the environment sets for ``"auto"``."""
    return os.environ.get(_ENVIRONMENT_VARIABLE) or "auto"


def _support(op: str, implementations: Mapping[str, Backend], name: str, call: CallSignature) -> Support:
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


#: The backends of every op, by op and backend name; filled by :func:`register_backends`.
OPS: dict[str, dict[str, Backend]] = {}


def register_backends(op: str, folder: str, *kernels: str, torch_file: str = "reference") -> dict[str, Backend]:
    """Add an op and its backends to :data:`OPS`; return the backends by name.

    Args:
        op: name of the public function.
        folder: folder of the op in ``nord_snn/ops``.
        kernels: names of the backends besides ``"torch"``. Each is a file of that name, which may define a function
            ``accepts(call: CallSignature) -> Support``.
        torch_file: name of the file of the backend ``"torch"``. Default: ``"reference"``.
    """
    runs = Support(True, "plain PyTorch")
    backends = {"torch": Backend("any", lambda: runs, lambda call: runs, _importer(folder, torch_file))}
    for name in kernels:
        load = _importer(folder, name)
        backends[name] = Backend(_DEVICES[name], _AVAILABLE[name], functools.partial(_accepts, name, load), load)
    OPS[op] = backends
    return backends


def _importer(folder: str, file: str) -> Callable[[], ModuleType]:
    return functools.cache(lambda: importlib.import_module(f"nord_snn.ops.{folder}.{file}"))


def _accepts(name: str, load: Callable[[], ModuleType], call: CallSignature) -> Support:
    device = "cpu" if name == "triton" and _triton_interprets() else _DEVICES[name]
    if call.device != device:
        return Support(False, f"it needs {device} tensors, got tensors on {call.device}")
    if device == "cuda" and call.dtype == torch.float64:
        return Support(False, "it computes in float32, got float64")
    if call.n_features == 0:
        return Support(False, "it needs at least one neuron, got D = 0")
    try:
        kernel = load()
    except Exception as error:  # for example Numba without a writable cache folder, see NUMBA_CACHE_DIR
        return Support(False, f"its kernels do not load ({type(error).__name__}: {error})")
    return kernel.accepts(call) if hasattr(kernel, "accepts") else Support(True, "runs")


@functools.cache
def _numba_available() -> Support:
    """Return whether Numba is installed and can be imported."""
    support = _import_support("numba", "Numba", "pip install 'nord-snn[cpu]'")
    if support.runs and importlib.import_module("numba").config.DISABLE_JIT:
        return Support(False, "NUMBA_DISABLE_JIT switches Numba's compiler off")
    return support


@functools.cache
def _triton_available() -> Support:
    """Return whether Triton is installed and there is a GPU or, for tests, Triton's interpreter is switched on."""
    gpu = Support(True, "") if _triton_interprets() else _gpu_support()
    return _import_support("triton", "Triton", "it comes with PyTorch's CUDA builds for Linux") if gpu.runs else gpu


@functools.cache
def _cupy_available() -> Support:
    """Return whether CuPy is installed and there is a GPU."""
    gpu = _gpu_support()
    major = (torch.version.cuda or "").split(".")[0]
    return _import_support("cupy", "CuPy", f"pip install 'nord-snn[cuda{major}]'") if gpu.runs else gpu


def _triton_interprets() -> bool:
    """Return whether Triton interprets kernels on the CPU; Triton reads this when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _import_support(module: str, title: str, hint: str) -> Support:
    if importlib.util.find_spec(module) is None:
        return Support(False, f"{title} is not installed: {hint}")
    try:
        version = getattr(importlib.import_module(module), "__version__", "")
    except Exception as error:  # a broken installation of one library must leave other backends usable
        return Support(False, f"{title} is installed but does not import ({type(error).__name__}: {error}): {hint}")
    return Support(True, f"{title} {version}")


def _gpu_support() -> Support:
    if not torch.cuda.is_available():
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch finds none"
        return Support(False, f"it needs a CUDA GPU, and {why}")
    return Support(True, torch.cuda.get_device_name())


_DEVICES = {"numba": "cpu", "cupy": "cuda", "triton": "cuda"}
_AVAILABLE = {"numba": _numba_available, "cupy": _cupy_available, "triton": _triton_available}
