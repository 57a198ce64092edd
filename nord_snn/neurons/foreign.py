"""Neurons of libraries that may not be installed, known by their looks."""

from torch import nn

__all__ = ["is_snntorch"]


def is_snntorch(module: nn.Module) -> bool:
    """Whether it is one of snnTorch's neurons, or derived from one."""
    libraries = (kind.__module__.partition(".")[0] for kind in type(module).__mro__)
    return "snntorch" in libraries and hasattr(module, "reset_mem")
