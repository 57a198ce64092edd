"""The associative LIF neuron in plain PyTorch. All other backends are tested against it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nord_snn.ops.cascade import associative_cascade

__all__ = ["AssociativeLIFState", "reference"]


class AssociativeLIFState(NamedTuple):
    """State of the neurons between time steps; all zeros at rest.

    Attributes:
        v: membrane potential, ``[N, D]``.
        i_syn: synaptic current, ``[N, D]``.
        refractory: remaining time steps at ``v_reset``, ``[N, D]`` int32.
    """

    v: Tensor
    i_syn: Tensor
    refractory: Tensor


def reference(
    x_seq: Tensor,
    state: AssociativeLIFState,
    threshold: Tensor,
    beta_mem: float | Tensor,
    beta_syn: float | Tensor,
    cascade_weight: Tensor | None,
    cascade_gain: Tensor | None,
    v_reset: float,
    refractory_steps: int,
    fire: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, AssociativeLIFState]:
    """Run ``x_seq [T, N, D]`` from ``state``; return spikes and membrane potentials ``[T, N, D]`` and the last state.

    All tensors have the same dtype. The equations are in the docstring of :func:`nord_snn.ops.associative_lif`.
    """
    v, i_syn, refractory = state
    spikes, membranes = [], []
    for x in x_seq.unbind(0):
        i_syn = beta_syn * i_syn + x
        u = torch.where(refractory > 0, v_reset, beta_mem * v + (1 - beta_mem) * i_syn)
        s = fire(u - threshold)
        if cascade_weight is not None and cascade_gain is not None:
            i_syn = i_syn + associative_cascade(s, cascade_weight, cascade_gain)
        v = u - s * threshold.detach()
        refractory = torch.where(s > 0, refractory_steps, (refractory - 1).clamp(min=0))
        spikes.append(s)
        membranes.append(v)
    return torch.stack(spikes), torch.stack(membranes), AssociativeLIFState(v, i_syn, refractory)
