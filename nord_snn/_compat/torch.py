"""Private names of PyTorch. Written for 2.6 and newer, tested with 2.11."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode  # has no public name

__all__ = [
    "ForwardObserver",
    "KeepsStatePrecision",
    "TorchDispatchMode",
    "allow_recompilations",
    "assert_in_graph",
    "constant_when_compiled",
    "dispatch_mode_is_active",
    "is_view",
    "moved_state",
    "observe_forward",
    "operators_by_private_name",
    "padding_on_both_sides",
    "stop_observing_forward",
    "version_of",
    "without_dispatch_modes",
    "without_graph",
    "without_torch_function",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """Let torch.compile call ``function`` while it traces, and take the result for a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports TorchDynamo, which doubles the time that
    ``import nord_snn`` takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def allow_recompilations(number: int) -> None:
    """Let torch.compile compile one function for that many kinds of arguments; for programs, since it is process-wide."""
    torch._dynamo.config.recompile_limit = number


def dispatch_mode_is_active() -> bool:
    """Whether a ``TorchDispatchMode`` watches the operators that are called. There is no public way to ask."""
    return bool(_python_dispatch.is_in_torch_dispatch_mode())


def without_dispatch_modes() -> AbstractContextManager[Any]:
    """Leave the modes that watch operators for the time being. There is no public way to do so."""
    return _python_dispatch._disable_current_modes()


def version_of(x: Tensor) -> int:
    """Return how often ``x`` was written into; autograd compares this number, and shows it nowhere else."""
    return x._version


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Raise a RuntimeError when compiled code runs and ``condition`` does not hold; no branch is compiled for it."""
    torch._assert_async(condition, message)


def without_torch_function() -> AbstractContextManager[Any]:
    """Call tensor methods in C, also under a ``TorchFunctionMode`` such as ``with torch.device(...)``."""
    return torch._C.DisableTorchFunction()


def is_view(x: Tensor) -> bool:
    """Return whether ``x`` is a view for autograd, which refuses some operations in place on views."""
    return x._is_view()


def padding_on_both_sides(conv: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, int], ...]:
    """Return the padding ``(before, after)`` of each spatial dimension.

    The public ``conv.padding`` is a word for ``padding="same"``, where the two sides may differ.
    """
    sides = conv._reversed_padding_repeated_twice
    return tuple((int(sides[i]), int(sides[i + 1])) for i in range(len(sides) - 2, -1, -2))


def operators_by_private_name(*names: str) -> set[Any]:
    """Return the operators ``torch.ops.aten.<name>``, whose names begin with an underscore, as modes see them."""
    return {getattr(torch.ops.aten, name) for name in names}


# --- state that moves with a module


def moved_state(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Move a state where ``fn`` moves a module's tensors, but never to fewer bits.

    Only device and dtype of ``fn(value)`` are used: its values are undefined under ``to_empty``.
    """
    if not isinstance(value, Tensor):
        return value
    after = fn(value)
    if value.is_meta:  # has no data to move
        return value
    narrower = after.is_floating_point() and after.dtype.itemsize < value.dtype.itemsize
    return value.to(after.device, value.dtype if narrower else after.dtype)


def without_graph(value: Any) -> Any:
    """Return a tensor detached, and anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


class KeepsStatePrecision:
    """Makes a module one whose state moves with it, but stays float32 in a half-precision network.

    ``to``, ``half``, ``cuda`` and the like all end in ``Module._apply``, which torch offers no public way to follow. Stands
    before the base class that is a module; :meth:`get_state` and :meth:`set_state` say what is state.
    """

    def get_state(self) -> dict[str, Any]:
        """Return the state by name."""
        raise NotImplementedError

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over a state that :meth:`get_state` has returned."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        state = {name: moved_state(value, fn) for name, value in self.get_state().items()}
        # Module's own, not that of classes between: SpikingJelly's takes no ``recurse``.
        nn.Module._apply(self, fn, recurse=recurse)  # type: ignore[arg-type]
        self.set_state(state)
        return self


# --- calls that are observed, in compiled code too


class ForwardObserver(Protocol):
    """What :func:`observe_forward` calls around each forward of a module."""

    def before(self, module: nn.Module) -> None:
        """Called with the module before it runs."""

    def after(self, module: nn.Module, output: Any) -> None:
        """Called with the module and what its forward returned."""


_OBSERVERS, _INNER = "_nord_snn_observers", "_nord_snn_forward"


class _Observers(tuple):
    """Observers of a module; copies and pickles of the module have none."""

    def __deepcopy__(self, memo: Any) -> "_Observers":
        return _Observers()

    def __reduce__(self) -> Any:
        return _Observers, ()


def observe_forward(module: nn.Module, observer: ForwardObserver) -> None:
    """Call ``observer`` around every forward of ``module``, also in code that was compiled before.

    TorchDynamo does not notice a forward hook that is registered after compilation. But it guards the absence of an attribute
    ``forward`` on every module instance that it traces, since others patch it. So this sets one: code that was compiled with
    this module in it is compiled again, once. All other compiled code stays as it is, and so does the earlier code of this
    module, which runs again when its last observer has gone.
    """
    if not _is_observed(module):
        setattr(module, _INNER, module.__dict__.get("forward"))  # somebody else's patch, or None
        setattr(module, _OBSERVERS, _Observers())
        module.forward = MethodType(forward, module)  # a copy of the module gets a method of its own
        module._replicate_for_data_parallel = MethodType(_replicate_for_data_parallel, module)  # type: ignore[method-assign]
    setattr(module, _OBSERVERS, _Observers((*getattr(module, _OBSERVERS), observer)))


def stop_observing_forward(module: nn.Module, observer: ForwardObserver) -> None:
    """Take an observer off again; do nothing if it is not there."""
    left = _Observers(other for other in getattr(module, _OBSERVERS, ()) if other is not observer)
    if not left and _has(module, forward):
        _restore(module)
    elif _is_observed(module):  # others observe it, too, or somebody has patched ``forward`` on top of this
        setattr(module, _OBSERVERS, left)
    else:  # somebody has put another ``forward`` in the place of this
        _forget(module)


def _is_observed(module: nn.Module) -> bool:
    """Whether our forward is there, or below somebody else's patch."""
    patched = "forward" in module.__dict__ and not _has(module, type(module).forward)
    return _has(module, forward) or (patched and _INNER in module.__dict__)


def _has(module: nn.Module, function: Any) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) is function


def _restore(module: nn.Module) -> None:
    inner = getattr(module, _INNER)
    del module.forward
    if inner is not None:
        module.forward = inner
    _forget(module)


def _forget(module: nn.Module) -> None:
    for name in (_OBSERVERS, _INNER, "_replicate_for_data_parallel"):
        module.__dict__.pop(name, None)


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """A replica for ``DataParallel`` has a copy of ``__dict__``, and in it the method of the original."""
    replica = type(self)._replicate_for_data_parallel(self)
    _restore(replica)
    return replica


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of ``self`` between its observers.

    Bears this name because methods are pickled by name: the pickle of an observed module has the forward of its class.
    """
    for observer in self._nord_snn_observers:
        observer.before(self)
    inner = self._nord_snn_forward
    output = type(self).forward(self, *args, **kwargs) if inner is None else inner(*args, **kwargs)
    for observer in self._nord_snn_observers:
        observer.after(self, output)
    return output
