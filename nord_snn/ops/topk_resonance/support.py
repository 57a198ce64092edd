"""The arguments that all backends of the resonance take."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Arguments"]


class Arguments(NamedTuple):
    """The arguments of one call, as :func:`nord_snn.ops.resonance` describes them.

    ``temperature`` is a tensor without dimensions; ``temperature`` and ``recency`` have the dtype of the sums.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    temperature: Tensor
    recency: Tensor | None
    n_heads: int
    top_k: int
    causal: bool
