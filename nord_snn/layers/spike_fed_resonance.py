"""SpikeFedResonance: the resonance for an input of spikes, with a norm before every layer of neurons."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nord_snn.layers.cache import SequenceCache, UpdateCache, cache_argument
from nord_snn.layers.masking import visible_keys
from nord_snn.layers.resonance import ResonanceBase
from nord_snn.neurons import DenseActivation, NeuronFactory, fire_from_rest, make_neuron
from nord_snn.neurons.detection import emits_binary_spikes
from nord_snn.ops import pack_spikes
from nord_snn.ops.cached_resonance.packing import unpack_spikes
from nord_snn.ops.checks import check_channels, check_features, check_flags, check_numbers, describe

__all__ = ["SpikeFedResonance"]


class _BatchNormLast(nn.Module):
    """Apply a batch norm to the last dimension. It is a submodule, so ``SyncBatchNorm.convert_sync_batchnorm`` finds it."""

    def __init__(self, n_features: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(n_features, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).view(x.shape)


_NORMS = {"layer": nn.LayerNorm, "batch": _BatchNormLast}


class SpikeFedResonance(ResonanceBase):
    """Attend as :class:`CoFiringResonance` does, with linear maps that receive spikes only, as in a spiking transformer.

    For input spikes s, with the second form of v for ``spiking_values`` and of out for ``spikes_out``::

        q, k = lif_q(norm_q(W_q s)), lif_k(norm_k(W_k s));  v[t] = W_v s[t], or lif_v(norm_v(W_v s))[t]
        c[t] = softmax(temperature * coincidences - recency * distance) @ v[t]             over the selected keys
        out  = W_o lif_o(norm_o(c)), or lif_out(norm_out(W_o lif_o(norm_o(c))))

    The weights of the softmax are the same at all time steps, so they are computed once. Each time step has its own values,
    whereas :class:`CoFiringResonance` averages the values over time. If the values are spikes, mixing needs additions only.

    The norms scale the currents: a sum over few spikes is small, and a mean over many keys is smaller, so without norms the
    neurons would be nearly silent before training.

    Args:
        n_features: D.
        n_heads: H, the number of heads, a divisor of D.
        top_k: number of keys that each query selects. Among equal scores the highest position is selected, so for images
            ``top_k`` should be at least the number of positions.
        recency: lower the scores with distance, see :class:`CoFiringResonance`.
        causal: whether a query attends only to its own and earlier positions; False for images.
        neuron: factory of all neurons, see :mod:`nord_snn.neurons.factory`; None for ``AssociativeLIFNode``.
        backend: backend of the resonance, see :func:`nord_snn.ops.resonance`. Calls with a mask run in plain PyTorch.
        norm_eps: epsilon of the norms.
        spiking_values: whether values are spikes.
        spikes_out: whether the output is spikes, from a norm and neurons after W_o.
        norm: ``"layer"``, or ``"batch"`` as in Spikformer. In training, the statistics of a batch norm are over all positions,
            padding and later positions included.
        channels_first: whether input and output are ``[T, N, C, L]``, as in the attention of SpikingJelly's Spikformer.

    Attributes:
        query_neuron, key_neuron: the query and key neurons, ``lif_q`` and ``lif_k`` in the state dict.
        value_neuron: the neurons of spiking values or None, ``lif_v`` in the state dict.
        output_neuron: the neurons before W_o, ``lif_o`` in the state dict.
        final_neuron: the neurons after W_o or None, ``lif_out`` in the state dict.

    Shapes: spikes ``[T, B, S, D]`` (time steps, sequences, positions, features) -> currents or spikes ``[T, B, S, D]``; with
    ``channels_first`` ``[T, N, C, L]`` -> ``[T, N, C, L]``, where N is B, C is D and L is S. Every call starts from rest.

    Raises:
        ValueError: H does not divide D, the input has another rank or width, or ``norm`` is unknown.

    Warns:
        NeuronActivityWarning: the firing rate of queries or keys is below 0.1 % over the first ten calls in training mode;
            each layer warns once at most.

    Source: the resonance of the Nord spiking language model. Linear maps that receive spikes only are from this library; batch
    norm, channels first and spikes after W_o are as in Spikformer (Zhou et al. 2023).

    Example:
        >>> import torch
        >>> layer = SpikeFedResonance(64, n_heads=4)
        >>> spikes = (torch.rand(10, 2, 7, 64) < 0.1).float()
        >>> layer(spikes).shape
        torch.Size([10, 2, 7, 64])

        In place of Spikformer's attention:

        >>> from spikingjelly.activation_based.neuron import LIFNode
        >>> layer = SpikeFedResonance(64, 4, causal=False, neuron=lambda n: LIFNode(), spikes_out=True, norm="batch",
        ...                           channels_first=True)
        >>> layer(spikes.mT).unique().tolist()                         # [T, N, C, L] of 7 patches
        [0.0, 1.0]
    """

    remedy = (
        "lower the thresholds, those of AssociativeLIFNode with nord_snn.calibrate_thresholds(net, batch), or raise the "
        "weights of norm_q and norm_k"
    )

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
        *,
        spikes_out: bool = False,
        norm: str = "layer",
        channels_first: bool = False,
    ) -> None:
        if not isinstance(norm, str) or norm not in _NORMS:
            raise ValueError(f"norm must be one of {sorted(_NORMS)}, got {describe(norm)}")
        check_numbers(norm_eps=norm_eps)
        check_flags(spiking_values=spiking_values, spikes_out=spikes_out, channels_first=channels_first)
        super().__init__(n_features, n_heads, top_k, recency, causal, neuron, backend)
        self.channels_first = channels_first
        make_norm = _NORMS[norm]
        self.norm_q = make_norm(n_features, eps=norm_eps)
        self.norm_k = make_norm(n_features, eps=norm_eps)
        if spiking_values:
            self.norm_v = make_norm(n_features, eps=norm_eps)
            self.lif_v: nn.Module | None = make_neuron(neuron, n_features)
        else:
            self.lif_v = None
        self.norm_o = make_norm(n_features, eps=norm_eps)
        self.lif_o = make_neuron(neuron, n_features)
        if spikes_out:
            self.norm_out = make_norm(n_features, eps=norm_eps)
            self.lif_out: nn.Module | None = make_neuron(neuron, n_features)
        else:
            self.lif_out = None

    @property
    def value_neuron(self) -> nn.Module | None:
        """Return the neurons of spiking values, or None."""
        return self.lif_v

    @property
    def output_neuron(self) -> nn.Module:
        """Return the neurons before W_o."""
        return self.lif_o

    @property
    def final_neuron(self) -> nn.Module | None:
        """Return the neurons after W_o, or None."""
        return self.lif_out

    def forward(
        self,
        spikes: Tensor,
        *,
        mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: SequenceCache | None = None,
        **deprecated: Any,
    ) -> Tensor:
        """Return currents, or spikes, for ``spikes [T, B, S, D]`` or, with ``channels_first``, ``[T, N, C, L]``.

        The cache stores key spikes as bits, and the values of all time steps, ``[B, H, S, T * D/H]``, as bits if they are
        spikes.

        Args:
            spikes: the input; with earlier positions in ``cache``, only that of the new positions.
            mask: booleans ``[S, S]``, True where query a may attend to key b. Default: None, all keys.
            key_mask: booleans ``[B, S]``, True for keys to which queries may attend, False for padding. Default: None, all
                keys.
            cache: padding and earlier positions, see :class:`CoFiringResonance`.
            deprecated: deprecated fields of ``cache``, see :class:`CoFiringResonance`.

        With ``causal``, later keys are masked as well. The context of a query without a key is zero. Calls with a mask run in
        plain PyTorch with any ``backend``, with memory quadratic in S.

        Raises:
            TypeError: a mask is not boolean.
            ValueError: the input or a mask has another shape; there is both a mask and a cache; or the layer cannot take this
                cache, see :class:`CoFiringResonance`.
        """
        if self.channels_first:
            check_channels(spikes, self.n_features, type(self).__name__, "[T, N, C, L]")
            spikes = spikes.mT
        else:
            check_features(spikes, self.n_features, type(self).__name__, "[T, B, S, D]")
        cache = cache_argument(cache, deprecated)
        visible = visible_keys(mask, key_mask, spikes.shape[1], spikes.shape[2])
        q = fire_from_rest(self.query_neuron, self.norm_q(self.q_proj(spikes)))
        k = fire_from_rest(self.key_neuron, self.norm_k(self.k_proj(spikes)))
        v = self.v_proj(spikes)
        if self.value_neuron is not None:
            v = fire_from_rest(self.value_neuron, self.norm_v(v))
            if cache.update is not None and not isinstance(self.value_neuron, DenseActivation):
                cache = replace(cache, update=self._store_bits(cache.update, v))
        context = self.attend(q, k, self._fold_time_into_heads(v), cache, visible)
        current = self.norm_o(self._unfold_time(context, len(spikes)))
        out = self.o_proj(fire_from_rest(self.output_neuron, current))
        if self.final_neuron is not None:
            out = fire_from_rest(self.final_neuron, self.norm_out(out))
        return out.mT if self.channels_first else out

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

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{super().extra_repr()}, channels_first={self.channels_first}"
