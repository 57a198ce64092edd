"""Spike-timing-dependent plasticity in plain PyTorch, and the reward that modulates it: the truth for ``chunked.py``."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

#: ``(post [M, *out], pre [M, *in])`` -> their products summed over M, and over positions for a convolution, shaped as the weight.
Correlate = Callable[[Tensor, Tensor], Tensor]


class STDPState(NamedTuple):
    """Exponential traces of past spikes; rest is zero.

    Attributes:
        pre: presynaptic trace, ``[N, n_in]``; of a convolution ``[N, C_in, *]``.
        post: postsynaptic trace, ``[N, n_out]``; of a convolution ``[N, C_out, *]``.
    """

    pre: Tensor
    post: Tensor


class TripletState(NamedTuple):
    """The two traces of :class:`STDPState` and the two slow ones of the triplet rule; rest is zero.

    Attributes:
        pre: fast presynaptic trace (r1 of the paper), shaped as one step of the input.
        post: fast postsynaptic trace (o1), shaped as one step of the output.
        slow_pre: slow presynaptic trace (r2).
        slow_post: slow postsynaptic trace (o2).
    """

    pre: Tensor
    post: Tensor
    slow_pre: Tensor
    slow_post: Tensor


class RewardSTDPState(NamedTuple):
    """Traces, and what waits for a reward; rest is zero.

    Attributes:
        pre: presynaptic trace, as in :class:`STDPState`.
        post: postsynaptic trace.
        eligibility: decaying sum of what STDP would have changed, shaped as the weight; None where rewards are immediate.
    """

    pre: Tensor
    post: Tensor
    eligibility: Tensor | None


class Traces(NamedTuple):
    """What every rule carries from step to step; the slow traces are None for a pair rule."""

    pre: Tensor
    post: Tensor
    slow_pre: Tensor | None = None
    slow_post: Tensor | None = None


class Pairing(NamedTuple):
    """Constants of a rule: decay of every trace per step, and how much a pair and a triplet count."""

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
    """What strengthens and what weakens, each shaped as the weight and positive for positive constants, and the last traces.

    ``pre [T, N, *in]``, ``post [T, N, *out]``; ``row_factor``, which broadcasts to a step of ``post``, and
    ``step_factor [T]`` multiply what each row, neuron and step contributes.
    """
    p, q, x, y = traces
    strengthening = weakening = torch.zeros(())
    for t, (pre_t, post_t) in enumerate(zip(pre.unbind(0), post.unbind(0), strict=True)):
        p = p * pairing.decay_plus + pre_t
        q = q * pairing.decay_minus + post_t
        late, early = pairing.a_plus * post_t, pairing.a_minus * pre_t
        if x is not None and y is not None:  # slow traces are used before the spike of this step enters them
            x, y = x * pairing.decay_x, y * pairing.decay_y
            late, early = late + pairing.a3_plus * y * post_t, early + pairing.a3_minus * x * pre_t
            x, y = x + pre_t, y + post_t
        factor = (1 if row_factor is None else row_factor) * (1 if step_factor is None else step_factor[t])
        strengthening = strengthening + correlate(late * factor, p)
        weakening = weakening + correlate(q * factor, early)
    return strengthening, weakening, Traces(p, q, x, y)


def weight_dependence(weight: Tensor, lower: float, upper: float, mu: float) -> tuple[Tensor, Tensor]:
    """``((upper - w) / (upper - lower))^mu`` and ``((w - lower) / (upper - lower))^mu``, neither base below zero."""
    place = (weight - lower) / (upper - lower)
    return (1 - place).clamp(min=0) ** mu, place.clamp(min=0) ** mu


def reward_from_loss(loss: Any, baseline: float, scale: float = 1.0) -> Any:
    """Reward for a loss below its running baseline: ``2 * sigmoid(scale * (baseline - loss)) - 1``, in (-1, 1).

    Args:
        loss: one, or a tensor of several, of which each gets its own.
        baseline: the loss that is expected.
        scale: how steeply the reward answers.

    Example:
        >>> reward_from_loss(loss=10.0, baseline=10.0), round(reward_from_loss(loss=9.5, baseline=10.0), 4)
        (0.0, 0.2449)
    """
    tanh = torch.tanh if isinstance(loss, Tensor) else math.tanh
    return tanh(scale * (baseline - loss) / 2)


def rest(pre: Tensor, post: Tensor, dtype: torch.dtype, slow: bool = False) -> Traces:
    """Zero traces for inputs of these shapes."""

    def zeros(spikes: Tensor) -> Tensor:
        return torch.zeros_like(spikes[0], dtype=dtype)

    if not slow:
        return Traces(zeros(pre), zeros(post))
    return Traces(zeros(pre), zeros(post), zeros(pre), zeros(post))
