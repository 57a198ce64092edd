"""Find the layers of neurons of a network, and the spikes in their outputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.neurons.detection import is_neuron, runs_sequences, runs_snntorch

__all__ = [
    "Kinds",
    "check_feature_dims",
    "check_step_mode",
    "features_of",
    "first_tensor",
    "neuron_layers",
    "spikes_of",
]

#: Which modules are layers of neurons: a class, a tuple of classes, or a function of a module.
Kinds = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool]


def neuron_layers(net: nn.Module, kinds: Kinds | None = None) -> dict[str, nn.Module]:
    """Return the layers of neurons of ``net`` by name; ``net`` itself under ``""``.

    Raises:
        TypeError: ``kinds`` has another type, or a layer is a ScriptModule.
        ValueError: ``net`` has no such layers.
    """
    selects = _predicate(kinds)
    layers = {name: module for name, module in net.named_modules() if selects(module)}
    if not layers:
        expected = (
            "layers of neurons of nord-snn, SpikingJelly, snnTorch or Norse" if kinds is None else _described(kinds)
        )
        raise ValueError(f"expected {expected}, {type(net).__name__} has none")
    for name, module in layers.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"'{name}' is a ScriptModule, whose calls cannot be observed: pass the original module")
    inside = [inner for module in layers.values() for inner in module.modules() if inner is not module]
    return {name: module for name, module in layers.items() if not any(module is inner for inner in inside)}


def _predicate(kinds: Kinds | None) -> Callable[[nn.Module], bool]:
    if kinds is None:
        return lambda module: is_neuron(module) or runs_snntorch(module)
    classes = tuple(kind for kind in _as_tuple(kinds) if isinstance(kind, type) and issubclass(kind, nn.Module))
    if classes and len(classes) == len(_as_tuple(kinds)):
        return lambda module: isinstance(module, classes)
    if isinstance(kinds, type | tuple) or not callable(kinds):
        raise TypeError(
            f"kinds must be a class of modules, a tuple of such classes, a function of a module, or None, got {kinds!r}"
        )
    return kinds


def _as_tuple(kinds: Kinds) -> tuple[Any, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


def _described(kinds: Kinds) -> str:
    if all(isinstance(kind, type) for kind in _as_tuple(kinds)):
        return f"modules of class {' or '.join(kind.__name__ for kind in _as_tuple(kinds))}"
    return "modules for which kinds(module) is true"


def first_tensor(output: Any) -> Any:
    """Return the spikes in the output of a layer: snnTorch's and Norse's neurons also return states."""
    return output[0] if isinstance(output, tuple) else output


def spikes_of(module: nn.Module, output: Any, step_mode: str = "s") -> tuple[Tensor, bool]:
    """Return the spikes ``[T, N, *, D]`` in the output of a layer of neurons, and whether the layer ran a sequence.

    If it ran one time step, T is 1.

    Args:
        module: the layer.
        output: its output.
        step_mode: ``"m"`` if modules without an attribute ``step_mode`` run sequences, else ``"s"``.

    Raises:
        TypeError: the output is neither a tensor nor a tuple that begins with one.
    """
    spikes = first_tensor(output)
    if not isinstance(spikes, Tensor):
        raise TypeError(
            f"neurons must return spikes, or a tuple of spikes and states, {type(module).__name__} returned "
            f"{type(output).__name__}"
        )
    is_sequence = runs_sequences(module, step_mode)
    return spikes if is_sequence else spikes.unsqueeze(0), is_sequence


def features_of(module: nn.Module, spikes: Tensor, feature_dims: int | None) -> torch.Size:
    """Return the sizes of the last ``feature_dims`` dimensions of ``spikes``, which are neurons.

    None: one dimension for our neurons with features last, for others all dimensions but T and N.
    """
    if feature_dims is None:
        features_last = hasattr(module, "n_features") and getattr(module, "channel_dim", None) in (None, -1)
        feature_dims = 1 if features_last else max(spikes.ndim - 2, 0)
    if feature_dims >= spikes.ndim:
        raise ValueError(
            f"feature_dims must be less than the {spikes.ndim} dimensions of the spikes {list(spikes.shape)}, got {feature_dims}"
        )
    return spikes.shape[spikes.ndim - feature_dims :]


def check_feature_dims(feature_dims: int | None) -> None:
    """Raise a ValueError if ``feature_dims`` is below 1."""
    if feature_dims is not None and feature_dims < 1:
        raise ValueError(f"feature_dims must be at least 1, got {feature_dims}")


def check_step_mode(step_mode: str) -> None:
    """Raise a ValueError unless ``step_mode`` is ``"s"`` or ``"m"``."""
    if step_mode not in ("s", "m"):
        raise ValueError(f'step_mode must be "s" or "m", got {step_mode!r}')
