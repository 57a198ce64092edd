"""The public ops of STDP: argument checks and precision. They run without autograd: learning rules need no gradient."""

import math

import torch
from torch import Tensor

from nord_snn.ops.checks import (
    as_number,
    as_state,
    check_dependence,
    check_tensor,
    check_time_constants,
    compute_dtype,
    describe,
)
from nord_snn.ops.dispatch import register_backends
from nord_snn.ops.plasticity.chunked_torch import chunked
from nord_snn.ops.plasticity.correlation import ConvGeometry, dense
from nord_snn.ops.plasticity.reference import (
    Correlate,
    Pairing,
    RewardSTDPState,
    STDPState,
    Traces,
    TripletState,
    rest,
    weight_dependence,
)

__all__ = ["IMPLEMENTATIONS", "reward_modulated_stdp", "stdp", "triplet_stdp"]

IMPLEMENTATIONS = register_backends("stdp", "plasticity", torch_file="chunked_torch")


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
    weight: Tensor | None = None,
    bounds: tuple[float, float] = (-0.3, 1.0),
    mu: float = 0.0,
    geometry: ConvGeometry | None = None,
) -> tuple[Tensor, STDPState]:
    """Return the STDP weight change from all pairs of spikes, with exponential traces.

    Per time step, with traces p and q that are updated before use and zero at rest::

        p[t] = p[t-1] * exp(-1 / tau_plus)  + pre[t]
        q[t] = q[t-1] * exp(-1 / tau_minus) + post[t]
        dW  += a_plus * f_plus(W) * outer(post[t], p[t]) - a_minus * f_minus(W) * outer(q[t], pre[t])

    With ``bounds = (lower, upper)``, ``f_plus(W) = ((upper - W) / (upper - lower))^mu`` and
    ``f_minus(W) = ((W - lower) / (upper - lower))^mu``, bases clamped at zero: constant 1 for ``mu = 0`` (additive),
    linear to 0 at the bounds for ``mu = 1`` (multiplicative). W is the weight before the call, as in SpikingJelly.

    Args:
        pre: presynaptic spikes ``[T, N, n_in]``; for a convolution ``[T, N, C_in, *]``.
        post: postsynaptic spikes ``[T, N, n_out]``; for a convolution ``[T, N, C_out, *]``.
        state: initial traces, or None for rest.
        tau_plus: time constant of the presynaptic trace, in time steps.
        tau_minus: time constant of the postsynaptic trace, in time steps.
        a_plus: potentiation per pair, pre before post.
        a_minus: depression per pair, post before pre.
        weight: the weight W; required if ``mu`` is above 0.
        bounds: ``(lower, upper)`` of the weight dependence.
        mu: exponent of the weight dependence.
        geometry: geometry of a convolution; None for a dense layer.

    Returns:
        ``(dW, in the shape of the weight and summed over the N rows, last traces)``.

    Raises:
        TypeError: an argument has another type, or a tensor another dtype or layout.
        ValueError: shapes or devices disagree, or a constant is out of its range.

    Source: Bi and Poo 1998; traces as in Morrison, Diesmann and Gerstner 2008; ``mu`` as in Guetig, Aharonov, Rotter and
    Sompolinsky 2003. SpikingJelly's traces decay by ``1 - 1 / tau_sj``, which is equal for
    ``tau_sj = 1 / (1 - exp(-1 / tau))``.

    Example:
        >>> pre = torch.tensor([1.0, 0.0]).reshape(2, 1, 1)
        >>> post = torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
        >>> stdp(pre, post)[0].item() > 0 > stdp(post, pre)[0].item()  # pre before post: potentiation
        True
    """
    pairing = _pairing(tau_plus, tau_minus, a_plus, a_minus)
    initial = None if state is None else Traces(*as_state(state, STDPState))
    change, last = _weight_change(pre, post, initial, pairing, geometry, weight, bounds, mu, slow=False)
    return change, STDPState(last.pre, last.post)


@torch.no_grad()
def triplet_stdp(
    pre: Tensor,
    post: Tensor,
    state: TripletState | None = None,
    *,
    tau_plus: float = 16.8,
    tau_minus: float = 33.7,
    tau_x: float = 101.0,
    tau_y: float = 125.0,
    a2_plus: float = 5e-10,
    a2_minus: float = 7e-3,
    a3_plus: float = 6.2e-3,
    a3_minus: float = 2.3e-4,
    weight: Tensor | None = None,
    bounds: tuple[float, float] = (-0.3, 1.0),
    mu: float = 0.0,
    geometry: ConvGeometry | None = None,
) -> tuple[Tensor, TripletState]:
    """Return the STDP weight change from all pairs and triplets of spikes.

    Per time step, with p, q, f_plus and f_minus as in :func:`stdp`, and slow traces x and y that are used before the spike of
    the time step is added::

        x'   = x[t-1] * exp(-1 / tau_x),  y' = y[t-1] * exp(-1 / tau_y)
        dW  += f_plus(W)  * outer(post[t] * (a2_plus + a3_plus * y'), p[t])
             - f_minus(W) * outer(q[t], pre[t] * (a2_minus + a3_minus * x'))
        x[t] = x' + pre[t],  y[t] = y' + post[t]

    A pair thus changes the weight more if the neuron that fires second has fired often before. With
    ``a3_plus = a3_minus = 0`` the rule is pair-based STDP. The defaults are Pfister and Gerstner's fit to visual cortex
    (all-to-all interaction), with time steps of 1 ms.

    Args:
        pre: presynaptic spikes ``[T, N, n_in]``; for a convolution ``[T, N, C_in, *]``.
        post: postsynaptic spikes ``[T, N, n_out]``; for a convolution ``[T, N, C_out, *]``.
        state: initial traces, or None for rest.
        tau_plus: time constant of the fast presynaptic trace, in time steps.
        tau_minus: time constant of the fast postsynaptic trace, in time steps.
        tau_x: time constant of the slow presynaptic trace, in time steps.
        tau_y: time constant of the slow postsynaptic trace, in time steps.
        a2_plus: potentiation per pair.
        a2_minus: depression per pair.
        a3_plus: potentiation per triplet post-pre-post.
        a3_minus: depression per triplet pre-post-pre.
        weight: the weight W; required if ``mu`` is above 0.
        bounds: ``(lower, upper)`` of the weight dependence.
        mu: exponent of the weight dependence.
        geometry: geometry of a convolution; None for a dense layer.

    Returns:
        ``(dW, in the shape of the weight and summed over the N rows, last traces)``.

    Raises:
        TypeError: an argument has another type, or a tensor another dtype or layout.
        ValueError: shapes or devices disagree, or a constant is out of its range.

    Source: Pfister and Gerstner 2006, equations 3 and 4, and their table of fits to visual cortex.

    Example:
        >>> pre, post = torch.zeros(30, 1, 1), torch.zeros(30, 1, 1)
        >>> pre[[5, 15]], post[[6, 16]] = 1.0, 1.0
        >>> one, _ = triplet_stdp(pre[:10], post[:10]); two, _ = triplet_stdp(pre, post)
        >>> bool(two > 2 * one)  # the trace of the first pair adds to the second
        True
    """
    decays = _decays(tau_plus=tau_plus, tau_minus=tau_minus, tau_x=tau_x, tau_y=tau_y)
    amplitudes = {"a2_plus": a2_plus, "a2_minus": a2_minus, "a3_plus": a3_plus, "a3_minus": a3_minus}
    a2_plus, a2_minus, a3_plus, a3_minus = (as_number(value, name) for name, value in amplitudes.items())
    pairing = Pairing(decays["tau_plus"], decays["tau_minus"], a2_plus, a2_minus, decays["tau_x"], decays["tau_y"],
                      a3_plus, a3_minus)  # fmt: skip
    initial = None if state is None else Traces(*as_state(state, TripletState))
    change, last = _weight_change(pre, post, initial, pairing, geometry, weight, bounds, mu, slow=True)
    return change, TripletState(*last)  # type: ignore[arg-type]  # with slow traces none of the four is None


@torch.no_grad()
def reward_modulated_stdp(
    pre: Tensor,
    post: Tensor,
    reward: float | Tensor,
    state: RewardSTDPState | None = None,
    *,
    tau_plus: float = 20.0,
    tau_minus: float = 20.0,
    a_plus: float = 0.005,
    a_minus: float = 0.005,
    tau_eligibility: float | None = None,
    weight: Tensor | None = None,
    bounds: tuple[float, float] = (-0.3, 1.0),
    mu: float = 0.0,
    geometry: ConvGeometry | None = None,
) -> tuple[Tensor, RewardSTDPState]:
    """Return the STDP weight change times a reward, either immediate or with an eligibility trace.

    With ``dW[n, t]`` the change of :func:`stdp` by row n at time step t, and without ``tau_eligibility``::

        dW = sum_n reward[n] * sum_t dW[n, t]

    With ``tau_eligibility``, and the reward at the last time step::

        e[t] = e[t-1] * exp(-1 / tau_eligibility) + sum_n dW[n, t]
        dW   = reward * e[T]

    Args:
        pre: presynaptic spikes ``[T, N, n_in]``; for a convolution ``[T, N, C_in, *]``.
        post: postsynaptic spikes ``[T, N, n_out]``; for a convolution ``[T, N, C_out, *]``.
        reward: a number, or a tensor without dimensions. Without ``tau_eligibility`` it may also be one reward per row,
            ``[N]``, or per row and output neuron or channel, ``[N, n_out]``: the third factor of three-factor rules. The
            weight changes of single rows are never stored.
        state: initial traces and eligibility, or None for rest.
        tau_plus: time constant of the presynaptic trace, in time steps.
        tau_minus: time constant of the postsynaptic trace, in time steps.
        a_plus: potentiation per pair.
        a_minus: depression per pair.
        tau_eligibility: time constant of the eligibility trace, in time steps. None for no trace: the reward applies only to
            the spikes of this call.
        weight: the weight W; required if ``mu`` is above 0.
        bounds: ``(lower, upper)`` of the weight dependence.
        mu: exponent of the weight dependence.
        geometry: geometry of a convolution; None for a dense layer.

    Returns:
        ``(dW, in the shape of the weight and summed over the N rows, last traces and eligibility)``.

    Raises:
        TypeError: an argument has another type, or a tensor another dtype or layout.
        ValueError: shapes or devices disagree, or a constant is out of its range.

    Source: Izhikevich 2007 for the eligibility trace; Florian 2007 for both forms (there with a factor
    1 / tau_eligibility); Fremaux and Gerstner 2016 for a third factor per neuron.

    Example:
        >>> pre, post = torch.ones(4, 2, 3), torch.ones(4, 2, 5)
        >>> both, _ = reward_modulated_stdp(pre, post, torch.tensor([1.0, -1.0]), a_minus=0.0)
        >>> bool(both.abs().max() < 1e-6)  # the changes of the two rows cancel
        True
    """
    pairing = _pairing(tau_plus, tau_minus, a_plus, a_minus)
    _check_spikes(pre, post, geometry)
    if isinstance(reward, Tensor):
        check_tensor(reward, "reward", "of one number, [N] or [N, n_out]", kind="real")
    else:
        reward = as_number(reward, "reward")
    state = None if state is None else as_state(state, RewardSTDPState)
    initial = None if state is None else Traces(state.pre, state.post)
    row_rewards = reward if isinstance(reward, Tensor) and reward.ndim else None
    if tau_eligibility is None:
        change, last = _weight_change(
            pre, post, initial, pairing, geometry, weight, bounds, mu, slow=False, reward=row_rewards
        )
        return change if row_rewards is not None else reward * change, RewardSTDPState(last.pre, last.post, None)
    decay = _decays(tau_eligibility=tau_eligibility)["tau_eligibility"]
    if row_rewards is not None:
        raise ValueError(
            f"with an eligibility trace the reward must be one number, got a tensor of shape {list(row_rewards.shape)}"
        )
    remaining = decay ** torch.arange(len(pre) - 1, -1, -1, dtype=torch.float64, device=pre.device)
    eligibility, last = _weight_change(
        pre, post, initial, pairing, geometry, weight, bounds, mu, slow=False, remaining=remaining
    )
    if state is not None and state.eligibility is not None:
        check_tensor(state.eligibility, "state.eligibility", "of the weight", like=eligibility)
        if state.eligibility.shape != eligibility.shape:
            raise ValueError(
                f"the eligibility of the state must have the shape of the weight, {list(eligibility.shape)}, got "
                f"{list(state.eligibility.shape)}"
            )
        eligibility = eligibility + decay ** len(pre) * state.eligibility
    return reward * eligibility, RewardSTDPState(last.pre, last.post, eligibility)


def _weight_change(
    pre: Tensor,
    post: Tensor,
    traces: Traces | None,
    pairing: Pairing,
    geometry: ConvGeometry | None,
    weight: Tensor | None,
    bounds: tuple[float, float],
    mu: float,
    slow: bool,
    reward: Tensor | None = None,
    remaining: Tensor | None = None,
) -> tuple[Tensor, Traces]:
    """Check the arguments, compute the weight change in float32 or float64, apply the weight dependence.

    ``slow`` creates slow traces at rest; ``reward`` is ``[N]`` or ``[N, n_out]``; ``remaining [T]`` is the fraction of each
    time step's change that remains in the eligibility after the last time step.
    """
    _check_spikes(pre, post, geometry)
    check_dependence(bounds, mu)
    mu = float(mu)
    if mu and weight is None:
        raise ValueError("weight must be passed if mu is above 0, got None")
    if weight is not None:
        check_tensor(weight, "weight", "of the synapse", like=post)
    dtype = compute_dtype(pre)
    factor = None if reward is None else _row_factor(reward.to(post.device, dtype), post)
    if traces is None:
        traces = rest(pre, post, dtype, slow)
    _check_traces(traces, pre, post)
    correlate: Correlate = dense if geometry is None else geometry.correlate
    with torch.autocast(pre.device.type, enabled=False):
        potentiation, depression, last = chunked(pre, post, traces, pairing, correlate, factor, remaining)
        if mu and weight is not None:
            if weight.shape != potentiation.shape:
                raise ValueError(f"weight must have shape {list(potentiation.shape)}, got {list(weight.shape)}")
            f_plus, f_minus = weight_dependence(weight.to(dtype), *bounds, mu)
            potentiation, depression = f_plus * potentiation, f_minus * depression
    return potentiation - depression, last


def _pairing(tau_plus: float, tau_minus: float, a_plus: float, a_minus: float) -> Pairing:
    """Return the constants of a rule of pairs."""
    decays = _decays(tau_plus=tau_plus, tau_minus=tau_minus)
    return Pairing(decays["tau_plus"], decays["tau_minus"], as_number(a_plus, "a_plus"), as_number(a_minus, "a_minus"))


def _decays(**time_constants: float) -> dict[str, float]:
    check_time_constants(**time_constants)
    return {name: math.exp(-1 / tau) for name, tau in time_constants.items()}


def _check_spikes(pre: Tensor, post: Tensor, geometry: ConvGeometry | None) -> None:
    if geometry is not None:
        _check_geometry(geometry)
    n_spatial = 0 if geometry is None else len(geometry.kernel_size)
    check_tensor(pre, "pre", "[T, N, *]", kind="real")
    check_tensor(post, "post", "[T, N, *]", kind="real", like=pre)
    if pre.ndim != 3 + n_spatial or post.ndim != 3 + n_spatial or pre.shape[:2] != post.shape[:2]:
        into, out = ("n_in", "n_out") if geometry is None else ("C_in" + ", *" * n_spatial, "C_out" + ", *" * n_spatial)
        raise ValueError(
            f"STDP expects pre [T, N, {into}] and post [T, N, {out}] with the same T and N, "
            f"got {list(pre.shape)} and {list(post.shape)}"
        )
    if pre.shape[0] == 0:
        raise ValueError("STDP expects at least one time step, got T = 0")
    if geometry is not None:
        expected = geometry.output_size(tuple(pre.shape[3:]))
        if tuple(post.shape[3:]) != expected:
            raise ValueError(
                f"post must have the spatial size {list(expected)} of this convolution for pre {list(pre.shape)}, got "
                f"{list(post.shape)}"
            )


def _check_geometry(geometry: ConvGeometry) -> None:
    """Raise unless this is the geometry of a convolution with one or two spatial dimensions."""
    if not isinstance(geometry, ConvGeometry):
        raise TypeError(f"geometry must be a ConvGeometry or None, got {describe(geometry)}")
    sizes = (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
    if not all(isinstance(size, tuple) and len(size) == len(sizes[0]) for size in sizes) or len(sizes[0]) not in (1, 2):
        raise ValueError("geometry must have kernel_size, stride, padding and dilation with one or two entries each")


def _check_traces(traces: Traces, pre: Tensor, post: Tensor) -> None:
    for name, trace, spikes in zip(
        ("pre", "post", "slow_pre", "slow_post"), traces, (pre, post, pre, post), strict=True
    ):
        if trace is None and (name in ("pre", "post") or (traces.slow_pre is None) != (traces.slow_post is None)):
            raise TypeError(f"state.{name} must be a tensor of the shape of one time step of the spikes, got None")
        if trace is not None:
            check_tensor(trace, f"state.{name}", "of one time step of the spikes", like=spikes)
        if trace is not None and trace.shape != spikes.shape[1:]:
            raise ValueError(
                f"traces of the state must have the shapes {list(pre.shape[1:])} and {list(post.shape[1:])} of one time step of "
                f"the spikes, got {list(traces.pre.shape)} and {list(traces.post.shape)}: reset them when the batch shape changes"
            )


def _row_factor(reward: Tensor, post: Tensor) -> Tensor:
    """Return ``reward``, ``[N]`` or ``[N, n_out]``, in a shape that broadcasts to one time step of ``post``."""
    if reward.shape not in (post.shape[1:2], post.shape[1:3]):
        raise ValueError(
            f"the reward must be one number or have shape [{post.shape[1]}] (rows) or {list(post.shape[1:3])} (rows and "
            f"neurons), got {list(reward.shape)}"
        )
    return reward.view(*reward.shape, *[1] * (post.ndim - 1 - reward.ndim))
