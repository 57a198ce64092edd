"""Our neurons and integrators for NIR nodes, with the constants of NIR's equations by forward Euler."""

import math
from typing import Any, NamedTuple

import nir
import numpy as np
import torch
from torch import Tensor

from nord_snn.neurons import AssociativeLIFNode, LeakyIntegrator
from nord_snn.ops import Dynamics

__all__ = ["RESETS", "NIRNeurons", "integrator", "neurons"]

#: How a spike resets the membrane of an imported neuron, see :func:`nord_snn.integrations.nir.import_from_nir`.
RESETS = ("value", "subtract", "delayed_value", "delayed_subtract")

#: Relative deviation at which numbers count as equal: exporters compute them in float32.
_TOLERANCE = 1e-6


class NIRNeurons(AssociativeLIFNode):
    """An :class:`~nord_snn.neurons.AssociativeLIFNode` with a strict threshold and a constant current, for NIR's equations.

    Attributes:
        strict: fire above the threshold only, not at it.
        bias: constant current of every neuron, ``[D]``, or None. With a hard reset our membranes leak towards ``v_rest``, to
            which they are reset; the current ``(v_leak - v_rest) / r`` makes them leak towards ``v_leak``.
    """

    def __init__(self, n_features: int, *, strict: bool, bias: Tensor | None, **arguments: Any) -> None:
        super().__init__(n_features, **arguments)
        self.strict = strict
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def _input_current(self, x: Tensor, dim: int) -> Tensor:
        return x if self.bias is None else x + self.bias.to(x.dtype).reshape(-1, *[1] * (-1 - dim))


class _Euler(NamedTuple):
    """Constants of a time step by forward Euler: ``v += leak * (v_leak - v) + gain * i`` and ``i = beta_syn * i + x``."""

    leak: np.ndarray
    gain: np.ndarray
    v_leak: np.ndarray
    beta_syn: np.ndarray


def neurons(
    name: str, node: Any, dt: float, shape: tuple[int, ...] | None, *, reset: str, strict: bool, step_mode: str
) -> NIRNeurons:
    """Return the neurons of an ``IF``, ``LIF`` or ``CubaLIF`` for time steps of ``dt``.

    Args:
        name: name of the node, for messages.
        node: the node.
        dt: length of a time step in seconds.
        shape: shape of one row of the input; None if unknown.
        reset: one of :data:`RESETS`.
        strict: see :class:`NIRNeurons`.
        step_mode: step mode of the result.

    Raises:
        ValueError: a field has a value that our neurons do not support; the message names the field.
    """
    shape = _shape(name, node, "v_threshold", shape)
    euler, hard_reset, no_leak = _euler(name, node, dt), reset == "value", isinstance(node, nir.IF)
    if not (np.all(euler.gain > 0) and np.isfinite(euler.gain).all() and np.isfinite(node.v_threshold).all()):
        raise ValueError(f"'{name}' must have positive r and w_in, and a finite v_threshold")
    charge, unit = _charge(euler)
    v_rest, threshold, bias = _potentials(name, node, euler, (charge, unit), hard_reset)
    fields = {"threshold": threshold, "bias": bias, "beta_mem": 1 - euler.leak, "beta_syn": euler.beta_syn}
    per_neuron, channel_dim = _per_neuron(name, fields, shape)
    scale = _reset_scale(name, reset, 1 - euler.leak)
    refractory_steps = _refractory_steps(name, node, dt, reset)
    return NIRNeurons(
        shape[0] if channel_dim is not None else shape[-1],
        strict=strict,
        bias=per_neuron["bias"],
        n_clusters=None,
        preset="lif",
        channel_dim=channel_dim,
        threshold=per_neuron["threshold"],
        beta_mem=0.5 if no_leak else _decay(per_neuron["beta_mem"]),  # an IF has no decay
        beta_syn=_decay(per_neuron["beta_syn"]),
        surrogate="nord_atan",
        alpha=4.0,
        v_reset=_reset_potential(name, hard_reset, refractory_steps, np.asarray(node.v_reset) / unit),
        hard_reset=hard_reset,
        refractory_steps=refractory_steps,
        dynamics=Dynamics("leak" if no_leak else charge, math.inf if no_leak else 0.0, v_rest, hard_reset, scale),
        step_mode=step_mode,
    )


def integrator(name: str, node: Any, dt: float, shape: tuple[int, ...] | None) -> LeakyIntegrator:
    """Return the integrators of an ``I``, ``LI`` or ``CubaLI`` for time steps of ``dt``."""
    shape = _shape(name, node, "r", shape)
    euler = _euler(name, node, dt)
    tensors = [torch.from_numpy(np.array(_broadcast(name, field, shape))) for field in euler]
    leak, gain, v_leak, beta_syn = (
        tensor.flatten()[:1] if tensor.unique().numel() == 1 else tensor for tensor in tensors
    )
    return LeakyIntegrator(shape, beta_mem=1 - leak, gain=gain, v_rest=v_leak, beta_syn=beta_syn, step_mode="m")


def _euler(name: str, node: Any, dt: float) -> _Euler:
    r = np.asarray(node.r, dtype=np.float64)
    if isinstance(node, nir.IF | nir.I):
        return _Euler(np.zeros(()), r * dt, np.zeros(()), np.zeros(()))
    cuba = isinstance(node, nir.CubaLIF | nir.CubaLI)
    leak = _leak(name, "tau_mem" if cuba else "tau", node.tau_mem if cuba else node.tau, dt)
    gain, beta_syn = r * leak, np.zeros(())
    if cuba:
        leak_syn = _leak(name, "tau_syn", node.tau_syn, dt, allow_1=True)
        gain, beta_syn = gain * leak_syn * node.w_in, 1 - leak_syn
    return _Euler(leak, gain, np.asarray(node.v_leak, dtype=np.float64), beta_syn)


def _leak(name: str, field: str, tau: Any, dt: float, allow_1: bool = False) -> np.ndarray:
    """Return ``dt / tau``, in (0, 1), or 1 if ``allow_1``."""
    tau = np.asarray(tau, dtype=np.float64)
    leak = np.divide(dt, tau, out=np.full_like(tau, np.nan), where=tau != 0)
    if allow_1 and np.allclose(leak, 1):
        return np.ones(())
    if not (np.all(leak > 0) and np.all(leak < 1)):
        raise ValueError(f"{field} of '{name}' must be finite and longer than a time step of {dt} s")
    return leak


def _charge(euler: _Euler) -> tuple[str, np.ndarray]:
    """Return ``charge`` of :class:`nord_snn.ops.Dynamics`, and the unit of membrane potentials that it needs.

    In this unit the factor of the current is 1 with "sum", and the leak with "average".
    """
    if np.allclose(euler.gain, 1, rtol=_TOLERANCE, atol=0):
        return "sum", np.ones(())
    if np.all(euler.leak > 0) and np.allclose(euler.gain, euler.leak, rtol=_TOLERANCE, atol=0):
        return "average", np.ones(())
    return "sum", euler.gain


def _potentials(
    name: str, node: Any, euler: _Euler, charge: tuple[str, np.ndarray], hard_reset: bool
) -> tuple[float, np.ndarray, np.ndarray | None]:
    """Return resting potential, thresholds and constant current, in the unit of :func:`_charge`.

    Our neurons have one resting potential, to which a hard reset also sets them. If it differs between the neurons of the node,
    the potentials of each neuron are measured from its own.
    """
    kind, unit = charge
    rest = np.asarray(node.v_reset if hard_reset else euler.v_leak, dtype=np.float64) / unit
    threshold = np.asarray(node.v_threshold, dtype=np.float64) / unit
    is_common = np.unique(rest).size == 1
    if not is_common and not hard_reset:
        raise ValueError(f"v_leak of '{name}' must be the same for all neurons, unless their reset is 'value'")
    bias = _bias(name, kind, euler, euler.v_leak / unit - rest) if hard_reset else None
    return (float(np.ravel(rest)[0]), threshold, bias) if is_common else (0.0, threshold - rest, bias)


def _bias(name: str, charge: str, euler: _Euler, difference: np.ndarray) -> np.ndarray | None:
    """Return the constant current that shifts the potential towards which the membrane leaks by ``difference``."""
    bias = difference * (euler.leak if charge == "sum" else 1.0)
    if not np.any(bias):
        return None
    if np.any(euler.beta_syn):
        raise ValueError(
            f"v_leak of '{name}' must be its v_reset, because our neurons with a synaptic current leak towards the potential "
            "to which they are reset"
        )
    return bias


def _refractory_steps(name: str, node: Any, dt: float, reset: str) -> int:
    """Return the refractory period in time steps. A delayed reset to a value is a refractory period of one time step."""
    times = np.unique(getattr(node, "refractory_time", 0.0))
    steps = round(float(times[0]) / dt)
    if times.size != 1 or not np.isclose(steps * dt, times[0], rtol=_TOLERANCE, atol=0):
        raise ValueError(f"refractory_time of '{name}' must be the same for all neurons, and a multiple of {dt} s")
    if steps and reset.startswith("delayed"):
        raise ValueError(f"'{name}' has a refractory period: reset must be 'value' or 'subtract', got {reset!r}")
    return int(reset == "delayed_value") or steps


def _reset_potential(name: str, hard_reset: bool, refractory_steps: int, v_reset: np.ndarray) -> float | None:
    """Return the potential to which a membrane is set after a spike, and while it is refractory."""
    is_common = np.unique(v_reset).size == 1
    if not hard_reset and not refractory_steps:
        return None
    if not hard_reset and not is_common:
        raise ValueError(f"v_reset of '{name}' must be the same for all neurons, because they have a refractory period")
    return float(np.ravel(v_reset)[0]) if is_common else 0.0


def _reset_scale(name: str, reset: str, beta_mem: np.ndarray) -> float:
    if reset != "delayed_subtract":
        return 1.0
    if np.unique(beta_mem).size != 1:
        raise ValueError(
            f"tau of '{name}' must be the same for all neurons, because their reset comes one time step late"
        )
    return 1 / float(np.ravel(beta_mem)[0])


def _shape(name: str, node: Any, field: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the shape of one row: that of the field or, if the field has one entry, that of the input."""
    own = np.shape(getattr(node, field))
    if math.prod(own) > 1 or (own and shape is None):
        return own
    if not shape:
        raise ValueError(f"'{name}' must have constants of shape [D], because the shape of its input is not known")
    return shape


def _broadcast(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.broadcast_to(np.asarray(value, dtype=np.float64), shape)
    except ValueError as error:
        raise ValueError(
            f"the constants of '{name}' must have the shape {list(shape)}, got {list(np.shape(value))}"
        ) from error


def _per_neuron(
    name: str, fields: dict[str, Any], shape: tuple[int, ...]
) -> tuple[dict[str, Tensor | None], int | None]:
    """Return every field as a tensor ``[D]``, and the dimension of the neurons: None for the last one.

    Raises:
        ValueError: a field differs within a channel.
    """
    tensors: dict[str, Tensor | None] = {}
    for field, value in fields.items():
        if value is None:
            tensors[field] = None
            continue
        channels = (
            _broadcast(name, value, shape).reshape(shape[0], -1)
            if len(shape) > 1
            else _broadcast(name, value, shape)[:, None]
        )
        if not (channels == channels[:, :1]).all():
            raise ValueError(
                f"{field} of '{name}' must be the same at all positions of a channel, one for each of {shape[0]} channels"
            )
        tensors[field] = torch.from_numpy(channels[:, 0].copy())
    return tensors, -len(shape) if len(shape) > 1 else None


def _decay(beta: Any) -> float | Tensor:
    """Return the decays, as one number if they are equal."""
    return float(beta[0]) if beta.unique().numel() == 1 else beta
