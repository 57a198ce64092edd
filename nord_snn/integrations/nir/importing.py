"""From NIR to networks of our parts."""

from collections.abc import Callable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import nir
import nirtorch
import numpy as np
import torch
from torch import Tensor, nn

from nord_snn.integrations.nir.exporting import recurrent_weight
from nord_snn.integrations.nir.graphs import inline, text
from nord_snn.layers import LeakyClamp, MembraneReadout, SpikingFeedForward
from nord_snn.neurons import AssociativeLIFNode

__all__ = ["import_from_nir"]

_FromNIR = Callable[[Any], nn.Module]


def import_from_nir(
    graph: nir.NIRGraph | str | Path,
    dt: float = 1e-4,
    *,
    approximate: bool = False,
    more: Mapping[type[nir.NIRNode], _FromNIR] | None = None,
) -> nn.Module:
    """A network of our parts from a NIR graph: the way back from :func:`export_to_nir`, and a way in for others' graphs.

    Our own graphs come back as the parts that they were made of, with the refractory hold, the cascade and its weights. Of
    others' graphs ``Linear``, ``Affine``, ``Scale``, what nirtorch maps (convolutions, pooling, ``Flatten``) and ``CubaLIF``
    with one time constant a layer are understood.

    Args:
        graph: the graph, or a file with one.
        dt: length of a step in seconds.
        approximate: take a ``CubaLIF`` that was not made by us although it resets to ``v_reset = 0`` where ours subtracts its
            threshold, which are the same only in continuous time.
        more: further nodes: class -> function that turns an instance into a module on sequences ``[T, N, *]``.

    Returns:
        A module on sequences, ``[T, N, *]``. Its neurons hold state between calls, as every SpikingJelly network does.

    Raises:
        ValueError: the graph has a node or a loop that our parts cannot express.

    Example:
        >>> from nord_snn.integrations.nir import export_to_nir
        >>> net = nn.Sequential(nn.Linear(20, 64), AssociativeLIFNode(64, n_clusters=8, refractory_steps=0, step_mode="m"))
        >>> back = import_from_nir(export_to_nir(net, torch.rand(10, 4, 20)))
        >>> x_seq = torch.rand(10, 4, 20)
        >>> torch.equal(net(x_seq), back(x_seq))
        True
    """
    if not isinstance(graph, nir.NIRGraph):
        graph = nir.read(graph)
    parts = inline(_Import(dt, approximate, more or {}).graph(graph))
    _check_loops(parts)
    return _Whole(nirtorch.nir_to_torch(parts, {_Part: lambda part: part.module}))


class _Whole(nn.Module):
    """nirtorch's network without the explicit state, of which our parts have none."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_seq: Tensor) -> Tensor:
        return self.network(x_seq)[0]


class _Part(nir.NIRNode):
    """A node that stands for one of our modules, for nirtorch to wire."""

    def __init__(self, module: nn.Module, like: nir.NIRNode) -> None:
        self.module = module
        self.metadata: dict[str, Any] = {}
        self.input_type, self.output_type = like.input_type, like.output_type


class _Import:
    """One import: turns nodes into modules."""

    def __init__(self, dt: float, approximate: bool, more: Mapping[type[nir.NIRNode], _FromNIR]) -> None:
        self.dt, self.approximate, self.more = dt, approximate, more

    def graph(self, graph: nir.NIRGraph) -> nir.NIRGraph:
        """The same graph, with modules for all nodes that are not nirtorch's affair."""
        nodes = {name: self.node(name, node) for name, node in graph.nodes.items()}
        return nir.NIRGraph(nodes=nodes, edges=graph.edges, type_check=False)

    def node(self, name: str, node: nir.NIRNode) -> nir.NIRNode:
        part = text(node.metadata.get("part"))
        if type(node) in self.more:
            return _Part(self.more[type(node)](node), node)
        if part in ("SpikingFeedForward", "MembraneReadout", "LeakyClamp"):
            build = {"SpikingFeedForward": self.feed_forward, "MembraneReadout": self.readout, "LeakyClamp": self.clamp}
            return _Part(build[part](node), node)
        if part == "AssociativeLIFNode" or isinstance(node, nir.CubaLIF):
            return _Part(self.neurons(name, node), node)
        if isinstance(node, nir.NIRGraph):
            return self.graph(node)
        if isinstance(node, nir.Linear | nir.Affine):
            return _Part(_linear(node), node)
        if isinstance(node, nir.Scale):
            return _Part(_Scale(node.scale), node)
        if type(node) not in nirtorch.nir_interpreter.DEFAULT_MAP:
            raise ValueError(f"{type(node).__name__} '{name}' has no counterpart here: name one in `more`")
        return node

    def neurons(self, name: str, node: nir.NIRNode) -> AssociativeLIFNode:
        """A CubaLIF, alone or in the loop of its cascade."""
        if isinstance(node, nir.NIRGraph):
            made = self.layer_of(name, node.nodes["lif"])
            _check_recurrence(made, node.nodes["w_rec"])
            return made
        return self.layer_of(name, node)

    def layer_of(self, name: str, lif: nir.CubaLIF) -> AssociativeLIFNode:
        return self.make(name, lif, lif.tau_mem, lif.tau_syn, lif.w_in)

    def make(
        self, name: str, lif: Any, tau_mem: np.ndarray, tau_syn: np.ndarray, w_in: np.ndarray
    ) -> AssociativeLIFNode:
        about = lif.metadata
        self.check(name, lif, about)
        beta_mem, beta_syn = (
            1 - self.dt / _one(name, tau, what) for tau, what in ((tau_mem, "tau_mem"), (tau_syn, "tau_syn"))
        )
        for beta, what in ((beta_mem, "tau_mem"), (beta_syn, "tau_syn")):
            if not 0 < beta < 1:
                raise ValueError(f"{what} of '{name}' must be longer than a step of {self.dt} s")
        weight = about.get("cascade_weight")
        made = AssociativeLIFNode(
            lif.v_threshold.size,
            None if weight is None else len(weight),
            beta_mem=beta_mem,
            beta_syn=beta_syn,
            v_reset=float(about.get("v_reset", -0.1)),
            refractory_steps=int(about.get("refractory_steps", 0)),
            surrogate=text(about.get("surrogate", "nord_atan")),
            alpha=float(about.get("alpha", 4.0)),
            step_mode="m",
        )
        # What a unit of input adds to their membrane, of which ours sees 1 - beta_mem.
        gain = np.asarray(w_in) * (1 - beta_syn) * lif.r
        if not (gain > 0).all():
            raise ValueError(f"r and w_in of '{name}' must be positive")
        with torch.no_grad():
            made.v_threshold.copy_(torch.from_numpy(np.asarray(lif.v_threshold / gain)).flatten())
            if made.cascade is not None:
                made.cascade.weight.copy_(torch.from_numpy(weight))
                made.cascade.gain.copy_(torch.from_numpy(about["cascade_gain"]))
        return made

    def check(self, name: str, lif: Any, about: dict[str, Any]) -> None:
        if np.any(lif.v_leak):
            raise ValueError(f"'{name}' leaks towards v_leak, where our neurons leak towards 0")
        if "reset" in about:
            return
        if np.any(lif.v_reset):
            raise ValueError(f"'{name}' resets to v_reset without a refractory hold, which our neurons cannot")
        if not self.approximate:
            raise ValueError(
                f"'{name}' resets its membrane to 0 where ours subtracts the threshold; approximate=True takes it for that"
            )

    def feed_forward(self, graph: nir.NIRGraph) -> SpikingFeedForward:
        up, down = graph.nodes["n1_up"], graph.nodes["n3_down"]
        made = SpikingFeedForward(up.weight.shape[1], up.weight.shape[0], neuron=lambda n: nn.Identity())
        made.up, made.down = _linear(up), _linear(down)
        made.lif1, made.lif2 = (self.neurons(name, graph.nodes[name]) for name in ("n2_lif1", "n4_lif2"))
        return made

    def readout(self, graph: nir.NIRGraph) -> MembraneReadout:
        lif, synapse = graph.nodes["lif"], graph.nodes["synapse"]
        node = self.make("lif", lif, lif.tau, synapse.tau, synapse.r)
        if node.cascade is not None:
            _check_recurrence(node, graph.nodes["w_rec"])
        made = MembraneReadout(node.n_features, neuron=lambda n: node)
        with torch.no_grad():
            made.decay_logit.copy_(torch.from_numpy(graph.metadata["decay_logit"]))
        return made

    def clamp(self, node: nir.Scale) -> LeakyClamp:
        made = LeakyClamp(node.scale.size)
        with torch.no_grad():
            made.floor.copy_(torch.from_numpy(node.metadata["floor"]))
            made.leak_logit.copy_(torch.from_numpy(node.metadata["leak_logit"]))
        return made


class _Scale(nn.Module):
    """One factor a channel."""

    def __init__(self, scale: np.ndarray) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.from_numpy(np.asarray(scale, dtype=np.float32)))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def _check_recurrence(node: AssociativeLIFNode, w_rec: nir.Linear) -> None:
    if node.cascade is None or not np.allclose(w_rec.weight, recurrent_weight(node), rtol=1e-4, atol=1e-7):
        raise ValueError(
            "the recurrent weight is not the cascade that the metadata describes: it was changed since the export"
        )


def _check_loops(graph: nir.NIRGraph) -> None:
    before: dict[str, set[str]] = {name: set() for name in graph.nodes}
    for source, target in graph.edges:
        before[target].add(source)
    try:
        TopologicalSorter(before).prepare()
    except CycleError as error:
        raise ValueError(f"the graph has a loop that is no cascade: {' -> '.join(error.args[1])}") from None


def _linear(node: nir.Linear | nir.Affine) -> nn.Linear:
    bias = getattr(node, "bias", None)
    made = nn.Linear(node.weight.shape[1], node.weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(np.asarray(node.weight)))
        if bias is not None:
            made.bias.copy_(torch.from_numpy(np.asarray(bias)))
    return made


def _one(name: str, values: np.ndarray, what: str) -> float:
    """The value that all neurons of a layer share."""
    values = np.unique(values)
    if values.size != 1:
        raise ValueError(f"{what} of '{name}' differs between neurons, where a layer of ours has one")
    return float(values[0])
