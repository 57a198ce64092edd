"""CoFiringResonance: positions of a sequence bind by firing together."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nord_snn.neurons import AssociativeLIFNode, NeuronFactory, SmoothActivation, fire_from_rest, make_neuron
from nord_snn.ops import pack_spikes, resonance, resonance_cached
from nord_snn.ops.cached_resonance.packing import check_spikes
from nord_snn.ops.checks import check_features, check_heads

__all__ = ["Binding", "CoFiringResonance", "Remember"]

#: Takes keys and values of new positions, and gives those of all positions.
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Binding(nn.Module):
    """What the resonance layers share: four projections, neurons for queries and keys, and the way from these to a context.

    The arguments are those of :class:`CoFiringResonance`.
    """

    #: SpikingJelly 0.0.0.0.14's ``functional.set_backend`` asks for it, and leaves alone what does not have the backend.
    supported_backends = ("auto", "torch", "numba")

    def __init__(
        self,
        n_features: int,
        n_heads: int,
        top_k: int,
        recency: bool,
        causal: bool,
        neuron: NeuronFactory | None,
        backend: str,
    ) -> None:
        super().__init__()
        check_heads(n_features, n_heads)
        self.n_features, self.n_heads, self.top_k, self.causal = n_features, n_heads, top_k, causal
        self.backend = backend
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
        """Put temperature and slopes back to their initial values; projections and neurons have their own."""
        nn.init.constant_(self.temperature, (self.n_features / self.n_heads) ** -0.5)
        if self.recency_log is not None:
            self.recency_log.copy_(-(1 + 2 * torch.arange(self.n_heads)) * math.log(2.0))

    @property
    def recency(self) -> Tensor | None:
        """Slope per head ``[H]``, positive, or None."""
        return None if self.recency_log is None else self.recency_log.exp()

    def bind(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None = None,
        remember: Remember | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Context ``[B, S, V]`` from spikes ``[T, B, S, D]`` and values ``[B, S, V]``; the other arguments are the layer's."""
        if remember is None and window is not None:
            raise ValueError("window goes with remember: without it every position is seen")
        if remember is None:
            return self._bind(q, k, v, lengths)
        return self._bind_to_earlier(q, k, v, lengths, remember, window)

    def _bind(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is not None:  # padding goes behind the tokens, which do not see it there
            if not self.causal:
                raise ValueError("padding needs a causal resonance: behind the tokens it must not be seen")
            S = v.shape[1]
            row = torch.arange(len(v), device=v.device)[:, None]
            place = torch.arange(S, device=v.device)
            padding = (S - lengths.long()).clamp(min=0)[:, None]
            to_front, back = (place + padding) % S, (place - padding) % S
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
        return context if lengths is None else context[row, back] * (place >= padding)[..., None]

    def _bind_to_earlier(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, remember: Remember, window: int | None
    ) -> Tensor:
        if not self.causal:
            raise ValueError("a resonance that is not causal cannot grow: earlier positions would see later ones")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        kinds = {type(self.lif_q), type(self.lif_k)}
        if kinds == {SmoothActivation}:
            new = k.unflatten(-1, (self.n_heads, -1)).permute(1, 3, 2, 0, 4).flatten(-2)  # [B, H, S, T * D/H]
        else:
            ours = kinds == {AssociativeLIFNode}  # which fires zeros and ones
            if not ours:
                check_spikes(q)
            new = pack_spikes(k, self.n_heads, trusted=ours)
        keys, values = remember(new, v.unflatten(-1, (self.n_heads, -1)).transpose(1, 2))
        if keys.shape[2] == v.shape[1] and (window is None or v.shape[1] <= window):  # these are the first
            return self._bind(q, k, v, lengths)
        return resonance_cached(
            q,
            keys,
            values,
            top_k=self.top_k,
            temperature=self.temperature,
            recency=self.recency,
            lengths=lengths,
            window=window,
            backend=self.backend,
            trusted=True,  # looked at above
        )

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return (
            f"n_heads={self.n_heads}, top_k={self.top_k}, recency={self.recency_log is not None}, causal={self.causal}"
        )


class CoFiringResonance(Binding):
    """Attention whose scores are counts of coincident spikes.

    ``q, k = lif_q(W_q x), lif_k(W_k x)`` are spikes; the score of two positions is the number of (step, neuron) pairs of a
    head that fire in both, times a learnable temperature; the ``top_k`` best keys of each query bind by softmax; the values
    are ``W_v`` of the time-mean of x; ``W_o`` closes. The equations, ties included, are those of :func:`nord_snn.ops.resonance`.

    Args:
        n_features: D.
        n_heads: H; D must be a multiple of it.
        top_k: keys kept per query.
        recency: give every head a learnable positive slope that lowers the score with distance, starting at
            ``2^-(1 + 2h)`` for head h. Without it the layer knows no order of the positions before a query.
        causal: whether a position sees only itself and earlier ones.
        neuron: factory of the query and key neurons, see :mod:`nord_snn.neurons.factory`; None for
            ``AssociativeLIFNode`` with its 64 clusters.
        backend: of the resonance itself, see :func:`nord_snn.ops.resonance`; the neurons have their own.

    Shapes: ``[T, B, S, D]`` -> ``[T, B, S, D]``, the same context at every step (a view without memory of its own).

    Raises:
        ValueError: H does not divide D, the input has another rank or width, or 64 does not divide a width and no ``neuron``
            is given.

    Source: the Nord spiking language model; recency after ALiBi (Press et al. 2022).

    Example:
        >>> layer = CoFiringResonance(64, n_heads=4)
        >>> x = torch.randn(10, 2, 7, 64)                             # 10 steps, 2 sequences of 7 positions
        >>> layer(x).shape
        torch.Size([10, 2, 7, 64])

        The same with SpikingJelly's neurons:

        >>> from spikingjelly.activation_based.neuron import LIFNode
        >>> CoFiringResonance(64, n_heads=4, neuron=lambda n: LIFNode())(x).shape
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
    ) -> None:
        super().__init__(n_features, n_heads, top_k, recency, causal, neuron, backend)

    def forward(
        self,
        x: Tensor,
        expand: bool = True,
        *,
        lengths: Tensor | None = None,
        remember: Remember | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Context for ``x [T, B, S, D]``.

        Args:
            x: the input, of the new positions alone where ``remember`` holds earlier ones.
            expand: False gives the context once, as ``[B, S, D]``.
            lengths: how many positions of each sequence, counted from the last, are tokens, ``[B]``; what stands before is
                padding that nobody sees. None for all.
            remember: keeps keys and values for a sequence that grows: a function that takes those of the new positions,
                key spikes as bits ``[B, H, S, bytes]`` and values ``[B, H, S, D/H]``, and returns them behind all earlier
                ones, as the ``update`` of a cache of transformers does. Nothing may be learned then, and q and k must be
                spikes.
            window: a query sees itself and so many less one before it; only with ``remember``.

        Raises:
            ValueError: wrong rank or width, a window without ``remember``, positions to remember that see what comes after
                them, or, with ``remember``, q or k that are not zeros and ones.
        """
        check_features(x, self.n_features, type(self).__name__, "[T, B, S, D]")
        q, k = fire_from_rest(self.lif_q, self.q_proj(x)), fire_from_rest(self.lif_k, self.k_proj(x))
        v = self.v_proj(x.mean(0))  # a mean and a linear map commute: W_v runs once and not T times
        context = self.o_proj(self.bind(q, k, v, lengths, remember, window))
        return context.expand(x.shape) if expand else context
