"""Costs of ops: operations and bytes of one call. The energy profile looks up the cost of each op that runs.

Each folder of an op has a ``cost.py`` with a function of the op's arguments. ``op.py`` registers it, as
``torch.utils.flop_counter.register_flop_formula`` does for operations of torch.
"""

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "COSTS",
    "OpCost",
    "ProductCount",
    "is_binary",
    "is_ternary",
    "is_whole",
    "register_cost",
    "spike_bytes",
    "tensor_bytes",
]


class ProductCount(NamedTuple):
    """Operations and bytes of one product of tensors (linear map, convolution or attention) in one call.

    Attributes:
        kind: see :class:`nord_snn.monitor.ProductCost`.
        dense: multiply-accumulates if zeros are multiplied, too.
        macs: multiply-accumulates; 0 if one factor contains only zeros and ones.
        acs: accumulates (additions); 0 unless one factor contains only zeros and ones.
        activation_bytes: bytes of inputs and outputs, with spikes stored as one bit each.
        dense_activation_bytes: bytes of inputs and outputs, with spikes stored as numbers.
        weight_bytes: bytes of the weights whose input is not zero, each read once.
        dense_weight_bytes: bytes of all weights, each read once.
        time_steps: number of time steps that the product covers; None for those of the running module's input.
        sop_macs: multiply-accumulates as publications since Spikformer (Zhou et al. 2023) count them; None for ``macs``.
        sops: synaptic operations as these publications count them; None for ``acs``.
        effective_macs: multiply-accumulates as NeuroBench (Yik et al. 2025) counts them: of inputs and weights that are not
            zero, if an input is not 0, 1 or -1.
        effective_acs: accumulates as NeuroBench counts them: of inputs and weights that are not zero, if all inputs are 0, 1
            or -1.
        unpadded: ``dense`` without the zeros that pad the input of a convolution; 0 if the product has no weight.
    """

    kind: str
    dense: int
    macs: int
    acs: int
    activation_bytes: int
    dense_activation_bytes: int
    weight_bytes: int = 0
    dense_weight_bytes: int = 0
    time_steps: int | None = None
    sop_macs: int | None = None
    sops: int | None = None
    effective_macs: int = 0
    effective_acs: int = 0
    unpadded: int = 0


class OpCost(NamedTuple):
    """Operations and bytes of one call of an op, or of the updates of a layer of neurons.

    Attributes:
        products: the products of tensors.
        elementwise: number of outputs of elementwise operations, over all time steps.
        elementwise_once: number of outputs of elementwise operations that are computed once for all time steps.
        multiplications: multiplications in updates of neurons or traces.
        additions: additions in these updates.
        state_bytes: bytes of state that these updates read and write, over all time steps.
        neuron_outputs: number of outputs of neurons, over all time steps.
    """

    products: tuple[ProductCount, ...] = ()
    elementwise: int = 0
    elementwise_once: int = 0
    multiplications: int = 0
    additions: int = 0
    state_bytes: int = 0
    neuron_outputs: int = 0


#: Name of an op, such as ``"nord_snn::resonance"`` -> function of the op's arguments, and of its output as ``out``.
COSTS: dict[str, Callable[..., OpCost]] = {}


def register_cost(name: str, cost: Callable[..., OpCost]) -> None:
    """Register the cost of ``nord_snn::name``: a function of the op's arguments, and of its output as ``out``."""
    COSTS[f"nord_snn::{name}"] = cost


def is_binary(x: Tensor) -> bool:
    """Return whether all values are 0 or 1."""
    return bool(((x == 0) | (x == 1)).all())


def is_ternary(x: Tensor) -> bool:
    """Return whether all values are -1, 0 or 1."""
    return bool(((x == 0) | (x.abs() == 1)).all())


def is_whole(x: Tensor) -> bool:
    """Return whether all values are integers, of any dtype."""
    return not x.is_floating_point() or bool((x == x.round()).all() & x.isfinite().all())


def tensor_bytes(x: Tensor) -> int:
    """Return the bytes of the elements of a tensor."""
    return x.numel() * x.element_size()


def spike_bytes(x: Tensor) -> int:
    """Return the bytes of the elements of a tensor, at one bit each if all are 0 or 1."""
    return ceil(x.numel() / 8) if is_binary(x) else tensor_bytes(x)
