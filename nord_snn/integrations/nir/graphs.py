"""NIR graphs: execution order, comparison, metadata."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import nir
import numpy as np

__all__ = [
    "ScheduledNode",
    "SubgraphPort",
    "difference",
    "fires",
    "metadata_of",
    "resolve_dt",
    "schedule",
    "topologically_named",
]


class ScheduledNode(NamedTuple):
    """A node and the names of the nodes whose outputs are summed as its input.

    Attributes:
        name: name of the node; ``subgraph/name`` in a subgraph.
        node: the node.
        sources: nodes whose output of the same time step is added.
        delayed: nodes whose output of the time step before is added.
    """

    name: str
    node: nir.NIRNode
    sources: tuple[str, ...]
    delayed: tuple[str, ...]


def schedule(graph: nir.NIRGraph) -> tuple[list[ScheduledNode], ScheduledNode]:
    """Return the nodes of a graph in execution order, with subgraphs flattened, and the output node.

    Back edges are delayed: edges to a node on the path from the input to the edge's source.

    Raises:
        ValueError: the graph does not have exactly one input and one output, an edge has an unknown end, or a node
            that leads to the output has no path from the input.
    """
    nodes, edges = _flattened(graph)
    (start,), (end,) = (_single(nodes, kind) for kind in (nir.Input, nir.Output))
    successors: dict[str, list[str]] = {name: [] for name in nodes}
    for source, target in edges:
        successors[source].append(target)
    order, back_edges = _depth_first(start, successors)
    scheduled = []
    for name in order:
        sources = [source for source, target in edges if target == name]
        if unreachable := [source for source in sources if source not in order]:
            raise ValueError(f"all nodes of the graph must have a path from its input, '{unreachable[0]}' has none")
        delayed = tuple(source for source in sources if (source, name) in back_edges)
        scheduled.append(ScheduledNode(name, nodes[name], tuple(s for s in sources if s not in delayed), delayed))
    if end not in order:
        raise ValueError("the graph must have a path from its input to its output")
    *inner, output = sorted(scheduled, key=lambda item: item.name == end)
    return inner, output


def _single(nodes: dict[str, nir.NIRNode], kind: type[nir.NIRNode]) -> list[str]:
    names = [name for name, node in nodes.items() if isinstance(node, kind)]
    if len(names) != 1:
        raise ValueError(f"expected a graph with one {kind.__name__} node, got one with {len(names)}")
    return names


def _depth_first(start: str, successors: dict[str, list[str]]) -> tuple[list[str], set[tuple[str, str]]]:
    """Return the reachable nodes in topological order, and the back edges."""
    finished: list[str] = []
    back_edges: set[tuple[str, str]] = set()
    path = [(start, iter(successors[start]))]
    on_path = {start}
    while path:
        name, targets = path[-1]
        for target in targets:
            if target in on_path:
                back_edges.add((name, target))
            elif target not in finished:
                on_path.add(target)
                path.append((target, iter(successors[target])))
                break
        else:
            path.pop()
            on_path.discard(name)
            finished.append(name)
    return finished[::-1], back_edges


def _flattened(graph: nir.NIRGraph) -> tuple[dict[str, nir.NIRNode], list[tuple[str, str]]]:
    """Return nodes and edges with subgraphs flattened: inner nodes are named ``subgraph/node``."""
    _check_edges(graph)
    nodes: dict[str, nir.NIRNode] = {}
    edges = [(str(a), str(b)) for a, b in graph.edges]
    for name, node in graph.nodes.items():
        if not isinstance(node, nir.NIRGraph):
            nodes[name] = node
            continue
        inner, inner_edges = _flattened(node)
        (entry,), (exit_,) = (_single(inner, kind) for kind in (nir.Input, nir.Output))
        # Inputs and outputs of subgraphs become identity nodes.
        nodes |= {f"{name}/{key}": SubgraphPort(n) if key in (entry, exit_) else n for key, n in inner.items()}
        edges = [(f"{name}/{exit_}" if a == name else a, f"{name}/{entry}" if b == name else b) for a, b in edges]
        edges += [(f"{name}/{a}", f"{name}/{b}") for a, b in inner_edges]
    return nodes, edges


class SubgraphPort(nir.NIRNode):
    """The input or output of a flattened subgraph; an identity."""

    def __init__(self, port: nir.NIRNode) -> None:
        self.input_type, self.output_type = port.input_type, port.output_type
        self.metadata: dict[str, Any] = {}


def _check_edges(graph: nir.NIRGraph) -> None:
    for edge in graph.edges:
        for end in edge:
            if end not in graph.nodes:
                raise ValueError(f"the ends of an edge must be nodes of the graph, got '{end}'")


def topologically_named(nodes: dict[str, nir.NIRNode], edges: list[tuple[str, str]]) -> nir.NIRGraph:
    """Return a graph whose nodes are renamed so that their names sort in execution order.

    Files list nodes alphabetically, and nirtorch, which other readers use, cannot connect a subgraph that is listed before its
    sources.
    """
    inner = [name for name, node in nodes.items() if not isinstance(node, nir.Input | nir.Output)]
    names: dict[str, str] = {}
    if inner != sorted(inner):
        digits = len(str(len(inner)))
        names = {name: f"n{place:0{digits}}_{name}" for place, name in enumerate(inner)}
        names |= {
            name: "input" if isinstance(node, nir.Input) else "output"
            for name, node in nodes.items()
            if name not in names
        }
    return nir.NIRGraph(
        nodes={names.get(name, name): node for name, node in nodes.items()},
        edges=[(names.get(source, source), names.get(target, target)) for source, target in edges],
    )


def fires(node: nir.NIRNode) -> bool:
    """Return whether all outputs of a node are spikes."""
    if isinstance(node, nir.NIRGraph):
        return all(fires(node.nodes[source]) for source, target in node.edges if target in node.outputs)
    return isinstance(node, nir.CubaLIF | nir.LIF | nir.IF | nir.Threshold)


def difference(node: nir.NIRNode, expected: nir.NIRNode) -> str | None:
    """Return the first difference of two nodes or graphs beyond rounding, or None. Metadata are not compared."""
    if type(node) is not type(expected):
        return f"a {type(node).__name__} where a {type(expected).__name__} was expected"
    if isinstance(node, nir.NIRGraph):
        if node.nodes.keys() != expected.nodes.keys() or {*map(tuple, node.edges)} != {*map(tuple, expected.edges)}:
            return "its nodes and edges"
        return _first(
            f"{name}: {change}" for name in node.nodes if (change := difference(node.nodes[name], expected.nodes[name]))
        )
    names = [
        field.name for field in dataclasses.fields(node) if field.name not in ("metadata", "input_type", "output_type")
    ]
    return _first(name for name in names if not _close(getattr(node, name), getattr(expected, name)))


def _close(value: Any, expected: Any) -> bool:
    value, expected = np.asarray(value), np.asarray(expected)
    size = np.abs(expected).max(initial=0.0)  # values of a field, such as time constants, have any order of magnitude
    return value.shape == expected.shape and np.allclose(value, expected, rtol=1e-4, atol=1e-6 * size)


def _first(items: Iterable[str]) -> str | None:
    return next(iter(items), None)


def metadata_of(node: nir.NIRNode) -> dict[str, Any]:
    """Return the metadata of a node, with bytes decoded: some releases of h5py return bytes for text."""
    metadata = node.metadata or {}
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in metadata.items()}


def _export_dt(graph: nir.NIRGraph) -> float | None:
    """Return the time step ``dt`` in seconds for which a graph or one of its subgraphs was exported; None if unknown."""
    own = metadata_of(graph).get("dt")
    if own is not None:
        return float(own)
    inner = (_export_dt(node) for node in graph.nodes.values() if isinstance(node, nir.NIRGraph))
    return next((dt for dt in inner if dt is not None), None)


def resolve_dt(graph: nir.NIRGraph, dt: float | None) -> float:
    """Return the length of a time step in seconds: ``dt``, that of the graph's metadata, or 1e-4.

    Raises:
        ValueError: ``dt`` differs from that of the metadata, or is not positive.
    """
    export_dt = _export_dt(graph)
    if dt is not None and export_dt is not None and not np.isclose(dt, export_dt):
        raise ValueError(f"dt must be {float(export_dt)} s, for which the graph was exported, got {dt} s")
    resolved = float(export_dt if dt is None and export_dt is not None else 1e-4 if dt is None else dt)
    if not resolved > 0:
        raise ValueError(f"dt must be positive, got {resolved}")
    return resolved
