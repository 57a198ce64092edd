"""Small things about NIR graphs."""

from typing import Any

import nir

__all__ = ["fires", "in_order", "inline", "text"]


def fires(node: nir.NIRNode) -> bool:
    """Whether all that a node puts out is spikes."""
    if isinstance(node, nir.NIRGraph):
        return all(fires(node.nodes[source]) for source, target in node.edges if target in node.outputs)
    return isinstance(node, nir.CubaLIF | nir.LIF | nir.IF | nir.Threshold)


def in_order(graph: nir.NIRGraph) -> nir.NIRGraph:
    """The same graph with names whose alphabet is the order of execution.

    A file lists nodes by the alphabet, and nirtorch cannot wire a subgraph that is listed before what feeds it.
    """
    inner = [name for name, node in graph.nodes.items() if not isinstance(node, nir.Input | nir.Output)]
    if inner == sorted(inner):
        return graph
    digits = len(str(len(inner)))
    names = {name: f"n{place:0{digits}}_{name}" for place, name in enumerate(inner)}
    return nir.NIRGraph(
        nodes={names.get(name, name): node for name, node in graph.nodes.items()},
        edges=[(names.get(source, source), names.get(target, target)) for source, target in graph.edges],
        metadata=graph.metadata,
    )


def inline(graph: nir.NIRGraph) -> nir.NIRGraph:
    """The same graph without subgraphs, which nirtorch can wire in any order."""
    nodes: dict[str, nir.NIRNode] = {}
    edges = list(graph.edges)
    for name, node in graph.nodes.items():
        if not isinstance(node, nir.NIRGraph):
            nodes[name] = node
            continue
        inner = inline(node)
        gates = {*inner.inputs, *inner.outputs}
        nodes |= {f"{name}.{key}": part for key, part in inner.nodes.items() if key not in gates}
        entries = [f"{name}.{target}" for source, target in inner.edges if source in inner.inputs]
        exits = [f"{name}.{source}" for source, target in inner.edges if target in inner.outputs]
        within = [(f"{name}.{a}", f"{name}.{b}") for a, b in inner.edges if not gates & {a, b}]
        edges = [(a, entry) for a, b in edges if b == name for entry in entries] + [e for e in edges if e[1] != name]
        edges = [(end, b) for a, b in edges if a == name for end in exits] + [e for e in edges if e[0] != name]
        edges += within
    return nir.NIRGraph(nodes=nodes, edges=edges, metadata=graph.metadata, type_check=False)


def text(value: Any) -> Any:
    """Strings that come out of a file are bytes with some releases of h5py."""
    return value.decode() if isinstance(value, bytes) else value
