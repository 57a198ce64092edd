"""Make the neurons of a layer from a factory, and run them from rest over whole sequences.

A factory is any callable ``neuron(n_features) -> nn.Module``, with ``n_features`` the number of neurons D:
``AssociativeLIFNode`` itself, or ``lambda n: LIFNode(step_mode="m")`` for SpikingJelly's node, which needs no D. A module
that is neither nord-snn's nor SpikingJelly's must take and return a whole sequence ``[T, N, *, D]`` as one tensor, and start
each call from rest. snnTorch's neurons take single time steps and return tuples: wrap them in
:class:`nord_snn.integrations.snntorch.MultiStep`.

A module may define two optional attributes:

``emits_binary_spikes``
    Class attribute or property. True: ``forward`` returns exactly zeros and ones. Layers that store spikes as bits then skip
    the check of the values, which would synchronise with the GPU. A subclass that overrides ``forward`` must define the
    attribute again; otherwise it counts as False.
``update_cost(spikes) -> OpCost``
    Method. Returns the cost of the updates that computed ``spikes``: multiplications, additions and bytes of state, see
    :class:`nord_snn.ops.OpCost`, including those of matrix products inside the module.
    :func:`nord_snn.monitor.profile_energy` calls it for every neuron of SpikingJelly, snnTorch and Norse. The updates of a
    neuron without this method cost as much as those of a LIF neuron, and products inside it are counted separately.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from spikingjelly.activation_based import base, functional
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from nord_snn._compat.spikingjelly import reset_value
from nord_snn.neurons.associative_lif import AssociativeLIFNode, Membranes
from nord_snn.neurons.locking import one_at_a_time
from nord_snn.ops.checks import as_count, check_flags, describe

__all__ = ["NeuronFactory", "fire_from_rest", "fire_with_membranes", "make_neuron", "multi_step_mode"]

NeuronFactory = Callable[[int], nn.Module]


def make_neuron(neuron: NeuronFactory | None, n_features: int, *, store_v_seq: bool = False) -> nn.Module:
    """Make the neurons of a layer, in step mode ``"m"`` (whole sequences).

    Args:
        neuron: the factory; None for ``AssociativeLIFNode`` with its defaults.
        n_features: D, the number of neurons.
        store_v_seq: whether the neurons store their membrane potentials, which the layer reads. Default: False.

    Raises:
        TypeError: the factory is a class of SpikingJelly, which takes no ``n_features``; it did not return a module; or the
            layer reads membrane potentials and the module has no ``store_v_seq``.
    """
    as_count(n_features, "n_features")
    check_flags(store_v_seq=store_v_seq)
    factory = AssociativeLIFNode if neuron is None else neuron
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(
            f"neuron must be a function of the number of neurons that returns a module, or None, got {describe(factory)}"
        )
    if isinstance(factory, type) and issubclass(factory, BaseNode) and not issubclass(factory, AssociativeLIFNode):
        raise TypeError(
            f"neuron must be a function of the number of neurons, which the class {factory.__name__} is not: pass "
            f"neuron=lambda n: {factory.__name__}()"
        )
    neurons = factory(n_features)
    if not isinstance(neurons, nn.Module):
        raise TypeError(f"neuron(n_features) must return a torch.nn.Module, got {type(neurons).__name__}")
    functional.set_step_mode(neurons, "m")
    if store_v_seq:
        if not hasattr(neurons, "store_v_seq"):
            raise TypeError(
                f"the layer reads the membrane potentials of its neurons: {type(neurons).__name__} must have store_v_seq "
                "and v_seq"
            )
        neurons.store_v_seq = True
    return neurons


def fire_from_rest(neuron: nn.Module, x_seq: Tensor) -> Tensor:
    """Return the spikes of ``neuron`` over the sequence ``x_seq [T, N, *, D]``, started from rest.

    The module runs through ``__call__``, so that hooks and monitors work. The stored state of the module and its children is
    restored afterwards. Modules that are neither nord-snn's nor SpikingJelly's are called as they are.

    It may be called from several threads. A call of other neurons than ``AssociativeLIFNode`` in step mode ``"m"`` changes
    their attributes, so only one thread at a time runs such neurons; under torch.compile call them from one thread only.
    """
    if isinstance(neuron, AssociativeLIFNode) and neuron.step_mode == "m":
        return neuron(x_seq, stateless=True)
    with one_at_a_time(), multi_step_mode(neuron):
        return _from_rest(neuron, x_seq)


def fire_with_membranes(neuron: nn.Module, x_seq: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return spikes as :func:`fire_from_rest` does, and membrane potentials, or None if the module stored none."""
    ours = isinstance(neuron, AssociativeLIFNode) and type(neuron).forward is AssociativeLIFNode.forward
    if ours and neuron.step_mode == "m":
        membranes = Membranes()
        return neuron(x_seq, stateless=True, membranes=membranes), membranes.v_seq
    neurons: Any = neuron
    with one_at_a_time(), multi_step_mode(neuron):
        spikes = _from_rest(neuron, x_seq)
        v_seq = neurons.v_seq
        neurons.v_seq = None  # otherwise the autograd graph of the last batch would stay in memory
    return spikes, v_seq


@contextmanager
def multi_step_mode(neuron: nn.Module) -> Iterator[None]:
    """Set step mode ``"m"`` in a ``with`` block.

    SpikingJelly's ``set_step_mode(net, "s")`` also changes the neurons inside layers, but layers always run whole sequences.
    """
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
        if name != "v_seq"  # a memory in SpikingJelly 0.0.0.0.14; it is not restored, because the caller reads it
    ]
    for module, name, _ in saved:
        setattr(module, name, reset_value(module, name))
    try:
        return neuron(x_seq)
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
