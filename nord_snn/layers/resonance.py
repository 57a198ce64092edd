"""CoFiringResonance: attention whose scores count coincident spikes."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.layers.cache import SequenceCache, cache_argument
from nord_snn.layers.masking import masked_resonance
from nord_snn.neurons import DenseActivation, NeuronFactory, fire_from_rest, make_neuron
from nord_snn.neurons.activity import FirstBatches, NeuronActivityWarning
from nord_snn.neurons.detection import emits_binary_spikes
from nord_snn.ops import pack_spikes, resonance, resonance_cached
from nord_snn.ops.cached_resonance.packing import check_spikes
from nord_snn.ops.checks import as_count, check_features, check_flags, check_heads
from nord_snn.ops.dispatch import check_backend

__all__ = ["CoFiringResonance", "ResonanceBase"]

#: A layer warns if queries or keys fire at a rate below ``SILENT`` over its first ``BATCHES`` calls in training mode.
BATCHES, SILENT = 10, 1e-3


class ResonanceBase(nn.Module):
    """Base class of the resonance layers: linear maps, query and key neurons, and the resonance of their spikes.

    The arguments are those of :class:`CoFiringResonance`.

    Attributes:
        query_neuron: the query neurons, ``lif_q`` in the state dict.
        key_neuron: the key neurons, ``lif_k`` in the state dict.
    """

    #: SpikingJelly 0.0.0.0.14's ``functional.set_backend`` skips modules that do not list the backend here.
    supported_backends = ("auto", "torch", "numba")
    #: What the warning of silent queries or keys recommends.
    remedy = "lower the thresholds of the query and key neurons"

    def __init__(
        self,
        n_features: int,
        n_heads: int,
        top_k: int = 64,
        recency: bool = False,
        causal: bool = True,
        neuron: NeuronFactory | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        as_count(n_features, "n_features")
        check_heads(n_features, n_heads)
        as_count(top_k, "top_k")
        check_flags(recency=recency, causal=causal)
        check_backend(backend)
        self.n_features, self.n_heads, self.top_k, self.causal = n_features, n_heads, top_k, causal
        self.backend = backend
        self._first_batches = FirstBatches(BATCHES)
        self.q_proj = nn.Linear(n_features, n_features, bias=False)
        self.k_proj = nn.Linear(n_features, n_features, bias=False)
        self.v_proj = nn.Linear(n_features, n_features, bias=False)
        self.o_proj = nn.Linear(n_features, n_features, bias=False)
        self.lif_q = make_neuron(neuron, n_features)
        self.lif_k = make_neuron(neuron, n_features)
        self.temperature = nn.Parameter(torch.empty(1))
        self.recency_log = nn.Parameter(torch.empty(n_heads)) if recency else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset temperature and recency to their initial values, but not linear maps and neurons."""
        nn.init.constant_(self.temperature, (self.n_features / self.n_heads) ** -0.5)
        if self.recency_log is not None:
            self.recency_log.copy_(-(1 + 2 * torch.arange(self.n_heads)) * math.log(2.0))

    @property
    def query_neuron(self) -> nn.Module:
        """Return the query neurons."""
        return self.lif_q

    @property
    def key_neuron(self) -> nn.Module:
        """Return the key neurons."""
        return self.lif_k

    @property
    def recency(self) -> Tensor | None:
        """Return the penalty of scores per position of distance, for each head ``[H]``, or None."""
        return None if self.recency_log is None else self.recency_log.exp()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: SequenceCache, visible: Tensor | None = None) -> Tensor:
        """Return the context ``[B, S, V]`` of query and key spikes ``[T, B, S, D]`` and values ``[B, S, V]``.

        With ``visible``, booleans that broadcast to ``[B, H, S, S]``, a query attends only to keys where it is True; see
        :func:`nord_snn.layers.masking.masked_resonance`.

        Raises:
            ValueError: there is padding or there are earlier positions and the layer is not causal; there are earlier
                positions and q or k are not zeros and ones; or there is both a mask and a cache.
        """
        if self.training and not torch.compiler.is_compiling() and self._first_batches.batches_left:
            self._first_batches.add(q, k)
            self._warn_if_silent(self._first_batches.end_batch())
        if visible is not None:
            if cache.lengths is not None or cache.update is not None:
                raise ValueError("a call takes masks or a cache, not both: padding can be part of key_mask")
            return masked_resonance(
                q,
                k,
                v,
                visible,
                n_heads=self.n_heads,
                top_k=self.top_k,
                temperature=self.temperature,
                recency=self.recency,
                causal=self.causal,
            )
        if cache.update is None:
            return self._attend_uncached(q, k, v, cache.lengths)
        return self._attend_cached(q, k, v, cache)

    def _warn_if_silent(self, rates: tuple[float, ...] | None) -> None:
        """Warn if queries or keys hardly fired in the first batches; ``rates`` is None until these have run."""
        if rates is not None and min(rates) < SILENT:
            warnings.warn(
                f"{type(self).__name__} is silent: in its first {BATCHES} training batches the firing rate of queries was "
                f"{rates[0]:.2%} and that of keys {rates[1]:.2%}, so its scores hardly depend on the input: {self.remedy}",
                NeuronActivityWarning,
                stacklevel=3,
            )

    def _attend_uncached(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is not None:  # move padding behind the tokens: causal queries do not attend to later positions
            if not self.causal:
                raise ValueError("padding needs a causal resonance, in which no query attends to later positions")
            S = v.shape[1]
            row = torch.arange(len(v), device=v.device)[:, None]
            position = torch.arange(S, device=v.device)
            padding = (S - lengths.long()).clamp(min=0)[:, None]
            to_front, to_back = (position + padding) % S, (position - padding) % S
            q, k, v = q[:, row, to_front], k[:, row, to_front], v[row, to_front]
        context = resonance(
            q,
            k,
            v,
            n_heads=self.n_heads,
            top_k=self.top_k,
            temperature=self.temperature,
            recency=self.recency,
            causal=self.causal,
            backend=self.backend,
        )
        return context if lengths is None else context[row, to_back] * (position >= padding)[..., None]

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: SequenceCache) -> Tensor:
        if not self.causal:
            raise ValueError("a cache needs a causal resonance: otherwise new positions would change earlier ones")
        assert cache.update is not None
        neurons = self.query_neuron, self.key_neuron
        if all(type(neuron) is DenseActivation for neuron in neurons):
            new_keys = k.unflatten(-1, (self.n_heads, -1)).permute(1, 3, 2, 0, 4).flatten(-2)  # [B, H, S, T * D/H]
        else:
            binary = all(emits_binary_spikes(neuron) for neuron in neurons)
            if not binary:
                check_spikes(q, "q")
            new_keys = pack_spikes(k, self.n_heads, trusted=binary)
        keys, values = cache.update(new_keys, v.unflatten(-1, (self.n_heads, -1)).transpose(1, 2))
        S = v.shape[1]
        if keys.shape[2] == S and (cache.window is None or cache.window >= S):  # there are no earlier positions
            return self._attend_uncached(q, k, v, cache.lengths)
        return resonance_cached(
            q,
            keys,
            values,
            top_k=self.top_k,
            temperature=self.temperature,
            recency=self.recency,
            lengths=cache.lengths,
            window=cache.window,
            backend=self.backend,
            trusted=True,  # checked above
        )

    def extra_repr(self) -> str:
        """Return the settings."""
        return (
            f"n_heads={self.n_heads}, top_k={self.top_k}, recency={self.recency_log is not None}, causal={self.causal}"
        )


class CoFiringResonance(ResonanceBase):
    """Attend to the positions that fired at the same time steps: scores count coincident spikes.

    ::

        q, k = lif_q(W_q x), lif_k(W_k x)                                          spikes
        v = W_v mean_t(x)
        count[a, b] = number of (time step, neuron) pairs of a head that fire in both q[a] and k[b]
        score[a, b] = temperature * count[a, b] - recency * |a - b|
        context[a] = sum over the top_k keys b with the best scores of softmax_b(score[a, b]) * v[b]
        output = W_o context

    The temperature is learnable. :func:`nord_snn.ops.resonance` has all details, such as ties.

    The input should have a standard deviation of about 1, such as the output of a norm. On an input of spikes the query and
    key neurons hardly fire: use :class:`SpikeFedResonance` in a spiking transformer.

    Args:
        n_features: D.
        n_heads: H, the number of heads, a divisor of D.
        top_k: number of keys that each query selects.
        recency: subtract a learnable positive penalty per position of distance from the scores of each head, initially
            ``2^-(1 + 2h)`` for head h. Without it the order of the positions before a query has no effect.
        causal: whether a query attends only to its own and earlier positions.
        neuron: factory of the query and key neurons, see :mod:`nord_snn.neurons.factory`; None for ``AssociativeLIFNode``.
        backend: backend of the resonance, see :func:`nord_snn.ops.resonance`; the neurons have their own ``backend``.

    Shapes: ``[T, B, S, D]`` -> ``[T, B, S, D]``: time steps, sequences, positions, features. The output is the same at all time
    steps, an expanded view. Every call starts from rest.

    Raises:
        ValueError: H does not divide D, or the input has another rank or width.

    Warns:
        NeuronActivityWarning: the firing rate of queries or keys is below 0.1 % over the first ten calls in training mode;
            each layer warns once at most.

    Source: the Nord spiking language model; recency as in ALiBi (Press et al. 2022), but learnable.

    Example:
        >>> layer = CoFiringResonance(64, n_heads=4)
        >>> x = torch.randn(10, 2, 7, 64)                             # 10 time steps, 2 sequences of 7 positions
        >>> layer(x).shape
        torch.Size([10, 2, 7, 64])

        With SpikingJelly's neurons:

        >>> from spikingjelly.activation_based.neuron import LIFNode
        >>> CoFiringResonance(64, n_heads=4, neuron=lambda n: LIFNode())(x).shape
        torch.Size([10, 2, 7, 64])
    """

    remedy = (
        "on an input of spikes use SpikeFedResonance, which has norms before its neurons; otherwise lower the thresholds, those "
        "of AssociativeLIFNode with nord_snn.calibrate_thresholds(net, batch)"
    )

    def forward(
        self,
        x: Tensor,
        expand: bool = True,
        *,
        cache: SequenceCache | None = None,
        **deprecated: Any,
    ) -> Tensor:
        """Return the context of ``x [T, B, S, D]``.

        Args:
            x: the input; with earlier positions in ``cache``, only that of the new positions.
            expand: False returns the context without the time dimension, ``[B, S, D]``.
            cache: padding and earlier positions. With earlier positions there is no gradient, and q and k must be spikes.
            deprecated: ``lengths``, ``remember`` (now ``update``) and ``window``: pass them as fields of ``cache``.

        Raises:
            ValueError: x has another rank or width; there is padding or there are earlier positions and the layer is not
                causal; or there are earlier positions and q or k are not zeros and ones.
        """
        check_features(x, self.n_features, type(self).__name__, "[T, B, S, D]")
        cache = cache_argument(cache, deprecated)
        q = fire_from_rest(self.query_neuron, self.q_proj(x))
        k = fire_from_rest(self.key_neuron, self.k_proj(x))
        v = self.v_proj(x.mean(0))  # mean and linear map commute, so W_v runs once instead of T times
        context = self.o_proj(self.attend(q, k, v, cache))
        return context.expand(x.shape) if expand else context
