"""SpikeFedBlock: a block in which the input of every linear map is spikes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.layers.cache import SequenceCache, UpdateCache, cache_argument
from nord_snn.layers.resonance import ResonanceBase
from nord_snn.neurons import DenseActivation, NeuronFactory, fire_from_rest, make_neuron
from nord_snn.neurons.detection import emits_binary_spikes
from nord_snn.ops import pack_spikes
from nord_snn.ops.cached_resonance.packing import unpack_spikes
from nord_snn.ops.checks import check_features

__all__ = ["SpikeFedBlock", "SpikeFedResonance"]


class SpikeFedResonance(ResonanceBase):
    """Apply resonance so that the input of every linear map is spikes.

    For input spikes s::

        q, k = lif_q(norm_q(W_q s)), lif_k(norm_k(W_k s));  v[t] = W_v s[t], or lif_v(norm_v(W_v s))[t]
        c[t] = softmax over the selected keys of (temperature * coincidences - recency * distance) @ v[t]
        out  = W_o lif_o(norm_o(c))

    The weights of the softmax are the same at all time steps, so they are computed once. Each time step has its own values,
    where :class:`CoFiringResonance` takes their mean. If the values spike, mixing positions needs additions only.

    The norms scale the currents: a sum over few spikes is small, and a mean over many keys is smaller, so without norms the
    neurons would be nearly silent before training.

    Args:
        n_features: D.
        n_heads: H; D must be a multiple of it.
        top_k: keys selected per query.
        recency: see :class:`CoFiringResonance`.
        causal: whether a query sees only its own and earlier positions.
        neuron: factory of all neurons, see :mod:`nord_snn.neurons.factory`; None for ``AssociativeLIFNode`` with its 64
            clusters.
        backend: backend of the op, see :func:`nord_snn.ops.resonance`.
        norm_eps: epsilon of the layer norms.
        spiking_values: whether values are spikes.

    Attributes:
        query_neuron, key_neuron: ``lif_q`` and ``lif_k`` in the state dict.
        value_neuron: the neurons of spiking values or None, ``lif_v`` in the state dict.
        output_neuron: the neurons before W_o, ``lif_o`` in the state dict.

    Shapes: spikes ``[T, B, S, D]`` -> currents ``[T, B, S, D]``; every call starts from rest.

    Raises:
        ValueError: H does not divide D, the input has another rank or width, or 64 does not divide a width and no ``neuron``
            is given.

    Source: the resonance of the Nord spiking language model; spikes at the input of all its linear maps: this library.

    Example:
        >>> layer = SpikeFedResonance(64, n_heads=4)
        >>> spikes = (torch.rand(10, 2, 7, 64) < 0.1).float()
        >>> layer(spikes).shape
        torch.Size([10, 2, 7, 64])
    """

    def __init__(
        self,
        n_features: int,
        n_heads: int,
        top_k: int = 64,
        recency: bool = False,
        causal: bool = True,
        neuron: NeuronFactory | None = None,
        backend: str = "auto",
        norm_eps: float = 1e-5,
        spiking_values: bool = False,
    ) -> None:
        super().__init__(n_features, n_heads, top_k, recency, causal, neuron, backend)
        self.norm_q = nn.LayerNorm(n_features, eps=norm_eps)
        self.norm_k = nn.LayerNorm(n_features, eps=norm_eps)
        if spiking_values:
            self.norm_v = nn.LayerNorm(n_features, eps=norm_eps)
            self.lif_v: nn.Module | None = make_neuron(neuron, n_features)
        else:
            self.lif_v = None
        self.norm_o = nn.LayerNorm(n_features, eps=norm_eps)
        self.lif_o = make_neuron(neuron, n_features)

    @property
    def value_neuron(self) -> nn.Module | None:
        """Return the neurons of spiking values, or None."""
        return self.lif_v

    @property
    def output_neuron(self) -> nn.Module:
        """Return the neurons before W_o."""
        return self.lif_o

    def forward(
        self,
        spikes: Tensor,
        *,
        cache: SequenceCache | None = None,
        **deprecated: Any,
    ) -> Tensor:
        """Return currents for ``spikes [T, B, S, D]``; for ``cache`` see :class:`CoFiringResonance`.

        The cache stores key spikes as bits and the values of all time steps, ``[B, H, S, T * D/H]``, as bits if they spike.
        """
        check_features(spikes, self.n_features, type(self).__name__, "[T, B, S, D]")
        cache = cache_argument(cache, deprecated)
        q = fire_from_rest(self.query_neuron, self.norm_q(self.q_proj(spikes)))
        k = fire_from_rest(self.key_neuron, self.norm_k(self.k_proj(spikes)))
        v = self.v_proj(spikes)
        if self.value_neuron is not None:
            v = fire_from_rest(self.value_neuron, self.norm_v(v))
            if cache.update is not None and not isinstance(self.value_neuron, DenseActivation):
                cache = replace(cache, update=self._store_bits(cache.update, v))
        context = self.attend(q, k, self._fold_time_into_heads(v), cache)
        current = self.norm_o(self._unfold_time(context, len(spikes)))
        return self.o_proj(fire_from_rest(self.output_neuron, current))

    def _store_bits(self, update: UpdateCache, v: Tensor) -> UpdateCache:
        """Return an update that stores values as bits, for values that are spikes ``[T, B, S, D]``."""
        assert self.lif_v is not None
        bits = pack_spikes(v, self.n_heads, trusted=emits_binary_spikes(self.lif_v))

        def update_bits(keys: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = update(keys, bits)
            return keys, unpack_spikes(values, len(v), self.n_features // self.n_heads).to(v.dtype)

        return update_bits

    def _fold_time_into_heads(self, v: Tensor) -> Tensor:
        """Return ``[T, B, S, D]`` as ``[B, S, H * T * D/H]``, so that all time steps are mixed by one product."""
        return v.unflatten(-1, (self.n_heads, -1)).permute(1, 2, 3, 0, 4).flatten(2)

    def _unfold_time(self, wide: Tensor, time_steps: int) -> Tensor:
        """Invert :meth:`_fold_time_into_heads`."""
        return wide.unflatten(-1, (self.n_heads, time_steps, -1)).permute(3, 0, 1, 2, 4).flatten(3)


class _StrongNorm(nn.LayerNorm):
    """Normalise as a layer norm does, with an initial scale of 2."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, 2.0)


class SpikeFedBlock(nn.Module):
    """Run one block with a layer of neurons before every linear map.

    ::

        x = x + g1 * resonance(lif1(norm1(x)))
        x = x + g2 * down(lif_h(norm_h(up(lif2(norm2(x))))))

    x is a current, a real number at each time step, and is not clamped. g1 and g2 are learnable per channel. A norm before
    every layer of neurons gives them currents of the same size at any width and depth. The scale of the hidden neurons'
    norm starts at 2: with 1, training silences most of these neurons.

    Args:
        n_features: D.
        n_heads: number of heads of the resonance.
        hidden_features: hidden width of the feed-forward.
        top_k: keys selected per query.
        recency: see :class:`CoFiringResonance`.
        residual_scale: initial g1 and g2.
        resonance: False omits the resonance, its norm and its neurons: a control in which positions do not interact.
        norm_eps: epsilon of all layer norms.
        neuron: factory of all neurons, see :mod:`nord_snn.neurons.factory`; None for
            ``AssociativeLIFNode`` with its 64 clusters.
        spiking_values: see :class:`SpikeFedResonance`.

    Attributes:
        attention_neuron: the neurons before the resonance or None, ``lif1`` in the state dict.
        ffn_neuron: the neurons before the feed-forward, ``lif2`` in the state dict.
        hidden_neuron: the hidden neurons of the feed-forward, ``lif_h`` in the state dict.

    Shapes: ``[T, B, S, D]`` -> ``[T, B, S, D]``; every call starts from rest.

    Raises:
        ValueError: H does not divide D, the input has another rank or width, or 64 does not divide a width and no ``neuron``
            is given.

    Source: this library, from the parts of the Nord block. A residual stream of currents and spikes before every linear map
    are from spike-driven transformers (Yao et al. 2023), a norm before every neuron from Spikformer (Zhou et al. 2023).

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
        self.norm_h = _StrongNorm(hidden_features, eps=norm_eps)
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
        """Return the neurons before the feed-forward."""
        return self.lif2

    @property
    def hidden_neuron(self) -> nn.Module:
        """Return the hidden neurons of the feed-forward."""
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
