"""nord-snn: the five mechanisms of the Nord spiking language model as parts for any spiking network.

The parts live one level down and are imported from there: :mod:`nord_snn.neurons`, :mod:`nord_snn.layers`,
:mod:`nord_snn.learning_rules`, :mod:`nord_snn.monitor`, and the pure functions under them in :mod:`nord_snn.ops`.
"""

from spikingjelly.activation_based import functional
from torch import nn

from nord_snn._compat.spikingjelly import forget_module_list
from nord_snn._version import __version__
from nord_snn.neurons.foreign import is_snntorch

__all__ = ["__version__", "reset"]


def reset(net: nn.Module) -> None:
    """Put every stateful module in ``net`` (ours, SpikingJelly's and snnTorch's) back to rest.

    Args:
        net: any module; its submodules are searched too.

    Example:
        >>> import nord_snn, torch
        >>> from nord_snn.neurons import AssociativeLIFNode
        >>> node = AssociativeLIFNode(8, n_clusters=4, step_mode="m")
        >>> _ = node(torch.rand(5, 2, 8)); nord_snn.reset(node); node.v
        0.0
    """
    # The module list that reset_net caches would hide neurons that were swapped in after the first call.
    forget_module_list(net)
    foreign = [module for module in net.modules() if is_snntorch(module)]
    for module in foreign:
        module.__dict__.pop("reset", None)  # a tensor, which SpikingJelly would call
    functional.reset_net(net)
    for module in foreign:
        module.reset_mem()  # type: ignore[operator]
