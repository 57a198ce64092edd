"""The public op: argument checks and precision. Plasticity is no loss, so nothing here carries gradients."""

import math

import torch
from torch import Tensor

from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.stdp.chunked import chunked
from nord_snn.ops.stdp.reference import STDPState, rest

__all__ = ["stdp"]


@torch.no_grad()
def stdp(
    pre: Tensor,
    post: Tensor,
    state: STDPState | None = None,
    *,
    tau_plus: float = 20.0,
    tau_minus: float = 20.0,
    a_plus: float = 0.005,
    a_minus: float = 0.005,
) -> tuple[Tensor, STDPState]:
    """Weight change from all pairs of spikes, with exponential traces.

    Per step, traces updated before use and zero at rest::

        p[t] = p[t-1] * exp(-1 / tau_plus)  + pre[t]
        q[t] = q[t-1] * exp(-1 / tau_minus) + post[t]
        dW  += a_plus * outer(post[t], p[t]) - a_minus * outer(q[t], pre[t])

    Args:
        pre: presynaptic spikes ``[T, N, n_in]``.
        post: postsynaptic spikes ``[T, N, n_out]``.
        state: traces to start from, or None for rest.
        tau_plus: time constant of the presynaptic trace, in steps.
        tau_minus: time constant of the postsynaptic trace, in steps.
        a_plus: strengthening per pair, pre before post.
        a_minus: weakening per pair, post before pre.

    Returns:
        ``(dW [n_out, n_in] summed over the N rows, last traces)``.

    Raises:
        ValueError: ranks, T or N disagree, or a time constant is not positive.

    Source: Bi and Poo 1998; online traces after Morrison, Diesmann and Gerstner 2008. SpikingJelly decays by
    ``1 - 1 / tau``: the two agree at ``tau_sj = 1 / (1 - exp(-1 / tau))``.

    Example:
        >>> pre = torch.tensor([1.0, 0.0]).reshape(2, 1, 1)
        >>> post = torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
        >>> stdp(pre, post)[0].item() > 0 > stdp(post, pre)[0].item()  # pre before post strengthens
        True
    """
    if pre.ndim != 3 or post.ndim != 3 or pre.shape[:2] != post.shape[:2]:
        raise ValueError(
            f"stdp expects pre [T, N, n_in] and post [T, N, n_out] with the same T and N, "
            f"got {list(pre.shape)} and {list(post.shape)}"
        )
    if pre.shape[0] == 0:
        raise ValueError("stdp expects at least one time step, got T = 0")
    if not (tau_plus > 0 and tau_minus > 0):
        raise ValueError(f"time constants must be positive, got tau_plus = {tau_plus} and tau_minus = {tau_minus}")
    dtype = compute_dtype(pre)
    if state is None:
        state = rest(pre, post, dtype)
    elif state.pre.shape != pre.shape[1:] or state.post.shape != post.shape[1:]:
        raise ValueError(
            f"traces must be {list(pre.shape[1:])} and {list(post.shape[1:])} as the spikes are, "
            f"got {list(state.pre.shape)} and {list(state.post.shape)}: reset them when the batch shape changes"
        )
    with torch.autocast(pre.device.type, enabled=False):
        return chunked(pre, post, state, math.exp(-1 / tau_plus), math.exp(-1 / tau_minus), a_plus, a_minus)
