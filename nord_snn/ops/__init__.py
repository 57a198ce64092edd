"""The mathematics as pure functions on tensors: explicit state in and out, no modules, nothing kept."""

from torch import Tensor

from nord_snn.ops.cached_resonance.op import resonance_cached
from nord_snn.ops.cached_resonance.packing import pack_spikes
from nord_snn.ops.cascade import associative_cascade
from nord_snn.ops.clamp.op import leaky_clamp
from nord_snn.ops.dispatch import OPS, BackendChoice, Call, choose_backend
from nord_snn.ops.lif.op import associative_lif, associative_lif_backend
from nord_snn.ops.lif.reference import AssociativeLIFState
from nord_snn.ops.plasticity.correlation import ConvGeometry
from nord_snn.ops.plasticity.op import reward_modulated_stdp, stdp, triplet_stdp
from nord_snn.ops.plasticity.reference import RewardSTDPState, STDPState, TripletState, reward_from_loss
from nord_snn.ops.surrogate import SURROGATES, SurrogateLike, spike
from nord_snn.ops.topk_resonance.op import resonance

__all__ = [
    "SURROGATES",
    "AssociativeLIFState",
    "BackendChoice",
    "ConvGeometry",
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


def which_backend(
    x: Tensor,
    backend: str = "auto",
    surrogate: SurrogateLike = "nord_atan",
    n_clusters: int | None = None,
    *,
    op: str = "associative_lif",
) -> BackendChoice:
    """Return what an op would run on this input, and why not the others.

    Args:
        x: an input of the op, for the resonances the values; only its device, dtype and last dimension matter.
        backend: as given to the op.
        surrogate: as given to :func:`associative_lif`; other ops have none.
        n_clusters: C of its cascade, or None.
        op: name of the op: ``"associative_lif"``, ``"resonance"``, ``"resonance_cached"``, ``"leaky_clamp"``, ``"stdp"``.

    Raises:
        ValueError: the op or the backend is unknown.
        RuntimeError: the backend asked for cannot run this input.

    Example:
        >>> import torch
        >>> which_backend(torch.zeros(4, 1, 8), backend="torch").name
        'torch'
        >>> which_backend(torch.zeros(4, 1, 8), backend="torch", op="resonance").name
        'torch'
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}: expected one of {sorted(OPS)}")
    if op == "associative_lif":
        return associative_lif_backend(x, backend, surrogate, n_clusters)
    return choose_backend(op, OPS[op], backend, Call(x.device.type, x.dtype, x.shape[-1]))
