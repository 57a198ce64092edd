"""Ops, pure functions on tensors: the state is an argument and a result, and nothing is stored between calls."""

from torch import Tensor

from nord_snn.ops.cached_resonance.op import resonance_cached
from nord_snn.ops.cached_resonance.packing import pack_spikes
from nord_snn.ops.cascade import associative_cascade
from nord_snn.ops.checks import as_count, check_tensor, describe
from nord_snn.ops.clamp.op import leaky_clamp
from nord_snn.ops.costs import OpCost
from nord_snn.ops.dispatch import OPS, BackendChoice, CallSignature, choose_backend
from nord_snn.ops.lif.op import associative_lif, associative_lif_backend
from nord_snn.ops.lif.reference import AssociativeLIFState, Dynamics
from nord_snn.ops.plasticity.correlation import ConvGeometry
from nord_snn.ops.plasticity.op import reward_modulated_stdp, stdp, triplet_stdp
from nord_snn.ops.plasticity.reference import RewardSTDPState, STDPState, TripletState, reward_from_loss
from nord_snn.ops.renamed import keep_old_path
from nord_snn.ops.surrogate import SURROGATES, SurrogateLike, resolve_surrogate, spike
from nord_snn.ops.topk_resonance.op import resonance

__all__ = [
    "SURROGATES",
    "AssociativeLIFState",
    "BackendChoice",
    "ConvGeometry",
    "Dynamics",
    "OpCost",
    "RewardSTDPState",
    "STDPState",
    "TripletState",
    "associative_cascade",
    "associative_lif",
    "leaky_clamp",
    "pack_spikes",
    "resonance",
    "resonance_cached",
    "reward_from_loss",
    "reward_modulated_stdp",
    "spike",
    "stdp",
    "triplet_stdp",
    "which_backend",
]

keep_old_path()


def which_backend(
    x: Tensor,
    backend: str = "auto",
    surrogate: SurrogateLike = "nord_atan",
    n_clusters: int | None = None,
    *,
    op: str = "associative_lif",
) -> BackendChoice:
    """Return the backend that an op would choose for this input, and for each other backend why it was not chosen.

    Args:
        x: an input of the op (for the resonances, the values). Only its device, dtype and last dimension are used.
        backend: as passed to the op.
        surrogate: as passed to :func:`associative_lif`; ignored by other ops.
        n_clusters: number of clusters of the cascade of :func:`associative_lif`, None for no cascade; ignored by other ops.
        op: name of the op: ``"associative_lif"``, ``"resonance"``, ``"resonance_cached"``, ``"leaky_clamp"``,
            ``"stdp"``.

    Raises:
        TypeError: an argument has another type.
        ValueError: the op, the surrogate or the backend is unknown.
        RuntimeError: the requested backend cannot run this input.

    Example:
        >>> import torch
        >>> which_backend(torch.zeros(4, 1, 8), backend="torch").name
        'torch'
        >>> which_backend(torch.zeros(4, 1, 8), backend="torch", op="resonance").name
        'torch'
    """
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"unknown op {describe(op)}: expected one of {sorted(OPS)}")
    check_tensor(x, "x", "[*, D]", kind="real")
    if not x.ndim:
        raise ValueError("x must be [*, D], got a tensor without dimensions")
    resolve_surrogate(surrogate, 1.0)
    if n_clusters is not None:
        as_count(n_clusters, "n_clusters")
    if op == "associative_lif":
        return associative_lif_backend(x, backend, surrogate, n_clusters)
    return choose_backend(op, OPS[op], backend, CallSignature(x.device.type, x.dtype, x.shape[-1]))
