"""SpikeFedBlock: a block whose linear maps receive spikes only."""

from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.layers.cache import SequenceCache, cache_argument
from nord_snn.layers.spike_fed_resonance import SpikeFedResonance
from nord_snn.neurons import NeuronFactory, fire_from_rest, make_neuron
from nord_snn.ops.checks import as_count, check_features, check_flags, check_numbers

__all__ = ["SpikeFedBlock", "SpikeFedResonance"]


class _LayerNormOfScale2(nn.LayerNorm):
    """Apply a layer norm whose weight starts at 2."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, 2.0)


class SpikeFedBlock(nn.Module):
    """Run one block with a layer of neurons before every linear map.

    ::

        x = x + g1 * resonance(lif1(norm1(x)))
        x = x + g2 * down(lif_h(norm_h(up(lif2(norm2(x))))))

    x is a current, a real number at each time step, and is not clamped. g1 and g2 are learnable per channel. A norm before
    every layer of neurons gives them currents of the same standard deviation at any width and depth. The weight of ``norm_h``
    starts at 2: starting at 1, training silences most hidden neurons.

    Args:
        n_features: D.
        n_heads: number of heads of the resonance, a divisor of D.
        hidden_features: hidden width of the feed-forward layer.
        top_k: number of keys that each query selects.
        recency: lower the scores with distance, see :class:`CoFiringResonance`.
        residual_scale: initial g1 and g2.
        resonance: False omits the resonance, its norm and its neurons: a control in which positions do not interact.
        norm_eps: epsilon of all layer norms.
        neuron: factory of all neurons, see :mod:`nord_snn.neurons.factory`; None for ``AssociativeLIFNode``.
        spiking_values: whether the values of the resonance are spikes.

    Attributes:
        attention_neuron: the neurons before the resonance or None, ``lif1`` in the state dict.
        ffn_neuron: the neurons before the feed-forward layer, ``lif2`` in the state dict.
        hidden_neuron: the hidden neurons of the feed-forward layer, ``lif_h`` in the state dict.

    Shapes: ``[T, B, S, D]`` -> ``[T, B, S, D]``: time steps, sequences, positions, features. Every call starts from rest.

    Raises:
        ValueError: ``n_heads`` does not divide D, or the input has another rank or width.

    Source: this library, from the parts of :class:`NordBlock`. Spike-driven transformers (Yao et al. 2023) have a residual
    stream of currents and spikes before every linear map; Spikformer (Zhou et al. 2023) has a norm before every neuron.

    Example:
        >>> block = SpikeFedBlock(64, n_heads=4, hidden_features=128)
        >>> block(torch.randn(10, 2, 7, 64)).shape                    # 10 time steps, 2 sequences of 7 positions
        torch.Size([10, 2, 7, 64])
    """

    def __init__(
        self,
        n_features: int,
        n_heads: int,
        hidden_features: int,
        top_k: int = 64,
        recency: bool = False,
        residual_scale: float = 0.5,
        resonance: bool = True,
        norm_eps: float = 1e-5,
        neuron: NeuronFactory | None = None,
        spiking_values: bool = False,
    ) -> None:
        super().__init__()
        as_count(n_features, "n_features")
        as_count(hidden_features, "hidden_features")
        check_numbers(residual_scale=residual_scale, norm_eps=norm_eps)
        check_flags(resonance=resonance, spiking_values=spiking_values)
        self.n_features, self.residual_scale = n_features, residual_scale
        if resonance:
            self.norm1 = nn.LayerNorm(n_features, eps=norm_eps)
            self.lif1 = make_neuron(neuron, n_features)
            self.resonance: SpikeFedResonance | None = SpikeFedResonance(
                n_features,
                n_heads,
                top_k,
                recency,
                neuron=neuron,
                norm_eps=norm_eps,
                spiking_values=spiking_values,
            )
            self.resonance_gain = nn.Parameter(torch.empty(n_features))
        else:
            self.resonance = None
        self.norm2 = nn.LayerNorm(n_features, eps=norm_eps)
        self.lif2 = make_neuron(neuron, n_features)
        self.up = nn.Linear(n_features, hidden_features, bias=False)
        self.norm_h = _LayerNormOfScale2(hidden_features, eps=norm_eps)
        self.lif_h = make_neuron(neuron, hidden_features)
        self.down = nn.Linear(hidden_features, n_features, bias=False)
        self.ffn_gain = nn.Parameter(torch.empty(n_features))
        self.reset_parameters()

    @property
    def attention_neuron(self) -> nn.Module | None:
        """Return the neurons before the resonance, or None without a resonance."""
        return None if self.resonance is None else self.lif1

    @property
    def ffn_neuron(self) -> nn.Module:
        """Return the neurons before the feed-forward layer."""
        return self.lif2

    @property
    def hidden_neuron(self) -> nn.Module:
        """Return the hidden neurons of the feed-forward layer."""
        return self.lif_h

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
            spikes = fire_from_rest(self.lif1, self.norm1(x))
            x = x + self.resonance_gain * self.resonance(spikes, cache=cache)
        hidden = self.norm_h(self.up(fire_from_rest(self.ffn_neuron, self.norm2(x))))
        return x + self.ffn_gain * self.down(fire_from_rest(self.hidden_neuron, hidden))
