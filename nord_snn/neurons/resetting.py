"""Reset networks whose neurons come from several libraries."""

from spikingjelly.activation_based import functional
from torch import nn

from nord_snn._compat.spikingjelly import clear_module_cache
from nord_snn.neurons.detection import is_snntorch

__all__ = ["reset"]


def reset(net: nn.Module) -> None:
    """Reset every stateful module in ``net`` (nord-snn's, SpikingJelly's and snnTorch's) to rest.

    Args:
        net: any module; its submodules are reset, too.

    Example:
        >>> import nord_snn, torch
        >>> from nord_snn.neurons import AssociativeLIFNode
        >>> node = AssociativeLIFNode(8, n_clusters=4, step_mode="m")
        >>> _ = node(torch.rand(5, 2, 8)); nord_snn.reset(node); node.v
        0.0
    """
    # reset_net caches its module list, which lacks neurons that were replaced after its first call.
    clear_module_cache(net)
    snntorch_neurons = [module for module in net.modules() if is_snntorch(module)]
    for module in snntorch_neurons:
        module.__dict__.pop("reset", None)  # snnTorch stores a tensor under this name, which SpikingJelly would call
    functional.reset_net(net)
    for module in snntorch_neurons:
        module.reset_mem()  # type: ignore[operator]
