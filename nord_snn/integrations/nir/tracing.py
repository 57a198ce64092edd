"""Trace a module's forward with torch.fx into a graph of module calls and additions."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nir
import numpy as np
import torch
from spikingjelly.activation_based import base
from torch import fx, nn

from nord_snn.integrations.nir.graphs import fires, topologically_named
from nord_snn.layers import LeakyClamp

__all__ = ["trace"]

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


def trace(
    net: nn.Module,
    table: Mapping[type[nn.Module], Callable[[Any], nir.NIRNode]],
    identity_modules: tuple[type[nn.Module], ...],
    features: Sequence[int],
    out_features: Sequence[int],
) -> nir.NIRGraph:
    """Return the graph of ``net``.

    Args:
        net: a module composed of the classes in ``table`` and ``identity_modules``, modules that call these, and additions.
        table: class of a module -> function that returns its node.
        identity_modules: classes of modules that are the identity.
        features: shape of one row of the input.
        out_features: shape of one row of the output, for nodes without an output shape.

    Raises:
        ValueError: the forward contains another operation, which the message names.
    """
    root = nn.Sequential(net) if isinstance(net, (*table, *identity_modules)) else net
    tracer = _Tracer((*table, *identity_modules))
    try:
        calls = tracer.trace(root)
    except Exception as error:  # a forward may raise anything on a proxy
        raise ValueError(f"cannot trace the forward of {type(net).__name__}: {error}") from error
    return _GraphBuilder(root, table, identity_modules, features, out_features).graph(calls)


class _Tracer(fx.Tracer):
    """Trace into every module except those of known classes."""

    def __init__(self, known: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.known = known

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.known


class _GraphBuilder:
    """Build a NIR graph from the calls of a forward, in their order."""

    def __init__(
        self,
        net: nn.Module,
        table: Mapping[type[nn.Module], Any],
        identity_modules: tuple[type, ...],
        features: Any,
        out_features: Any,
    ) -> None:
        self.net, self.table, self.identity_modules = net, table, identity_modules
        self.features, self.out_features = features, out_features
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []
        self.sources: dict[fx.Node, list[str]] = {}  # a value of the forward -> the nodes whose outputs are added in it
        self.called: set[nn.Module] = set()

    def graph(self, calls: fx.Graph) -> nir.NIRGraph:
        for call in calls.nodes:
            if call.op == "placeholder" and not self.nodes:
                self.entry = call.name
                self.nodes[call.name] = nir.Input(input_type=np.array(self.features))
                self.sources[call] = [call.name]
            elif call.op == "placeholder":
                if call.users:
                    raise ValueError(f"the forward must have one input, as a graph has, but also uses '{call.target}'")
            elif call.op == "call_module":
                self.sources[call] = self.module(call)
            elif call.op in ("call_function", "call_method") and call.target in _ADDITIONS:
                self.sources[call] = self.addition(call)
            elif call.op == "output":
                self.output(call)
            else:
                target = call.target if isinstance(call.target, str) else getattr(call.target, "__name__", call.target)
                raise ValueError(
                    f"the forward must consist of modules and additions, as a graph does, got '{target}' ({call.format_node()})"
                )
        self.prune()
        return topologically_named(self.nodes, self.edges)

    def module(self, call: fx.Node) -> list[str]:
        module = self.net.get_submodule(str(call.target))
        if len(call.args) != 1 or call.kwargs:
            raise ValueError(f"'{call.target}' must be called with one input, as a node of a graph, got more")
        sources = self.sources_of(call.args[0], str(call.target))
        if type(module) in self.identity_modules:
            if isinstance(module, LeakyClamp):
                self.check_clamp(str(call.target), sources)
            return sources
        if module in self.called and isinstance(module, base.MemoryModule):
            raise ValueError(
                f"'{call.target}' must be called once, got two calls that share one state; in a graph each node has its own"
            )
        self.called.add(module)
        node = self.table[type(module)](module)
        if not isinstance(node, nir.NIRNode):
            raise TypeError(f"`more` must turn {type(module).__name__} into a nir.NIRNode, got {type(node).__name__}")
        self.nodes[call.name] = node
        self.connect(sources, call.name)
        return [call.name]

    def addition(self, call: fx.Node) -> list[str]:
        if len(call.args) != 2 or call.kwargs:
            raise ValueError(f"expected an addition of two values, got {call.format_node()}")
        return [source for part in call.args for source in self.sources_of(part, call.name)]

    def sources_of(self, value: Any, target: str) -> list[str]:
        if value not in self.sources:
            raise ValueError(f"the input of '{target}' must be computed from the network's input, got {value}")
        return self.sources[value]

    def connect(self, sources: list[str], target: str) -> None:
        if len(set(sources)) < len(sources):
            raise ValueError(
                f"'{target}' must not receive the same value twice, as a graph has one edge between two nodes: scale a weight"
            )
        self.edges += [(source, target) for source in sources]

    def output(self, call: fx.Node) -> None:
        """Add the output node, and before it a node that adds several sources: readers accept one edge to an output."""
        if not isinstance(call.args[0], fx.Node):
            raise ValueError("the forward must return one value, as a graph has one output")  # noqa: TRY004
        sources = self.sources_of(call.args[0], "output")
        if sources == [self.entry]:
            raise ValueError("the forward must compute something, but returns its input")
        width = self.width(sources)
        if len(sources) > 1:
            total = f"{call.name}_sum"
            while total in self.nodes:
                total += "_"
            self.nodes[total] = nir.Scale(scale=np.ones(tuple(width)))
            self.connect(sources, total)
            sources = [total]
        self.nodes[call.name] = nir.Output(output_type=width)
        self.connect(sources, call.name)

    def width(self, sources: list[str]) -> np.ndarray:
        """Return the output shape of these nodes."""
        name = next(source for source in sources if source != self.entry)
        (width,) = (self.nodes[name].output_type or {"output": None}).values()
        return np.array(self.out_features if width is None else width)

    def check_clamp(self, name: str, sources: list[str]) -> None:
        """Raise a ValueError unless the input of a clamp is spikes: for inputs of 0 and above it is the identity."""
        if not all(fires(self.nodes[source]) for source in sources):
            raise ValueError(
                f"cannot export LeakyClamp '{name}': its input must be spikes, because NIR has no function whose slope changes "
                "at zero"
            )

    def prune(self) -> None:
        """Remove nodes and edges from which no path leads to the output."""
        used = {name for name, node in self.nodes.items() if isinstance(node, nir.Output)}
        for source, target in reversed(self.edges):
            if target in used:
                used.add(source)
        self.nodes = {name: node for name, node in self.nodes.items() if name in used or name == self.entry}
        self.edges = [edge for edge in self.edges if edge[1] in used]
        # The input shape is that of the first node with a known one: leading dimensions that it does not use count as rows.
        types = [self.nodes[target].input_type for source, target in self.edges if source == self.entry]
        shape = next((shape for type_ in types for shape in (type_ or {}).values() if shape is not None), None)
        if shape is not None:
            self.nodes[self.entry] = nir.Input(input_type=np.array(shape))
