"""What happens to the state of a neuron when its module is moved or copied."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["cut", "moved"]


def moved(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A state after ``fn``, which moves a module's tensors; where ``fn`` takes bits away, it only changes the device."""
    if not isinstance(value, Tensor):
        return value
    after = fn(value)
    narrower = after.is_floating_point() and after.dtype.itemsize < value.dtype.itemsize
    return value.to(after.device) if narrower else after


def cut(value: Any) -> Any:
    """A state without the graph behind it; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value
