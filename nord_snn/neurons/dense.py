"""DenseActivation: GELU in place of neurons, for a dense twin (a copy of a spiking network without spikes)."""

from torch import Tensor, nn

from nord_snn.ops.checks import as_count

__all__ = ["DenseActivation"]


class DenseActivation(nn.Module):
    """Apply GELU through the interface of a layer of neurons, for a dense twin that differs by its activation only.

    ``y[t] = gelu(x[t])``, without state and parameters. Use it with T = 1: a real-valued activation needs no time steps.

    Args:
        n_features: width, which layers pass to every neuron factory; it is stored, but has no effect.

    Attributes:
        store_v_seq: whether to store the input as ``v_seq``, for layers that read membrane potentials.

    Shapes: ``[T, N, *, D]`` -> ``[T, N, *, D]``.

    Source: GELU is from Hendrycks and Gimpel 2016.

    Example:
        >>> import torch
        >>> from nord_snn.layers import SpikingFeedForward
        >>> dense = SpikingFeedForward(64, 128, neuron=DenseActivation)
        >>> dense(torch.randn(1, 4, 64)).unique().numel() > 2
        True
    """

    def __init__(self, n_features: int | None = None) -> None:
        super().__init__()
        if n_features is not None:
            as_count(n_features, "n_features")
        self.n_features = n_features
        self.store_v_seq = False
        self.v_seq: Tensor | None = None

    def forward(self, x_seq: Tensor) -> Tensor:
        """Return ``gelu(x_seq)``."""
        if self.store_v_seq:
            self.v_seq = x_seq
        return nn.functional.gelu(x_seq)
