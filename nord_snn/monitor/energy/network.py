"""The weights of a network and their bytes, and notes on what an energy profile of it does not show."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nord_snn.ops.costs import tensor_bytes

__all__ = ["CONNECTIONS", "count_weights", "footprint", "notes_on", "own_tensors"]

#: Layers whose weights NeuroBench counts.
CONNECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase)


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors that are plain attributes of a module, as the masked weight that ``torch.nn.utils.prune`` sets."""
    return [value for value in vars(module).values() if isinstance(value, Tensor)]


def footprint(net: nn.Module) -> int | None:
    """Return the bytes of all parameters and buffers; None if some are lazy, so that their shapes are not known yet."""
    tensors = (*net.parameters(), *net.buffers())
    return None if any(map(is_lazy, tensors)) else sum(map(tensor_bytes, tensors))


def count_weights(net: nn.Module) -> tuple[int, int]:
    """Return the number of weights in :data:`CONNECTIONS` and the number of zeros in them; biases count in recurrent modules."""
    weights: list[Tensor] = []
    for module in net.modules():
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            weights += module.parameters(recurse=False)
        elif isinstance(module, CONNECTIONS):
            weights += [
                x for x in own_tensors(module) or module.parameters(recurse=False) if not is_lazy(x) and x.ndim > 1
            ]
    return sum(weight.numel() for weight in weights), sum(int((weight == 0).sum()) for weight in weights)


def notes_on(net: nn.Module, padded: int, positions: int) -> list[str]:
    """Return sentences about what the figures of a profile do not show.

    Args:
        net: the network.
        padded: number of padded positions in all its calls.
        positions: number of all positions.
    """
    notes = []
    scripts = [name for name, module in net.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    outermost = [name for name in scripts if not any(_contains(other, name) for other in scripts)]
    if outermost:
        names = ", ".join(f"'{name}'" if name else "the network" for name in outermost)
        notes.append(
            f"ScriptModules: {names}. Hooks do not run inside them: their products are counted without the names of the "
            "modules that compute them, and their neurons as elementwise operations."
        )
    if padded:
        notes.append(
            f"Padding: {padded:,} of {positions:,} positions of attention_mask. It is computed, so it is counted: linear maps, "
            "neurons and elementwise operations of these positions are in all figures."
        )
    return notes


def _contains(outer: str, inner: str) -> bool:
    return outer != inner and (not outer or inner.startswith(f"{outer}."))
