"""Convert stored states to tensors that fit an input."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["state_tensor"]


def state_tensor(state: Any, x: Tensor, step_shape: torch.Size, dtype: torch.dtype, owner: str) -> Tensor:
    """Return a stored state as a tensor of one time step; a number is the state of all neurons.

    Args:
        state: a number or a tensor.
        x: the input; the result is on its device.
        step_shape: shape of one time step of the input, and of the result.
        dtype: dtype of the result.
        owner: name of the module, for error messages.

    Raises:
        ValueError: the state has another shape, or no data.
    """
    if not isinstance(state, Tensor):
        return x.new_full(step_shape, state, dtype=dtype)
    if state.shape != step_shape:
        raise ValueError(
            f"{owner} has state of shape {list(state.shape)}, but got input of shape {list(step_shape)} per time step: call "
            "reset() (or functional.reset_net) before a batch of another shape"
        )
    if state.is_meta and not x.is_meta:
        raise ValueError(f"{owner} has state without data (device meta): call reset() before it runs")
    return state.to(device=x.device, dtype=dtype)
