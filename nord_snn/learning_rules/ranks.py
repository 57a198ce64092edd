"""Several processes that train one network: what a rule changes must be the same in all of them."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, distributed

__all__ = ["mean_over_ranks", "together"]

Result = TypeVar("Result")


def _alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def together(compute: Callable[[], Result], device: torch.device) -> Result:
    """What ``compute`` gives; where it raises in one process of ``torch.distributed`` all of them raise.

    Args:
        compute: all processes call this with theirs.
        device: one that the processes can exchange tensors of.

    Raises:
        Exception: what ``compute`` raised, here or, as a RuntimeError, in another process: else some would wait for ever.
    """
    if _alone():
        return compute()
    failed = torch.ones((), device=device)
    try:
        result = compute()
        failed.zero_()
    finally:
        distributed.all_reduce(failed)
    if failed.item():
        raise RuntimeError("a learning rule failed in another process")
    return result


def mean_over_ranks(x: Tensor | None, like: Tensor) -> Tensor | None:
    """The mean over all processes, which all call this; ``x`` itself where there is one.

    Args:
        x: what this process has, or None, which counts as zeros.
        like: lies on a device that the processes can exchange tensors of; what ``x`` would be shaped as, where it is None.

    Returns:
        None if no process has anything.
    """
    if _alone():
        return x
    there = torch.tensor(float(x is not None), device=like.device)
    distributed.all_reduce(there)
    if not there.item():
        return None
    total = torch.zeros_like(like) if x is None else x.detach().to(like.device, copy=True)
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
