"""The public op: argument checks, precision, choice of the backend, registration of both passes with torch.library."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nord_snn._compat.torch import kernels_are_opaque
from nord_snn.ops.checks import (
    as_count,
    check_flags,
    check_heads,
    check_scalar,
    check_shape,
    check_tensor,
    compute_dtype,
    without_autocast,
)
from nord_snn.ops.costs import register_cost
from nord_snn.ops.dispatch import CallSignature, backend_selector, register_backends
from nord_snn.ops.registration import Kernel, register_op
from nord_snn.ops.topk_resonance.cost import resonance_cost
from nord_snn.ops.topk_resonance.reference import reference
from nord_snn.ops.topk_resonance.support import Arguments

__all__ = ["IMPLEMENTATIONS", "resonance"]

IMPLEMENTATIONS = register_backends("resonance", "topk_resonance", "numba", torch_file="blockwise_torch")
_choose = backend_selector("resonance", IMPLEMENTATIONS)


def resonance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    n_heads: int,
    top_k: int,
    temperature: float | Tensor,
    recency: Tensor | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Return an attention context whose scores are counts of coincident spikes.

    For query position a, key position b and head h::

        count[a, b] = number of (time step, neuron) pairs of the head that fire in q at a and in k at b
        score[a, b] = temperature * count[a, b] - recency[h] * |a - b|
        context[a]  = sum_b softmax_b(score[a, b]) * v[b]         over the top_k best b (b <= a if causal)

    Among equal scores the most recent (highest) position is selected. With a negative temperature the keys with the
    fewest coincidences are best. Sums are float32 (float64 for float64 values), also under autocast, so counts are
    exact; the context is rounded once, to the dtype of ``v``.

    Peak memory grows linearly with the number of positions S, forward and backward. Second derivatives need memory
    quadratic in S; every backend computes them in plain PyTorch.

    Args:
        q: query spikes ``[T, B, S, D]`` (time steps, sequences, positions, neurons), floating (with gradient) or bool.
        k: key spikes ``[T, B, S, D]``.
        v: values ``[B, S, V]``, V any multiple of H. In the published model they are the mean over time of a projection;
            if each time step has its own values, the values of a head at all time steps are concatenated.
        n_heads: number of heads H, a divisor of D and V.
        top_k: number of keys that each query selects, at least 1.
        temperature: factor of the counts, a float, or a tensor of one element.
        recency: penalty per position of distance, for each head ``[H]``, or None.
        causal: whether a query attends only to itself and earlier positions.
        backend: ``"auto"``, ``"torch"`` (PyTorch, in blocks of queries, on any device) or ``"numba"``; see
            :mod:`nord_snn.ops.dispatch`.

    Returns:
        ``[B, S, V]`` in the dtype of ``v``.

    Raises:
        TypeError: an argument has another type, or a tensor another dtype or layout.
        ValueError: a shape or device is wrong, D or V is not a multiple of H, or ``top_k`` is not positive.
        RuntimeError: the requested backend cannot run.

    Source: temporal co-firing resonance of the Nord spiking language model; recency as in ALiBi (Press et al. 2022).

    Example:
        >>> import torch
        >>> q = k = torch.eye(3).reshape(1, 1, 3, 3)  # position i fires neuron i
        >>> resonance(q, k, torch.eye(3)[None], n_heads=1, top_k=1, temperature=1.0)[0].argmax(-1)
        tensor([0, 1, 2])
    """
    _check(q, k, v, temperature, recency, n_heads, top_k, causal)
    n_heads, top_k = int(n_heads), int(top_k)
    dtype = compute_dtype(v)
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), float(temperature), dtype=dtype, device=v.device)
    temperature = temperature.to(dtype).reshape(())
    recency = None if recency is None else recency.to(dtype)
    inputs = (q, k, v, temperature, recency)
    save_weights = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    name = _choose(backend, CallSignature(v.device.type, v.dtype, v.shape[-1]))
    if (
        name == "torch" and kernels_are_opaque()
    ):  # ``blockwise_torch.py`` writes in place, which transforms do not support
        return _differentiable(inputs, {"n_heads": n_heads, "top_k": top_k, "causal": causal})
    context, *_ = _run(*inputs, n_heads=n_heads, top_k=top_k, causal=causal, save_weights=save_weights, backend=name)
    return context


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: float | Tensor,
    recency: Tensor | None,
    n_heads: int,
    top_k: int,
    causal: bool,
) -> None:
    check_tensor(v, "v", "[B, S, V]")
    check_tensor(q, "q", "[T, B, S, D]", kind="real", like=v)
    check_tensor(k, "k", "[T, B, S, D]", kind="real", like=v)
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(
            f"resonance expects q and k of one shape [T, B, S, D], got {list(q.shape)} and {list(k.shape)}"
        )
    check_heads(q.shape[-1], n_heads)
    if v.ndim != 3 or v.shape[:2] != q.shape[1:3] or v.shape[2] % n_heads:
        raise ValueError(
            f"resonance expects v of shape [B, S, V] = [{q.shape[1]}, {q.shape[2]}, a multiple of {n_heads}], got {list(v.shape)}"
        )
    if q.shape[0] == 0:
        raise ValueError("resonance expects q and k [T, B, S, D] with at least one time step, got T = 0")
    as_count(top_k, "top_k")
    check_flags(causal=causal)
    check_scalar(temperature, "temperature", like=v)
    if recency is not None:
        check_shape(recency, "recency", "[H]", (n_heads,), like=v)


def _check_forward(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, recency: Tensor | None, *, n_heads: int, top_k: int,
    causal: bool, save_weights: bool, backend: str,
) -> None:  # fmt: skip
    _check(q, k, v, temperature, recency, n_heads, top_k, causal)


def _check_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, recency: Tensor | None, keys: Tensor,
    worst: Tensor, weights: Tensor, *, n_heads: int, top_k: int, causal: bool, needs_spike_grad: bool, backend: str,
) -> None:  # fmt: skip
    """Raise unless the tensors are those that the forward pass has saved; the selected keys must be positions."""
    _check(q, k, v, temperature, recency, n_heads, top_k, causal)
    check_shape(grad, "grad", "of v", tuple(v.shape), like=v)
    shapes = IMPLEMENTATIONS[backend].kernel().saved_shapes(q, n_heads, top_k, True)
    for name, saved, shape in zip(("keys", "worst", "weights"), (keys, worst, weights), shapes, strict=True):
        dtype = torch.int32 if name == "keys" else compute_dtype(v)
        check_shape(saved, name, "that the forward pass saves", tuple(shape), kind="real", like=v)
        if saved.dtype != dtype or not saved.is_contiguous():
            raise TypeError(
                f"{name} must be contiguous and of {dtype}, as the forward pass saves it, got {saved.dtype}"
            )
    if keys.is_cpu and keys.numel() and not bool(((keys >= -1) & (keys < q.shape[2])).all()):
        raise ValueError(f"keys must be positions below {q.shape[2]}, or -1 for none")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    recency: Tensor | None,
    *,
    n_heads: int,
    top_k: int,
    causal: bool,
    save_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = Arguments(q, k, v, temperature, recency, n_heads, top_k, causal)
    with without_autocast(v):
        return IMPLEMENTATIONS[backend].kernel().forward(arguments, save_weights)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    recency: Tensor | None,
    *,
    n_heads: int,
    top_k: int,
    causal: bool,
    save_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # ``worst``, the lowest selected score of each query, is empty if the backend saves the selected keys.
    keys, worst, weights = IMPLEMENTATIONS[backend].kernel().saved_shapes(q, n_heads, top_k, save_weights)
    return (
        v.new_empty(v.shape),
        q.new_empty(keys, dtype=torch.int32),
        temperature.new_empty(worst),
        temperature.new_empty(weights),
    )


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    recency: Tensor | None,
    keys: Tensor,
    worst: Tensor,
    weights: Tensor,
    *,
    n_heads: int,
    top_k: int,
    causal: bool,
    needs_spike_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = Arguments(q, k, v, temperature, recency, n_heads, top_k, causal)
    with without_autocast(v):
        return IMPLEMENTATIONS[backend].kernel().backward(grad, arguments, (keys, worst, weights), needs_spike_grad)


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    recency: Tensor | None,
    *saved: Tensor,
    needs_spike_grad: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k = (x.new_empty(x.shape if needs_spike_grad else 0) for x in (q, k))
    grad_recency = temperature.new_empty(0) if recency is None else torch.empty_like(recency)
    return grad_q, grad_k, v.new_empty(v.shape), torch.empty_like(temperature), grad_recency


def _save(ctx: Any, tensors: Sequence[Tensor | None], options: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = options


def _gradients(ctx: Any, grad: Tensor | None, *_: None, run: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    needed = ctx.needs_input_grad[:5]
    options = {name: option for name, option in ctx.options.items() if name != "save_weights"}
    gradients = run(grad, *ctx.saved_tensors, **options, needs_spike_grad=needed[0] or needed[1])
    return tuple(gradient if need else None for gradient, need in zip(gradients, needed, strict=True))


def _differentiable(tensors: Sequence[Any], options: dict[str, Any]) -> Tensor:
    q, k, v, temperature, recency = tensors
    dtype = compute_dtype(v)
    with without_autocast(v):
        return reference(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            options["n_heads"],
            options["top_k"],
            temperature,
            recency,
            options["causal"],
        ).to(v.dtype)


_run = register_op(
    "resonance",
    Kernel(_forward, _forward_fake),
    Kernel(_backward, _backward_fake),
    _save,
    _gradients,
    differentiable=_differentiable,
    checks=(_check_forward, _check_backward),
)
register_cost("resonance", resonance_cost)
