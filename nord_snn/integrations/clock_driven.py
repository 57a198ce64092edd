"""Run repositories that were written for ``spikingjelly.clock_driven``, the package of SpikingJelly 0.0.0.0.12 and older.

Releases after 0.0.0.0.14 have ``activation_based`` only. :func:`install` defines the old names by classes of the new package,
so that the files of such a repository run unedited::

    from nord_snn.integrations.clock_driven import install

    install()      # before the repository is imported
    import model   # from spikingjelly.clock_driven.neuron import MultiStepLIFNode

The modules ``neuron``, ``layer``, ``functional``, ``surrogate``, ``base`` and ``encoding`` have all names that
``activation_based`` has kept, and ``MultiStepIFNode``, ``MultiStepLIFNode``, ``MultiStepParametricLIFNode``,
``MultiStepEIFNode``, ``MultiStepDropout``, ``MultiStepDropout2d``, ``MultiStepThresholdDependentBatchNorm1d`` to ``3d`` and
``MultiStepTemporalWiseAttention``. The modules ``model``, ``ann2snn``, ``monitor`` and ``examples``, names that the new package
has dropped, the attribute ``spike_seq``, ``backend="lava"``, and the arguments ``cupy_fp32_inference`` and ``lava_s_cale`` are
missing; ``v_seq`` exists only if ``store_v_seq`` is set.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import spikingjelly
from spikingjelly.activation_based import base, encoding, functional, layer, neuron, surrogate

__all__ = ["install"]

_PACKAGE = "spikingjelly.clock_driven"


def install() -> None:
    """Make ``spikingjelly.clock_driven`` importable in this process. A second call changes nothing.

    ``backend`` of its neurons may be ``"torch"`` or ``"cupy"`` and has no effect: SpikingJelly 2 selects its kernels itself.

    Raises:
        RuntimeError: the installed SpikingJelly has this package itself.

    Example:
        >>> try:
        ...     install()
        ... except RuntimeError:  # SpikingJelly 0.0.0.0.14 has it
        ...     pass
        >>> from spikingjelly.clock_driven.neuron import MultiStepLIFNode
        >>> MultiStepLIFNode(tau=2.0, detach_reset=True, backend="torch").tau
        2.0
    """
    loaded = sys.modules.get(_PACKAGE)
    if isinstance(loaded, _OldModule):
        return
    if loaded is not None or importlib.util.find_spec(_PACKAGE) is not None:
        raise RuntimeError(
            "install() is for SpikingJelly without the package clock_driven, the installed one has it: do not call install()"
        )
    package = _OldModule(_PACKAGE, None, {})
    package.__path__ = []
    sys.modules[_PACKAGE] = package
    spikingjelly.clock_driven = package
    parts = {
        "neuron": (neuron, _NEURONS),
        "layer": (layer, _layers()),
        "functional": (functional, {}),
        "surrogate": (surrogate, {}),
        "base": (base, {}),
        "encoding": (encoding, {}),
    }
    for name, (current, own) in parts.items():
        module = _OldModule(f"{_PACKAGE}.{name}", current, own)
        sys.modules[module.__name__] = module
        setattr(package, name, module)


class _OldModule(ModuleType):
    """A module of ``clock_driven`` with the names in ``own`` and all other names of ``current``, if it is a module."""

    def __init__(self, name: str, current: ModuleType | None, own: dict[str, Any]) -> None:
        super().__init__(
            name, f"{name} in terms of {_PACKAGE.replace('clock_driven', 'activation_based')}, by nord-snn."
        )
        self.__dict__.update(own)
        self._current = current

    def __getattr__(self, name: str) -> Any:
        current = self.__dict__.get("_current")
        if name.startswith("__") or not hasattr(current, name):
            raise AttributeError(
                f"{self.__name__} has no {name} here: the docstring of nord_snn.integrations.clock_driven lists its names"
            )
        return getattr(current, name)


def _check_backend(backend: str) -> None:
    if backend not in ("torch", "cupy"):
        raise ValueError(f"backend must be 'torch' or 'cupy', got {backend!r}")


class _MultiStep:
    """Mixin: set step mode "m", and accept the argument ``backend`` of ``clock_driven``."""

    def __init__(self, *args: Any, backend: str = "torch", **kwargs: Any) -> None:
        _check_backend(backend)
        super().__init__(*args, step_mode="m", **kwargs)  # type: ignore[call-arg]  # of the node


class MultiStepIFNode(_MultiStep, neuron.IFNode):
    """``IFNode`` for sequences ``[T, N, *]``."""


class MultiStepLIFNode(_MultiStep, neuron.LIFNode):
    """``LIFNode`` for sequences ``[T, N, *]``."""


class MultiStepParametricLIFNode(_MultiStep, neuron.ParametricLIFNode):
    """``ParametricLIFNode`` for sequences ``[T, N, *]``."""


class MultiStepEIFNode(_MultiStep, neuron.EIFNode):
    """``EIFNode`` for sequences ``[T, N, *]``."""


_NEURONS: dict[str, Any] = {
    kind.__name__: kind for kind in (MultiStepIFNode, MultiStepLIFNode, MultiStepParametricLIFNode, MultiStepEIFNode)
}
for _kind in _NEURONS.values():
    _kind.__module__ = f"{_PACKAGE}.neuron"  # the name under which it is imported and pickled


def _layers() -> dict[str, Any]:
    """Return the layers whose names have changed."""

    class MultiStepDropout(layer.Dropout):
        """``Dropout`` for sequences, with one mask for all time steps."""

        def __init__(self, p: float = 0.5) -> None:
            super().__init__(p, step_mode="m")

    class MultiStepDropout2d(layer.Dropout2d):
        """``Dropout2d`` for sequences, with one mask for all time steps."""

        def __init__(self, p: float = 0.2) -> None:
            super().__init__(p, step_mode="m")

    own: dict[str, Any] = {kind.__name__: kind for kind in (MultiStepDropout, MultiStepDropout2d)}
    for kind in own.values():
        kind.__module__, kind.__qualname__ = f"{_PACKAGE}.layer", kind.__name__
    for name in ("TemporalWiseAttention", *(f"ThresholdDependentBatchNorm{n}d" for n in (1, 2, 3))):
        own[f"MultiStep{name}"] = getattr(layer, name)
    return own
