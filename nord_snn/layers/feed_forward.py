"""SpikingFeedForward: two linear maps, each followed by neurons."""

from torch import Tensor, nn

from nord_snn.neurons import NeuronFactory, fire_from_rest, make_neuron
from nord_snn.ops.checks import as_count, check_features

__all__ = ["SpikingFeedForward"]


class SpikingFeedForward(nn.Module):
    """Run two linear maps without biases, each followed by neurons: ``lif2(down(lif1(up(x))))``.

    STDP can train ``down``: its inputs are spikes, and ``lif2`` turns its outputs into spikes.

    Args:
        n_features: D.
        hidden_features: width between the two maps.
        neuron: factory of both layers of neurons, see :mod:`nord_snn.neurons.factory`; None for ``AssociativeLIFNode``.

    Attributes:
        hidden_neuron: the neurons between the two maps, ``lif1`` in the state dict.
        output_neuron: the neurons of the output, ``lif2`` in the state dict.

    Shapes: ``[T, N, *, D]`` -> spikes ``[T, N, *, D]``: time steps, rows, any dimensions, features. Every call starts from rest.

    Raises:
        ValueError: the input has another rank or width.

    Source: the Nord spiking language model.

    Example:
        >>> import torch
        >>> ffn = SpikingFeedForward(64, 128)
        >>> ffn(torch.randn(10, 4, 64)).unique().tolist()
        [0.0, 1.0]

        With SpikingJelly's neurons:

        >>> from spikingjelly.activation_based.neuron import LIFNode
        >>> SpikingFeedForward(64, 128, neuron=lambda n: LIFNode())(torch.randn(10, 4, 64)).shape
        torch.Size([10, 4, 64])
    """

    def __init__(self, n_features: int, hidden_features: int, neuron: NeuronFactory | None = None) -> None:
        super().__init__()
        as_count(n_features, "n_features")
        as_count(hidden_features, "hidden_features")
        self.n_features = n_features
        self.up = nn.Linear(n_features, hidden_features, bias=False)
        self.lif1 = make_neuron(neuron, hidden_features)
        self.down = nn.Linear(hidden_features, n_features, bias=False)
        self.lif2 = make_neuron(neuron, n_features)

    @property
    def hidden_neuron(self) -> nn.Module:
        """Return the neurons between the two maps."""
        return self.lif1

    @property
    def output_neuron(self) -> nn.Module:
        """Return the neurons of the output."""
        return self.lif2

    def forward(self, x: Tensor) -> Tensor:
        """Return the spikes for ``x [T, N, *, D]``."""
        check_features(x, self.n_features, type(self).__name__, "[T, N, *, D]")
        hidden = fire_from_rest(self.hidden_neuron, self.up(x))
        return fire_from_rest(self.output_neuron, self.down(hidden))
