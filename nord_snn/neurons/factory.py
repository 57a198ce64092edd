"""How layers take neurons: a factory makes them, and they run from rest on whole sequences.

A factory is any callable ``neuron(n_features) -> nn.Module``, so ``AssociativeLIFNode`` itself is one, and so is
``lambda n: LIFNode(step_mode="m")`` around SpikingJelly's node, which does not need the width. Any other module must take
and return a whole sequence ``[T, N, *, D]`` as one tensor, and start it from rest; snnTorch's neurons, which take single
steps and return tuples, do so inside :class:`nord_snn.integrations.snntorch.MultiStep`.

``AssociativeLIFNode`` itself has 64 clusters, which must divide the width. For other widths say how many:
``neuron=lambda n: AssociativeLIFNode(n, n_clusters=8)``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from spikingjelly.activation_based import base, functional
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from nord_snn._compat.spikingjelly import reset_value
from nord_snn.neurons.associative_lif import AssociativeLIFNode

__all__ = ["NeuronFactory", "fire_from_rest", "make_neuron"]

NeuronFactory = Callable[[int], nn.Module]


def make_neuron(neuron: NeuronFactory | None, n_features: int, *, store_v_seq: bool = False) -> nn.Module:
    """Make the neurons of a layer, in step mode ``"m"``.

    Args:
        neuron: the factory; None for ``AssociativeLIFNode`` with its defaults.
        n_features: width to make them for.
        store_v_seq: whether the layer will read their membranes.

    Raises:
        TypeError: the factory is a class that takes no width, it returned no module, or membranes are needed and the module
            offers no ``store_v_seq``.
    """
    if isinstance(neuron, type) and issubclass(neuron, BaseNode) and not issubclass(neuron, AssociativeLIFNode):
        raise TypeError(
            f"{neuron.__name__} takes no width: pass a function of it, neuron=lambda n: {neuron.__name__}()"
        )
    made = (neuron or AssociativeLIFNode)(n_features)
    if not isinstance(made, nn.Module):
        raise TypeError(f"neuron(n_features) must return a torch.nn.Module, got {type(made).__name__}")
    functional.set_step_mode(made, "m")
    if store_v_seq:
        if not hasattr(made, "store_v_seq"):
            raise TypeError(f"this layer reads membranes: {type(made).__name__} must offer store_v_seq and v_seq")
        made.store_v_seq = True
    return made


def fire_from_rest(neuron: nn.Module, x_seq: Tensor) -> Tensor:
    """Spikes of ``neuron`` over the sequence ``x_seq [T, N, *, D]``, started from rest.

    The module is called as a module, so hooks and monitors see it, and memories that it or its children hold are left as
    they were. A neuron that is neither ours nor SpikingJelly's is simply called: its state is its owner's affair.
    """
    with _whole_sequences(neuron):
        return _from_rest(neuron, x_seq)


@contextmanager
def _whole_sequences(neuron: nn.Module) -> Iterator[None]:
    """Step mode ``"m"`` for the time being: ``set_step_mode`` on a network reaches into the layers, whose input stays whole."""
    modes = [(module, module.step_mode) for module in neuron.modules() if hasattr(module, "step_mode")]
    if all(mode == "m" for _, mode in modes):
        yield
        return
    functional.set_step_mode(neuron, "m")
    try:
        yield
    finally:
        for module, mode in modes:
            module.step_mode = mode


def _from_rest(neuron: nn.Module, x_seq: Tensor) -> Tensor:
    if isinstance(neuron, AssociativeLIFNode):
        return neuron(x_seq, stateless=True)
    stateful = [module for module in neuron.modules() if isinstance(module, base.MemoryModule)]
    held = [
        (module, name, value)
        for module in stateful
        for name, value in module.named_memories()
        if name != "v_seq"  # a memory in SpikingJelly 0.0.0.0.14, and what the caller may want to read
    ]
    for module, name, _ in held:
        setattr(module, name, reset_value(module, name))
    try:
        return neuron(x_seq)
    finally:
        for module, name, value in held:
            setattr(module, name, value)
