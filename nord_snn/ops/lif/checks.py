"""Checks of the arguments of the associative LIF neuron: of the public function, and of the op that anyone may call."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nord_snn.ops.cascade import check_cascade
from nord_snn.ops.checks import (
    as_number,
    as_state,
    check_channels,
    check_features,
    check_flags,
    check_refractory_steps,
    check_shape,
    check_tensor,
    compute_dtype,
    describe,
)
from nord_snn.ops.lif.reference import CHARGES, PUBLISHED, AssociativeLIFState, Dynamics
from nord_snn.ops.lif.support import Options
from nord_snn.ops.surrogate import resolve_surrogate

__all__ = ["check_backward", "check_call", "check_constants", "check_forward", "check_options", "check_state"]


def check_call(
    x_seq: Tensor,
    threshold: Tensor,
    decays: dict[str, float | Tensor | None],
    cascade: dict[str, Tensor | None],
    options: Options,
    channels_first: bool,
) -> None:
    """Raise unless the arguments of a call, apart from the state, are of the right type, shape and device.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: one has another shape or is out of its range.
    """
    check_flags(channels_first=channels_first)
    check_tensor(threshold, "threshold", "[D]")
    if threshold.ndim != 1:
        raise ValueError(f"associative_lif expects threshold of shape [D], got {list(threshold.shape)}")
    n_features = threshold.shape[0]
    if channels_first:
        check_channels(x_seq, n_features, "associative_lif", name="x_seq")
    else:
        check_features(x_seq, n_features, "associative_lif", "[T, N, D]", "x_seq")
    check_tensor(threshold, "threshold", "[D]", like=x_seq)
    check_constants(options)
    for name, beta in decays.items():
        if isinstance(beta, Tensor):
            check_tensor(beta, name, "of one element or [D]", like=x_seq)
        elif beta is not None or name == "beta_syn":
            as_number(beta, name)
    (name_of_weight, weight), (name_of_gain, gain) = cascade.items()
    if (weight is None) != (gain is None):
        raise ValueError(f"pass both {name_of_weight} and {name_of_gain}, or neither for no cascade")
    if weight is not None and gain is not None:
        check_cascade(n_features, weight, gain, "cascade_", like=x_seq)


def check_state(
    state: AssociativeLIFState | None, x_seq: Tensor, layout: str, membrane_only: bool
) -> AssociativeLIFState | None:
    """Return the state of a call as its class; raise unless its parts fit the input.

    Raises:
        TypeError: the state or a part of it has another type.
        ValueError: a part has another shape, is missing, or would be ignored.
    """
    if state is None:
        return None
    state = as_state(state, AssociativeLIFState)
    for name, part in zip(AssociativeLIFState._fields, state, strict=True):
        if membrane_only and name != "v":
            if part is not None:
                raise ValueError(f"with membrane_only state.{name} must be None, got {describe(part)}")
            continue
        if part is None:
            raise ValueError(f"state.{name} must be {layout} = {list(x_seq.shape[1:])} for this input, got None")
        check_tensor(
            part, f"state.{name}", layout, kind="real" if name == "refractory" else "floating-point", like=x_seq
        )
        if part.shape != x_seq.shape[1:]:
            raise ValueError(
                f"state.{name} must be {layout} = {list(x_seq.shape[1:])} for this input, got {list(part.shape)}"
            )
    return state


def check_constants(options: Options) -> None:
    """Raise unless the constants have the right type; :func:`check_options` checks how they fit each other."""
    check_refractory_steps(options.refractory_steps)
    as_number(options.v_reset, "v_reset")
    as_number(options.alpha, "alpha")
    check_flags(membrane_only=options.membrane_only, return_v_seq=options.keep_v)
    if options.dynamics is not PUBLISHED:  # the default is valid
        _check_types(options.dynamics)


def _check_types(dynamics: Dynamics) -> None:
    if not isinstance(dynamics, Dynamics):
        raise TypeError(f"dynamics must be Dynamics, got {describe(dynamics)}")
    for name in ("tau", "v_rest", "reset_scale"):
        value = getattr(dynamics, name)
        if name != "tau" or value != math.inf:  # no leak
            as_number(value, f"dynamics.{name}")
    check_flags(**{f"dynamics.{name}": getattr(dynamics, name) for name in ("hard_reset", "detach_reset")})


def check_options(options: Options, beta_mem: float | Tensor | None, without_current: bool, has_cascade: bool) -> None:
    """Raise a ValueError unless constants, decays and cascade fit each other."""
    if without_current and has_cascade:
        raise ValueError(
            "a cascade adds to the synaptic current, which beta_syn=0 discards: pass no cascade, or beta_syn > 0"
        )
    if options.membrane_only and not (without_current and options.refractory_steps == 0 and not has_cascade):
        raise ValueError(
            "membrane_only is for neurons whose state is the membrane potential: beta_syn=0, refractory_steps=0, no cascade"
        )
    resolve_surrogate(options.surrogate, options.alpha)
    _check_dynamics(options.dynamics, beta_mem)


def _check_dynamics(dynamics: Dynamics, beta_mem: float | Tensor | None) -> None:
    if dynamics.charge not in CHARGES:
        raise ValueError(
            f"dynamics have an unknown charge {describe(dynamics.charge)}: expected one of {list(CHARGES)}"
        )
    if dynamics.charge in ("relax", "leak"):
        if not dynamics.tau >= 1:
            raise ValueError(f"the charge {dynamics.charge!r} needs tau >= 1 time steps, got {dynamics.tau}")
        if beta_mem is not None:
            raise ValueError(f"the charge {dynamics.charge!r} has tau instead of beta_mem: do not pass beta_mem")
        return
    if beta_mem is None:
        raise ValueError(f"the charge {dynamics.charge!r} needs beta_mem")
    if dynamics.charge == "average" and not isinstance(beta_mem, Tensor) and not 0 < beta_mem < 1:
        raise ValueError(f"beta_mem must lie in (0, 1), got {beta_mem}")


def check_forward(
    x: Tensor,
    v: Tensor | None,
    i_syn: Tensor | None,
    refractory: Tensor | None,
    threshold: Tensor,
    beta_mem: Tensor | None,
    beta_syn: Tensor | None,
    weight: Tensor | None,
    gain: Tensor | None,
    *,
    membrane_only: bool,
    shape: Sequence[int],
    step: Sequence[int],
    **options: Any,
) -> None:
    """Raise unless the arguments of the registered op fit each other.

    Raises:
        TypeError: a tensor has another dtype or layout.
        ValueError: an argument has another shape or device, or is missing.
    """
    wanted = (v is not None, v is not None and not membrane_only, v is not None and not membrane_only)
    if wanted != tuple(part is not None for part in (v, i_syn, refractory)):
        raise ValueError(
            "v, i_syn and refractory must all be given or all None; with membrane_only the last two are None"
        )
    check_tensor(x, "x", "[T, N, D]")
    fits = len(shape) in (3, 4) and min(shape) >= 0 and math.prod(shape) == x.numel()
    if not fits or math.prod(shape[1:]) != math.prod(step) or not (shape[0] and shape[2]):
        raise ValueError(
            f"shape must be [T, N, D] or [T, N, D, M] of x {list(x.shape)}, T and D at least 1, and step that of a time step"
        )
    D = shape[2]
    check_shape(threshold, "threshold", "[D]", (D,), like=x)
    decays = {name: beta for name, beta in (("beta_mem", beta_mem), ("beta_syn", beta_syn)) if beta is not None}
    for name, beta in decays.items():
        check_tensor(beta, name, "[1] or [D]", like=x)
        if beta.shape not in ((1,), (D,)) or any(beta.shape != other.shape for other in decays.values()):
            raise ValueError(f"{name} must be [1] or [D] = [{D}], both decays alike, got {list(beta.shape)}")
    for name, part, kind in (
        ("v", v, "floating-point"),
        ("i_syn", i_syn, "floating-point"),
        ("refractory", refractory, "real"),
    ):
        if part is not None:
            check_shape(part, name, "of a time step", tuple(step), kind=kind, like=x)
    if (weight is None) != (gain is None):
        raise ValueError("pass both weight and gain of the cascade, or neither")
    if weight is not None and gain is not None:
        check_cascade(D, weight, gain, like=x)
    dtype = compute_dtype(x)
    parameters = {"threshold": threshold, **decays, "weight": weight, "gain": gain, "v": v, "i_syn": i_syn}
    for name, parameter in parameters.items():
        if parameter is not None and parameter.dtype != dtype:
            raise TypeError(f"{name} must have the dtype {dtype} for this x, got {parameter.dtype}")
    resolve_surrogate(options["surrogate"], options["alpha"])
    if options["charge"] not in CHARGES:
        raise ValueError(f"charge must be one of {list(CHARGES)}, got {options['charge']!r}")
    if options["refractory_steps"] < 0:
        raise ValueError(f"refractory_steps must be 0 or more, got {options['refractory_steps']}")


def check_backward(
    grad_spikes: Tensor, other_grads: Sequence[Tensor | None], x: Tensor, *tensors: Tensor | None, **options: Any
) -> None:
    """Raise unless the arguments of the registered backward pass fit each other; see :func:`check_forward`."""
    check_forward(x, *tensors, **options)  # type: ignore[arg-type]
    check_shape(grad_spikes, "grad_spikes", "of x", tuple(x.shape), like=x)
    if len(other_grads) != 3:
        raise ValueError(f"other_grads must be those of v_seq, v and i_syn, got {len(other_grads)}")
    steps: Any = tuple(options["step"])
    for name, grad, shape in zip(("v_seq", "v", "i_syn"), other_grads, (tuple(x.shape), steps, steps), strict=True):
        if grad is not None:
            check_shape(grad, f"other_grads of {name}", "of the output", shape, like=x)
