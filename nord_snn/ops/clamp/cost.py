"""Operations of the leaky clamp: one elementwise output for each number, the residual sum included."""

from typing import Any

from torch import Tensor

from nord_snn.ops.costs import OpCost

__all__ = ["leaky_clamp_cost"]


def leaky_clamp_cost(x: Tensor, *arguments: Any, **options: Any) -> OpCost:
    """Return the cost of one call for ``x [*, D]``, without bytes: elementwise operations count as fused with a product."""
    return OpCost(elementwise=x.numel())
