"""What happens to the state of a neuron when its module is moved or copied."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["cut", "moved"]


def moved(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A state where ``fn`` takes a module's tensors: on that device, in that dtype unless it has fewer bits.

    Only where is asked of ``fn``, not what: it may give memory that nobody has written, as ``to_empty`` does.
    """
    if not isinstance(value, Tensor):
        return value
    after = fn(value)
    if value.is_meta:  # has no data to move
        return value
    narrower = after.is_floating_point() and after.dtype.itemsize < value.dtype.itemsize
    return value.to(after.device, value.dtype if narrower else after.dtype)


def cut(value: Any) -> Any:
    """A state without the graph behind it; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value
