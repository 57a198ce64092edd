"""Collectives of learning rules: weight changes must be equal in all processes that train one network."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, distributed

__all__ = ["check_same_on_all_ranks", "mean_over_ranks", "raise_on_all_ranks"]

Result = TypeVar("Result")


def _single_process() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def raise_on_all_ranks(compute: Callable[[], Result], device: torch.device) -> Result:
    """Return ``compute()``; if it raises in one process of ``torch.distributed``, raise in all of them.

    All processes must call this. Otherwise the next collective would wait for the failed process.

    Args:
        compute: function without arguments.
        device: a device that the process group supports.

    Raises:
        Exception: ``compute`` raised it in this process.
        RuntimeError: ``compute`` raised in another process.
    """
    if _single_process():
        return compute()
    failed = torch.ones((), device=device)
    try:
        result = compute()
        failed.zero_()
    finally:
        distributed.all_reduce(failed)
    if failed.item():
        raise RuntimeError("a learning rule failed in another process, whose error says why")
    return result


def check_same_on_all_ranks(value: bool, device: torch.device, message: str) -> None:
    """Raise ValueError in all processes if ``value`` differs between them. All processes must call this.

    Args:
        value: a value that decides which collectives follow.
        device: a device that the process group supports.
        message: message of the error.
    """
    if _single_process():
        return
    n_true = torch.tensor(float(value), device=device)
    distributed.all_reduce(n_true)
    if n_true.item() not in (0, distributed.get_world_size()):
        raise ValueError(message)


def mean_over_ranks(x: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the mean of ``x`` over all processes, or ``x`` itself in a single process. All processes must call this.

    Args:
        x: the tensor of this process, or None, which counts as zeros.
        like: a tensor of the shape of ``x``, on a device that the process group supports.

    Returns:
        The mean; None if ``x`` is None in every process.
    """
    if _single_process():
        return x
    n_present = torch.tensor(float(x is not None), device=like.device)
    distributed.all_reduce(n_present)
    if not n_present.item():
        return None
    total = torch.zeros_like(like) if x is None else x.detach().to(like.device, copy=True)
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
