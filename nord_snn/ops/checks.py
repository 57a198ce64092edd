"""Argument checks that ops, layers and learning rules share, so that the same mistake always gives the same message."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Rational, Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

__all__ = [
    "as_count",
    "as_number",
    "as_state",
    "check_bounds",
    "check_channels",
    "check_dependence",
    "check_features",
    "check_flags",
    "check_heads",
    "check_numbers",
    "check_refractory_steps",
    "check_scalar",
    "check_shape",
    "check_storage",
    "check_tensor",
    "check_time_constants",
    "compute_dtype",
    "describe",
    "is_dense",
    "without_autocast",
]

_MOST = 2**63 - 1
State = TypeVar("State", bound=NamedTuple)


def describe(value: object) -> str:
    """Return a value in a few words, for a message: a tensor by shape and dtype, what has a long name by its class."""
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    short = value is None or isinstance(value, (bool, float, complex, str, bytes))
    if isinstance(value, int) and not isinstance(value, bool):
        short = value.bit_length() <= 128
    text = repr(value) if short else ""
    return text if 0 < len(text) <= 40 else type(value).__name__


def _describe_tensor(x: Tensor) -> str:
    if isinstance(x, (UninitializedParameter, UninitializedBuffer)):
        return "a parameter without a shape"
    if x.is_nested:
        return "a nested tensor"
    kind = "" if x.layout == torch.strided else f" in the layout {x.layout}"
    return f"{list(x.shape)} of {x.dtype}{kind}"


#: Classes whose check is fast: ``isinstance`` of a parameter takes longer than a small kernel's other checks together.
_PLAIN = {Tensor, torch.nn.Parameter}
_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def is_dense(x: Tensor) -> bool:
    """Return whether the elements of a tensor are all stored, in rows of one length: neither sparse nor nested nor lazy."""
    if type(x) in _PLAIN:
        return x.layout is torch.strided and not x.is_nested
    return (
        not x.is_nested
        and x.layout == torch.strided
        and not isinstance(x, (UninitializedParameter, UninitializedBuffer))
    )


def _is_floating(x: Tensor) -> bool:
    """Return whether a dtype is floating and computes: 8 bits do not."""
    return x.dtype in _FLOATING


_KINDS: dict[str, Callable[[Tensor], bool]] = {
    "floating-point": _is_floating,
    "real": lambda x: _is_floating(x) or not (x.is_floating_point() or x.is_complex() or x.is_quantized),
    "integer": lambda x: not (x.is_floating_point() or x.is_complex() or x.is_quantized or x.dtype == torch.bool),
}


def check_tensor(
    x: object, name: str, layout: str, *, kind: str = "floating-point", like: Tensor | None = None
) -> None:
    """Raise unless ``x`` is a dense tensor of a kind of dtype.

    Args:
        x: the argument to check.
        name: its name.
        layout: dimensions that are expected, for the message.
        kind: ``"floating-point"``, ``"integer"``, or ``"real"`` for any dtype that is neither complex nor quantised.
        like: a tensor whose device ``x`` must have; one element on the CPU goes with every device. Default: None, any.

    Raises:
        TypeError: ``x`` is not a tensor, not dense, or of another kind.
        ValueError: it is on another device.
    """
    if not isinstance(x, Tensor) or not is_dense(x) or not _KINDS[kind](x):
        article = "an" if kind == "integer" else "a"
        raise TypeError(f"{name} must be {article} {kind} tensor {layout}, dense, got {describe(x)}")
    if like is None or (x.is_cpu and like.is_cpu):
        return
    if x.device != like.device and not (x.ndim == 0 and x.device.type == "cpu"):
        raise ValueError(f"{name} must be on {like.device}, the device of the input, got {x.device}")


def check_storage(x: Tensor) -> None:
    """Raise a ValueError if the storage of a tensor on the CPU is smaller than its elements need."""
    if x.untyped_storage().nbytes() >= x.nbytes and not x.storage_offset():  # most tensors are their whole storage
        return
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    needed = (x.storage_offset() + last + 1) * x.element_size() if x.numel() else 0
    if x.untyped_storage().nbytes() < needed:
        raise ValueError(
            f"expected a tensor {list(x.shape)} with its data, got one whose storage was freed, as FSDP does between uses"
        )


def check_shape(x: object, name: str, layout: str, shape: tuple[int, ...], *, kind: str = "floating-point",
                like: Tensor | None = None) -> None:  # fmt: skip
    """Raise as :func:`check_tensor` does, or a ValueError unless the shape is ``shape``."""
    check_tensor(x, name, layout, kind=kind, like=like)
    assert isinstance(x, Tensor)
    if x.shape != shape:
        raise ValueError(f"{name} must have the shape {layout} = {list(shape)}, got {list(x.shape)}")


def check_features(
    x: Tensor, n_features: int, caller: str, layout: str = "[T, N, *, D]", name: str | None = None
) -> None:
    """Raise unless ``x`` is a floating tensor of the layout's rank whose last dimension is ``n_features``.

    Args:
        x: the input to check.
        n_features: expected width D.
        caller: name of the calling op or layer, for the message.
        layout: dimensions in the notation of the docstrings; ``*`` stands for any number of dimensions.
        name: name of the argument. Default: None, the only input of the caller.

    Raises:
        TypeError: ``x`` is not a tensor, or not a floating and dense one.
        ValueError: the rank or width is wrong, or T = 0.
    """
    _check_input(x, caller, layout, name)
    names = [part.strip() for part in layout.strip("[]").split(",")]
    fixed = len(names) - ("*" in names)
    wrong_rank = x.ndim < fixed if "*" in names else x.ndim != fixed
    shape = f"{'' if name is None else f'{name} of '}shape {layout}"
    if wrong_rank or x.shape[-1] != n_features:
        raise ValueError(f"{caller} expects {shape} with {names[-1]} = {n_features}, got {list(x.shape)}")
    if names[0] == "T" and x.shape[0] == 0:
        raise ValueError(f"{caller} expects {shape} with at least one time step, got T = 0")


def check_channels(
    x: Tensor, n_features: int, caller: str, layout: str = "[T, N, D, M]", name: str | None = None
) -> None:
    """Raise unless ``x`` is a floating tensor of the layout's rank, with ``n_features`` as dimension 2 and T >= 1.

    The arguments are those of :func:`check_features`.

    Raises:
        TypeError: ``x`` is not a tensor, or not a floating and dense one.
        ValueError: the rank or D is wrong, or T = 0.
    """
    _check_input(x, caller, layout, name)
    if x.ndim != 4 or x.shape[2] != n_features or x.shape[0] == 0:
        channels = layout.strip("[]").split(", ")[2]
        shape = f"{'' if name is None else f'{name} of '}shape {layout}"
        raise ValueError(f"{caller} expects {shape} with T >= 1 and {channels} = {n_features}, got {list(x.shape)}")


def _check_input(x: Tensor, caller: str, layout: str, name: str | None) -> None:
    if not isinstance(x, Tensor) or not is_dense(x) or not _is_floating(x):
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) and is_dense(x) else describe(x)
        what = "" if name is None else f"{name}, "
        raise TypeError(f"{caller} expects {what}a floating-point tensor of shape {layout}, dense, got {got}")


def check_heads(n_features: int, n_heads: int, name: str = "n_heads") -> None:
    """Raise unless ``n_heads`` is a whole number and ``n_features`` a multiple of it.

    Raises:
        TypeError: ``n_heads`` is not a whole number.
        ValueError: it does not divide ``n_features``.
    """
    as_count(n_heads, name)
    if n_features % n_heads:
        raise ValueError(
            f"the width D must be a multiple of the number of heads H ({name}), got D = {n_features} and H = {n_heads}"
        )


def check_scalar(value: float | Tensor, name: str, like: Tensor | None = None) -> None:
    """Raise unless ``value`` is a finite number, or a floating tensor of one element.

    Raises:
        TypeError: it is neither a number nor a floating tensor.
        ValueError: it has another number of elements, or is not finite.
    """
    if not isinstance(value, Tensor):
        as_number(value, name)
        return
    check_tensor(value, name, "of one element", like=like)
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {list(value.shape)}")


def as_number(value: Any, name: str) -> float:
    """Return a finite number as a float.

    Raises:
        TypeError: ``value`` is neither a whole number nor a float; True, False and fractions are not.
        ValueError: it is not finite.
    """
    if type(value) is float and math.isfinite(value):
        return value
    is_number = isinstance(value, Integral) or (isinstance(value, Real) and not isinstance(value, Rational))
    if not is_number or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if isinstance(value, Integral) and not -_MOST <= int(value) <= _MOST:
        raise ValueError(f"{name} must be a number of at most 63 bits, or a float, got {describe(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {describe(value)}")
    return float(value)


def as_count(value: Any, name: str, least: int = 1, most: int = _MOST) -> int:
    """Return a whole number from ``least`` to ``most`` as an int.

    Raises:
        TypeError: ``value`` is not a whole number; True and False are not.
        ValueError: it is out of its range.
    """
    if type(value) is not int and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a whole number, got {describe(value)}")
    count = int(value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {describe(value)}")
    if count > most:
        raise ValueError(f"{name} must be at most {most}, got {describe(value)}")
    return count


def check_flags(**flags: bool) -> None:
    """Raise a TypeError unless all are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {describe(value)}")


def as_state(state: Any, kind: type[State]) -> State:
    """Return a state as its class; a tuple of as many parts is one, too.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(state, tuple) or len(state) != len(kind._fields):
        raise TypeError(
            f"state must be {kind.__name__}({', '.join(kind._fields)}), a tuple of these, or None, got {describe(state)}"
        )
    return state if isinstance(state, kind) else kind(*state)


def check_time_constants(**time_constants: float) -> None:
    """Raise unless all time constants are positive, finite numbers.

    Raises:
        TypeError: one is not a number.
        ValueError: one is not positive, or not finite.
    """
    check_numbers(**time_constants)
    for name, tau in time_constants.items():
        if not tau > 0:
            raise ValueError(f"time constants must be positive, got {name} = {tau}")


def check_numbers(**constants: float) -> None:
    """Raise unless all constants are finite numbers. SpikingJelly also accepts functions of the weight.

    Raises:
        TypeError: one is not a number.
        ValueError: one is not finite.
    """
    for name, value in constants.items():
        as_number(value, name)


def check_refractory_steps(steps: int) -> None:
    """Raise a ValueError unless ``steps`` is a whole number from 0 to 2^24, up to which float32 has all whole numbers."""
    is_whole = type(steps) is int or (isinstance(steps, Integral) and not isinstance(steps, bool))
    if not is_whole or not 0 <= steps <= 2**24:
        raise ValueError(f"refractory_steps must be a whole number from 0 to 2^24, got {describe(steps)}")


def check_bounds(bounds: tuple[float, float]) -> None:
    """Raise unless these are two numbers, the lower one first; an infinite one is no bound.

    Raises:
        TypeError: they are not two numbers.
        ValueError: the lower bound is not below the upper one.
    """
    numbers = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    if not numbers or not all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in bounds):
        raise TypeError(f"bounds must be two numbers (lower, upper), got {describe(bounds)}")
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (lower, upper) with lower < upper, got {bounds}")


def check_dependence(bounds: tuple[float, float], mu: float) -> None:
    """Raise unless lower < upper and ``mu``, the exponent of the weight dependence, is a finite number, at least 0.

    Raises:
        TypeError: one of them is not a number.
        ValueError: one is out of its range, or a bound is infinite with ``mu`` above 0.
    """
    check_bounds(bounds)
    if as_number(mu, "mu") < 0:
        raise ValueError(f"mu must be at least 0, got {mu}")
    if mu > 0 and not (math.isfinite(bounds[0]) and math.isfinite(bounds[1])):
        raise ValueError(f"bounds must be finite if mu is above 0, got {bounds} with mu = {mu}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of states and sums: float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context that disables autocast on the device of ``x``."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)  # torch does not support the query for meta
    return torch.autocast(device, enabled=False) if enabled else nullcontext()
