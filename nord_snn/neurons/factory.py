"""Neuron factories of layers, and runs from rest over whole sequences.

A factory is any callable ``neuron(n_features) -> nn.Module``: ``AssociativeLIFNode`` itself, or
``lambda n: LIFNode(step_mode="m")`` for SpikingJelly's node, which does not need the width. Any other module must take
and return a whole sequence ``[T, N, *, D]`` as one tensor, and start from rest. snnTorch's neurons take single time steps and
return tuples: wrap them in :class:`nord_snn.integrations.snntorch.MultiStep`.

``AssociativeLIFNode`` has 64 clusters by default, which must divide the width. For other widths set the number:
``neuron=lambda n: AssociativeLIFNode(n, n_clusters=8)``.

A module may say two things of itself:

``emits_binary_spikes``
    Class attribute or property. True: its ``forward`` returns exactly zeros and ones, so that layers which store spikes as
    bits need not check them, a check that waits for the GPU. It holds for subclasses that do not override ``forward``.
``update_cost(spikes) -> OpCost``
    Method. What the updates that gave ``spikes`` cost: multiplications, additions and bytes of state, see
    :class:`nord_snn.ops.OpCost`. :func:`nord_snn.monitor.profile_energy` asks every neuron, which is a subclass of
    SpikingJelly's ``BaseNode`` or of snnTorch's neurons. Neurons without it count as LIF neurons.
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
        n_features: D, their number.
        store_v_seq: whether the layer will read their membranes.

    Raises:
        TypeError: the factory is a class that takes no width, it did not return a module, or the layer reads membranes and
            the module has no ``store_v_seq``.
    """
    if isinstance(neuron, type) and issubclass(neuron, BaseNode) and not issubclass(neuron, AssociativeLIFNode):
        raise TypeError(
            f"{neuron.__name__} takes no width: pass a function of it, neuron=lambda n: {neuron.__name__}()"
        )
    layer = (neuron or AssociativeLIFNode)(n_features)
    if not isinstance(layer, nn.Module):
        raise TypeError(f"neuron(n_features) must return a torch.nn.Module, got {type(layer).__name__}")
    functional.set_step_mode(layer, "m")
    if store_v_seq:
        if not hasattr(layer, "store_v_seq"):
            raise TypeError(f"this layer reads membranes: {type(layer).__name__} must offer store_v_seq and v_seq")
        layer.store_v_seq = True
    return layer


def fire_from_rest(neuron: nn.Module, x_seq: Tensor) -> Tensor:
    """Return the spikes of ``neuron`` over the sequence ``x_seq [T, N, *, D]``, started from rest.

    The module's ``__call__`` runs, so hooks and monitors see it. Memories of the module and its children are restored
    afterwards. Modules that are neither ours nor SpikingJelly's are called as they are; managing their state is up to the
    caller.
    """
    with _whole_sequences(neuron):
        return _from_rest(neuron, x_seq)


@contextmanager
def _whole_sequences(neuron: nn.Module) -> Iterator[None]:
    """Set step mode ``"m"`` temporarily: ``set_step_mode`` on a network also sets the neurons in layers, whose input is whole."""
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
    saved = [
        (module, name, value)
        for module in stateful
        for name, value in module.named_memories()
        if name != "v_seq"  # a memory in SpikingJelly 0.0.0.0.14; the caller reads it after the run
    ]
    for module, name, _ in saved:
        setattr(module, name, reset_value(module, name))
    try:
        return neuron(x_seq)
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
