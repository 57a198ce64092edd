"""The mathematics as pure functions on tensors: explicit state in and out, no modules, nothing kept."""

from torch import Tensor

from nord_snn.ops.associative_lif import AssociativeLIFState, associative_lif, associative_lif_backend
from nord_snn.ops.cascade import associative_cascade
from nord_snn.ops.dispatch import BackendChoice
from nord_snn.ops.leaky_clamp import leaky_clamp
from nord_snn.ops.resonance import pack_spikes, resonance, resonance_cached
from nord_snn.ops.stdp import (
    ConvGeometry,
    RewardSTDPState,
    STDPState,
    TripletState,
    reward_from_loss,
    reward_modulated_stdp,
    stdp,
    triplet_stdp,
)
from nord_snn.ops.surrogate import SURROGATES, SurrogateLike, spike

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
    x_seq: Tensor, backend: str = "auto", surrogate: SurrogateLike = "nord_atan", n_clusters: int | None = None
) -> BackendChoice:
    """What :func:`associative_lif` would run on this input, and why not the others.

    Args:
        x_seq: an input ``[T, N, D]``; only its device, dtype and D matter.
        backend: as given to the op.
        surrogate: as given to the op.
        n_clusters: C of the cascade, or None.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: the backend asked for cannot run this input.

    Example:
        >>> import torch
        >>> which_backend(torch.zeros(4, 1, 8), backend="torch").name
        'torch'
    """
    return associative_lif_backend(x_seq, backend, surrogate, n_clusters)
