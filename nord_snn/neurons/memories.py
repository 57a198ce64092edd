"""What happens to the state of a neuron when its module is moved or copied."""

from typing import Any

from torch import Tensor

__all__ = ["cut", "keep_precision"]


def keep_precision(before: Tensor, after: Tensor) -> Tensor:
    """A state that was moved: where the move took bits away, the one from before on the new device."""
    narrower = after.is_floating_point() and after.dtype.itemsize < before.dtype.itemsize
    return before.to(after.device) if narrower else after


def cut(value: Any) -> Any:
    """A state without the graph behind it; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value
