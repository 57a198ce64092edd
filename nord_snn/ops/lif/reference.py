"""The associative LIF neuron in plain PyTorch. All other backends are tested against it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nord_snn.ops.cascade import associative_cascade

__all__ = ["CHARGES", "PUBLISHED", "AssociativeLIFState", "Dynamics", "map_state", "reference"]

#: Names of the equations of the membrane potential before firing, see :class:`Dynamics`.
CHARGES = ("average", "sum", "relax", "leak")


class Dynamics(NamedTuple):
    """The equations of the membrane potential: charge by the synaptic current, and reset by a spike.

    With ``i`` the synaptic current, ``v`` the membrane potential, ``u`` the same before firing, ``s`` the spike and
    ``reset_by = reset_scale * threshold``::

        average    u = beta_mem * v + (1 - beta_mem) * (i + v_rest)        the published Nord model
        sum        u = beta_mem * v + (1 - beta_mem) * v_rest + i          snnTorch's neurons
        relax      u = v + (i - (v - v_rest)) / tau                        SpikingJelly's LIFNode
        leak       u = v - (v - v_rest) / tau + i                          SpikingJelly's LIFNode(decay_input=False)

        soft reset v = u - s * reset_by
        hard reset v = v_rest where s, u elsewhere

    "average" and "relax" are equal up to rounding at ``tau = 1 / (1 - beta_mem)``, as are "sum" and "leak". ``tau`` is a
    constant, ``beta_mem`` is learnable.

    Attributes:
        charge: one of :data:`CHARGES`.
        tau: membrane time constant in time steps, for "relax" and "leak".
        v_rest: resting potential.
        hard_reset: whether a spike sets the membrane potential to ``v_rest``, instead of subtracting the threshold.
        reset_scale: factor of the threshold in a soft reset.
        detach_reset: whether the spike is detached in the reset, so that no gradient flows through the reset.
    """

    charge: str = "average"
    tau: float = 0.0
    v_rest: float = 0.0
    hard_reset: bool = False
    reset_scale: float = 1.0
    detach_reset: bool = False


#: The dynamics of the neuron of the published Nord model.
PUBLISHED = Dynamics()


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


def map_state(function: Callable[[Tensor], Tensor], state: AssociativeLIFState) -> AssociativeLIFState:
    """Return the state with a function applied to each part that is not None."""
    return AssociativeLIFState(*(part if part is None else function(part) for part in state))


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
    dynamics: Dynamics = PUBLISHED,
) -> tuple[Tensor, Tensor, AssociativeLIFState]:
    """Run ``x_seq [T, N, D]`` from ``state``; return spikes and membrane potentials ``[T, N, D]`` and the last state.

    All floating tensors have the same dtype. ``fire`` returns the spikes for ``u - threshold``; the equations and the other
    arguments are those of :func:`nord_snn.ops.associative_lif`. Without a cascade, ``x_seq`` may be ``[T, N, D, M]`` if the
    parameters are ``[D, 1]``.
    """
    v, i_syn, refractory = state
    spikes, v_seq = [], []
    for x in x_seq.unbind(0):
        i_syn = beta_syn * i_syn + x
        u = torch.where(refractory > 0, v_reset, _charge(v, i_syn, beta_mem, dynamics))
        s = fire(u - threshold)
        if cascade_weight is not None and cascade_gain is not None:
            i_syn = i_syn + associative_cascade(s, cascade_weight, cascade_gain)
        v = _reset(u, s, threshold.detach(), dynamics)
        refractory = torch.where(s > 0, refractory_steps, (refractory - 1).clamp(min=0))
        spikes.append(s)
        v_seq.append(v)
    return torch.stack(spikes), torch.stack(v_seq), AssociativeLIFState(v, i_syn, refractory)


def _charge(v: Tensor, i_syn: Tensor, beta_mem: float | Tensor, dynamics: Dynamics) -> Tensor:
    charge, tau, v_rest, *_ = dynamics
    if charge == "average":
        return beta_mem * v + (1 - beta_mem) * (i_syn + v_rest)
    if charge == "sum":
        return beta_mem * v + (1 - beta_mem) * v_rest + i_syn
    if charge == "relax":
        return v + (i_syn - (v - v_rest)) / tau
    return v - (v - v_rest) / tau + i_syn


def _reset(u: Tensor, s: Tensor, threshold: Tensor, dynamics: Dynamics) -> Tensor:
    s = s.detach() if dynamics.detach_reset else s
    if dynamics.hard_reset:
        return (1 - s) * u + s * dynamics.v_rest
    return u - s * (threshold * dynamics.reset_scale)
