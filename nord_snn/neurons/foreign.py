"""Neurons of libraries that may not be installed, known by their looks."""

from torch import nn

__all__ = ["is_snntorch", "runs_snntorch"]


def is_snntorch(module: nn.Module) -> bool:
    """Whether it is one of snnTorch's neurons, or derived from one."""
    libraries = (kind.__module__.partition(".")[0] for kind in type(module).__mro__)
    return "snntorch" in libraries and hasattr(module, "reset_mem")


def runs_snntorch(module: nn.Module) -> bool:
    """Whether it is a :class:`nord_snn.integrations.snntorch.MultiStep`, which runs one of them over whole sequences."""
    return type(module).__name__ == "MultiStep" and any(is_snntorch(child) for child in module.children())
