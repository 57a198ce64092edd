"""Several processes that train one network: what a rule changes must be the same in all of them."""

import torch
from torch import Tensor, distributed

__all__ = ["mean_over_ranks"]


def mean_over_ranks(x: Tensor | None, like: Tensor) -> Tensor | None:
    """The mean of ``x`` over all processes of ``torch.distributed``, which all call this; ``x`` where there is only one.

    A process without anything, None, counts as zeros of the shape of ``like``; None if none has anything.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return x
    there = torch.tensor([float(x is not None)], device=like.device)
    distributed.all_reduce(there)
    if not there.item():
        return None
    total = torch.zeros_like(like) if x is None else x.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
