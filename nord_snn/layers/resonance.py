"""CoFiringResonance: positions of a sequence bind by firing together."""

import math

import torch
from torch import Tensor, nn

from nord_snn.neurons import NeuronFactory, fire_from_rest, make_neuron
from nord_snn.ops import resonance
from nord_snn.ops.checks import check_features
from nord_snn.ops.resonance import check_heads

__all__ = ["CoFiringResonance"]


class CoFiringResonance(nn.Module):
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

    def forward(self, x: Tensor, expand: bool = True) -> Tensor:
        """Context for ``x [T, B, S, D]``; with ``expand=False`` once, as ``[B, S, D]``."""
        check_features(x, self.n_features, type(self).__name__, "[T, B, S, D]")
        context = resonance(
            fire_from_rest(self.lif_q, self.q_proj(x)),
            fire_from_rest(self.lif_k, self.k_proj(x)),
            self.v_proj(x.mean(0)),  # a mean and a linear map commute: W_v runs once and not T times
            n_heads=self.n_heads,
            top_k=self.top_k,
            temperature=self.temperature,
            recency=self.recency,
            causal=self.causal,
            backend=self.backend,
        )
        context = self.o_proj(context)
        return context.expand(x.shape) if expand else context

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return (
            f"n_heads={self.n_heads}, top_k={self.top_k}, recency={self.recency_log is not None}, causal={self.causal}"
        )
