"""Operations and bytes of STDP: traces in each time step, and one addition per spike and synapse.

The rules are not registered with ``torch.library``, so the energy profile counts the products of a backend instead. These
functions return the cost of a spike-driven implementation.
"""

import torch
from torch import Tensor

from nord_snn.ops.costs import OpCost, ProductCount, is_binary, spike_bytes, tensor_bytes
from nord_snn.ops.plasticity.correlation import ConvGeometry, dense

__all__ = ["stdp_cost"]


def stdp_cost(pre: Tensor, post: Tensor, geometry: ConvGeometry | None = None, triplets: bool = False) -> OpCost:
    """Return the cost of the weight change of one call, without weight dependence and reward.

    Each output spike adds the presynaptic traces of its synapses to a sum per weight, the potentiation, and each input spike
    adds the postsynaptic traces of its synapses to another, the depression. At each time step each trace is multiplied by its
    decay, and a spike is added. Both sums are scaled once, and one is subtracted from the other.

    Args:
        pre: presynaptic spikes ``[T, N, n_in]``; for a convolution ``[T, N, C_in, *]``.
        post: postsynaptic spikes ``[T, N, n_out]``; for a convolution ``[T, N, C_out, *]``.
        geometry: geometry of a convolution; None for a dense layer.
        triplets: whether the rule also has the two slow traces of triplet STDP. Default: False.

    Example:
        >>> pre, post = torch.zeros(6, 1, 4), torch.zeros(6, 1, 3)
        >>> pre[2, 0, 1] = post[3, 0, 2] = 1.0
        >>> potentiation, depression = stdp_cost(pre, post).products
        >>> potentiation.acs, depression.acs, potentiation.dense  # 4 synapses of an output, 3 of an input
        (4, 3, 72)
    """
    correlate = dense if geometry is None else geometry.correlate
    flat_pre, flat_post = pre.flatten(0, 1).double(), post.flatten(0, 1).double()
    # Correlating spikes with ones counts the synapses of each spike, which are fewer at the edges of a convolution.
    by_post = correlate(flat_post, torch.ones_like(flat_pre))
    by_pre = correlate(torch.ones_like(flat_post), flat_pre)
    synapses = int(correlate(torch.ones_like(flat_post), torch.ones_like(flat_pre)).sum())
    weights, traces = by_post.numel(), (pre.numel() + post.numel()) * (2 if triplets else 1)
    return OpCost(
        products=(
            _change("potentiation", post, pre, by_post, synapses),
            _change("depression", pre, post, by_pre, synapses),
        ),
        multiplications=traces + 2 * weights,
        additions=traces + weights,
        state_bytes=2 * traces * pre.element_size(),
    )


def _change(kind: str, spikes: Tensor, other_side: Tensor, per_weight: Tensor, synapses: int) -> ProductCount:
    """Return the cost of one of the two sums.

    ``spikes`` add the traces of the spikes of ``other_side``; ``per_weight`` has the number of spikes that change each weight.
    """
    binary, weight_bytes = is_binary(spikes), per_weight.numel() * spikes.element_size()
    return ProductCount(
        kind,
        synapses,
        macs=0 if binary else synapses,
        acs=int(per_weight.sum().round()) if binary else 0,
        activation_bytes=spike_bytes(spikes) + spike_bytes(other_side),
        dense_activation_bytes=tensor_bytes(spikes) + tensor_bytes(other_side),
        weight_bytes=int(per_weight.count_nonzero()) * spikes.element_size(),
        dense_weight_bytes=weight_bytes,
        time_steps=len(spikes),
    )
