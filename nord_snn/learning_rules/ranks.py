"""Several processes that train one network: what a rule changes must be the same in all of them."""

from collections.abc import Callable

import torch
from torch import Tensor, distributed

__all__ = ["mean_over_ranks"]


def mean_over_ranks(compute: Callable[[], Tensor | None], like: Tensor) -> Tensor | None:
    """The mean over all processes of ``torch.distributed``, which all call this; what ``compute`` gives where there is one.

    Args:
        compute: gives what this process has, or None, which counts as zeros.
        like: what has the same shape and lies on a device that the processes can exchange tensors of.

    Returns:
        None if no process has anything.

    Raises:
        Exception: what ``compute`` raised, here or, as a RuntimeError, in another process: else some would wait for ever.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return compute()
    x, error = None, None
    try:
        x = compute()
    except Exception as raised:
        error = raised
    said = torch.tensor([float(x is not None), float(error is not None)], device=like.device)
    distributed.all_reduce(said)
    if error is not None:
        raise error
    there, failed = said.tolist()
    if failed:
        raise RuntimeError("a learning rule failed in another process")
    if not there:
        return None
    total = torch.zeros_like(like) if x is None else x.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
