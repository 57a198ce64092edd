"""Argument checks that ops and layers share, so that the same mistake always gives the same message."""

from contextlib import AbstractContextManager, nullcontext
from numbers import Integral

import torch
from torch import Tensor

__all__ = [
    "check_bounds",
    "check_channels",
    "check_dependence",
    "check_features",
    "check_heads",
    "check_numbers",
    "check_refractory_steps",
    "check_scalar",
    "check_time_constants",
    "compute_dtype",
    "without_autocast",
]


def check_features(x: Tensor, n_features: int, caller: str, layout: str = "[T, N, *, D]") -> None:
    """Raise unless ``x`` is a floating tensor of the layout's rank whose last dimension is ``n_features``.

    Args:
        x: the input to check.
        n_features: expected width D.
        caller: name of the calling op or layer, for the message.
        layout: dimensions in the notation of the docstrings; ``*`` stands for any number of dimensions.

    Raises:
        TypeError: ``x`` is not a tensor, or not a floating one.
        ValueError: the rank or width is wrong, or T = 0.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{caller} expects a tensor of shape {layout}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{caller} expects a floating-point tensor of shape {layout}, got dtype {x.dtype}")
    names = [name.strip() for name in layout.strip("[]").split(",")]
    fixed = len(names) - ("*" in names)
    wrong_rank = x.ndim < fixed if "*" in names else x.ndim != fixed
    if wrong_rank or x.shape[-1] != n_features:
        raise ValueError(f"{caller} expects shape {layout} with {names[-1]} = {n_features}, got {list(x.shape)}")
    if names[0] == "T" and x.shape[0] == 0:
        raise ValueError(f"{caller} expects shape {layout} with at least one time step, got T = 0")


def check_channels(x: Tensor, n_features: int, caller: str, layout: str = "[T, N, D, M]") -> None:
    """Raise unless ``x`` is a floating tensor of the layout's rank, with ``n_features`` as dimension 2 and T >= 1.

    The arguments are those of :func:`check_features`.

    Raises:
        TypeError: ``x`` is not a tensor, or not a floating one.
        ValueError: the rank or D is wrong, or T = 0.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{caller} expects a floating-point tensor of shape {layout}, got {got}")
    if x.ndim != 4 or x.shape[2] != n_features or x.shape[0] == 0:
        channels = layout.strip("[]").split(", ")[2]
        raise ValueError(
            f"{caller} expects shape {layout} with T >= 1 and {channels} = {n_features}, got {list(x.shape)}"
        )


def check_heads(n_features: int, n_heads: int) -> None:
    """Raise a ValueError unless ``n_features`` is a multiple of ``n_heads``."""
    if n_heads < 1 or n_features % n_heads:
        raise ValueError(
            f"the width D must be a multiple of the number of heads H, got D = {n_features} and H = {n_heads}"
        )


def check_scalar(value: float | Tensor, name: str) -> None:
    """Raise a ValueError if ``value`` is a tensor without exactly one element."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {list(value.shape)}")


def check_time_constants(**time_constants: float) -> None:
    """Raise unless all time constants are positive numbers.

    Raises:
        TypeError: one is not a number.
        ValueError: one is not positive.
    """
    check_numbers(**time_constants)
    for name, tau in time_constants.items():
        if not tau > 0:
            raise ValueError(f"time constants must be positive, got {name} = {tau}")


def check_numbers(**constants: float) -> None:
    """Raise a TypeError unless all constants are numbers. SpikingJelly also accepts functions of the weight."""
    for name, value in constants.items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_refractory_steps(steps: int) -> None:
    """Raise a ValueError unless ``steps`` is a whole number from 0 to 2^24, up to which float32 has all whole numbers."""
    if not isinstance(steps, Integral) or isinstance(steps, bool) or not 0 <= steps <= 2**24:
        raise ValueError(f"refractory_steps must be a whole number from 0 to 2^24, got {steps!r}")


def check_bounds(bounds: tuple[float, float]) -> None:
    """Raise a ValueError unless the lower bound is below the upper one."""
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (lower, upper) with lower < upper, got {bounds}")


def check_dependence(bounds: tuple[float, float], mu: float) -> None:
    """Raise a ValueError unless lower < upper and ``mu``, the exponent of the weight dependence, is at least 0."""
    check_bounds(bounds)
    if not mu >= 0:
        raise ValueError(f"mu must be at least 0, got {mu}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of states and sums: float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context that disables autocast on the device of ``x``."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)  # torch does not support the query for meta
    return torch.autocast(device, enabled=False) if enabled else nullcontext()
