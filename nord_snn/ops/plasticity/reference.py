"""STDP in plain PyTorch, one time step at a time, and the reward of a loss. ``chunked_torch.py`` is tested against it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nord_snn.ops.checks import as_number, check_numbers, check_tensor

__all__ = [
    "Pairing",
    "RewardSTDPState",
    "STDPState",
    "Traces",
    "TripletState",
    "reference",
    "rest",
    "reward_from_loss",
    "weight_dependence",
]

#: A function ``(post [M, *out], pre [M, *in])`` that returns products in the shape of the weight, summed over the M pairs and
#: over the positions of a convolution.
Correlate = Callable[[Tensor, Tensor], Tensor]


class STDPState(NamedTuple):
    """Exponential traces of past spikes; rest is zero.

    Attributes:
        pre: presynaptic trace, ``[N, n_in]``; for a convolution ``[N, C_in, *]``.
        post: postsynaptic trace, ``[N, n_out]``; for a convolution ``[N, C_out, *]``.
    """

    pre: Tensor
    post: Tensor


class TripletState(NamedTuple):
    """The two traces of :class:`STDPState` and two slow traces for the triplet rule; rest is zero.

    Attributes:
        pre: fast presynaptic trace (r1 in Pfister and Gerstner 2006), in the shape of one time step of the input.
        post: fast postsynaptic trace (o1), in the shape of one time step of the output.
        slow_pre: slow presynaptic trace (r2), in the shape of ``pre``.
        slow_post: slow postsynaptic trace (o2), in the shape of ``post``.
    """

    pre: Tensor
    post: Tensor
    slow_pre: Tensor
    slow_post: Tensor


class RewardSTDPState(NamedTuple):
    """Traces and eligibility; rest is zero.

    Attributes:
        pre: presynaptic trace, as in :class:`STDPState`.
        post: postsynaptic trace, as in :class:`STDPState`.
        eligibility: decaying sum of the STDP weight changes, in the shape of the weight; None without an eligibility
            trace.
    """

    pre: Tensor
    post: Tensor
    eligibility: Tensor | None


class Traces(NamedTuple):
    """State of every rule between time steps; the slow traces are None for a pair rule."""

    pre: Tensor
    post: Tensor
    slow_pre: Tensor | None = None
    slow_post: Tensor | None = None


class Pairing(NamedTuple):
    """Constants of a rule: factor of each trace per time step, and amplitudes of pairs and triplets."""

    decay_plus: float
    decay_minus: float
    a_plus: float
    a_minus: float
    decay_x: float = 0.0
    decay_y: float = 0.0
    a3_plus: float = 0.0
    a3_minus: float = 0.0


def reference(
    pre: Tensor,
    post: Tensor,
    traces: Traces,
    pairing: Pairing,
    correlate: Correlate,
    row_factor: Tensor | None = None,
    step_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Traces]:
    """Return potentiation, depression and the last traces, for ``pre [T, N, *in]`` and ``post [T, N, *out]``.

    Potentiation and depression have the shape of the weight and are positive for positive constants; the weight change is
    their difference. The contribution of each row, neuron and time step is multiplied by ``row_factor``, which broadcasts
    to one time step of ``post``, and by ``step_factor [T]``. The other arguments have the types of this file.
    """
    p, q, x, y = traces
    potentiation = depression = torch.zeros((), device=pre.device)
    for t, (pre_t, post_t) in enumerate(zip(pre.unbind(0), post.unbind(0), strict=True)):
        p = p * pairing.decay_plus + pre_t
        q = q * pairing.decay_minus + post_t
        post_term, pre_term = pairing.a_plus * post_t, pairing.a_minus * pre_t
        if x is not None and y is not None:  # slow traces are used before the spike of this time step is added
            x, y = x * pairing.decay_x, y * pairing.decay_y
            post_term, pre_term = post_term + pairing.a3_plus * y * post_t, pre_term + pairing.a3_minus * x * pre_t
            x, y = x + pre_t, y + post_t
        factor = (1 if row_factor is None else row_factor) * (1 if step_factor is None else step_factor[t])
        potentiation = potentiation + correlate(post_term * factor, p)
        depression = depression + correlate(q * factor, pre_term)
    return potentiation, depression, Traces(p, q, x, y)


def weight_dependence(weight: Tensor, lower: float, upper: float, mu: float) -> tuple[Tensor, Tensor]:
    """Return ``((upper - w) / (upper - lower))^mu`` and ``((w - lower) / (upper - lower))^mu``, with bases clamped at 0."""
    fraction = (weight - lower) / (upper - lower)
    return (1 - fraction).clamp(min=0) ** mu, fraction.clamp(min=0) ** mu


def reward_from_loss(loss: Any, baseline: float, scale: float = 1.0) -> Any:
    """Return the reward of a loss below a baseline: ``2 * sigmoid(scale * (baseline - loss)) - 1``, in (-1, 1).

    Args:
        loss: a number, or a tensor of losses, each with its own reward.
        baseline: expected loss.
        scale: factor of the difference, per unit of loss. Default: 1.

    Raises:
        TypeError: an argument is not a real number or a tensor of such numbers.
        ValueError: a number is not finite.

    Example:
        >>> reward_from_loss(loss=10.0, baseline=10.0), round(reward_from_loss(loss=9.5, baseline=10.0), 4)
        (0.0, 0.2449)
    """
    check_numbers(baseline=baseline, scale=scale)
    if isinstance(loss, Tensor):
        check_tensor(loss, "loss", "of losses", kind="real")
    else:
        loss = as_number(loss, "loss")
    tanh = torch.tanh if isinstance(loss, Tensor) else math.tanh
    return tanh(scale * (baseline - loss) / 2)


def rest(pre: Tensor, post: Tensor, dtype: torch.dtype, slow: bool = False) -> Traces:
    """Return zero traces in the shapes of the inputs; with ``slow`` also the slow traces."""

    def zeros(spikes: Tensor) -> Tensor:
        return torch.zeros_like(spikes[0], dtype=dtype)

    if not slow:
        return Traces(zeros(pre), zeros(post))
    return Traces(zeros(pre), zeros(post), zeros(pre), zeros(post))
