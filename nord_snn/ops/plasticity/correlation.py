"""How a synapse pairs its inputs with its outputs: every input with every output, or as a convolution does."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ConvGeometry", "dense"]


class ConvGeometry(NamedTuple):
    """Which inputs of a convolution meet which outputs.

    Attributes:
        kernel_size: extent of the kernel, one number for each of the one or two spatial dimensions, as for all others.
        stride: steps between two outputs.
        padding: added in front and behind, as pairs, the first dimension first.
        dilation: distance of two taps of the kernel.
        groups: into which the channels are divided.
        padding_mode: what is padded with, as ``torch.nn.Conv2d`` names it.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for a spatial size of the input."""
        return tuple(
            (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def correlate(self, post: Tensor, pre: Tensor) -> Tensor:
        """``post [M, C_out, *]``, ``pre [M, C_in, *]`` -> ``[C_out, C_in / groups, *kernel_size]``.

        Every tap of the kernel sums the products of the outputs with the inputs that it joins them to: the gradient of a
        convolution by its weight.
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
    """``post [M, n_out]``, ``pre [M, n_in]`` -> ``[n_out, n_in]``."""
    return post.mT @ pre
