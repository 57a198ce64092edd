"""Presets: named sets of constants of :class:`nord_snn.neurons.AssociativeLIFNode`, and SpikingJelly's argument names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nord_snn.ops.checks import as_number, check_flags, check_refractory_steps, describe
from nord_snn.ops.surrogate import SURROGATES

__all__ = ["OF_PRESET", "PRESETS", "known_surrogate", "resolve_constants"]


class _OfPreset:
    """Type of :data:`OF_PRESET`, the default of arguments that take the preset's value; None is a value of its own."""

    def __repr__(self) -> str:
        return "<of the preset>"


OF_PRESET: Any = _OfPreset()

_LIF = {
    "n_clusters": None,
    "cascade_radius": 3,
    "cascade_gain": 0.0,
    "threshold": 0.5,
    "beta_mem": 0.5,
    "beta_syn": 0.0,
    "v_reset": None,
    "refractory_steps": 0,
    "surrogate": "atan",
    "alpha": 2.0,
}

#: Constants by name of the preset. "nord": the neuron of the published Nord language model. "lif": SpikingJelly's ``LIFNode``
#: with half of its threshold and a soft reset; no synaptic current, refractory period or cascade. "images": "lif" with a
#: synaptic current and a cascade whose gain starts at 0.
PRESETS: dict[str, dict[str, Any]] = {
    "nord": {
        "n_clusters": "auto",  # the largest divisor of the width up to 64
        "cascade_radius": 3,
        "cascade_gain": 0.8,
        "threshold": 0.25,
        "beta_mem": 0.9,
        "beta_syn": 0.5,
        "v_reset": -0.1,
        "refractory_steps": 2,
        "surrogate": "nord_atan",
        "alpha": 4.0,
    },
    "lif": _LIF,
    "images": _LIF | {"n_clusters": "auto", "beta_syn": 0.5},
}

#: SpikingJelly's name of an argument -> nord-snn's name.
_OUR_NAME = {"v_threshold": "threshold", "surrogate_function": "surrogate"}


def resolve_constants(
    preset: str | None, has_width: bool, arguments: Mapping[str, Any], spikingjelly_arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all constants: those of the preset, replaced by the arguments that were passed.

    With a cascade the synaptic decay of "lif" is that of "nord", because a cascade adds to the synaptic current.

    Args:
        preset: a name from :data:`PRESETS`. None: "nord" with a width and without SpikingJelly's arguments, else "lif".
        has_width: whether the width was passed.
        arguments: arguments under nord-snn's names; :data:`OF_PRESET` if not passed.
        spikingjelly_arguments: ``tau, v_threshold, surrogate_function, decay_input``; None if not passed.

    Raises:
        TypeError: an argument was passed under both names, or has another type.
        ValueError: the preset is unknown, ``tau`` is less than 1, or ``v_reset`` would have no effect.
    """
    theirs = {name: value for name, value in spikingjelly_arguments.items() if value is not None}
    _check_theirs(theirs)
    if preset is not None and not isinstance(preset, str):
        raise TypeError(f"preset must be a name or None, got {describe(preset)}")
    if preset is None:
        preset = "nord" if has_width and not theirs else "lif"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: expected one of {sorted(PRESETS)}")
    ours = {name: value for name, value in arguments.items() if value is not OF_PRESET}
    if "refractory_steps" in ours:
        check_refractory_steps(ours["refractory_steps"])
    for their_name, our_name in (*_OUR_NAME.items(), ("tau", "beta_mem")):
        if their_name in theirs and our_name in ours:
            raise TypeError(f"{their_name} and {our_name} are the same constant: pass one of them")
    translated = {_OUR_NAME[name]: value for name, value in theirs.items() if name in _OUR_NAME}
    if "tau" in theirs:
        if not theirs["tau"] >= 1:
            raise ValueError(f"tau must be at least 1 time step, got {theirs['tau']}")
        translated["beta_mem"] = 1 - 1 / theirs["tau"]
        if not 0 < translated["beta_mem"] < 1:
            raise ValueError(f"tau must give beta_mem = 1 - 1 / tau in (0, 1), got tau = {theirs['tau']}")
    constants = PRESETS[preset] | translated | ours
    if constants["n_clusters"] is not None and "beta_syn" not in ours and constants["beta_syn"] == 0:
        constants["beta_syn"] = PRESETS["nord"]["beta_syn"]  # a cascade adds to the synaptic current
    v_reset, is_unused = ours.get("v_reset"), constants["refractory_steps"] == 0 and not ours.get("hard_reset")
    if preset != "nord" and v_reset is not None and is_unused:
        raise ValueError(
            f"v_reset={v_reset} would have no effect without a refractory period: pass hard_reset=True if a spike should set "
            "the membrane potential to this value, as in SpikingJelly's nodes, or v_reset=None"
        )
    return constants


def _check_theirs(theirs: Mapping[str, Any]) -> None:
    """Raise unless the arguments under SpikingJelly's names have the right type, under the name that the caller uses."""
    for name in ("tau", "v_threshold"):
        if name in theirs and not (name == "v_threshold" and isinstance(theirs[name], Tensor)):
            as_number(theirs[name], name)
    surrogate = theirs.get("surrogate_function", "atan")
    if not callable(surrogate) and not isinstance(surrogate, str):
        raise TypeError(f"surrogate_function must be a name or a callable, got {describe(surrogate)}")
    if isinstance(surrogate, str) and surrogate not in SURROGATES:
        raise ValueError(f"surrogate_function must be one of {sorted(SURROGATES)} or a callable, got {surrogate!r}")
    check_flags(decay_input=theirs.get("decay_input", True))


def known_surrogate(surrogate: Any, alpha: float) -> tuple[Any, float]:
    """Return ``surrogate`` and ``alpha``; SpikingJelly's ``ATan`` and ``Sigmoid`` by name, which all backends support."""
    if not isinstance(surrogate, nn.Module) or not type(surrogate).__module__.startswith("spikingjelly."):
        return surrogate, alpha
    name = {"ATan": "atan", "Sigmoid": "sigmoid"}.get(type(surrogate).__name__)
    if name is None or not getattr(surrogate, "spiking", False):
        return surrogate, alpha
    sharpness: Any = surrogate.alpha
    return name, float(sharpness)
