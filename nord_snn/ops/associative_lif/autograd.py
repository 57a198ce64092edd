"""The public op: argument checks, precision, and the choice of a backend."""

import torch
from torch import Tensor

from nord_snn.ops.associative_lif.reference import AssociativeLIFState, reference
from nord_snn.ops.cascade import check_clusters
from nord_snn.ops.checks import check_features, check_scalar, compute_dtype
from nord_snn.ops.dispatch import Backend, BackendChoice, choose_backend
from nord_snn.ops.surrogate import SurrogateLike, resolve_surrogate

__all__ = ["associative_lif", "associative_lif_backend"]

_IMPLEMENTATIONS = {"torch": Backend(verify=lambda x_seq: (True, "always there"), run=reference)}


def associative_lif_backend(x_seq: Tensor, backend: str = "auto") -> BackendChoice:
    """What :func:`associative_lif` would run on ``x_seq``, and why not the others."""
    return choose_backend("associative_lif", _IMPLEMENTATIONS, backend, x_seq)


def associative_lif(
    x_seq: Tensor,
    state: AssociativeLIFState | None = None,
    *,
    threshold: Tensor,
    beta_mem: float | Tensor,
    beta_syn: float | Tensor,
    cascade_weight: Tensor | None = None,
    cascade_gain: Tensor | None = None,
    v_reset: float = -0.1,
    refractory_steps: int = 2,
    surrogate: SurrogateLike = "nord_atan",
    alpha: float = 4.0,
    return_v_seq: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, AssociativeLIFState]:
    r"""Current-based LIF neurons with a refractory period and an associative cascade.

    Per step, from rest ``v = i = refractory = 0``::

        i[t]  = beta_syn * i[t-1] + x[t]                          synaptic current
        u[t]  = v_reset                                           where refractory > 0 (no gradient)
                beta_mem * v[t-1] + (1 - beta_mem) * i[t]         elsewhere
        s[t]  = 1 where u[t] >= threshold else 0
        i[t] += cascade(s[t])                                     felt from step t + 1 on
        v[t]  = u[t] - s[t] * stop_gradient(threshold)            soft reset
        refractory = refractory_steps where s[t] else max(refractory - 1, 0)

    States and arithmetic are float32 (float64 for float64 input), also under autocast; outputs have the dtype of
    ``x_seq``. For float16 and bfloat16 input, spikes and states are exactly those of the same values in float32, and
    only ``v_seq`` is rounded, once. Rows never influence each other. A neuron whose threshold is at or below
    ``v_reset`` fires while refractory.

    Args:
        x_seq: input current ``[T, N, D]``, T >= 1; N may be 0.
        state: where to start, each part ``[N, D]``; None for rest.
        threshold: ``[D]``.
        beta_mem: membrane decay in (0, 1), a float or a tensor of one element. The value of a tensor is not checked,
            since a GPU would have to be waited for.
        beta_syn: synaptic decay in (0, 1), likewise.
        cascade_weight: ``[C, C]``, already through the sigmoid, or None for no cascade.
        cascade_gain: ``[C]``, or None.
        v_reset: membrane while refractory.
        refractory_steps: how many steps a neuron rests after a spike; 0 for none.
        surrogate: name from :data:`nord_snn.ops.surrogate.SURROGATES` or a callable of ``u - threshold``.
        alpha: sharpness of a named surrogate.
        return_v_seq: also return the membranes after reset.
        backend: ``"auto"``, ``"torch"``, ``"numba"``, ``"triton"`` or ``"cupy"``.

    Returns:
        ``(spikes [T, N, D], v_seq [T, N, D] or None, last state)``.

    Raises:
        TypeError: ``x_seq`` is not a floating tensor.
        ValueError: a shape does not fit, or D is not a multiple of C.
        RuntimeError: the backend asked for cannot run.

    Source: the Nord spiking language model; the surrogate gradient after Neftci, Mostafa and Zenke 2019.

    Example:
        >>> import torch
        >>> x = torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0]).reshape(5, 1, 1)
        >>> spikes, _, state = associative_lif(x, threshold=torch.tensor([0.25]), beta_mem=0.9, beta_syn=0.5)
        >>> spikes.flatten()                                # fires, rests two steps at v_reset, has decayed by then
        tensor([1., 0., 0., 0., 0.])
    """
    _check(x_seq, state, threshold, cascade_weight, cascade_gain, refractory_steps)
    run = _IMPLEMENTATIONS[associative_lif_backend(x_seq, backend).name].run
    dtype = compute_dtype(x_seq)
    with torch.autocast(x_seq.device.type, enabled=False):
        spikes, v_seq, last = run(
            x_seq.to(dtype),
            _state_in(dtype, x_seq, state),
            threshold.to(dtype),
            _scalar(beta_mem, dtype, "beta_mem"),
            _scalar(beta_syn, dtype, "beta_syn"),
            None if cascade_weight is None else cascade_weight.to(dtype),
            None if cascade_gain is None else cascade_gain.to(dtype),
            v_reset,
            refractory_steps,
            resolve_surrogate(surrogate, alpha),
        )
    return spikes.to(x_seq.dtype), v_seq.to(x_seq.dtype) if return_v_seq else None, last


def _check(
    x_seq: Tensor,
    state: AssociativeLIFState | None,
    threshold: Tensor,
    cascade_weight: Tensor | None,
    cascade_gain: Tensor | None,
    refractory_steps: int,
) -> None:
    if not isinstance(threshold, Tensor) or threshold.ndim != 1:
        got = list(threshold.shape) if isinstance(threshold, Tensor) else repr(threshold)
        raise ValueError(f"associative_lif expects threshold of shape [D], got {got}")
    n_features = threshold.shape[0]
    check_features(x_seq, n_features, "associative_lif", "[T, N, D]")
    if refractory_steps < 0:
        raise ValueError(f"refractory_steps must be 0 or more, got {refractory_steps}")
    if (cascade_weight is None) != (cascade_gain is None):
        raise ValueError("cascade_weight and cascade_gain belong together: give both, or neither for no cascade")
    if cascade_gain is not None:
        check_clusters(n_features, cascade_gain.shape[0])
    if state is None:
        return
    for name, part in zip(AssociativeLIFState._fields, state, strict=True):
        if part.shape != x_seq.shape[1:]:
            raise ValueError(
                f"state.{name} must be [N, D] = {list(x_seq.shape[1:])} as the input has, got {list(part.shape)}"
            )


def _state_in(dtype: torch.dtype, x_seq: Tensor, state: AssociativeLIFState | None) -> AssociativeLIFState:
    if state is not None:
        return AssociativeLIFState(state.v.to(dtype), state.i_syn.to(dtype), state.refractory.to(torch.int32))
    rest = x_seq.new_zeros(x_seq.shape[1:], dtype=dtype)
    return AssociativeLIFState(rest, rest, torch.zeros_like(rest, dtype=torch.int32))


def _scalar(beta: float | Tensor, dtype: torch.dtype, name: str) -> float | Tensor:
    check_scalar(beta, name)
    if isinstance(beta, Tensor):
        return beta.to(dtype)
    if not 0 < beta < 1:
        raise ValueError(f"{name} must lie in (0, 1), got {beta}")
    return beta
