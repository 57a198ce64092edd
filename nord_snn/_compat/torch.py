"""Private names of PyTorch. Written for 2.6 and newer, tested with 2.11."""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import MethodType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode  # has no public name
from torch.utils._pytree import tree_leaves  # torch.utils has no public one

__all__ = [
    "ForwardObserver",
    "StatePrecisionMixin",
    "TorchDispatchMode",
    "allow_recompilations",
    "assert_in_graph",
    "constant_when_compiled",
    "detached_state",
    "dispatch_mode_is_active",
    "in_backward",
    "initialize_lazy_module",
    "is_view",
    "kernels_are_opaque",
    "move_state",
    "observe_forward",
    "openmp_functions",
    "operators_by_private_name",
    "padding_on_both_sides",
    "stop_observing_forward",
    "transform_is_active",
    "tree_leaves",
    "version_counter",
    "without_dispatch_modes",
    "without_torch_function",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """Make torch.compile call ``function`` during tracing and use the result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports TorchDynamo, which doubles the time that
    ``import nord_snn`` takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def allow_recompilations(number: int) -> None:
    """Set torch.compile's limit of recompilations per function. Process-wide, so for scripts only."""
    torch._dynamo.config.recompile_limit = number


def initialize_lazy_module(module: Any, *arguments: Any) -> None:
    """Initialise a lazy module without calling it, as its first call would. There is no public function for it."""
    module._infer_parameters(module, arguments)


def dispatch_mode_is_active() -> bool:
    """Return whether a ``TorchDispatchMode`` is active. There is no public function for it."""
    return bool(_python_dispatch.is_in_torch_dispatch_mode())


def transform_is_active() -> bool:
    """Return whether ``vmap``, ``torch.func`` or forward-mode differentiation is active. There is no public function for it."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def kernels_are_opaque() -> bool:
    """Return whether the tracer of TorchScript or a transform (see above) is active: neither can trace a kernel."""
    return transform_is_active() or torch._C._get_tracing_state() is not None


def openmp_functions(*names: str) -> tuple[int, ...] | None:
    """Return the addresses of functions in the OpenMP library that torch has loaded; None if that library lacks one."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(library))  # its attributes include functions of the libraries that it depends on
        return tuple([ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value or 0 for name in names])
    except (OSError, AttributeError):
        return None


def in_backward() -> int | None:
    """Return the number of the backward pass that this thread runs, or None. There is no public function for it."""
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def without_dispatch_modes() -> AbstractContextManager[Any]:
    """Disable all dispatch modes in a ``with`` block. There is no public function for it."""
    return _python_dispatch._disable_current_modes()


def version_counter(x: Tensor) -> int:
    """Return autograd's version counter of ``x``: the number of in-place writes."""
    return x._version


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Check in compiled code, without a graph break, that ``condition`` is True; raise a RuntimeError otherwise."""
    torch._assert_async(condition, message)


def without_torch_function() -> AbstractContextManager[Any]:
    """Disable every ``TorchFunctionMode``, such as ``with torch.device(...)``, so that tensor methods run in C."""
    return torch._C.DisableTorchFunction()


def is_view(x: Tensor) -> bool:
    """Return whether ``x`` is a view for autograd, which rejects some in-place operations on views."""
    return x._is_view()


def padding_on_both_sides(conv: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, int], ...]:
    """Return the padding ``(before, after)`` of each spatial dimension.

    The two may differ with ``padding="same"``, for which the public ``conv.padding`` is only this string.
    """
    sides = conv._reversed_padding_repeated_twice
    return tuple((int(sides[i]), int(sides[i + 1])) for i in range(len(sides) - 2, -1, -2))


def operators_by_private_name(*names: str) -> set[Any]:
    """Return the operators ``torch.ops.aten.<name>`` whose names begin with an underscore."""
    return {getattr(torch.ops.aten, name) for name in names}


# --- state that moves with a module


def move_state(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Move a state to the device and dtype to which ``fn`` moves a module's tensors, but never to a narrower dtype.

    Only device and dtype of ``fn(value)`` are used: in ``to_empty`` its values are uninitialised memory.
    """
    if not isinstance(value, Tensor):
        return value
    target = fn(value)
    if value.is_meta:  # a meta tensor has no data to move
        return value
    narrower = target.is_floating_point() and target.dtype.itemsize < value.dtype.itemsize
    return value.to(target.device, value.dtype if narrower else target.dtype)


def detached_state(value: Any) -> Any:
    """Return a tensor detached, and any other value unchanged."""
    return value.detach() if isinstance(value, Tensor) else value


class StatePrecisionMixin:
    """Mixin for modules whose state moves with them but stays float32 in a half-precision network.

    ``to``, ``half`` and ``cuda`` all call ``Module._apply``, for which torch has no public hook. List the mixin before the
    module class in the bases; :meth:`get_state` and :meth:`set_state` define the state.
    """

    def get_state(self) -> dict[str, Any]:
        """Return the state by name."""
        raise NotImplementedError

    def set_state(self, state: dict[str, Any]) -> None:
        """Set a state that :meth:`get_state` has returned."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        state = {name: move_state(value, fn) for name, value in self.get_state().items()}
        # Module's method, not that of classes in between: SpikingJelly's has no ``recurse``.
        nn.Module._apply(self, fn, recurse=recurse)  # type: ignore[arg-type]
        self.set_state(state)
        return self


# --- observed forwards, in compiled code too


class ForwardObserver(Protocol):
    """Interface of observers: :func:`observe_forward` calls them around each forward of a module."""

    def before(self, module: nn.Module) -> None:
        """Receive the module before it runs."""

    def after(self, module: nn.Module, output: Any) -> None:
        """Receive the module and the output of its forward."""


#: Attributes of an observed module: its observers, and the ``forward`` that other code had set on it, or None.
_OBSERVERS, _INNER = "_nord_snn_observers", "_nord_snn_forward"


class _Observers(tuple):
    """Observers of a module; not copied or pickled with it."""

    def __deepcopy__(self, memo: Any) -> "_Observers":
        return _Observers()

    def __reduce__(self) -> Any:
        return _Observers, ()


def observe_forward(module: nn.Module, observer: ForwardObserver) -> None:
    """Call ``observer`` around every forward of ``module``, also in code that was compiled before.

    TorchDynamo ignores forward hooks that are registered after compilation, but it has a guard that a traced module has no
    instance attribute ``forward``. So this function sets one: code that contains this module is compiled again, once. All other
    compiled code stays valid. The earlier code with this module is kept, and runs again once it has no observers.
    """
    if not _is_observed(module):
        setattr(module, _INNER, module.__dict__.get("forward"))
        setattr(module, _OBSERVERS, _Observers())
        module.forward = MethodType(forward, module)  # a copied module gets its own method
        module._replicate_for_data_parallel = MethodType(_replicate_for_data_parallel, module)  # type: ignore[method-assign]
    setattr(module, _OBSERVERS, _Observers((*getattr(module, _OBSERVERS), observer)))


def stop_observing_forward(module: nn.Module, observer: ForwardObserver) -> None:
    """Remove an observer; do nothing if it is not registered."""
    remaining = _Observers(other for other in getattr(module, _OBSERVERS, ()) if other is not observer)
    if not remaining and _has_forward(module, forward):
        _restore(module)
    elif _is_observed(module):  # observers remain, or other code has wrapped this ``forward``
        setattr(module, _OBSERVERS, remaining)
    else:  # other code has replaced this ``forward``
        _clear_attributes(module)


def _is_observed(module: nn.Module) -> bool:
    """Return whether our ``forward`` is set, possibly wrapped by a patch of other code."""
    patched = "forward" in module.__dict__ and not _has_forward(module, type(module).forward)
    return _has_forward(module, forward) or (patched and _INNER in module.__dict__)


def _has_forward(module: nn.Module, function: Any) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) is function


def _restore(module: nn.Module) -> None:
    inner = getattr(module, _INNER)
    del module.forward
    if inner is not None:
        module.forward = inner
    _clear_attributes(module)


def _clear_attributes(module: nn.Module) -> None:
    for name in (_OBSERVERS, _INNER, "_replicate_for_data_parallel"):
        module.__dict__.pop(name, None)


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """Return a replica for ``DataParallel`` without observers: their ``forward`` is bound to the original module."""
    replica = type(self)._replicate_for_data_parallel(self)
    _restore(replica)
    return replica


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of ``self``, with its observers before and after.

    Methods are pickled by name: because this one is called ``forward``, an unpickled module has the forward of its class.
    """
    for observer in self._nord_snn_observers:
        observer.before(self)
    inner = self._nord_snn_forward
    output = type(self).forward(self, *args, **kwargs) if inner is None else inner(*args, **kwargs)
    for observer in self._nord_snn_observers:
        observer.after(self, output)
    return output
