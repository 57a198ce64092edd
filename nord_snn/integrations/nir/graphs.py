"""NIR graphs: in what order they run, and whether two say the same."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import nir
import numpy as np

__all__ = ["Gate", "Step", "about", "difference", "fires", "in_order", "plan", "same_step"]


class Step(NamedTuple):
    """A node, and the nodes whose outputs it gets the sum of; those that are delayed give what they put out a step before."""

    name: str
    node: nir.NIRNode
    sources: tuple[str, ...]
    delayed: tuple[str, ...]


def plan(graph: nir.NIRGraph) -> tuple[list[Step], Step]:
    """All nodes of a graph in an order in which they can run, subgraphs resolved, and the output.

    What comes back through a loop is delayed: an edge that leads to a node on the way from the input to its own source.

    Raises:
        ValueError: there is not one input and one output, an edge leads nowhere, or a node has no input.
    """
    nodes, edges = _resolved(graph)
    (start,), (end,) = (_only(nodes, kind) for kind in (nir.Input, nir.Output))
    after: dict[str, list[str]] = {name: [] for name in nodes}
    for source, target in edges:
        after[source].append(target)
    order, back = _depth_first(start, after)
    steps = []
    for name in order:
        sources = [source for source, target in edges if target == name and source in order]
        if not sources and name != start:
            raise ValueError(f"'{name}' of the graph has no input")
        late = tuple(source for source in sources if (source, name) in back)
        steps.append(Step(name, nodes[name], tuple(s for s in sources if s not in late), late))
    if end not in order:
        raise ValueError("no way leads through the graph from its input to its output")
    *inner, output = sorted(steps, key=lambda step: step.name == end)
    return inner, output


def _only(nodes: dict[str, nir.NIRNode], kind: type[nir.NIRNode]) -> list[str]:
    found = [name for name, node in nodes.items() if isinstance(node, kind)]
    if len(found) != 1:
        raise ValueError(f"a graph with one {kind.__name__} node was expected, this one has {len(found)}")
    return found


def _depth_first(start: str, after: dict[str, list[str]]) -> tuple[list[str], set[tuple[str, str]]]:
    """Nodes that can be reached, each behind those that feed it, and the edges that lead back."""
    done: list[str] = []
    back: set[tuple[str, str]] = set()
    way = [(start, iter(after[start]))]
    on_the_way = {start}
    while way:
        name, targets = way[-1]
        for target in targets:
            if target in on_the_way:
                back.add((name, target))
            elif target not in done:
                on_the_way.add(target)
                way.append((target, iter(after[target])))
                break
        else:
            way.pop()
            on_the_way.discard(name)
            done.append(name)
    return done[::-1], back


def _resolved(graph: nir.NIRGraph) -> tuple[dict[str, nir.NIRNode], list[tuple[str, str]]]:
    """Nodes and edges without subgraphs: the inner nodes are called ``subgraph/node``."""
    _check_edges(graph)
    nodes: dict[str, nir.NIRNode] = {}
    edges = [(str(a), str(b)) for a, b in graph.edges]
    for name, node in graph.nodes.items():
        if not isinstance(node, nir.NIRGraph):
            nodes[name] = node
            continue
        inner, within = _resolved(node)
        (entry,), (leave,) = (_only(inner, kind) for kind in (nir.Input, nir.Output))
        # The gates stay, as nodes that pass on what they get.
        nodes |= {f"{name}/{key}": Gate(part) if key in (entry, leave) else part for key, part in inner.items()}
        edges = [(f"{name}/{leave}" if a == name else a, f"{name}/{entry}" if b == name else b) for a, b in edges]
        edges += [(f"{name}/{a}", f"{name}/{b}") for a, b in within]
    return nodes, edges


class Gate(nir.NIRNode):
    """Where a subgraph begins or ends."""

    def __init__(self, gate: nir.NIRNode) -> None:
        self.input_type, self.output_type = gate.input_type, gate.output_type
        self.metadata: dict[str, Any] = {}


def _check_edges(graph: nir.NIRGraph) -> None:
    for edge in graph.edges:
        for end in edge:
            if end not in graph.nodes:
                raise ValueError(f"an edge of the graph leads to '{end}', which is none of its nodes")


def in_order(nodes: dict[str, nir.NIRNode], edges: list[tuple[str, str]]) -> nir.NIRGraph:
    """A graph with names whose alphabet is the order of execution.

    A file lists nodes by the alphabet, and nirtorch, which other readers stand on, cannot wire a subgraph that is listed
    before what feeds it.
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
    """Whether all that a node puts out is spikes."""
    if isinstance(node, nir.NIRGraph):
        return all(fires(node.nodes[source]) for source, target in node.edges if target in node.outputs)
    return isinstance(node, nir.CubaLIF | nir.LIF | nir.IF | nir.Threshold)


def difference(one: nir.NIRNode, other: nir.NIRNode) -> str | None:
    """What two nodes or graphs differ in, beyond rounding; None for nothing. Metadata are no part of the comparison."""
    if type(one) is not type(other):
        return f"a {type(one).__name__} where a {type(other).__name__} was expected"
    if isinstance(one, nir.NIRGraph):
        if one.nodes.keys() != other.nodes.keys() or set(map(tuple, one.edges)) != set(map(tuple, other.edges)):
            return "its nodes and edges"
        return _first(
            f"{name}: {found}" for name in one.nodes if (found := difference(one.nodes[name], other.nodes[name]))
        )
    names = [
        field.name for field in dataclasses.fields(one) if field.name not in ("metadata", "input_type", "output_type")
    ]
    return _first(name for name in names if not _close(getattr(one, name), getattr(other, name)))


def _close(one: Any, other: Any) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    size = np.abs(other).max(initial=0.0)  # time constants may be of any
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-4, atol=1e-6 * size)


def _first(found: Iterable[str]) -> str | None:
    return next(iter(found), None)


def about(node: nir.NIRNode) -> dict[str, Any]:
    """The metadata of a node, with text as text: some releases of h5py give bytes."""
    told = node.metadata or {}
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in told.items()}


def _made_for(graph: nir.NIRGraph) -> float | None:
    """The step that a graph or a graph in it was exported for."""
    found = about(graph).get("dt")
    if found is not None:
        return float(found)
    inner = (_made_for(node) for node in graph.nodes.values() if isinstance(node, nir.NIRGraph))
    return next((step for step in inner if step is not None), None)


def same_step(graph: nir.NIRGraph, dt: float | None) -> float:
    """Length of a step: the one that is given, the one that the graph was made for, or 1e-4 s.

    Raises:
        ValueError: the first two are both there and differ, or it is not positive.
    """
    made_for = _made_for(graph)
    if dt is not None and made_for is not None and not np.isclose(dt, made_for):
        raise ValueError(f"the graph was made for steps of {float(made_for)} s, not of {dt} s")
    step = float(made_for if dt is None and made_for is not None else 1e-4 if dt is None else dt)
    if not step > 0:
        raise ValueError(f"dt must be positive, got {step}")
    return step
