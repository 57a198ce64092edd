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
    """Return the largest number of clusters, at most ``most``, that divides the number of neurons ``n_features``."""
    return max(c for c in range(1, min(most, n_features) + 1) if n_features % c == 0)


class AssociativeCascade(nn.Module):
    r"""Return the synaptic current that firing clusters of neurons send to all clusters.

    Neuron d is in cluster ``c = d mod C`` and receives ``gain[c] * sum_k sigmoid(weight[c, k]) * f[k]``, with ``f[k]`` the
    fraction of the neurons of cluster k that fire. ``weight [C, C]`` is initially largest between neighbours on a ring of
    clusters, see :func:`nord_snn.ops.cascade.ring_weight`. ``weight`` and ``gain [C]`` are learnable.

    Args:
        n_features: D, the number of neurons, a multiple of C.
        n_clusters: C, the number of clusters.
        radius: number of neighbours on each side with an initial weight above 0.
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
        """Set weight and gain to their initial values."""
        self.weight.copy_(ring_weight(self.n_clusters, self.radius))
        nn.init.constant_(self.gain, self._initial_gain)

    def forward(self, spikes: Tensor | None, dtype: torch.dtype | None = None) -> Any:
        """Return the current ``[*, D]`` that ``spikes [*, D]`` cause, or, without spikes, ``(sigmoid(weight), gain)``.

        Neurons call the cascade for its parameters instead of reading its attributes, so that forward hooks work, such as those
        that load offloaded parameters. Then the weight is cast to ``dtype`` before the sigmoid: half precision would round it.
        """
        if spikes is None:
            return self.weight.to(dtype).sigmoid(), self.gain
        check_features(spikes, self.n_features, type(self).__name__, "[*, D]")
        return associative_cascade(spikes, self.weight.sigmoid(), self.gain)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"n_features={self.n_features}, n_clusters={self.n_clusters}, radius={self.radius}"


class LazyAssociativeCascade(LazyModuleMixin, AssociativeCascade):
    """An :class:`AssociativeCascade` of the width of the first input, with its largest divisor up to 64 as C."""

    cls_to_become = AssociativeCascade
    weight: Any
    gain: Any

    def __init__(self, radius: int = 3, gain: float = 0.8) -> None:
        super().__init__(1, 1, radius, gain)
        self.n_features = self.n_clusters = 0
        self.weight, self.gain = UninitializedParameter(), UninitializedParameter()

    def reset_parameters(self) -> None:
        """Set weight and gain to their initial values, if the width is known."""
        if not self.has_uninitialized_params() and self.n_clusters:
            super().reset_parameters()

    def initialize_parameters(self, n_features: int) -> None:
        """Create the parameters for this width, or check those that were loaded from a state dict."""
        loaded = not is_lazy(self.gain)
        self.n_features = n_features
        self.n_clusters = len(self.gain) if loaded else largest_clusters(n_features)
        check_clusters(n_features, self.n_clusters)
        if not loaded:
            self.weight.materialize((self.n_clusters, self.n_clusters))
            self.gain.materialize((self.n_clusters,))
            self.reset_parameters()
