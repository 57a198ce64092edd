"""Replace neuron modules of a network in place, with widths and channel dimensions from a run with an example input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nord_snn._compat.spikingjelly import clear_module_cache
from nord_snn.convert.protocols import LIBRARIES, Protocol, protocol_of
from nord_snn.convert.report import Replacement, ReplacementReport
from nord_snn.convert.restoring import unchanged
from nord_snn.neurons import AssociativeLIFNode

__all__ = ["replace_neurons"]

Selection = type | tuple[type, ...] | str | Callable[[str, nn.Module], bool]

#: Layers whose outputs ``[N, C, *]`` have channels in dimension 1.
_CHANNELS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)
#: Attributes of these layers that store the number of channels; poolings have none.
_CHANNEL_COUNTS = ("out_channels", "num_features", "num_channels")
#: Layers whose outputs have features in the last dimension.
_FEATURES: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm, nn.Embedding)
#: Arguments of a neuron that are allowed with ``like=True``.
_WITH_LIKE = {"backend", "channel_dim", "learnable", "store_v_seq"}


@dataclass
class _NeuronModule:
    """A neuron module of the network, and the inputs that it received in the run with the example input."""

    names: list[str]
    module: nn.Module
    protocol: Protocol
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    channel_dims: set[int] = field(default_factory=set)  # 1 or -1 from the layer before it, 0 if that is unknown
    previous: tuple[str, int] | None = None  # class and channels of the layer that ran before it, except poolings

    @property
    def step_shapes(self) -> set[tuple[int, ...]]:
        """Return the shapes ``[N, *]`` of one time step of its inputs."""
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
    """Replace neuron modules of ``net`` in place by :class:`nord_snn.neurons.AssociativeLIFNode`.

    The code of ``net`` need not change. Where it passes states in and out (``spk, mem = lif(x, mem)`` in snnTorch,
    ``spikes, state = cell(x, state)`` in Norse) or uses snnTorch's ``init_hidden``, the replacement is a module with the same
    signature, whose attribute ``node`` is the AssociativeLIFNode. In Norse the state is an
    :class:`~nord_snn.ops.AssociativeLIFState`, and None at first. ``snntorch.utils.reset`` works on the new neurons.

    ``net(*example)`` runs once, without gradient and from rest, to find the width of every neuron module and the dimension of
    its channels in a time step: dimension 1 if its input is the output of a convolution, batch norm or pooling, the last one
    if it is that of a linear map or layer norm. After other layers it is dimension 1 if a time step has four dimensions or
    more, else the last one; the report has a note if the last one may be wrong. The new neurons have new parameters: make
    optimizers after this call. All other parameters stay, with their names.

    A module with several names in ``net`` is replaced under all of them, by one module, if one of them is selected. If an error
    is raised, nothing is replaced.

    Args:
        net: a network with neurons of SpikingJelly (``activation_based`` or ``clock_driven``), snnTorch (``Leaky``,
            ``Lapicque``, ``Synaptic``), Norse (``LIF``, ``LIFCell``, ``LIFBoxCell``, ``IAF``, ``IAFCell``), or several of
            these. Other neurons of snnTorch and Norse are reported as skipped; other libraries' neurons are not replaced.
        example: positional arguments of ``net``; the batch size may differ from that of later calls.
        only: which neuron modules: a class or a tuple of classes, the name of a neuron module or of a module that contains it
            (``"layer1"``), or a function of name and module. Default: None, all but AssociativeLIFNodes.
        like: give the same spikes as the neurons that are replaced, see :meth:`AssociativeLIFNode.like`. Default: False. With
            and without it, a network of snnTorch receives membrane potentials after the reset; snnTorch's are those before.
        overrides: arguments of single neuron modules by name, such as ``{"lif1": {"threshold": 0.7}}``. With ``like``, only
            ``channel_dim``, ``learnable`` (True or False), ``backend`` and ``store_v_seq``, which stores the membrane
            potentials of a sequence in ``v_seq`` of the node.
        neuron: ``neuron(width, channel_dim=..., step_mode=..., **constants)`` returns a replacement. Not with ``like``. In
            networks of snnTorch and Norse it must return an ``AssociativeLIFNode``.
        forward: the function that is called with the example, such as ``lambda batch: net(**batch)``. Default: None, ``net``.
        constants: arguments for all neuron modules, such as ``preset="nord"``. Default: those of ``preset="lif"``.

    Returns:
        A report of what was replaced, and of what was skipped and why; ``print`` it for a table.

    Raises:
        ValueError: no neuron module is selected, a name in ``overrides`` is not that of a selected one, two names of one module
            have different values there, or arguments do not fit to each other or to a width; the message names the module.
        TypeError: an argument has the wrong type, or ``neuron`` returns another module in a network of snnTorch or Norse.

    Example:
        >>> from spikingjelly.activation_based import functional, layer, neuron
        >>> net = nn.Sequential(layer.Conv2d(1, 8, 3), neuron.LIFNode(), layer.Flatten(), layer.Linear(288, 5), neuron.LIFNode())
        >>> functional.set_step_mode(net, "m")
        >>> report = replace_neurons(net, torch.rand(4, 2, 1, 8, 8))
        >>> [(row.name, row.width, row.channel_dim) for row in report]
        [('1', 8, 1), ('4', 5, -1)]
    """
    if like and neuron is not AssociativeLIFNode:
        raise ValueError("like=True makes AssociativeLIFNodes: pass neuron= or like=True, not both")
    overrides = {} if overrides is None else overrides
    _check_types(only, overrides)
    if like and (excess := sorted(set(constants).union(*overrides.values()) - _WITH_LIKE)):
        raise ValueError(
            f"like=True takes {', '.join(sorted(_WITH_LIKE))}, all other arguments are those of the replaced neuron: leave "
            f"{excess} out"
        )
    for options in (constants, *overrides.values()):
        if like and not isinstance(options.get("learnable", False), bool):
            raise TypeError(f"with like=True, learnable must be True or False, got {options['learnable']!r}")
    selected = _select(net, only)
    if unknown := sorted(overrides.keys() - {name for entry in selected for name in entry.names}):
        raise ValueError(
            f"overrides for {unknown}, which are not among the selected neurons {[entry.names[0] for entry in selected]}"
        )
    all_options = [constants | _own_options(entry, overrides) for entry in selected]
    _observe(net, lambda: (net if forward is None else forward)(*example), selected)
    results = [_make(net, entry, like, neuron, own) for entry, own in zip(selected, all_options, strict=True)]
    report = ReplacementReport()
    for entry, (rows, replacement) in zip(selected, results, strict=True):
        report.rows += rows
        for name in entry.names if replacement is not None else ():
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, replacement)
    clear_module_cache(net)
    return report


def _select(net: nn.Module, only: Selection | None) -> list[_NeuronModule]:
    """Return the selected neuron modules, each once, with all its names.

    Raises:
        ValueError: none is selected.
    """
    neurons: dict[int, _NeuronModule] = {}
    selected = set()
    for name, module in net.named_modules(remove_duplicate=False):
        protocol = protocol_of(module)
        if protocol is not None:
            neurons.setdefault(id(module), _NeuronModule([], module, protocol)).names.append(name)
            if _is_selected(name, module, only):
                selected.add(id(module))
    if not selected:
        raise ValueError(_nothing_selected(net, list(neurons.values()), only))
    return [entry for key, entry in neurons.items() if key in selected]


def _nothing_selected(net: nn.Module, neurons: list[_NeuronModule], only: Selection | None) -> str:
    """Return the message of the error when no neuron module is selected."""
    if not neurons:
        kinds = sorted({type(module).__name__ for module in net.modules()})
        return f"net must have neurons of {', '.join(LIBRARIES.values())}, it has modules {kinds}"
    if all(isinstance(entry.module, AssociativeLIFNode) for entry in neurons):
        return (
            f"all neurons of net are AssociativeLIFNodes already: {[name for entry in neurons for name in entry.names]}"
        )
    listed = ", ".join(f"{name!r} ({type(entry.module).__name__})" for entry in neurons for name in entry.names)
    return f"only must select at least one of the neurons {listed}, got {only!r}"


def _own_options(entry: _NeuronModule, overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the overrides of a neuron module under all its names."""
    own: dict[str, tuple[str, Any]] = {}
    for name in entry.names:
        for key, value in overrides.get(name, {}).items():
            earlier_name, earlier = own.setdefault(key, (name, value))
            if not _equal(earlier, value):
                raise ValueError(
                    f"{earlier_name!r} and {name!r} are the same module: overrides must have one {key} for it, got {earlier!r} "
                    f"and {value!r}"
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


def _is_selected(name: str, module: nn.Module, only: Selection | None) -> bool:
    if only is None:
        return not isinstance(module, AssociativeLIFNode)
    if isinstance(only, str):
        return name == only or name.startswith(f"{only}.")
    if isinstance(only, type | tuple):
        return isinstance(module, only)
    return bool(only(name, module))


def _observe(net: nn.Module, run: Callable[[], Any], selected: list[_NeuronModule]) -> None:
    """Run the network and record the input shapes of the selected modules and the layers that computed these inputs."""
    # Address of storage -> output of a layer, stored so that the address stays in use, and its channel dimension.
    outputs: dict[int, tuple[Tensor, int]] = {}
    previous: tuple[str, int] | None = None

    def record_output(channel_dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal previous
            counts = [getattr(module, name) for name in _CHANNEL_COUNTS if hasattr(module, name)]
            if channel_dim != 1 or counts:  # poolings keep the number of channels
                previous = (type(module).__name__, counts[0]) if channel_dim == 1 else None
            if isinstance(output, Tensor):
                outputs[output.untyped_storage().data_ptr()] = (output, channel_dim)

        return hook

    def record_input(entry: _NeuronModule) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            entry.shapes.add(tuple(x.shape))
            _, channel_dim = outputs.get(x.untyped_storage().data_ptr(), (None, 0))
            entry.channel_dims.add(channel_dim)
            entry.previous = previous

        return hook

    hooks = [
        module.register_forward_hook(record_output(1 if isinstance(module, _CHANNELS) else -1))
        for module in net.modules()
        if isinstance(module, _CHANNELS + _FEATURES)
    ]
    hooks += [entry.module.register_forward_pre_hook(record_input(entry), with_kwargs=True) for entry in selected]
    try:
        with unchanged(net):
            run()
    finally:
        for hook in hooks:
            hook.remove()


def _make(
    net: nn.Module, entry: _NeuronModule, like: bool, neuron: Callable[..., nn.Module], options: Mapping[str, Any]
) -> tuple[list[Replacement], nn.Module | None]:
    """Return rows of the report and the replacement of a neuron module, None if it is skipped. ``net`` is not changed."""
    try:
        channel_dim, width, reason = _measure(entry, options.get("channel_dim"))
        arguments = {**options, "channel_dim": channel_dim}
        node: nn.Module | None = None
        if not reason and like:
            node, reason = _make_like(entry, width, arguments)
        elif not reason:
            step_mode = "m" if entry.protocol.runs_sequences(entry.module) else "s"
            node = neuron(width, step_mode=step_mode, **{"preset": "lif"} | arguments)
        replacement = None if node is None else entry.protocol.put(entry.module, node)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{entry.names[0]} ({type(entry.module).__name__}), no neuron is replaced: {error}") from error
    was = type(entry.module).__name__
    if replacement is None:
        return [Replacement(name, was, width=width, skipped=reason) for name in entry.names], None
    replacement.train(entry.module.training)
    parameter = next(net.parameters(), None)
    if parameter is not None:
        replacement.to(parameter.device)
    note = _note(entry, channel_dim) if "channel_dim" not in options else ""
    now = type(node).__name__
    return [Replacement(name, was, now, width, channel_dim, note=note) for name in entry.names], replacement


def _measure(entry: _NeuronModule, channel_dim: int | None) -> tuple[int | None, int | None, str]:
    """Return dimension and number of the neurons, and why they cannot be replaced, or an empty string."""
    if reason := _reason(entry):
        return None, None, reason
    shape = min(entry.step_shapes, key=len)
    channel_dim = _channel_dim(entry, shape) if channel_dim is None else channel_dim
    if type(channel_dim) is not int or channel_dim == 0 or abs(channel_dim) >= len(shape):
        raise ValueError(
            f"channel_dim must be from 1 to {len(shape) - 1}, or from {1 - len(shape)} to -1, a dimension of a time step "
            f"{list(shape)} without that of the batch, got {channel_dim!r}"
        )
    if len({step[channel_dim] for step in entry.step_shapes}) > 1:
        return None, None, f"it gets inputs of several widths, {sorted(entry.shapes)}"
    return channel_dim, shape[channel_dim], ""


def _make_like(
    entry: _NeuronModule, width: int | None, arguments: dict[str, Any]
) -> tuple[AssociativeLIFNode | None, str]:
    """Return a node that gives the same spikes, or None and what cannot be matched."""
    attributes = {key: arguments.pop(key) for key in ("backend", "store_v_seq") if key in arguments}
    try:
        node = entry.protocol.like(entry.module, width, **arguments)
    except (TypeError, ValueError) as error:  # about the constants of the neuron that is replaced
        return None, str(error)
    for key, value in attributes.items():
        setattr(node, key, value)
    return node, ""


def _note(entry: _NeuronModule, channel_dim: int | None) -> str:
    """Return a note if the last dimension was a guess and dimension 1 has as many entries as the layer before has channels."""
    step = next(iter(entry.step_shapes))
    if entry.channel_dims != {0} or channel_dim != -1 or len(step) != 3 or entry.previous is None:
        return ""
    kind, channels = entry.previous
    if step[1] != channels or step[-1] == channels:
        return ""
    return (
        f"the neurons are those of the last dimension of a time step {list(step)}; the {kind} before them has {channels} "
        "channels in dimension 1: if these are the neurons, pass channel_dim=1 in overrides"
    )


def _reason(entry: _NeuronModule) -> str:
    """Return why a neuron module cannot be replaced, or an empty string."""
    if why := entry.protocol.why_not(entry.module):
        return why
    if "" in entry.names:
        return "net is this neuron itself, which has no module above it"
    if not entry.shapes:
        return "the example input did not reach it"
    if any(len(step) < 2 for step in entry.step_shapes):
        return f"it gets inputs without a dimension of neurons, {sorted(entry.shapes)}"
    return ""


def _channel_dim(entry: _NeuronModule, step: tuple[int, ...]) -> int:
    """Return the dimension of the neurons: that of the layer before them, else a guess from the number of dimensions."""
    known = entry.channel_dims - {0}
    if len(step) == 2 or len(known) != 1:
        return 1 if len(step) >= 4 else -1
    return known.pop()
