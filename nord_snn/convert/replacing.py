"""Replace the neurons of a network in place, with widths and channel dimensions from a run with an example input."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nord_snn._compat.spikingjelly import clear_module_cache
from nord_snn.convert.protocols import LIBRARIES, Protocol, protocol_of
from nord_snn.convert.report import Replacement, ReplacementReport
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.neurons.resetting import reset

__all__ = ["replace_neurons", "unchanged"]

Selection = type | tuple[type, ...] | str | Callable[[str, nn.Module], bool]

#: Modules whose outputs ``[N, C, *]`` have channels in dimension 1, and those with features in the last one.
_CHANNELS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)
_CHANNEL_COUNTS = ("out_channels", "num_features", "num_channels")
_WITH_LIKE = {"backend", "channel_dim", "learnable", "store_v_seq"}
_FEATURES: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm, nn.Embedding)


@dataclass
class _Found:
    """A neuron of the network, and what the run with the example input showed."""

    names: list[str]
    module: nn.Module
    protocol: Protocol
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    channels: set[int] = field(default_factory=set)
    before: tuple[str, int] | None = None  # class and channels of the last layer before it, except poolings

    @property
    def steps(self) -> set[tuple[int, ...]]:
        """Return the shapes of one time step that it received."""
        return {shape[self.protocol.runs_sequences(self.module) :] for shape in self.shapes}


@torch.no_grad()
def replace_neurons(
    net: nn.Module,
    *example: Any,
    only: Selection | None = None,
    like: bool = False,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    neuron: Callable[..., nn.Module] = AssociativeLIFNode,
    forward: Callable[..., Any] | None = None,
    **constants: Any,
) -> ReplacementReport:
    """Replace neurons of ``net`` in place by :class:`nord_snn.neurons.AssociativeLIFNode`.

    ``net`` is a network of SpikingJelly, snnTorch or Norse, or of several. Its own code goes on calling its neurons as before:
    where the library passes states in and out (``spk, mem = lif(x, mem)``, ``spikes, state = cell(x, state)``) or has
    ``init_hidden``, a module with the same call takes the place of the neuron, and its attribute ``node`` is ours. In Norse the
    state is an :class:`~nord_snn.ops.AssociativeLIFState`, and None at first. ``snntorch.utils.reset`` works on the new neurons.

    ``net(*example)`` runs once, without gradient and from rest, to find the width of every neuron module and the dimension of
    its channels in a time step: dimension 1 if its input is the output of a convolution, batch norm or pooling, the last one
    if it is that of a linear map or layer norm. After other layers it is dimension 1 if a time step has four dimensions or
    more, else the last one; the report has a note where the last one may be wrong. Names of all other parameters stay. Make
    optimizers afterwards.

    A module that the network has under several names stays one, and is replaced under all of them if one of them is selected.
    If an error is raised, nothing is replaced.

    Args:
        net: a network with neurons of SpikingJelly (``activation_based`` or ``clock_driven``), snnTorch (``Leaky``,
            ``Lapicque``, ``Synaptic``) or Norse (``LIF``, ``LIFCell``, ``LIFBoxCell``, ``IAF``, ``IAFCell``). Other neurons
            of snnTorch and Norse are reported as skipped, modules of other libraries are left alone.
        example: positional arguments of the network, with the shapes that it will get; the batch size may differ.
        only: which neurons: a class or a tuple of them, the name of a neuron or of a module that contains it (``"layer1"``), or
            a function of name and module. Default: None, all of these libraries.
        like: give the same spikes as the neuron that is replaced, see :meth:`AssociativeLIFNode.like`. Default: False. With or
            without it, a network of snnTorch receives membrane potentials after the reset; snnTorch's are those before.
        overrides: further arguments for single neurons, by any of their names. With ``like``, only ``channel_dim``,
            ``learnable`` (True or False), ``backend`` and ``store_v_seq``, which stores the membrane potentials of a sequence
            in ``v_seq`` of the node.
        neuron: what to replace by: ``neuron(width, channel_dim=..., step_mode=..., **constants)``. Not with ``like``. In
            networks of snnTorch and Norse it must make an ``AssociativeLIFNode``.
        forward: what to call with the example, such as ``lambda batch: net(**batch)``. Default: None, the network.
        constants: arguments for all neurons, such as ``preset="nord"``.

    Returns:
        What was replaced, and what was skipped and why; ``print`` it for a table.

    Raises:
        ValueError: no neuron is selected, a name in ``overrides`` is not one of them, two names of a neuron have different
            values there, or arguments do not fit together or to a width; the message names the neuron.
        TypeError: ``only`` or an argument has another type, or ``neuron`` makes another module in a network of snnTorch or Norse.

    Example:
        >>> from spikingjelly.activation_based import functional, layer, neuron
        >>> net = nn.Sequential(layer.Conv2d(1, 8, 3), neuron.LIFNode(), layer.Flatten(), layer.Linear(288, 5), neuron.LIFNode())
        >>> functional.set_step_mode(net, "m")
        >>> report = replace_neurons(net, torch.rand(4, 2, 1, 8, 8))
        >>> [(row.name, row.width, row.channel_dim) for row in report]
        [('1', 8, 1), ('4', 5, -1)]
    """
    if like and neuron is not AssociativeLIFNode:
        raise ValueError("like=True makes AssociativeLIFNodes: leave neuron= out")
    overrides = {} if overrides is None else overrides
    _check_types(only, overrides)
    given = set(constants).union(*overrides.values())
    if like and (more := sorted(given - _WITH_LIKE)):
        raise ValueError(
            f"like=True takes {', '.join(sorted(_WITH_LIKE))}, the rest is that of the neuron: leave {more} out"
        )
    for given_options in (constants, *overrides.values()):
        if like and not isinstance(given_options.get("learnable", False), bool):
            raise TypeError(f"with like=True, learnable must be True or False, got {given_options['learnable']!r}")
    found = _find(net, only)
    if not found:
        kinds = sorted({type(module).__name__ for module in net.modules()})
        raise ValueError(f"no neuron of {', '.join(LIBRARIES.values())} is selected: the network has modules {kinds}")
    if unknown := sorted(overrides.keys() - {name for one in found for name in one.names}):
        raise ValueError(
            f"overrides for {unknown}, which are not among the selected neurons {[one.names[0] for one in found]}"
        )
    options = [constants | _own_options(one, overrides) for one in found]
    _observe(net, lambda: (net if forward is None else forward)(*example), found)
    made = [_make(net, one, like, neuron, own) for one, own in zip(found, options, strict=True)]
    report = ReplacementReport()
    for one, (rows, placed) in zip(found, made, strict=True):
        report.rows += rows
        for name in one.names if placed is not None else ():
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, placed)
    clear_module_cache(net)
    return report


def _find(net: nn.Module, only: Selection | None) -> list[_Found]:
    """Return the neurons that are selected under one of their names, each once, with all names that the network has for it."""
    found: dict[int, _Found] = {}
    selected = set()
    for name, module in net.named_modules(remove_duplicate=False):
        protocol = protocol_of(module)
        if protocol is not None:
            found.setdefault(id(module), _Found([], module, protocol)).names.append(name)
            if _selected(name, module, only):
                selected.add(id(module))
    return [one for key, one in found.items() if key in selected]


def _own_options(one: _Found, overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the overrides of a neuron, which may stand under any of its names."""
    own: dict[str, tuple[str, Any]] = {}
    for name in one.names:
        for key, value in overrides.get(name, {}).items():
            other, earlier = own.setdefault(key, (name, value))
            if not _equal(earlier, value):
                raise ValueError(
                    f"{other!r} and {name!r} are one neuron: overrides must have one {key} for it, got {earlier!r} and {value!r}"
                )
    return {key: value for key, (_, value) in own.items()}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return a is b or bool(a == b)


def _check_types(only: Any, overrides: Any) -> None:
    classes = isinstance(only, type) or (isinstance(only, tuple) and all(isinstance(kind, type) for kind in only))
    function = callable(only) and not isinstance(only, nn.Module)
    if not (only is None or classes or isinstance(only, str) or function):
        raise TypeError(
            "only must be a class or a tuple of classes, the name of a neuron or of a module that contains it, or a function of "
            f"name and module, got {only!r}"
        )
    if not isinstance(overrides, Mapping) or not all(isinstance(own, Mapping) for own in overrides.values()):
        raise TypeError(
            f"overrides must be a dict of names and arguments, such as {{'lif1': {{'threshold': 0.7}}}}, got {overrides!r}"
        )


def _selected(name: str, module: nn.Module, only: Selection | None) -> bool:
    if only is None:
        return not isinstance(module, AssociativeLIFNode)
    if isinstance(only, str):
        return name == only or name.startswith(f"{only}.")
    if isinstance(only, type | tuple):
        return isinstance(module, only)
    return bool(only(name, module))


def _observe(net: nn.Module, run: Callable[[], Any], found: list[_Found]) -> None:
    """Run the network and record the inputs of the neurons, and which kind of layer made them."""
    made: dict[int, tuple[Tensor, int]] = {}  # storage -> tensor, which keeps the address in use, and channel dimension
    last: tuple[str, int] | None = None

    def record_output(channel_dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal last
            counts = [getattr(module, name) for name in _CHANNEL_COUNTS if hasattr(module, name)]
            if channel_dim != 1 or counts:  # pooling has as many channels as the layer before it
                last = (type(module).__name__, counts[0]) if channel_dim == 1 else None
            if isinstance(output, Tensor):
                made[output.untyped_storage().data_ptr()] = (output, channel_dim)

        return hook

    def record_input(one: _Found) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            one.shapes.add(tuple(x.shape))
            _, channel_dim = made.get(x.untyped_storage().data_ptr(), (None, 0))
            one.channels.add(channel_dim)
            one.before = last

        return hook

    hooks = [
        module.register_forward_hook(record_output(1 if isinstance(module, _CHANNELS) else -1))
        for module in net.modules()
        if isinstance(module, _CHANNELS + _FEATURES)
    ]
    hooks += [one.module.register_forward_pre_hook(record_input(one), with_kwargs=True) for one in found]
    try:
        with unchanged(net):
            run()
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def unchanged(net: nn.Module, evaluate: bool = True) -> Iterator[None]:
    """Run a network from rest, in evaluation mode if ``evaluate``.

    Modes and buffers are as before afterwards, and the state is reset.
    """
    modes = [(module, module.training) for module in net.modules()]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers() if not is_lazy(buffer)}
    reset(net)
    if evaluate:
        net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for name, buffer in net.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:  # others are states of snnTorch, reset below
                buffer.copy_(buffers[name])
        reset(net)


def _make(
    net: nn.Module, one: _Found, like: bool, neuron: Callable[..., nn.Module], constants: Mapping[str, Any]
) -> tuple[list[Replacement], nn.Module | None]:
    """Return the rows of the report, and what takes the place of a neuron; None if it is skipped. The network stays."""
    try:
        channel_dim, width, reason = _measure(one, constants.get("channel_dim"))
        options = {key: value for key, value in constants.items() if key != "channel_dim"} | {
            "channel_dim": channel_dim
        }
        made: nn.Module | None = None
        if not reason and like:
            made, reason = _make_like(one, width, options)
        elif not reason:
            step_mode = "m" if one.protocol.runs_sequences(one.module) else "s"
            made = neuron(width, step_mode=step_mode, **{"preset": "lif"} | options)
        placed = None if made is None else one.protocol.put(one.module, made)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{one.names[0]} ({type(one.module).__name__}), no neuron is replaced: {error}") from error
    was = type(one.module).__name__
    if placed is None:
        return [Replacement(name, was, width=width, skipped=reason) for name in one.names], None
    placed.train(one.module.training)
    parameter = next(net.parameters(), None)
    if parameter is not None:
        placed.to(parameter.device)
    note = _note(one, channel_dim) if "channel_dim" not in constants else ""
    return [Replacement(name, was, type(made).__name__, width, channel_dim, note=note) for name in one.names], placed


def _measure(one: _Found, given: int | None) -> tuple[int | None, int | None, str]:
    """Return dimension and number of the neurons, and why they cannot be replaced, or an empty string."""
    if reason := _reason(one):
        return None, None, reason
    shape = min(one.steps, key=len)
    channel_dim = _channel_dim(one, shape) if given is None else given
    if type(channel_dim) is not int or channel_dim == 0 or abs(channel_dim) >= len(shape):
        raise ValueError(
            f"channel_dim must be from 1 to {len(shape) - 1}, or from {1 - len(shape)} to -1, a dimension of a time step "
            f"{list(shape)} without that of the batch, got {channel_dim!r}"
        )
    if len({step[channel_dim] for step in one.steps}) > 1:
        return None, None, f"it gets inputs of several widths, {sorted(one.shapes)}"
    return channel_dim, shape[channel_dim], ""


def _make_like(one: _Found, width: int | None, options: dict[str, Any]) -> tuple[AssociativeLIFNode | None, str]:
    """Return neurons with the spikes of the one that is replaced, or None and what cannot be matched."""
    later = {key: options.pop(key) for key in ("backend", "store_v_seq") if key in options}
    try:
        made = one.protocol.like(one.module, width, **options)
    except (TypeError, ValueError) as error:  # about the constants of the neuron that is replaced
        return None, str(error)
    for key, value in later.items():
        setattr(made, key, value)
    return made, ""


def _note(one: _Found, channel_dim: int | None) -> str:
    """Return which layer before the neuron has channels in dimension 1, where the last dimension was taken without evidence."""
    step = next(iter(one.steps))
    if one.channels != {0} or channel_dim != -1 or len(step) != 3 or one.before is None:
        return ""
    kind, channels = one.before
    if step[1] != channels or step[-1] == channels:
        return ""
    return (
        f"the neurons are those of the last dimension of a time step {list(step)}; the {kind} before them has {channels} "
        "channels in dimension 1: if these are the neurons, pass channel_dim=1 in overrides"
    )


def _reason(one: _Found) -> str:
    """Return why a neuron cannot be replaced, or an empty string."""
    if why := one.protocol.why_not(one.module):
        return why
    if "" in one.names:
        return "the network is this neuron itself"
    if not one.shapes:
        return "the example input did not reach it"
    if any(len(step) < 2 for step in one.steps):
        return f"it gets inputs without a dimension of neurons, {sorted(one.shapes)}"
    return ""


def _channel_dim(one: _Found, step: tuple[int, ...]) -> int:
    """Return the dimension of the neurons: what the layer before them says, else a guess from the number of dimensions."""
    said = one.channels - {0}
    if len(step) == 2 or len(said) != 1:
        return 1 if len(step) >= 4 else -1
    return said.pop()
