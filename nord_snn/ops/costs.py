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
    """Counts of one product in one call.

    Attributes:
        kind: see :class:`nord_snn.monitor.ProductCost`.
        dense: multiply-accumulates of the dense product, without skipping zeros.
        macs: multiply-accumulates, if no factor is exactly zeros and ones.
        acs: accumulates, if a factor is exactly zeros and ones.
        activation_bytes: inputs and outputs; spikes are one bit each.
        dense_activation_bytes: inputs and outputs, all of them as numbers.
        weight_bytes: weights with an active input, each read once.
        dense_weight_bytes: all weights, each read once.
        time_steps: number of time steps that the product covers; None if it is that of the running module's input.
        sop_macs: multiply-accumulates under the published convention of synaptic operations; None if they are ``macs``.
        sops: synaptic operations under that convention; None if they are ``acs``.
        effective_macs: NeuroBench's: inputs and weights that are not zero, where an input is not 0, 1 or -1.
        effective_acs: NeuroBench's: inputs and weights that are not zero, where all inputs are 0, 1 or -1.
        unpadded: ``dense`` without the zeros around the input of a convolution; 0 if the product has no weight.
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
        products: its products.
        elementwise: outputs of pointwise operations in each time step.
        elementwise_once: outputs of pointwise operations that are computed once for all time steps.
        multiplications: multiplications in neurons' updates.
        additions: additions in neurons' updates.
        state_bytes: state of neurons, read and written in each time step.
        neuron_outputs: outputs of neurons, over all time steps.
    """

    products: tuple[ProductCount, ...] = ()
    elementwise: int = 0
    elementwise_once: int = 0
    multiplications: int = 0
    additions: int = 0
    state_bytes: int = 0
    neuron_outputs: int = 0


#: Name of an op, as ``"nord_snn::resonance"`` -> function that takes the op's arguments, and its output as ``out``.
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
    """Return the bytes of a tensor as numbers."""
    return x.numel() * x.element_size()


def spike_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor; if all its values are 0 or 1, one bit each."""
    return ceil(x.numel() / 8) if is_binary(x) else tensor_bytes(x)
