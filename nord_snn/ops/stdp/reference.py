"""Pair-based spike-timing-dependent plasticity in plain PyTorch, and the reward that modulates it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["STDPState", "reference", "reward_from_loss"]


class STDPState(NamedTuple):
    """Exponential traces of past spikes; rest is zero.

    Attributes:
        pre: presynaptic trace, ``[N, n_in]``.
        post: postsynaptic trace, ``[N, n_out]``.
    """

    pre: Tensor
    post: Tensor


def reference(
    pre: Tensor, post: Tensor, state: STDPState, decay_plus: float, decay_minus: float, a_plus: float, a_minus: float
) -> tuple[Tensor, STDPState]:
    """``pre [T, N, n_in]``, ``post [T, N, n_out]`` -> ``[n_out, n_in]`` summed over N, and the last traces."""
    p, q = state
    delta = pre.new_zeros(post.shape[-1], pre.shape[-1])
    for pre_t, post_t in zip(pre.unbind(0), post.unbind(0), strict=True):
        p = p * decay_plus + pre_t
        q = q * decay_minus + post_t
        delta = delta + a_plus * (post_t.mT @ p) - a_minus * (q.mT @ pre_t)
    return delta, STDPState(p, q)


def reward_from_loss(loss: float, baseline: float, scale: float = 1.0) -> float:
    """Reward for a loss below its running baseline: ``2 * sigmoid(scale * (baseline - loss)) - 1``, in (-1, 1).

    Example:
        >>> reward_from_loss(loss=10.0, baseline=10.0), round(reward_from_loss(loss=9.5, baseline=10.0), 4)
        (0.0, 0.2449)
    """
    return math.tanh(scale * (baseline - loss) / 2)


def rest(pre: Tensor, post: Tensor, dtype: torch.dtype) -> STDPState:
    """Zero traces for inputs of these shapes."""
    return STDPState(torch.zeros_like(pre[0], dtype=dtype), torch.zeros_like(post[0], dtype=dtype))
