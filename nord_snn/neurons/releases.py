"""What differs between SpikingJelly 2 and 0.0.0.0.14, the release that most published code runs on."""

import copy
from typing import Any

from spikingjelly.activation_based import base, functional
from torch import nn

__all__ = ["forget_module_list", "reset_value"]


def reset_value(module: base.MemoryModule, name: str) -> Any:
    """What ``reset()`` would put a memory back to."""
    if hasattr(module, "get_reset_value"):
        return module.get_reset_value(name)
    return copy.deepcopy(module._memories_rv[name])


def forget_module_list(net: nn.Module) -> None:
    """Have ``reset_net`` look for stateful modules anew: release 2 caches what it found at the first call."""
    if hasattr(functional, "invalidate_reset_cache"):
        functional.invalidate_reset_cache(net)
