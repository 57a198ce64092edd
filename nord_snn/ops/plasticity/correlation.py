"""Sums of products of outputs and inputs over the synapses of a dense or a convolutional layer."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ConvGeometry", "dense"]


class ConvGeometry(NamedTuple):
    """The geometry of a convolution: which inputs connect to which outputs.

    Attributes:
        kernel_size: size of the kernel. Each field has one entry per spatial dimension, of which there are one or two.
        stride: positions between two outputs.
        padding: pairs (before, after), first dimension first.
        dilation: distance between two taps of the kernel.
        groups: number of groups of channels.
        padding_mode: as in ``torch.nn.Conv2d``.
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

        Each kernel tap sums the products of the outputs and the inputs that it connects. This is the gradient of a
        convolution with respect to its weight.
        """
        reversed_padding = [side for pair in reversed(self.padding) for side in pair]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(pre, reversed_padding, mode=mode) if any(reversed_padding) else pre
        shape = post.new_empty(post.shape[1], pre.shape[1] // self.groups, *self.kernel_size)
        none = [0] * len(self.kernel_size)
        outputs = (False, True, False)
        return torch.ops.aten.convolution_backward(
            post, padded, shape, None, self.stride, none, self.dilation, False, none, self.groups, outputs
        )[1]


def dense(post: Tensor, pre: Tensor) -> Tensor:
    """Return the sum of products over M, ``[n_out, n_in]``, from ``post [M, n_out]`` and ``pre [M, n_in]``."""
    return post.mT @ pre
