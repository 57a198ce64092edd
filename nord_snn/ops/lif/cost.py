"""Operations and bytes of neurons: associative LIF, parallel, and plain LIF, also an estimate for all other neurons."""

from typing import Any

from torch import Tensor

from nord_snn.ops.costs import OpCost

__all__ = ["associative_lif_cost", "associative_update_cost", "lif_update_cost", "parallel_update_cost"]


def associative_update_cost(spikes: Tensor, n_clusters: int | None) -> OpCost:
    """Return the cost of the updates of associative LIF neurons and their cascade.

    One neuron in one time step takes (multiplications, additions): synaptic current (1, 1), membrane potential (2, 1),
    comparison with the threshold (0, 1), reset (0, 1), refractory counter (0, 1). Its state is v, i_syn and the refractory
    counter, 4 bytes each, read and written. The cascade of one row in one time step takes the spike counts of the clusters,
    a matrix product, and one addition of current per neuron.

    Args:
        spikes: output of the neurons, ``[*, D]``.
        n_clusters: number of clusters C of the cascade, or None for no cascade.
    """
    updates, rows = spikes.numel(), spikes.numel() // max(spikes.shape[-1], 1)
    multiplications, additions = 3 * updates, 5 * updates
    if n_clusters is not None:
        multiplications += rows * n_clusters * (n_clusters + 1)
        additions += int(spikes.count_nonzero()) + rows * (n_clusters**2 + spikes.shape[-1])
    return OpCost(
        multiplications=multiplications, additions=additions, state_bytes=24 * updates, neuron_outputs=updates
    )


def lif_update_cost(spikes: Tensor) -> OpCost:
    """Return the cost of the updates of LIF neurons.

    One neuron in one time step takes (multiplications, additions): membrane potential (2, 1), comparison with the threshold
    (0, 1), reset (0, 1). Its state is v, 4 bytes, read and written.

    Args:
        spikes: output of the neurons, in any shape.
    """
    n = spikes.numel()
    return OpCost(multiplications=2 * n, additions=3 * n, state_bytes=8 * n, neuron_outputs=n)


def parallel_update_cost(spikes: Tensor, order: int) -> OpCost:
    """Return the cost of parallel spiking neurons, which compare a weighted sum of ``order`` inputs with a threshold.

    One neuron in one time step takes (multiplications, additions): weighted sum (order, order - 1), comparison with the
    threshold (0, 1). It has no state; each time step reads ``order`` inputs, 4 bytes each.

    Args:
        spikes: output of the neurons, in any shape.
        order: number of time steps in a weighted sum.

    Source: Fang et al. 2023, "Parallel spiking neurons with high efficiency and ability to learn long-term dependencies".
    """
    n = spikes.numel()
    return OpCost(multiplications=order * n, additions=order * n, state_bytes=4 * order * n, neuron_outputs=n)


def associative_lif_cost(
    x: Tensor,
    v: Tensor | None,
    i_syn: Tensor | None,
    refractory: Tensor | None,
    threshold: Tensor,
    beta_mem: Tensor,
    beta_syn: Tensor,
    weight: Tensor | None,
    gain: Tensor | None,
    *options: Any,
    out: tuple[Tensor, ...],
    **more_options: Any,
) -> OpCost:
    """Return the cost of one call of the op; its options do not change it."""
    return associative_update_cost(out[0], None if gain is None else gain.shape[0])
