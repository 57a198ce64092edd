"""Surrogate derivatives of the spike: the table that the kernels of all backends (Numba, Triton, CuPy) implement.

A spike is the step function ``s = 1 where x >= 0 else 0`` of ``x = u - threshold``, with u the membrane potential. The
derivative of a step is zero almost everywhere, so the backward pass uses the derivative of a smooth function, the
*primitive*, instead (Neftci, Mostafa and Zenke 2019). Networks use only the derivative; tests compare it with finite
differences of the primitive.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nord_snn.ops.checks import as_number, check_tensor, describe

__all__ = ["SURROGATES", "Surrogate", "SurrogateLike", "resolve_surrogate", "spike"]


class Surrogate(NamedTuple):
    """A smooth function of ``(x, alpha)`` and its derivative with respect to ``x``."""

    primitive: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]


SURROGATES: dict[str, Surrogate] = {
    # The published Nord language model: a / (2 pi (1 + (a x)^2)), half of SpikingJelly's ATan at alpha = 2 a / pi.
    "nord_atan": Surrogate(
        lambda x, a: torch.atan(a * x) / (2 * math.pi) + 0.5,
        lambda x, a: a / (2 * math.pi * (1 + (a * x).square())),
    ),
    # Fang et al. 2021 (PLIF); equals SpikingJelly's ATan.
    "atan": Surrogate(
        lambda x, a: torch.atan(math.pi / 2 * a * x) / math.pi + 0.5,
        lambda x, a: a / 2 / (1 + (math.pi / 2 * a * x).square()),
    ),
    # Equals SpikingJelly's and snnTorch's Sigmoid.
    "sigmoid": Surrogate(
        lambda x, a: torch.sigmoid(a * x),
        lambda x, a: a * torch.sigmoid(a * x) * torch.sigmoid(-a * x),
    ),
    # Zenke and Ganguli 2018 (SuperSpike); equals snnTorch's fast_sigmoid.
    "fast_sigmoid": Surrogate(
        lambda x, a: x / (1 + a * x.abs()),
        lambda x, a: 1 / (1 + a * x.abs()).square(),
    ),
}

#: A name in :data:`SURROGATES`, or a function from ``u - threshold`` to spikes with its own backward pass, such as a surrogate
#: module of SpikingJelly.
SurrogateLike = str | Callable[[Tensor], Tensor]


class _Spike(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, derivative: Callable[[Tensor, float], Tensor], alpha: float) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.derivative, ctx.alpha = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * ctx.derivative(x, ctx.alpha), None, None


class _SpikeWithTangent(_Spike):
    """A spike that also has a forward-mode derivative, which torch.compile cannot trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangents[0] * ctx.derivative(x, ctx.alpha)


def _spike_function() -> type[_Spike]:
    return _Spike if torch.compiler.is_compiling() else _SpikeWithTangent


def spike(x: Tensor, surrogate: SurrogateLike = "nord_atan", alpha: float = 4.0) -> Tensor:
    """Return 1 where ``x >= 0``, else 0; the backward pass uses the surrogate derivative.

    Args:
        x: membrane potential minus threshold, any shape.
        surrogate: a name from :data:`SURROGATES`, or a callable of ``x`` with its own backward pass.
        alpha: factor of ``x`` in a named surrogate: the larger, the narrower its derivative. Not used for a callable.

    Returns:
        0 or 1 in the shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not a dense floating tensor, ``alpha`` not a number, or ``surrogate`` neither a name nor a callable.
        ValueError: the name is not in the table, or ``alpha`` is not finite.

    Example:
        >>> import torch
        >>> spike(torch.tensor([-0.1, 0.0, 0.1]))
        tensor([0., 1., 1.])
    """
    check_tensor(x, "x", "[*]")
    as_number(alpha, "alpha")
    return resolve_surrogate(surrogate, alpha)(x)


def _checked_spikes(spikes: Any, x: Tensor) -> Tensor:
    if not isinstance(spikes, Tensor) or spikes.shape != x.shape:
        raise TypeError(
            f"surrogate must return a tensor of the shape of its input, {list(x.shape)}, got {describe(spikes)}"
        )
    return spikes


def resolve_surrogate(surrogate: SurrogateLike, alpha: float) -> Callable[[Tensor], Tensor]:
    """Return the spike function of a name, or the callable itself.

    Raises:
        TypeError: it is neither a name nor a callable.
        ValueError: the name is unknown.
    """
    if callable(surrogate):
        return lambda x: _checked_spikes(surrogate(x), x)
    if not isinstance(surrogate, str):
        raise TypeError(f"surrogate must be a name or a callable, got {describe(surrogate)}")
    if surrogate not in SURROGATES:
        raise ValueError(f"unknown surrogate {surrogate!r}: expected one of {sorted(SURROGATES)} or a callable")
    derivative = SURROGATES[surrogate].derivative
    return lambda x: _spike_function().apply(x, derivative, alpha)
