"""The public op: argument checks, precision, choice of the backend, registration of the kernels with torch.library."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nord_snn.ops.checks import check_storage, compute_dtype, without_autocast
from nord_snn.ops.costs import register_cost
from nord_snn.ops.dispatch import BackendChoice, CallSignature, backend_selector, choose_backend, register_backends
from nord_snn.ops.lif.checks import check_backward, check_call, check_forward, check_options, check_state
from nord_snn.ops.lif.cost import associative_lif_cost
from nord_snn.ops.lif.reference import PUBLISHED, AssociativeLIFState, Dynamics, map_state, reference
from nord_snn.ops.lif.support import Arguments, Options, OutputGradients
from nord_snn.ops.registration import Kernel, register_op
from nord_snn.ops.surrogate import SurrogateLike, resolve_surrogate

__all__ = ["IMPLEMENTATIONS", "Options", "associative_lif", "associative_lif_backend", "associative_lif_of_rank"]

IMPLEMENTATIONS = register_backends("associative_lif", "lif", "numba", "cupy", "triton")
_choose = backend_selector("associative_lif", IMPLEMENTATIONS)


def associative_lif_backend(
    x_seq: Tensor,
    backend: str = "auto",
    surrogate: SurrogateLike = "nord_atan",
    n_clusters: int | None = None,
    dynamics: Dynamics = PUBLISHED,
    n_decays: int = 1,
    channels_first: bool = False,
) -> BackendChoice:
    """Return the backend that :func:`associative_lif` would choose for ``x_seq``, and why it would not choose the others.

    ``n_decays`` is D if every neuron has its own decays, else 1; other arguments as in :func:`associative_lif`.
    """
    n_features = x_seq.shape[2 if channels_first else -1]
    signature = _signature(x_seq, n_features, surrogate, n_clusters, dynamics, n_decays)
    return choose_backend("associative_lif", IMPLEMENTATIONS, backend, signature)


def _signature(
    x: Tensor,
    n_features: int,
    surrogate: SurrogateLike,
    n_clusters: int | None,
    dynamics: Dynamics,
    n_decays: int,
) -> CallSignature:
    name = surrogate if isinstance(surrogate, str) else "callable"
    options = (
        ("n_clusters", n_clusters or 0),
        ("surrogate", name),
        ("published_dynamics", dynamics == PUBLISHED),
        ("n_decays", n_decays),
    )
    return CallSignature(x.device.type, x.dtype, n_features, options)


def associative_lif(
    x_seq: Tensor,
    state: AssociativeLIFState | None = None,
    *,
    threshold: Tensor,
    beta_mem: float | Tensor | None = None,
    beta_syn: float | Tensor,
    cascade_weight: Tensor | None = None,
    cascade_gain: Tensor | None = None,
    v_reset: float = -0.1,
    refractory_steps: int = 2,
    surrogate: SurrogateLike = "nord_atan",
    alpha: float = 4.0,
    dynamics: Dynamics = PUBLISHED,
    channels_first: bool = False,
    membrane_only: bool = False,
    return_v_seq: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, AssociativeLIFState]:
    r"""Run current-based LIF neurons with a refractory period and an associative cascade.

    Per time step, from rest ``v = i = refractory = 0``::

        i[t]  = beta_syn * i[t-1] + x[t]                          synaptic current
        u[t]  = v_reset                                           where refractory > 0 (no gradient)
                beta_mem * v[t-1] + (1 - beta_mem) * i[t]         elsewhere
        s[t]  = 1 where u[t] >= threshold else 0
        i[t] += cascade(s[t])                                     acts from time step t + 1 on
        v[t]  = u[t] - s[t] * stop_gradient(threshold)            soft reset
        refractory = refractory_steps where s[t] else max(refractory - 1, 0)

    States and arithmetic are float32 (float64 for float64 input), also under autocast. Outputs have the dtype of
    ``x_seq``. For float16 and bfloat16 input, spikes and states are exactly those of the same values in float32;
    only ``v_seq`` is rounded, once. Rows are independent. A neuron whose threshold is at or below
    ``v_reset`` fires while refractory. :func:`nord_snn.ops.associative_cascade` has the equation of the cascade,
    :class:`nord_snn.ops.Dynamics` has other equations of ``u`` and of the reset.

    Args:
        x_seq: input current ``[T, N, D]``, T >= 1; N may be 0. With ``channels_first``: ``[T, N, D, M]``.
        state: initial state, each part ``[N, D]`` or ``[N, D, M]``; None for rest.
        threshold: ``[D]``.
        beta_mem: membrane decay in (0, 1), a float, or a tensor of one element or ``[D]``. It may be 0 or 1 if
            ``dynamics.charge`` is "sum". The values of a tensor are not checked, because that would synchronise with the GPU.
            None if ``dynamics`` has ``tau``.
        beta_syn: synaptic decay in [0, 1), a float, or a tensor of one element or ``[D]``, whose values are not checked. At 0
            the synaptic current is the input, and there must be no cascade, whose current would be discarded.
        cascade_weight: ``[C, C]``, after the sigmoid, or None for no cascade.
        cascade_gain: ``[C]``, or None for no cascade.
        v_reset: membrane potential while refractory.
        refractory_steps: number of refractory time steps after a spike; 0 for none.
        surrogate: name from :data:`nord_snn.ops.SURROGATES` or a callable of ``u - threshold``.
        alpha: sharpness of a named surrogate.
        dynamics: equations of membrane potential and reset. Default: those above.
        channels_first: take ``[T, N, D, M]``, in which M positions of a channel, such as the pixels of an image, share the
            parameters of one neuron. Outputs have the layout of the input. Default: False.
        membrane_only: the membrane potential is the whole state; ``i_syn`` and ``refractory`` are None in ``state`` and in
            the last state. Only for neurons without synaptic current (``beta_syn=0``), refractory period and cascade. It
            saves memory, and time in loops of single time steps. Default: False.
        return_v_seq: also return the membrane potentials after reset. Default: False.
        backend: ``"auto"``, ``"torch"``, ``"numba"``, ``"triton"`` or ``"cupy"``; see :mod:`nord_snn.ops.dispatch`. The
            kernels have a first derivative only; a second derivative needs ``"torch"`` and raises an error elsewhere.

    Returns:
        ``(spikes [T, N, D], v_seq [T, N, D] or None, last state)``.

    Raises:
        TypeError: an argument has another type, or a tensor another dtype or layout.
        ValueError: a shape or device is wrong, D is not a multiple of C, a constant is out of its range, or ``membrane_only`` is
            passed for neurons with more state.
        RuntimeError: the requested backend cannot run.

    Source: the Nord spiking language model; the surrogate gradient after Neftci, Mostafa and Zenke 2019.

    Example:
        >>> import torch
        >>> x = torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0]).reshape(5, 1, 1)
        >>> spikes, _, state = associative_lif(x, threshold=torch.tensor([0.25]), beta_mem=0.9, beta_syn=0.5)
        >>> spikes.flatten()                          # fires, is refractory for two time steps, stays below threshold
        tensor([1., 0., 0., 0., 0.])
    """
    options = Options(v_reset, refractory_steps, surrogate, alpha, dynamics, membrane_only, return_v_seq)
    check_call(
        x_seq, threshold, {"beta_mem": beta_mem, "beta_syn": beta_syn},
        {"cascade_weight": cascade_weight, "cascade_gain": cascade_gain}, options, channels_first,
    )  # fmt: skip
    state = check_state(state, x_seq, "[N, D, M]" if channels_first else "[N, D]", membrane_only)
    layout = _Layout(tuple(x_seq.shape), tuple(x_seq.shape[1:]))
    return _associative_lif(
        x_seq, state, layout, options, backend, threshold, beta_mem, beta_syn, cascade_weight, cascade_gain
    )


class _Layout(NamedTuple):
    """Shapes of a call.

    Attributes:
        shape: shape ``[T, N, D]`` or ``[T, N, D, M]`` to which the input is reshaped.
        step_shape: shape of the state: that of the whole input if the input is a single time step.
    """

    shape: tuple[int, ...]
    step_shape: tuple[int, ...]


def associative_lif_of_rank(
    x: Tensor,
    state: AssociativeLIFState | None,
    dim: int,
    single_step: bool,
    options: Options,
    backend: str,
    *parameters: Any,
    logits: bool,
) -> tuple[Tensor, Tensor | None, AssociativeLIFState]:
    """Run :func:`associative_lif` on an input of any rank.

    For small inputs, creating views of inputs and outputs would take longer than the kernel.

    Args:
        x: sequence ``[T, N, *, D, *]``, or a time step without T, with at least one batch dimension. It is not checked.
        state: initial state in the shape of a time step, or None for rest. It is not checked.
        dim: dimension of the neurons, a negative number.
        single_step: whether ``x`` is a time step.
        options: constants.
        backend: that of :func:`associative_lif`.
        parameters: threshold, both betas, and weight and gain of the cascade, as :func:`associative_lif` takes them.
        logits: whether betas that are tensors are logits; others are None or 0. The op computes the sigmoid and its gradient,
            which takes less time than autograd if the input is small.

    Returns:
        Spikes and membrane potentials in the shape of ``x``, and the last state in that of a time step.
    """
    step_shape = tuple(x.shape) if single_step else tuple(x.shape[1:])
    shape: tuple[int, ...] = (1 if single_step else x.shape[0], math.prod(step_shape[:dim]), step_shape[dim])
    if dim != -1:
        shape = (*shape, math.prod(step_shape[dim + 1 :]))
    return _associative_lif(x, state, _Layout(shape, step_shape), options, backend, *parameters, logits=logits)


def _associative_lif(
    x: Tensor,
    state: AssociativeLIFState | None,
    layout: _Layout,
    options: Options,
    backend: str,
    threshold: Tensor,
    beta_mem: float | Tensor | None,
    beta_syn: float | Tensor,
    cascade_weight: Tensor | None,
    cascade_gain: Tensor | None,
    *,
    logits: bool = False,
) -> tuple[Tensor, Tensor | None, AssociativeLIFState]:
    without_current = not isinstance(beta_syn, Tensor) and beta_syn == 0
    check_options(options, beta_mem, without_current, cascade_gain is not None)
    n_clusters = None if cascade_gain is None else cascade_gain.shape[0]
    dtype = compute_dtype(x)
    with without_autocast(x):
        mem_decay = None if beta_mem is None else _beta_tensor(beta_mem, x, "beta_mem", threshold, closed=True)
        syn_decay = _beta_tensor(beta_syn, x, "beta_syn", threshold)
        if mem_decay is not None and syn_decay is not None and mem_decay.shape != syn_decay.shape:
            mem_decay, syn_decay = mem_decay.expand(threshold.shape), syn_decay.expand(threshold.shape)
        n_decays = max([1, *(decay.shape[0] for decay in (mem_decay, syn_decay) if decay is not None)])
        signature = _signature(x, layout.shape[2], options.surrogate, n_clusters, options.dynamics, n_decays)
        name = _choose(backend, signature)
        if state is None:
            if options.dynamics.v_rest != 0:
                state = _resting_state(x, layout.step_shape, dtype, options.dynamics.v_rest)
        else:
            state = _cast_state(dtype, state)
        tensors = _Call(
            x,
            state,
            threshold.to(dtype),
            mem_decay,
            syn_decay,
            None if cascade_weight is None else cascade_weight.to(dtype),
            None if cascade_gain is None else cascade_gain.to(dtype),
        )
        if name == "numba" and (n_clusters is None or len(layout.shape) == 3):
            return _run_call(tensors, layout, options, name, logits)
        if logits:
            tensors = tensors._replace(beta_mem=_sigmoid(mem_decay), beta_syn=_sigmoid(syn_decay))
        return _run_reshaped(tensors, layout, options, name)


def _sigmoid(logit: Tensor | None) -> Tensor | None:
    return None if logit is None else logit.sigmoid()


class _Call(NamedTuple):
    """The tensors of a call; a decay is None if it is 0 or unused, or a logit until its sigmoid is computed."""

    x: Tensor
    state: AssociativeLIFState | None
    threshold: Tensor
    beta_mem: Tensor | None
    beta_syn: Tensor | None
    cascade_weight: Tensor | None
    cascade_gain: Tensor | None


_REST = AssociativeLIFState(*cast(tuple[Tensor, Tensor, Tensor], (None, None, None)))


def _run_call(
    call: _Call, layout: _Layout, options: Options, backend: str, logits: bool = False
) -> tuple[Tensor, Tensor | None, AssociativeLIFState]:
    if backend != "numba":
        call = _filled(call)
    if backend == "torch":
        return _run_reference(call, options)
    spikes, v_seq, v, i_syn, refractory = _run(
        call.x, *(call.state or _REST), *call[2:],
        v_reset=options.v_reset, refractory_steps=options.refractory_steps, surrogate=options.surrogate,
        alpha=options.alpha, **options.dynamics._asdict(), keep_v=options.keep_v, membrane_only=options.membrane_only,
        backend=backend, logits=logits, shape=layout.shape, step=layout.step_shape,
    )  # fmt: skip
    if options.membrane_only:
        i_syn, refractory = None, None
    return spikes, v_seq if options.keep_v else None, AssociativeLIFState(v, i_syn, refractory)


def _run_reshaped(
    call: _Call, layout: _Layout, options: Options, backend: str
) -> tuple[Tensor, Tensor | None, AssociativeLIFState]:
    """Reshape the input, run a backend, and reshape the outputs.

    All backends take ``[T, N, D]``; plain PyTorch without a cascade also takes ``[T, N, D, M]``.
    """
    shape, step_shape = layout
    original = call.x.shape
    state = None if call.state is None else map_state(lambda part: part.reshape(shape[1:]), call.state)
    call = call._replace(x=call.x.reshape(shape), state=state)
    if len(shape) == 4 and (call.cascade_gain is not None or backend != "torch"):
        spikes, v_seq, last = _run_features_last(call, options, backend)
    else:
        spikes, v_seq, last = _run_call(call, _Layout(shape, shape[1:]), options, backend)
    v_seq = None if v_seq is None else v_seq.reshape(original)
    return spikes.reshape(original), v_seq, map_state(lambda part: part.reshape(step_shape), last)


def _filled(call: _Call) -> _Call:
    """Return the call with zeros in place of decays and parts of the state that are None."""
    zero = call.threshold.new_zeros(1)
    size = max([1, *(beta.shape[0] for beta in (call.beta_mem, call.beta_syn) if beta is not None)])
    beta_mem, beta_syn = (zero.expand(size) if beta is None else beta for beta in (call.beta_mem, call.beta_syn))
    state = call.state
    if state is not None and state.i_syn is None:
        state = AssociativeLIFState(
            state.v, torch.zeros_like(state.v), torch.zeros_like(state.v, dtype=torch.int32, requires_grad=False)
        )
    return call._replace(state=state, beta_mem=beta_mem, beta_syn=beta_syn)


def _run_reference(call: _Call, options: Options) -> tuple[Tensor, Tensor | None, AssociativeLIFState]:
    x_seq, state, threshold, beta_mem, beta_syn, weight, gain = call
    assert beta_mem is not None
    assert beta_syn is not None
    dtype, D = compute_dtype(x_seq), len(threshold)
    if x_seq.ndim == 4:  # [D, 1] broadcasts to [N, D, M]
        threshold, beta_mem, beta_syn = (x[:, None] if len(x) == D else x for x in (threshold, beta_mem, beta_syn))
    spikes, v_seq, last = reference(
        x_seq.to(dtype),
        _resting_state(x_seq, x_seq.shape[1:], dtype) if state is None else state,
        threshold,
        beta_mem,
        beta_syn,
        weight,
        gain,
        options.v_reset,
        options.refractory_steps,
        resolve_surrogate(options.surrogate, options.alpha),
        options.dynamics,
    )
    if options.membrane_only:
        last = _REST._replace(v=last.v)
    return spikes.to(x_seq.dtype), v_seq.to(x_seq.dtype) if options.keep_v else None, last


def _run_features_last(
    call: _Call, options: Options, backend: str
) -> tuple[Tensor, Tensor | None, AssociativeLIFState]:
    """Run ``[T, N, D, M]`` as ``[T, N * M, D]``, which copies inputs and outputs."""
    T, N, D, M = call.x.shape

    def features_last(x: Tensor) -> Tensor:
        return x.movedim(-2, -1).reshape(*x.shape[:-3], N * M, D)

    def features_first(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-2], N, M, D).movedim(-1, -2).contiguous()

    state = None if call.state is None else map_state(features_last, call.state)
    layout = _Layout((T, N * M, D), (N * M, D))
    call = call._replace(x=features_last(call.x), state=state)
    spikes, v_seq, last = _run_call(call, layout, options, backend)
    return features_first(spikes), None if v_seq is None else features_first(v_seq), map_state(features_first, last)


def _cast_state(dtype: torch.dtype, state: AssociativeLIFState) -> AssociativeLIFState:
    v, i_syn, refractory = state
    if i_syn is None or refractory is None:
        return _REST._replace(v=v.to(dtype))
    return AssociativeLIFState(v.to(dtype), i_syn.to(dtype), refractory.to(torch.int32))


def _resting_state(
    x_seq: Tensor, step_shape: Sequence[int], dtype: torch.dtype, v_rest: float = 0.0
) -> AssociativeLIFState:
    rest = x_seq.new_zeros(step_shape, dtype=dtype)
    v = rest if v_rest == 0 else torch.full_like(rest, v_rest)
    return AssociativeLIFState(v, rest, torch.zeros_like(rest, dtype=torch.int32))


def _beta_tensor(
    beta: float | Tensor, x_seq: Tensor, name: str, threshold: Tensor, closed: bool = False
) -> Tensor | None:
    """Return a decay as tensor ``[1]`` or ``[D]``, None for the number 0.

    A number must lie in [0, 1), or in [0, 1] if ``closed``.
    """
    dtype = compute_dtype(x_seq)
    if isinstance(beta, Tensor):
        if beta.numel() != 1 and beta.shape != threshold.shape:
            raise ValueError(
                f"{name} must have one element or shape [D] = {list(threshold.shape)}, got {list(beta.shape)}"
            )
        beta = beta.to(dtype)
        return beta if beta.ndim == 1 else beta.reshape(-1)
    if not (0 <= beta < 1 or (closed and beta == 1)):
        raise ValueError(f"{name} must lie in {'[0, 1]' if closed else '[0, 1)'}, got {beta}")
    return torch.full((1,), float(beta), dtype=dtype, device=x_seq.device) if beta else None


def _forward(
    x: Tensor,
    v: Tensor | None,
    i_syn: Tensor | None,
    refractory: Tensor | None,
    threshold: Tensor,
    beta_mem: Tensor | None,
    beta_syn: Tensor | None,
    weight: Tensor | None,
    gain: Tensor | None,
    *,
    v_reset: float,
    refractory_steps: int,
    surrogate: str,
    alpha: float,
    charge: str,
    tau: float,
    v_rest: float,
    hard_reset: bool,
    reset_scale: float,
    detach_reset: bool,
    keep_v: bool,
    membrane_only: bool,
    backend: str,
    logits: bool,
    shape: Sequence[int],
    step: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the forward pass; outputs that are not needed may be None."""
    if logits:
        beta_mem, beta_syn = _sigmoid(beta_mem), _sigmoid(beta_syn)
    arguments = Arguments(
        x, v, i_syn, refractory, threshold, beta_mem, beta_syn, _coupling(weight, gain, threshold.shape[0]), v_reset,
        refractory_steps, Dynamics(charge, tau, v_rest, hard_reset, reset_scale, detach_reset), tuple(shape), tuple(step),
    )  # fmt: skip
    kernel = IMPLEMENTATIONS[backend].kernel()
    return kernel.forward(arguments, keep_v, membrane_only) if backend == "numba" else kernel.forward(arguments, keep_v)


def _coupling(weight: Tensor | None, gain: Tensor | None, n_features: int) -> Tensor | None:
    """Return the cascade as one matrix for the kernels: ``gain[c] * weight[c, k] / members``, ``[C, C]``."""
    if weight is None or gain is None:
        return None
    for x in (weight, gain):
        if x.is_cpu:
            check_storage(x)
    return gain[:, None] * weight / (n_features // gain.shape[0])


def _cascade_gradients(
    grad: Tensor, weight: Tensor | None, gain: Tensor | None, n_features: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and gain from ``grad``, that of the coupling; None without a cascade."""
    if weight is None or gain is None:
        return None, None
    grad = grad / (n_features // gain.shape[0])
    return grad * gain[:, None], (grad * weight).sum(1)


@functools.wraps(_forward)
def _registered_forward(x: Tensor, *tensors: Tensor | None, **options: Any) -> Any:
    """Run the forward pass with empty tensors in place of None, which a registered op cannot return."""
    spikes, v_seq, v, i_syn, refractory = _forward(x, *tensors, **options)  # type: ignore[arg-type]
    v_seq = x.new_empty(0, *options["step"]) if v_seq is None else v_seq
    if options["membrane_only"]:
        i_syn, refractory = v.new_empty(0), v.new_empty(0, dtype=torch.int32)
    return spikes, v_seq, v, i_syn, refractory


def _forward_fake(
    x: Tensor, *tensors: Tensor | None, keep_v: bool, membrane_only: bool, step: Sequence[int], **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x)
    shape_of_rest = (0,) if membrane_only else step
    v_last, i_last = x.new_empty(step, dtype=dtype), x.new_empty(shape_of_rest, dtype=dtype)
    v_seq = x.new_empty(x.shape if keep_v else (0, *step))
    return x.new_empty(x.shape), v_seq, v_last, i_last, x.new_empty(shape_of_rest, dtype=torch.int32)


def _backward(
    grad_spikes: Tensor,
    other_grads: Sequence[Tensor | None],
    x: Tensor,
    v: Tensor | None,
    i_syn: Tensor | None,
    refractory: Tensor | None,
    threshold: Tensor,
    beta_mem: Tensor | None,
    beta_syn: Tensor | None,
    weight: Tensor | None,
    gain: Tensor | None,
    *,
    v_reset: float,
    refractory_steps: int,
    surrogate: str,
    alpha: float,
    charge: str,
    tau: float,
    v_rest: float,
    hard_reset: bool,
    reset_scale: float,
    detach_reset: bool,
    membrane_only: bool,
    parameters: bool,
    backend: str,
    logits: bool,
    shape: Sequence[int],
    step: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward pass; gradients that are not needed may be None, those of all parameters unless ``parameters``.

    ``other_grads`` are the gradients of v_seq and of the last v and i_syn. The gradients of weight and gain are computed from
    that of the coupling.
    """
    grads = OutputGradients(grad_spikes, *other_grads)
    if logits:
        beta_mem, beta_syn = _sigmoid(beta_mem), _sigmoid(beta_syn)
    arguments = Arguments(
        x, v, i_syn, refractory, threshold, beta_mem, beta_syn, _coupling(weight, gain, threshold.shape[0]), v_reset,
        refractory_steps, Dynamics(charge, tau, v_rest, hard_reset, reset_scale, detach_reset), tuple(shape), tuple(step),
    )  # fmt: skip
    kernel = IMPLEMENTATIONS[backend].kernel()
    if backend == "numba":
        grad_x, grad_v, grad_i, *others = kernel.backward(grads, arguments, surrogate, alpha, parameters, logits)
    else:
        grad_x, grad_v, grad_i, *others = kernel.backward(grads, arguments, surrogate, alpha)
        if v is None:
            grad_v, grad_i = None, None
    if not parameters:
        return grad_x, grad_v, grad_i, *[cast(Tensor, None)] * 5
    threshold_grad, mem_grad, syn_grad, coupling_grad = others
    weight_grad, gain_grad = _cascade_gradients(coupling_grad, weight, gain, threshold.shape[0])
    return (
        grad_x,
        grad_v,
        grad_i,
        threshold_grad,
        mem_grad,
        syn_grad,
        cast(Tensor, weight_grad),
        cast(Tensor, gain_grad),
    )


@functools.wraps(_backward)
def _registered_backward(grad_spikes: Tensor, *tensors: Any, **options: Any) -> Any:
    """Run the backward pass with empty tensors in place of None, which a registered op cannot return."""
    grads = _backward(grad_spikes, *tensors, **options)
    _, _, _, _, _, threshold, *_ = tensors
    return tuple([threshold.new_empty(0) if grad is None else grad for grad in grads])


def _backward_fake(
    grad_spikes: Tensor,
    other_grads: Sequence[Tensor | None],
    x: Tensor,
    v: Tensor | None,
    i_syn: Tensor | None,
    refractory: Tensor | None,
    threshold: Tensor,
    beta_mem: Tensor | None,
    beta_syn: Tensor | None,
    weight: Tensor | None,
    gain: Tensor | None,
    *,
    parameters: bool,
    step: Sequence[int],
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_v, grad_i = (threshold.new_empty((0,) if part is None else step) for part in (v, i_syn))
    of_threshold, of_mem, of_syn, of_weight, of_gain = (
        threshold.new_empty((0,) if part is None or not parameters else part.shape)
        for part in (threshold, beta_mem, beta_syn, weight, gain)
    )
    return x.new_empty(x.shape), grad_v, grad_i, of_threshold, of_mem, of_syn, of_weight, of_gain


def _save(ctx: Any, tensors: Sequence[Tensor | None], options: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*tensors)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *grads: Tensor | None, run: Any) -> tuple[Tensor | None, ...]:
    grad_spikes, grad_v_seq, grad_v_last, grad_i_last, _ = grads
    # Without ``keep_v`` the output v_seq is empty, but torch.compile still passes a gradient for it.
    if grad_v_seq is not None and not grad_v_seq.shape[0]:
        grad_v_seq = None
    x, v, i_syn, *others, gain = ctx.saved_tensors
    _, beta_mem, beta_syn, _ = others[1:]
    if grad_spikes is None:
        grad_spikes = torch.zeros_like(x)
    if ctx.options["membrane_only"]:
        grad_i_last = None
    options = ctx.options.copy()
    del options["keep_v"]
    parameters = any(ctx.needs_input_grad[4:9])
    x_grad, v_grad, i_grad, *of_parameters = run(
        grad_spikes,
        [grad_v_seq, grad_v_last, grad_i_last],
        x,
        v,
        i_syn,
        *others,
        gain,
        parameters=parameters,
        **options,
    )
    state = (None if v is None else v_grad, None if i_syn is None else i_grad)
    if not parameters:
        return x_grad, *state, None, None, None, None, None, None
    threshold_grad, mem_grad, syn_grad, weight_grad, gain_grad = of_parameters
    decays = (None if beta_mem is None else mem_grad, None if beta_syn is None else syn_grad)
    cascade = (None, None) if gain is None else (weight_grad, gain_grad)
    return x_grad, *state, None, threshold_grad, *decays, *cascade


_run = register_op(
    "associative_lif",
    Kernel(_registered_forward, _forward_fake, direct=_forward),
    Kernel(_registered_backward, _backward_fake, direct=_backward),
    _save,
    _gradients,
    checks=(check_forward, check_backward),
)
register_cost("associative_lif", associative_lif_cost)
