"""The parameters of our neurons in the metadata of a node, from which the neurons are restored bit for bit."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nord_snn.integrations.nir.graphs import metadata_of
from nord_snn.integrations.nir.neurons import NIRNeurons
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.neurons.associative_lif import LEARNABLE
from nord_snn.ops import SURROGATES, Dynamics
from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.lif.reference import PUBLISHED

__all__ = ["array_of", "neurons_from_constants", "neurons_from_metadata", "parameters_of"]

log = logging.getLogger("nord_snn")


def parameters_of(node: AssociativeLIFNode) -> dict[str, Any]:
    """Return the metadata from which the importer restores the node: its parameters and what NIR nodes cannot express."""
    resets_to_value = node.refractory_steps > 0 or node.dynamics.hard_reset
    metadata: dict[str, Any] = {
        "part": "AssociativeLIFNode",
        "reset": "value" if resets_to_value else "subtract",
        "refractory_steps": node.refractory_steps,
        "alpha": node.alpha,
        "threshold": array_of(node.v_threshold),
        "learnable": ",".join(name for name in LEARNABLE if _is_learned(node, name)),
    }
    if node.channel_dim is not None:
        metadata["channel_dim"] = node.channel_dim
    if node.v_reset is not None:
        metadata["v_reset"] = node.v_reset
    for name in ("beta_mem_logit", "beta_syn_logit"):
        if getattr(node, name) is not None:
            metadata[name] = array_of(getattr(node, name))
    if node.dynamics != PUBLISHED:
        metadata |= node.dynamics._asdict()
    if isinstance(node, NIRNeurons):
        metadata["strict"] = node.strict
        if node.bias is not None:
            metadata["bias"] = array_of(node.bias)
    surrogate = node.surrogate_function
    metadata["surrogate"] = surrogate if isinstance(surrogate, str) else f"custom: {surrogate!r}"
    if node.cascade is not None:
        metadata |= {"cascade_weight": array_of(node.cascade.weight), "cascade_gain": array_of(node.cascade.gain)}
    return metadata


def neurons_from_metadata(name: str, metadata: dict[str, Any], dtype: torch.dtype) -> AssociativeLIFNode:
    """Return the neurons whose parameters are in ``metadata``."""
    dynamics = Dynamics(**{field: _plain(metadata[field]) for field in Dynamics._fields if field in metadata})
    mem, syn = (metadata.get(f"{beta}_logit") for beta in ("beta_mem", "beta_syn"))
    weight = metadata.get("cascade_weight")
    bias = metadata.get("bias")
    arguments: dict[str, Any] = {
        "preset": "nord",
        "n_clusters": None if weight is None else len(weight),
        "beta_mem": 0.5,
        "beta_syn": 0.0 if syn is None else 0.5,
        "own_decays": any(np.size(logit) > 1 for logit in (mem, syn) if logit is not None),
        "learnable": [name for name in str(metadata["learnable"]).split(",") if name],
        "v_reset": float(metadata["v_reset"]) if "v_reset" in metadata else None,
        "refractory_steps": int(metadata["refractory_steps"]),
        "surrogate": _surrogate(name, metadata),
        "alpha": float(metadata["alpha"]),
        "hard_reset": dynamics.hard_reset,
        "dynamics": dynamics,
        "channel_dim": int(metadata["channel_dim"]) if "channel_dim" in metadata else None,
        "step_mode": "m",
    }
    if "strict" in metadata:
        bias = None if bias is None else torch.from_numpy(bias)
        arguments |= {"strict": bool(metadata["strict"]), "bias": bias}
    kind: Any = NIRNeurons if "strict" in metadata else AssociativeLIFNode
    node = kind(len(metadata["threshold"]), **arguments).to(dtype)
    values = {"v_threshold": metadata["threshold"], "beta_mem_logit": mem, "beta_syn_logit": syn}
    with torch.no_grad():
        for field, value in values.items():
            if value is not None:
                getattr(node, field).copy_(torch.from_numpy(np.asarray(value)))
        if node.cascade is not None:
            node.cascade.weight.copy_(torch.from_numpy(weight))
            node.cascade.gain.copy_(torch.from_numpy(metadata["cascade_gain"]))
    return node


def neurons_from_constants(
    name: str, lif: Any, constants: tuple[Any, Any, Any], dt: float, dtype: torch.dtype
) -> AssociativeLIFNode:
    """Return the neurons of a graph that an earlier release of nord-snn exported, without parameters in its metadata.

    Args:
        name: name of the node, for messages.
        lif: the node.
        constants: ``tau_mem``, ``tau_syn`` and ``w_in``.
        dt: length of a time step in seconds.
        dtype: dtype of the parameters.
    """
    tau_mem, tau_syn, w_in = constants
    metadata = metadata_of(lif)
    beta_mem, beta_syn = (_decay(name, tau, kind, dt) for tau, kind in ((tau_mem, "tau_mem"), (tau_syn, "tau_syn")))
    # Increase of NIR's membrane potential per unit of input and per 1 - beta_mem; ours has 1.
    gain = np.asarray(w_in) * (1 - beta_syn) * lif.r
    if not (gain > 0).all() or not np.isfinite(lif.v_threshold).all() or np.ndim(lif.v_threshold) != 1:
        raise ValueError(f"'{name}' must have positive r and w_in, and a finite v_threshold with one dimension")
    weight = metadata.get("cascade_weight")
    node = AssociativeLIFNode(
        lif.v_threshold.size,
        None if weight is None else len(weight),
        beta_mem=beta_mem,
        beta_syn=beta_syn,
        v_reset=float(metadata.get("v_reset", -0.1)),
        refractory_steps=int(metadata.get("refractory_steps", 0)),
        surrogate=_surrogate(name, metadata),
        alpha=float(metadata.get("alpha", 4.0)),
        step_mode="m",
    ).to(dtype)
    with torch.no_grad():
        # Recompute in this precision: a logit rounded to float32 would change the decay.
        node.beta_mem_logit.fill_(float(np.log(beta_mem / (1 - beta_mem))))
        node.beta_syn_logit.fill_(float(np.log(beta_syn / (1 - beta_syn))))
        node.v_threshold.copy_(torch.from_numpy(np.asarray(lif.v_threshold / gain)))
        if node.cascade is not None:
            node.cascade.weight.copy_(torch.from_numpy(weight))
            node.cascade.gain.copy_(torch.from_numpy(metadata["cascade_gain"]))
    return node


def _decay(name: str, tau: Any, kind: str, dt: float) -> float:
    """Return the decay of a layer, which all its neurons must share."""
    values = np.unique(tau)
    if values.size != 1:
        raise ValueError(f"{kind} of '{name}' must be the same for all neurons of a layer")
    beta = 1 - dt / float(values[0])
    if not 0 < beta < 1:
        raise ValueError(f"{kind} of '{name}' must be finite and longer than a time step of {dt} s")
    return beta


def _surrogate(name: str, metadata: dict[str, Any]) -> str:
    surrogate = str(metadata.get("surrogate", "nord_atan"))
    if surrogate in SURROGATES:
        return surrogate
    log.warning("the surrogate of '%s' (%s) cannot be stored in a graph: nord_atan replaces it", name, surrogate)
    return "nord_atan"


def _plain(value: Any) -> Any:
    """Return a number or text of the metadata as a Python object."""
    return value.item() if isinstance(value, np.generic) else value


def _is_learned(node: AssociativeLIFNode, name: str) -> bool:
    parameter = node.v_threshold if name == "threshold" else getattr(node, f"{name}_logit")
    return parameter is not None and parameter.requires_grad


def array_of(x: Tensor) -> np.ndarray:
    """Return an array in float32, or in float64 for float64."""
    return x.detach().to("cpu", compute_dtype(x)).numpy().copy()
