"""The associative cascade: firing clusters increase the synaptic current of other clusters at the next time step."""

import torch
from torch import Tensor

from nord_snn.ops.checks import as_count, check_tensor

__all__ = ["associative_cascade", "check_cascade", "check_clusters", "ring_weight"]


def check_clusters(n_features: int, n_clusters: int) -> None:
    """Raise unless both are whole numbers, and ``n_features`` a multiple of ``n_clusters``.

    Raises:
        TypeError: one is not a whole number.
        ValueError: C does not divide D, or one is less than 1.
    """
    as_count(n_features, "n_features")
    as_count(n_clusters, "n_clusters")
    if n_features % n_clusters:
        raise ValueError(
            f"the number of neurons D must be a multiple of the number of clusters C, got D = {n_features} and C = {n_clusters}: "
            "choose another n_clusters, or None for no cascade"
        )


def check_cascade(n_features: int, weight: Tensor, gain: Tensor, prefix: str = "", like: Tensor | None = None) -> None:
    """Raise unless the tensors are ``weight [C, C]`` and ``gain [C]``, and C divides ``n_features``.

    Args:
        n_features: D.
        weight: the weight.
        gain: the gain.
        prefix: what stands before the names "weight" and "gain" in messages.
        like: a tensor on the device that both must have. Default: None, any.

    Raises:
        TypeError: one is not a dense floating tensor.
        ValueError: a shape or device is wrong.
    """
    check_tensor(weight, f"{prefix}weight", "[C, C]", like=like)
    check_tensor(gain, f"{prefix}gain", "[C]", like=like)
    if gain.ndim != 1 or weight.shape != (gain.shape[0], gain.shape[0]) or not gain.shape[0]:
        raise ValueError(
            f"{prefix}weight must be [C, C] and {prefix}gain [C] with one C of at least 1, got {list(weight.shape)} and "
            f"{list(gain.shape)}"
        )
    if n_features % gain.shape[0]:
        raise ValueError(
            "the number of neurons D must be a multiple of the number of clusters C, got "
            f"D = {n_features} and C = {gain.shape[0]} in {prefix}weight and {prefix}gain"
        )


def ring_weight(n_clusters: int, radius: int) -> Tensor:
    """Return initial cluster weights before the sigmoid.

    The weight is ``1 - o / (radius + 1)`` at circular distance o = 1..radius, and 0 elsewhere.

    Args:
        n_clusters: number of clusters C.
        radius: number of neighbours on each side with a weight above 0; at least 0.

    Returns:
        ``[C, C]`` float32.

    Raises:
        TypeError: an argument is not a whole number.
        ValueError: ``n_clusters`` is less than 1, or ``radius`` is negative.

    Example:
        >>> ring_weight(5, radius=1)[0]
        tensor([0.0000, 0.5000, 0.0000, 0.0000, 0.5000])
    """
    as_count(n_clusters, "n_clusters")
    as_count(radius, "radius", 0)
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
        TypeError: an argument is not a dense floating tensor.
        ValueError: D is not a multiple of C, or the shapes of ``weight`` and ``gain`` have different C.

    Source: the associative cascade of the Nord spiking language model.

    Example:
        >>> spikes = torch.tensor([0.0, 1.0, 0.0, 1.0])     # D = 4 in C = 2 clusters: all of cluster 1 fires
        >>> associative_cascade(spikes, weight=torch.tensor([[0.0, 1.0], [0.5, 0.0]]), gain=torch.ones(2))
        tensor([1., 0., 1., 0.])
    """
    check_tensor(spikes, "spikes", "[*, D]")
    if not spikes.ndim:
        raise ValueError("spikes must be [*, D], got a tensor without dimensions")
    check_cascade(spikes.shape[-1], weight, gain, like=spikes)
    n_features, n_clusters = spikes.shape[-1], gain.shape[0]
    members = spikes.unflatten(-1, (n_features // n_clusters, n_clusters))
    dtype = torch.promote_types(spikes.dtype, weight.dtype)
    current = gain * (members.mean(-2).to(dtype) @ weight.to(dtype).T)
    return current.unsqueeze(-2).expand(members.shape).flatten(-2)
