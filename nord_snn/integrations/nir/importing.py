"""Import NIR graphs as networks of nord-snn's layers."""

import warnings
from collections.abc import Callable, Mapping
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import nir
import numpy as np
import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from nord_snn.integrations.nir.exporter import Exporter
from nord_snn.integrations.nir.extension import read
from nord_snn.integrations.nir.graphs import SubgraphPort, difference, metadata_of, resolve_dt, schedule
from nord_snn.integrations.nir.neurons import RESETS, integrator, neurons
from nord_snn.integrations.nir.parameters import neurons_from_constants, neurons_from_metadata
from nord_snn.integrations.nir.recurrent import Loop, fold_loops, recurrent_layer
from nord_snn.integrations.nir.stateless import known_shape, output_shape, stateless_module
from nord_snn.layers import MembraneReadout, SpikingFeedForward
from nord_snn.neurons import AssociativeLIFNode

__all__ = ["NIRNetwork", "import_from_nir"]

_FromNIR = Callable[[Any], nn.Module]


def import_from_nir(
    graph: nir.NIRGraph | str | Path,
    dt: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    reset: str | None = None,
    strict: bool = True,
    approximate: bool = False,
    more: Mapping[type[nir.NIRNode], _FromNIR] | None = None,
) -> "NIRNetwork":
    """Return a network of nord-snn's layers from a NIR graph of :func:`export_to_nir` or of other libraries.

    Graphs of :func:`export_to_nir` are restored as the original layers, with the refractory period, the cascade and its weights;
    a layer whose node was changed after the export raises an error. In other graphs ``IF``, ``LIF`` and ``CubaLIF``, also with a
    linear map of their spikes of the last time step, become neurons; ``I``, ``LI`` and ``CubaLI`` become a
    :class:`~nord_snn.neurons.LeakyIntegrator`; ``Linear``, ``Affine``, ``Scale``, ``Threshold``, convolutions, pooling and
    ``Flatten`` become layers. NIR's equations are discretised by forward Euler, ``v += dt / tau * (v_leak - v + r * i)``, as the
    exporters of SpikingJelly, snnTorch and Norse assume. Potentials start at ``v_reset`` of neurons with a reset to ``v_reset``,
    and at ``v_leak`` of others.

    Args:
        graph: the graph, or the path of a file with a graph.
        dt: length of a time step in seconds; None: that in the graph's metadata, which our exports have, else 1e-4.
        dtype: dtype of the network's parameters.
        reset: reset by a spike in neurons of other libraries' graphs, which NIR does not define for discrete time. ``"value"``
            sets the membrane to ``v_reset``; ``"subtract"`` subtracts the threshold; ``"delayed_value"`` and
            ``"delayed_subtract"`` do so in the next time step, as snnTorch's neurons do by default. None: that in the node's
            metadata, else ``"value"``.
        strict: neurons of other libraries' graphs fire above their thresholds only, as in NIR's equations, snnTorch and Norse.
            False: they also fire at them, as in SpikingJelly.
        approximate: former name of ``reset="subtract"``.
        more: class of a further node -> function that returns a module on sequences ``[T, N, *]`` for an instance.

    Returns:
        A module on sequences, ``[T, N, *]``. Its neurons store their state between calls, as in every SpikingJelly network. A
        custom surrogate cannot be stored in a graph: it is replaced by the default, and a warning is logged.

    Raises:
        TypeError: ``graph`` is neither a graph nor a path, or a function in ``more`` did not return a module.
        ValueError: the graph has a node, a value or a loop that our layers cannot express, ``dt`` is not that of the graph, or
            ``reset`` is unknown.

    Example:
        >>> from nord_snn.integrations.nir import export_to_nir
        >>> net = nn.Sequential(nn.Linear(20, 64), AssociativeLIFNode(64, n_clusters=8, refractory_steps=0, step_mode="m"))
        >>> imported = import_from_nir(export_to_nir(net, torch.rand(10, 4, 20)))
        >>> x_seq = torch.rand(10, 4, 20)
        >>> torch.equal(net(x_seq), imported(x_seq))
        True
    """
    if isinstance(graph, str | Path):
        graph = read(graph)
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(f"expected a NIRGraph or the name of a file, got {type(graph).__name__}")
    if approximate:
        warnings.warn('approximate=True is now reset="subtract"', FutureWarning, stacklevel=2)
        reset = reset or "subtract"
    if reset not in (None, *RESETS):
        raise ValueError(f"reset must be one of {list(RESETS)} or None, got {reset!r}")
    # Build half-precision modules in float32 first: checked_part compares their parameters with the graph.
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    importer = _Importer(resolve_dt(graph, dt), precision, reset, strict, more or {})
    converted = importer.convert_node("the graph", graph)
    if isinstance(converted, _ModuleNode):
        return NIRNetwork([converted.module.to(dtype)], [(), (0,)])
    scheduled, output = schedule(converted)
    scheduled, loops = fold_loops(scheduled, output)
    positions = {item.name: position for position, item in enumerate(scheduled)}
    shapes: dict[str, tuple[int, ...] | None] = {}
    modules = []
    for item in scheduled:
        shape = next((shapes[name] for name in item.sources if shapes[name] is not None), None)
        module, shapes[item.name] = importer.part(item.name, item.node, shape, loops.get(item.name))
        modules.append(module.to(dtype))
    return NIRNetwork(modules, [tuple(positions[name] for name in item.sources) for item in (*scheduled, output)])


class NIRNetwork(nn.Module):
    """Run the modules of a graph, each on the sum of its sources.

    Args:
        parts: modules on sequences, in execution order.
        sources: for each module, and at the end for the output, the indices of the modules whose outputs are added; empty for
            modules that receive the input.

    Shapes: ``[T, N, *]`` -> ``[T, N, *]``; ``[N, *]`` after a readout.
    """

    def __init__(self, parts: list[nn.Module], sources: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.parts, self.sources = nn.ModuleList(parts), sources

    def forward(self, x_seq: Tensor) -> Tensor:
        """Run all time steps."""
        outputs: list[Tensor] = []
        for part, sources in zip(self.parts, self.sources, strict=False):
            outputs.append(part(reduce(add, (outputs[i] for i in sources)) if sources else x_seq))
        return reduce(add, (outputs[i] for i in self.sources[-1]))


class _ModuleNode(nir.NIRNode):
    """A node that contains a module, with the input and output types of the node ``like``."""

    def __init__(self, module: nn.Module, like: nir.NIRNode) -> None:
        self.module = module
        self.metadata: dict[str, Any] = {}
        self.input_type, self.output_type = like.input_type, like.output_type


class _Importer:
    """Convert nodes to modules. See :func:`import_from_nir` for the arguments."""

    def __init__(
        self, dt: float, dtype: torch.dtype, reset: str | None, strict: bool, more: Mapping[type[nir.NIRNode], _FromNIR]
    ) -> None:
        self.dt, self.dtype, self.reset, self.strict, self.more = dt, dtype, reset, strict, more

    def convert_graph(self, graph: nir.NIRGraph) -> nir.NIRGraph:
        """Return the graph with modules in place of the nodes and subgraphs that were layers of nord-snn."""
        nodes = {name: self.convert_node(name, node) for name, node in graph.nodes.items()}
        return nir.NIRGraph(nodes=nodes, edges=graph.edges, type_check=False)

    def convert_node(self, name: str, node: nir.NIRNode) -> nir.NIRNode:
        if type(node) in self.more:
            module = self.more[type(node)](node)
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"`more` must turn {type(node).__name__} into a torch.nn.Module, got {type(module).__name__}"
                )
            return _ModuleNode(module, node)
        kinds: dict[str, Callable[[str, Any], nn.Module]] = {
            "AssociativeLIFNode": self.neurons,
            "SpikingFeedForward": self.feed_forward,
            "MembraneReadout": self.readout,
        }
        kind = metadata_of(node).get("part")
        if kind in kinds:
            return _ModuleNode(self.checked_part(name, node, kind, kinds[kind]), node)
        return self.convert_graph(node) if isinstance(node, nir.NIRGraph) else node

    def checked_part(self, name: str, node: Any, kind: str, build: Callable[[str, Any], nn.Module]) -> nn.Module:
        """Return a layer of nord-snn, after comparing its export with the node."""
        try:
            module = build(name, node)
            exporter = Exporter(self.dt, int(metadata_of(node).get("n_steps", 1)), True, extension=_is_extended(node))
            row = known_shape(node.input_type)
            if row is not None:
                exporter.inputs[module] = torch.empty(1, 1, *row, device="meta")
            exported = exporter.table[type(module)](module)
        except (KeyError, AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"'{name}' is marked as a {kind}, but does not have its structure: {error!r}") from error
        if changed := difference(node, exported):
            raise ValueError(
                f"'{name}' is marked as a {kind}, but was changed since its export ({changed}): remove its metadata to import "
                "it as plain NIR nodes"
            )
        return module

    def part(
        self, name: str, node: nir.NIRNode, shape: tuple[int, ...] | None, loop: Loop | None
    ) -> tuple[nn.Module, tuple[int, ...] | None]:
        """Return the module for a node, on sequences, and the shape of one row of its output.

        Args:
            name: name of the node.
            node: the node.
            shape: shape of one row of its input; None if unknown.
            loop: map from its spikes to its input; None if there is no such map.
        """
        if isinstance(node, _ModuleNode):
            row = known_shape(node.output_type)
            return (node.module, row) if loop is None else (self.with_feedback(node.module, loop), row)
        if isinstance(node, nir.Input):
            return nn.Identity(), known_shape(node.input_type)
        if isinstance(node, SubgraphPort):
            return nn.Identity(), shape
        if isinstance(node, nir.IF | nir.LIF | nir.CubaLIF):
            return self.foreign_neurons(name, node, shape, loop)
        if isinstance(node, nir.I | nir.LI | nir.CubaLI):
            integrators = integrator(name, node, self.dt, shape)
            return integrators.to(self.dtype), integrators.shape
        module = stateless_module(node)
        if module is None:
            raise ValueError(f"there is no module for {type(node).__name__} '{name}': pass a function for it in `more`")
        over_features = isinstance(node, nir.Linear | nir.Affine | nir.Scale | nir.Threshold)
        return module if over_features else layer.SeqToANNContainer(module), output_shape(node, module, shape)

    def foreign_neurons(
        self, name: str, node: Any, shape: tuple[int, ...] | None, loop: Loop | None
    ) -> tuple[nn.Module, tuple[int, ...]]:
        """Return neurons for a node of another library, with the map from their spikes to their input."""
        reset = self.reset or str(metadata_of(node).get("reset", "value"))
        module = neurons(name, node, self.dt, shape, reset=reset, strict=self.strict, step_mode="m").to(self.dtype)
        module.reset_parameters()  # in this precision
        row = np.shape(node.v_threshold) if np.size(node.v_threshold) > 1 else shape or (module.n_features,)
        return (module, row) if loop is None else (self.with_feedback(module, loop), row)

    def with_feedback(self, module: Any, loop: Loop) -> nn.Module:
        """Return neurons with the map from their spikes to their input."""
        module.step_mode = "s"
        feedback = nn.Identity() if loop.node is None else stateless_module(loop.node)
        assert feedback is not None
        return recurrent_layer(module, feedback)

    def neurons(self, name: str, node: Any) -> AssociativeLIFNode:
        """Return the neurons of a CubaLIF, or of a subgraph with its recurrent cascade."""
        lif = node.nodes["lif"] if isinstance(node, nir.NIRGraph) else node
        if "threshold" in metadata_of(lif):
            return neurons_from_metadata(name, metadata_of(lif), self.dtype)
        return neurons_from_constants(name, lif, (lif.tau_mem, lif.tau_syn, lif.w_in), self.dt, self.dtype)

    def feed_forward(self, name: str, graph: Any) -> SpikingFeedForward:
        up, down = (stateless_module(graph.nodes[key]) for key in ("n1_up", "n3_down"))
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        ffn = SpikingFeedForward(up.in_features, up.out_features, neuron=lambda n: nn.Identity())
        ffn.up, ffn.down = up.to(self.dtype), down.to(self.dtype)
        ffn.lif1, ffn.lif2 = (self.neurons(f"{name}/{key}", graph.nodes[key]) for key in ("n2_lif1", "n4_lif2"))
        return ffn

    def readout(self, name: str, graph: Any) -> MembraneReadout:
        lif, synapse = graph.nodes["lif"], graph.nodes["synapse"]
        if "threshold" in metadata_of(lif):
            node = neurons_from_metadata(f"{name}/lif", metadata_of(lif), self.dtype)
        else:
            node = neurons_from_constants(f"{name}/lif", lif, (lif.tau, synapse.tau, synapse.r), self.dt, self.dtype)
        readout = MembraneReadout(node.n_features, neuron=lambda n: node).to(self.dtype)
        with torch.no_grad():
            readout.decay_logit.copy_(torch.from_numpy(metadata_of(graph)["decay_logit"]))
        return readout


def _is_extended(node: Any) -> bool:
    """Return whether a node, or one in a subgraph, is of our extension."""
    if isinstance(node, nir.NIRGraph):
        return any(_is_extended(inner) for inner in node.nodes.values())
    return hasattr(node, "refractory_time")
