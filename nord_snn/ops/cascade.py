"""The associative cascade: firing clusters increase the synaptic current of other clusters at the next time step."""

import torch
from torch import Tensor

__all__ = ["associative_cascade", "check_cascade", "check_clusters", "ring_weight"]


def check_clusters(n_features: int, n_clusters: int) -> None:
    """Raise a ValueError unless ``n_features`` is a multiple of ``n_clusters``."""
    if n_clusters < 1 or n_features % n_clusters:
        raise ValueError(
            f"the number of neurons D must be a multiple of the number of clusters C, got D = {n_features} and C = {n_clusters}: "
            "choose another n_clusters, or None for no cascade"
        )


def check_cascade(n_features: int, weight: Tensor, gain: Tensor) -> None:
    """Raise a ValueError unless the shapes are ``weight [C, C]`` and ``gain [C]``, and C divides ``n_features``."""
    if gain.ndim != 1 or weight.shape != (gain.shape[0], gain.shape[0]):
        raise ValueError(
            f"cascade weight must be [C, C] and gain [C] with the same C, got {list(weight.shape)} and {list(gain.shape)}"
        )
    check_clusters(n_features, gain.shape[0])


def ring_weight(n_clusters: int, radius: int) -> Tensor:
    """Return initial cluster weights before the sigmoid.

    The weight is ``1 - o / (radius + 1)`` at circular distance o = 1..radius, and 0 elsewhere.

    Args:
        n_clusters: number of clusters C.
        radius: number of neighbours on each side with a weight above 0; at least 0.

    Returns:
        ``[C, C]`` float32.

    Raises:
        ValueError: ``radius`` is negative.

    Example:
        >>> ring_weight(5, radius=1)[0]
        tensor([0.0000, 0.5000, 0.0000, 0.0000, 0.5000])
    """
    if radius < 0:
        raise ValueError(f"the cascade radius must not be negative, got {radius}")
    position = torch.arange(n_clusters)
    distance = (position[:, None] - position[None, :]).abs()
    distance = torch.minimum(distance, n_clusters - distance)
    is_neighbour = (distance >= 1) & (distance <= radius)
    return torch.where(is_neighbour, 1 - distance / (radius + 1), 0.0)


def associative_cascade(spikes: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    """Return the current that every neuron receives from the firing clusters.

    Neuron ``d`` belongs to cluster ``d mod C``. With ``f[k]`` the fraction of cluster ``k`` that fires, each neuron of
    cluster ``c`` receives ``gain[c] * sum_k weight[c, k] * f[k]``.

    Args:
        spikes: ``[*, D]``.
        weight: ``[C, C]``, after the sigmoid.
        gain: ``[C]``.

    Returns:
        ``[*, D]``, to be added to the synaptic current of the next time step.

    Raises:
        ValueError: D is not a multiple of C, or the shapes of ``weight`` and ``gain`` have different C.

    Source: the associative cascade of the Nord spiking language model.

    Example:
        >>> spikes = torch.tensor([0.0, 1.0, 0.0, 1.0])     # D = 4 in C = 2 clusters: all of cluster 1 fires
        >>> associative_cascade(spikes, weight=torch.tensor([[0.0, 1.0], [0.5, 0.0]]), gain=torch.ones(2))
        tensor([1., 0., 1., 0.])
    """
    check_cascade(spikes.shape[-1], weight, gain)
    n_features, n_clusters = spikes.shape[-1], gain.shape[0]
    members = spikes.unflatten(-1, (n_features // n_clusters, n_clusters))
    current = gain * (members.mean(-2) @ weight.T)
    return current.unsqueeze(-2).expand(members.shape).flatten(-2)
