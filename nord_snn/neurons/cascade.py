"""The associative cascade as a module: learnable coupling between clusters of neurons."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from nord_snn.ops.cascade import associative_cascade, check_clusters, ring_weight
from nord_snn.ops.checks import as_count, check_features, check_numbers

__all__ = ["AssociativeCascade", "LazyAssociativeCascade", "largest_clusters"]


def largest_clusters(n_features: int, most: int = 64) -> int:
    """Return the largest number of clusters up to ``most`` that divides the number of neurons."""
    return max(c for c in range(1, min(most, n_features) + 1) if n_features % c == 0)


class AssociativeCascade(nn.Module):
    r"""Raise the synaptic current of clusters associated with those that fire.

    ``current[d] = gain[c] * sum_k sigmoid(weight[c, k]) * f[k]`` with ``c = d mod C`` and ``f[k]`` the fraction of cluster
    ``k`` that fires. ``weight [C, C]`` starts as a ring (nearest clusters strongest), ``gain [C]`` at 0.8; both are learnable.

    Args:
        n_features: D, a multiple of C.
        n_clusters: C.
        radius: range of the ring, in neighbouring clusters on each side.
        gain: initial gain of every cluster.

    Shapes: spikes ``[*, D]`` -> current ``[*, D]``.

    Raises:
        TypeError: an argument has another type.
        ValueError: D is not a multiple of C, a constant is out of its range, or the input's last dimension is not D.

    Source: the Nord spiking language model.

    Example:
        >>> cascade = AssociativeCascade(8, n_clusters=4)
        >>> spikes = torch.zeros(1, 8); spikes[0, 0] = 1.0            # one of the two neurons of cluster 0 fires
        >>> (cascade(spikes) > 0).all().item()
        True
    """

    def __init__(self, n_features: int, n_clusters: int = 64, radius: int = 3, gain: float = 0.8) -> None:
        super().__init__()
        check_clusters(n_features, n_clusters)
        as_count(radius, "radius", 0)
        check_numbers(gain=gain)
        self.n_features, self.n_clusters, self.radius = n_features, n_clusters, radius
        self._initial_gain = gain
        self.weight = nn.Parameter(torch.empty(n_clusters, n_clusters))
        self.gain = nn.Parameter(torch.empty(n_clusters))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weight to the ring, and the initial gain."""
        self.weight.copy_(ring_weight(self.n_clusters, self.radius))
        nn.init.constant_(self.gain, self._initial_gain)

    def forward(self, spikes: Tensor | None, dtype: torch.dtype | None = None) -> Any:
        """Return the current that ``spikes [*, D]`` cause; for None, weight and gain as the op takes them.

        Neurons call the cascade for its parameters instead of reading them, so that hooks of a call, such as those that load
        offloaded parameters, work. The weight is cast to ``dtype`` before the sigmoid: half precision would round it.
        """
        if spikes is None:
            return self.weight.to(dtype).sigmoid(), self.gain
        check_features(spikes, self.n_features, type(self).__name__, "[*, D]")
        return associative_cascade(spikes, self.weight.sigmoid(), self.gain)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"n_features={self.n_features}, n_clusters={self.n_clusters}, radius={self.radius}"


class LazyAssociativeCascade(LazyModuleMixin, AssociativeCascade):
    """An :class:`AssociativeCascade` whose number of clusters follows from the width, which is found at the first call."""

    cls_to_become = AssociativeCascade
    weight: Any
    gain: Any

    def __init__(self, radius: int = 3, gain: float = 0.8) -> None:
        super().__init__(1, 1, radius, gain)
        self.n_features = self.n_clusters = 0
        self.weight, self.gain = UninitializedParameter(), UninitializedParameter()

    def reset_parameters(self) -> None:
        """Set the ring and the initial gain, if the width is known."""
        if not self.has_uninitialized_params() and self.n_clusters:
            super().reset_parameters()

    def initialize_parameters(self, n_features: int) -> None:
        """Make the parameters for this width, or check those that were loaded."""
        loaded = not is_lazy(self.gain)
        self.n_features = n_features
        self.n_clusters = len(self.gain) if loaded else largest_clusters(n_features)
        check_clusters(n_features, self.n_clusters)
        if not loaded:
            self.weight.materialize((self.n_clusters, self.n_clusters))
            self.gain.materialize((self.n_clusters,))
            self.reset_parameters()
