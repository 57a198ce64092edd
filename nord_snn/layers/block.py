"""NordBlock: resonance between positions, then a spiking feed-forward layer, then LeakyClamp."""

from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.layers.cache import SequenceCache, cache_argument
from nord_snn.layers.feed_forward import SpikingFeedForward
from nord_snn.layers.leaky_clamp import LeakyClamp
from nord_snn.layers.resonance import CoFiringResonance
from nord_snn.neurons import NeuronFactory
from nord_snn.ops.checks import as_count, check_features, check_flags, check_numbers

__all__ = ["NordBlock"]


class NordBlock(nn.Module):
    """Run one block of the published Nord language model.

    ::

        x = x + g1 * resonance(norm1(x))
        x = x + g2 * ffn(norm2(x))
        x = leaky_clamp(x)

    g1 and g2 are learnable per channel.

    Args:
        n_features: D.
        n_heads: number of heads of the resonance, a divisor of D.
        hidden_features: hidden width of the feed-forward layer.
        top_k: number of keys that each query selects.
        recency: lower the scores with distance, see :class:`CoFiringResonance`.
        residual_scale: initial g1 and g2; the language model has 0.1 divided by the number of blocks.
        resonance: False omits the resonance and its norm: a control in which positions do not interact.
        clamp_floor: initial lower bound of :class:`LeakyClamp`.
        norm_eps: epsilon of both layer norms.
        neuron: factory of all neurons, see :mod:`nord_snn.neurons.factory`; None for ``AssociativeLIFNode``.

    Shapes: ``[T, B, S, D]`` -> ``[T, B, S, D]``: time steps, sequences, positions, features. Every call starts from rest.

    Raises:
        ValueError: ``n_heads`` does not divide D, or the input has another rank or width.

    Source: the Nord spiking language model.

    Example:
        >>> block = NordBlock(64, n_heads=4, hidden_features=128)
        >>> block(torch.randn(10, 2, 7, 64)).shape                    # 10 time steps, 2 sequences of 7 positions
        torch.Size([10, 2, 7, 64])

        With SpikingJelly's neurons:

        >>> from spikingjelly.activation_based.neuron import LIFNode
        >>> NordBlock(64, 4, 128, neuron=lambda n: LIFNode())(torch.randn(10, 2, 7, 64)).shape
        torch.Size([10, 2, 7, 64])
    """

    def __init__(
        self,
        n_features: int,
        n_heads: int,
        hidden_features: int,
        top_k: int = 64,
        recency: bool = False,
        residual_scale: float = 0.1,
        resonance: bool = True,
        clamp_floor: float = -0.1,
        norm_eps: float = 1e-5,
        neuron: NeuronFactory | None = None,
    ) -> None:
        super().__init__()
        as_count(n_features, "n_features")
        check_numbers(residual_scale=residual_scale, clamp_floor=clamp_floor, norm_eps=norm_eps)
        check_flags(resonance=resonance)
        self.n_features, self.residual_scale = n_features, residual_scale
        if resonance:
            self.norm1 = nn.LayerNorm(n_features, eps=norm_eps)
            self.resonance: CoFiringResonance | None = CoFiringResonance(
                n_features, n_heads, top_k, recency=recency, neuron=neuron
            )
            self.resonance_gain = nn.Parameter(torch.empty(n_features))
        else:
            self.resonance = None
        self.norm2 = nn.LayerNorm(n_features, eps=norm_eps)
        self.ffn = SpikingFeedForward(n_features, hidden_features, neuron=neuron)
        self.ffn_gain = nn.Parameter(torch.empty(n_features))
        self.clamp = LeakyClamp(n_features, floor=clamp_floor)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the two gains to their initial value, but not the submodules."""
        if self.resonance is not None:
            nn.init.constant_(self.resonance_gain, self.residual_scale)
        nn.init.constant_(self.ffn_gain, self.residual_scale)

    def forward(
        self,
        x: Tensor,
        *,
        cache: SequenceCache | None = None,
        **deprecated: Any,
    ) -> Tensor:
        """Return the output ``[T, B, S, D]`` for ``x [T, B, S, D]``; for ``cache`` see :class:`CoFiringResonance`."""
        check_features(x, self.n_features, type(self).__name__, "[T, B, S, D]")
        cache = cache_argument(cache, deprecated)
        if self.resonance is not None:
            context = self.resonance(self.norm1(x), expand=False, cache=cache)
            x = x + self.resonance_gain * context  # adds one context to all time steps
        return self.clamp(x, self.ffn(self.norm2(x)), self.ffn_gain)
