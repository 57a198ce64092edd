"""Translate neurons of SpikingJelly and snnTorch to arguments of :class:`nord_snn.neurons.AssociativeLIFNode`."""

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nord_snn.ops import Dynamics

__all__ = ["arguments_like"]


def arguments_like(node: nn.Module) -> dict[str, Any]:
    """Return the arguments with which ``AssociativeLIFNode`` gives the same spikes as ``node``.

    Raises:
        TypeError: the class of ``node`` is unknown, or one of its options cannot be matched; the message names it.
    """
    library, kind = type(node).__module__.partition(".")[0], type(node).__name__
    translate = _KNOWN.get((library, kind))
    if translate is None:
        known = ", ".join(f"{library}'s {kind}" for library, kind in _KNOWN)
        raise TypeError(f"like() supports {known}, got as node {type(node).__module__}.{kind}")
    return _COMMON | translate(node)


#: Arguments for every class; the translation of a class replaces some.
_COMMON: dict[str, Any] = {"preset": "lif", "n_clusters": None, "beta_syn": 0.0, "learnable": ()}


def _spikingjelly(node: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments and the fields of :class:`Dynamics` that are common to all nodes of SpikingJelly."""
    if isinstance(node.v_threshold, Tensor):
        raise TypeError("like() needs a threshold that is a number, got a tensor")
    arguments = {
        "threshold": node.v_threshold,
        "surrogate": node.surrogate_function,
        "step_mode": node.step_mode,
        "store_v_seq": node.store_v_seq,
        "v_reset": node.v_reset,
        "hard_reset": node.v_reset is not None,
    }
    dynamics = {
        "v_rest": node.v_reset or 0.0,
        "hard_reset": node.v_reset is not None,
        "detach_reset": node.detach_reset,
    }
    return arguments, dynamics


def _if(node: Any) -> dict[str, Any]:
    arguments, dynamics = _spikingjelly(node)
    return arguments | {"dynamics": Dynamics("leak", math.inf, **dynamics)}


def _lif(node: Any) -> dict[str, Any]:
    arguments, dynamics = _spikingjelly(node)
    return arguments | {"dynamics": Dynamics("relax" if node.decay_input else "leak", float(node.tau), **dynamics)}


def _plif(node: Any) -> dict[str, Any]:
    arguments, dynamics = _spikingjelly(node)
    charge = "average" if node.decay_input else "sum"
    decay = 1 - node.w.detach().double().sigmoid()
    if not 0 < decay < 1:
        raise TypeError(f"like() needs a membrane decay 1 - sigmoid(w) in (0, 1), got {float(decay):.3g}")
    return arguments | {
        "dynamics": Dynamics(charge, **dynamics), "beta_mem": float(decay), "learnable": _learned(beta_mem=node.w)
    }  # fmt: skip


def _snntorch(node: Any, resets_after_charge: bool, beta: Tensor) -> dict[str, Any]:
    """Return the arguments for ``mem = beta * mem + input`` with snnTorch's reset, by default one time step after the spike.

    With ``resets_after_charge``, a reset to zero then discards the input of its time step, too.
    """
    threshold = node.threshold
    if node.inhibition:
        raise TypeError("like() cannot match inhibition=True, in which neurons of a layer silence each other")
    if float(node.graded_spikes_factor) != 1:
        raise TypeError("like() cannot match graded_spikes_factor: its outputs are not zeros and ones")
    arguments: dict[str, Any] = {
        "threshold": _number(threshold),
        "surrogate": node.spike_grad,
        "step_mode": "s",
        "learnable": _learned(threshold=threshold, beta_mem=beta),
    }
    if node.state_quant:
        raise TypeError("like() cannot match state_quant: AssociativeLIFNode does not quantise its membrane potential")
    decay, dynamics = _membrane_decay(beta)
    arguments |= decay
    dynamics["detach_reset"] = True
    if node.reset_mechanism == "none":
        dynamics["reset_scale"] = 0.0
    elif node.reset_mechanism == "subtract":
        dynamics["reset_scale"] = _late_reset_scale(node, beta)
    elif resets_after_charge and getattr(node, "reset_delay", True):
        arguments |= {
            "refractory_steps": 1,
            "v_reset": 0.0,
        }  # the membrane potential is 0 at the next time step, whatever the input
    else:
        arguments |= {"hard_reset": True, "v_reset": 0.0}
        dynamics["hard_reset"] = True
    return arguments | {"dynamics": Dynamics(**dynamics)}


def _membrane_decay(beta: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments and the fields of :class:`Dynamics` for a membrane decay, which snnTorch clips to [0, 1].

    A decay of 0 or 1 has no finite logit, so it is passed as the constant ``tau = 1`` or ``tau = inf``.
    """
    decay = beta.detach().clamp(0, 1)
    if bool(((decay > 0) & (decay < 1)).all()):
        return {"beta_mem": _number(decay)}, {"charge": "sum"}
    if _learned(beta=beta) or decay.numel() != 1 or bool(decay.isnan()):
        raise TypeError(
            f"like() needs a membrane decay in (0, 1) where it is learned or differs between neurons, got {_range(beta)}"
        )
    return {}, {"charge": "leak", "tau": math.inf if decay else 1.0}


def _synaptic_decay(alpha: Tensor) -> Any:
    """Return ``beta_syn``; it may be 0 only if it is one number that is not learned, because 0 has no finite logit."""
    is_constant = alpha.numel() == 1 and not _learned(alpha=alpha)
    if not bool((((alpha > 0) & (alpha < 1)) | ((alpha <= 0) & is_constant)).all()):
        raise TypeError(
            "like() needs a synaptic decay alpha below 1, and above 0 where it is learned or differs between neurons, got "
            f"{_range(alpha)}"
        )
    return _number(alpha.detach().clamp(min=0))


def _range(x: Tensor) -> str:
    return f"{x.item():.3g}" if x.numel() == 1 else f"values from {x.min():.3g} to {x.max():.3g}"


def _late_reset_scale(node: Any, beta: Tensor) -> float:
    """Return the ``reset_scale`` 1 / beta: snnTorch subtracts the threshold one time step later, after the decay."""
    if not getattr(node, "reset_delay", True):  # Lapicque has no such option
        raise TypeError(
            "like() cannot match reset_delay=False with reset_mechanism='subtract': a membrane potential that is above the "
            "threshold after its reset is reset at other time steps; reset_mechanism='zero' can be matched"
        )
    if isinstance(beta, nn.Parameter) and beta.requires_grad:
        raise TypeError("like() cannot match a learnable beta with reset_mechanism='subtract'")
    if beta.numel() != 1 or not float(beta) > 0:
        raise TypeError("like() cannot match reset_mechanism='subtract' unless beta is one number above 0")
    return 1 / min(float(beta), 1.0)


def _leaky(node: Any) -> dict[str, Any]:
    return _snntorch(node, resets_after_charge=False, beta=node.beta)


def _lapicque(node: Any) -> dict[str, Any]:
    """Return arguments for the membrane potential times ``C / time_step``, to which the input is added unscaled."""
    scale, beta = float(node.time_step / node.C), 1 - node.time_step / (node.R * node.C)
    if not 0 <= beta <= 1:
        raise TypeError(f"like() needs a membrane decay 1 - time_step / (R * C) in [0, 1], got {float(beta):.3g}")
    arguments = _snntorch(node, resets_after_charge=True, beta=beta)
    return arguments | {
        "threshold": _number(node.threshold / scale),
        "surrogate": functools.partial(_scaled, node.spike_grad, scale),
        "learnable": _learned(threshold=node.threshold),
    }


def _scaled(surrogate: Callable[[Tensor], Tensor], scale: float, x: Tensor) -> Tensor:
    return surrogate(x * scale)


def _synaptic(node: Any) -> dict[str, Any]:
    learned = _learned(threshold=node.threshold, beta_mem=node.beta, beta_syn=node.alpha)
    return _snntorch(node, resets_after_charge=True, beta=node.beta) | {
        "beta_syn": _synaptic_decay(node.alpha),
        "learnable": learned,
    }


def _learned(**parameters: Tensor) -> tuple[str, ...]:
    """Return the names of the tensors that are parameters with a gradient."""
    return tuple(name for name, x in parameters.items() if isinstance(x, nn.Parameter) and x.requires_grad)


def _number(x: Tensor) -> Any:
    return x.item() if x.numel() == 1 else x.detach().clone()


_KNOWN: dict[tuple[str, str], Any] = {
    ("spikingjelly", "IFNode"): _if,
    ("spikingjelly", "LIFNode"): _lif,
    ("spikingjelly", "ParametricLIFNode"): _plif,
    ("snntorch", "Lapicque"): _lapicque,
    ("snntorch", "Leaky"): _leaky,
    ("snntorch", "Synaptic"): _synaptic,
}
