"""SmoothActivation: what stands in the place of neurons in a network without spikes, the control."""

from torch import Tensor, nn

__all__ = ["SmoothActivation"]


class SmoothActivation(nn.Module):
    """GELU under the interface of a layer of neurons: the control in which only the spikes are missing.

    ``y[t] = gelu(x[t])``; it has no state and no parameters. Meant for one time step: a number says in one what spikes
    need several for.

    Args:
        n_features: width; not needed, but a factory is called with it.

    Attributes:
        store_v_seq: whether to keep the input as ``v_seq``, for layers that read membranes.

    Shapes: ``[T, N, *, D]`` -> ``[T, N, *, D]``.

    Source: GELU after Hendrycks and Gimpel 2016.

    Example:
        >>> import torch
        >>> from nord_snn.layers import SpikingFeedForward
        >>> dense = SpikingFeedForward(64, 128, neuron=SmoothActivation)
        >>> dense(torch.randn(1, 4, 64)).unique().numel() > 2
        True
    """

    def __init__(self, n_features: int | None = None) -> None:
        super().__init__()
        self.n_features = n_features
        self.store_v_seq = False
        self.v_seq: Tensor | None = None

    def forward(self, x_seq: Tensor) -> Tensor:
        """Activations of currents."""
        if self.store_v_seq:
            self.v_seq = x_seq
        return nn.functional.gelu(x_seq)
