"""Presets: named sets of constants of :class:`nord_snn.neurons.AssociativeLIFNode`, also under SpikingJelly's names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nord_snn.ops.checks import as_number, check_flags, check_refractory_steps, describe
from nord_snn.ops.surrogate import SURROGATES

__all__ = ["OF_PRESET", "PRESETS", "known_surrogate", "resolve_constants"]


class _OfPreset:
    """Default of an argument whose value the preset has; None means something else."""

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

#: Constants by name of the preset. "nord": the published neuron. "lif": SpikingJelly's ``LIFNode`` with half of its threshold
#: and a soft reset; no synaptic current, refractory period or cascade. "images": "lif" with a synaptic current
#: and a cascade whose gain starts at 0.
PRESETS: dict[str, dict[str, Any]] = {
    "nord": {
        "n_clusters": "auto",  # 64 where they divide the width
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

#: SpikingJelly's name of an argument -> ours.
_SAME = {"v_threshold": "threshold", "surrogate_function": "surrogate"}


def resolve_constants(
    preset: str | None, has_width: bool, given: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all constants: those of the preset, replaced by those that are given.

    With a cascade the synaptic decay of "lif" is that of "nord", because a cascade adds to the synaptic current.

    Args:
        preset: a name from :data:`PRESETS`, or None: "nord" if the width is given and no name of SpikingJelly's, else "lif".
        has_width: whether the width is given.
        given: arguments under our names; :data:`OF_PRESET` if not given.
        theirs: ``tau, v_threshold, surrogate_function, decay_input`` as SpikingJelly has them; None if not given.

    Raises:
        TypeError: an argument is given under both names, or has another type.
        ValueError: the preset is unknown, ``tau`` is less than 1, or ``v_reset`` asks for a hard reset.
    """
    theirs = {name: value for name, value in theirs.items() if value is not None}
    _check_theirs(theirs)
    if preset is not None and not isinstance(preset, str):
        raise TypeError(f"preset must be a name or None, got {describe(preset)}")
    if preset is None:
        preset = "nord" if has_width and not theirs else "lif"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: expected one of {sorted(PRESETS)}")
    given = {name: value for name, value in given.items() if value is not OF_PRESET}
    if "refractory_steps" in given:
        check_refractory_steps(given["refractory_steps"])
    for name, own in (*_SAME.items(), ("tau", "beta_mem")):
        if name in theirs and own in given:
            raise TypeError(f"{name} and {own} are the same constant: give one of them")
    translated = {_SAME[name]: value for name, value in theirs.items() if name in _SAME}
    if "tau" in theirs:
        if not theirs["tau"] >= 1:
            raise ValueError(f"tau must be at least 1 time step, got {theirs['tau']}")
        translated["beta_mem"] = 1 - 1 / theirs["tau"]
        if not 0 < translated["beta_mem"] < 1:
            raise ValueError(f"tau must give beta_mem = 1 - 1 / tau in (0, 1), got tau = {theirs['tau']}")
    constants = PRESETS[preset] | translated | given
    if constants["n_clusters"] is not None and "beta_syn" not in given and constants["beta_syn"] == 0:
        constants["beta_syn"] = PRESETS["nord"]["beta_syn"]  # a cascade adds to the synaptic current
    v_reset, unused = given.get("v_reset"), constants["refractory_steps"] == 0 and not given.get("hard_reset")
    if preset != "nord" and v_reset is not None and unused:
        raise ValueError(
            f"v_reset={v_reset} would have no effect without a refractory period: pass hard_reset=True if a spike shall set "
            "the membrane to it, as in SpikingJelly's nodes, or v_reset=None"
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
    """Return name and sharpness of a SpikingJelly surrogate that is in our table, which all backends have; else as given."""
    if not isinstance(surrogate, nn.Module) or not type(surrogate).__module__.startswith("spikingjelly."):
        return surrogate, alpha
    name = {"ATan": "atan", "Sigmoid": "sigmoid"}.get(type(surrogate).__name__)
    if name is None or not getattr(surrogate, "spiking", False):
        return surrogate, alpha
    sharpness: Any = surrogate.alpha
    return name, float(sharpness)
