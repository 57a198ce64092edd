"""Sums of products of outputs and inputs, for each synapse of a dense or a convolutional layer."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ConvGeometry", "dense"]


class ConvGeometry(NamedTuple):
    """The geometry of a convolution: which inputs connect to which outputs.

    Tuples have one entry per spatial dimension, of which there are one or two.

    Attributes:
        kernel_size: size of the kernel.
        stride: distance between two outputs, in input positions.
        padding: pairs (before, after) of input positions.
        dilation: distance between two taps of the kernel, in input positions.
        groups: number of groups of channels. Default: 1.
        padding_mode: as in ``torch.nn.Conv2d``. Default: ``"zeros"``.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial size of the output for a spatial size of the input."""
        return tuple(
            (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def correlate(self, post: Tensor, pre: Tensor) -> Tensor:
        """Return ``[C_out, C_in / groups, *kernel_size]`` from ``post [M, C_out, *]`` and ``pre [M, C_in, *]``.

        M is the number of summands, time steps times rows. The result sums, for each kernel tap, the products of the outputs
        and inputs that the tap connects. It is the gradient of a convolution with respect to the weight.
        """
        reversed_padding = [side for pair in reversed(self.padding) for side in pair]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(pre, reversed_padding, mode=mode) if any(reversed_padding) else pre
        weight = post.new_empty(post.shape[1], pre.shape[1] // self.groups, *self.kernel_size)  # only its shape is used
        zeros = [0] * len(self.kernel_size)
        only_weight = (False, True, False)
        return torch.ops.aten.convolution_backward(
            post, padded, weight, None, self.stride, zeros, self.dilation, False, zeros, self.groups, only_weight
        )[1]


def dense(post: Tensor, pre: Tensor) -> Tensor:
    """Return the sum of products ``[n_out, n_in]`` over the M summands of ``post [M, n_out]`` and ``pre [M, n_in]``."""
    return post.mT @ pre
