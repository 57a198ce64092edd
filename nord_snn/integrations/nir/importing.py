"""From NIR to networks of our parts."""

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

from nord_snn.integrations.nir.exporting import Export, log
from nord_snn.integrations.nir.graphs import Gate, about, difference, plan, same_step
from nord_snn.integrations.nir.stateless import stateless
from nord_snn.layers import MembraneReadout, SpikingFeedForward
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import SURROGATES

__all__ = ["NIRNetwork", "import_from_nir"]

_FromNIR = Callable[[Any], nn.Module]


def import_from_nir(
    graph: nir.NIRGraph | str | Path,
    dt: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    approximate: bool = False,
    more: Mapping[type[nir.NIRNode], _FromNIR] | None = None,
) -> "NIRNetwork":
    """A network of our parts from a NIR graph: the way back from :func:`export_to_nir`, and a way in for others' graphs.

    Our own graphs come back as the parts that they were made of, with the refractory hold, the cascade and its weights; a
    part that was changed since is refused. Of others' graphs ``Linear``, ``Affine``, ``Scale``, ``Threshold``, convolutions,
    pooling, ``Flatten``, graphs of these, and ``CubaLIF`` with one time constant a layer are understood.

    Args:
        graph: the graph, or a file with one.
        dt: length of a step in seconds; None: the one that an export of ours was made for, else 1e-4.
        dtype: of the network's parameters.
        approximate: take a ``CubaLIF`` that was not made by us although it resets to ``v_reset = 0`` where ours subtracts its
            threshold, which are the same only in continuous time.
        more: further nodes: class -> function that turns an instance into a module on sequences ``[T, N, *]``.

    Returns:
        A module on sequences, ``[T, N, *]``. Its neurons hold state between calls, as every SpikingJelly network does. A
        surrogate of one's own cannot be put into a graph: it comes back as the default, and a warning is logged.

    Raises:
        TypeError: it is neither a graph nor the name of a file, or a function in ``more`` made no module.
        ValueError: the graph has a node or a loop that our parts cannot express, or ``dt`` is not that of the graph.

    Example:
        >>> from nord_snn.integrations.nir import export_to_nir
        >>> net = nn.Sequential(nn.Linear(20, 64), AssociativeLIFNode(64, n_clusters=8, refractory_steps=0, step_mode="m"))
        >>> back = import_from_nir(export_to_nir(net, torch.rand(10, 4, 20)))
        >>> x_seq = torch.rand(10, 4, 20)
        >>> torch.equal(net(x_seq), back(x_seq))
        True
    """
    if isinstance(graph, str | Path):
        graph = nir.read(graph)
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(f"expected a NIRGraph or the name of a file, got {type(graph).__name__}")
    # Halves are made of float32, since a part that was rounded is another one than the graph's.
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    reader = _Import(same_step(graph, dt), precision, approximate, more or {})
    whole = reader.part("the graph", graph)
    if isinstance(whole, _Part):
        return NIRNetwork([whole.module.to(dtype)], [(), (0,)])
    steps, output = plan(whole)
    for step in steps:
        if step.delayed:
            raise ValueError(
                f"the graph has a loop that is no cascade: '{step.delayed[0]}' leads back to '{step.name}'"
            )
    places = {step.name: place for place, step in enumerate(steps)}
    modules = [reader.module(step.name, step.node).to(dtype) for step in steps]
    return NIRNetwork(modules, [tuple(places[name] for name in step.sources) for step in (*steps, output)])


class NIRNetwork(nn.Module):
    """The parts of a graph, each fed by the sum of its sources.

    Args:
        parts: modules on sequences, in an order in which they can run.
        sources: for each part, and last for the output, the places of those that feed it; none for the input.

    Shapes: ``[T, N, *]`` -> ``[T, N, *]``; ``[N, *]`` behind a readout.
    """

    def __init__(self, parts: list[nn.Module], sources: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.parts, self.sources = nn.ModuleList(parts), sources

    def forward(self, x_seq: Tensor) -> Tensor:
        """All steps."""
        outputs: list[Tensor] = []
        for part, sources in zip(self.parts, self.sources, strict=False):
            outputs.append(part(reduce(add, (outputs[place] for place in sources)) if sources else x_seq))
        return reduce(add, (outputs[place] for place in self.sources[-1]))


class _Part(nir.NIRNode):
    """A node that stands for one of our modules."""

    def __init__(self, module: nn.Module, like: nir.NIRNode) -> None:
        self.module = module
        self.metadata: dict[str, Any] = {}
        self.input_type, self.output_type = like.input_type, like.output_type


class _Import:
    """One import: turns nodes into modules."""

    def __init__(
        self, dt: float, dtype: torch.dtype, approximate: bool, more: Mapping[type[nir.NIRNode], _FromNIR]
    ) -> None:
        self.dt, self.dtype, self.approximate, self.more = dt, dtype, approximate, more

    def parts(self, graph: nir.NIRGraph) -> nir.NIRGraph:
        """The same graph with our modules in place of the nodes that they were exported as."""
        nodes = {name: self.part(name, node) for name, node in graph.nodes.items()}
        return nir.NIRGraph(nodes=nodes, edges=graph.edges, type_check=False)

    def part(self, name: str, node: nir.NIRNode) -> nir.NIRNode:
        if type(node) in self.more:
            made = self.more[type(node)](node)
            if not isinstance(made, nn.Module):
                raise TypeError(
                    f"`more` must make a torch.nn.Module of {type(node).__name__}, got {type(made).__name__}"
                )
            return _Part(made, node)
        kinds: dict[str, Callable[[str, Any], nn.Module]] = {
            "AssociativeLIFNode": self.neurons,
            "SpikingFeedForward": self.feed_forward,
            "MembraneReadout": self.readout,
        }
        kind = about(node).get("part")
        if kind in kinds:
            return _Part(self.ours(name, node, kind, kinds[kind]), node)
        if isinstance(node, nir.CubaLIF):
            return _Part(self.neurons(name, node), node)
        return self.parts(node) if isinstance(node, nir.NIRGraph) else node

    def ours(self, name: str, node: Any, kind: str, make: Callable[[str, Any], nn.Module]) -> nn.Module:
        """A part of ours, which must be what its module would be exported as."""
        try:
            made = make(name, node)
            export = Export(self.dt, int(about(node).get("n_steps", 1)), approximate=True)
            again = export.table[type(made)](made)
        except (KeyError, AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"'{name}' is marked as a {kind} of ours and is not built like one: {error!r}") from error
        if changed := difference(node, again):
            raise ValueError(
                f"'{name}' is marked as a {kind} of ours and was changed since its export ({changed}); without its metadata "
                "it is read as what it is"
            )
        return made

    def module(self, name: str, node: nir.NIRNode) -> nn.Module:
        """What runs in place of a node, on sequences."""
        if isinstance(node, _Part):
            return node.module
        if isinstance(node, nir.Input | Gate):
            return nn.Identity()
        made = stateless(node)
        if made is None:
            raise ValueError(f"{type(node).__name__} '{name}' has no counterpart here: name one in `more`")
        over_features = isinstance(node, nir.Linear | nir.Affine | nir.Scale | nir.Threshold)
        return made if over_features else layer.SeqToANNContainer(made)

    def neurons(self, name: str, node: Any) -> AssociativeLIFNode:
        """A CubaLIF, alone or in the loop of its cascade."""
        lif = node.nodes["lif"] if isinstance(node, nir.NIRGraph) else node
        return self.layer_of(name, lif, lif.tau_mem, lif.tau_syn, lif.w_in)

    def layer_of(self, name: str, lif: Any, tau_mem: Any, tau_syn: Any, w_in: Any) -> AssociativeLIFNode:
        told = about(lif)
        self.check(name, lif, told)
        beta_mem, beta_syn = (self.decay(name, tau, what) for tau, what in ((tau_mem, "tau_mem"), (tau_syn, "tau_syn")))
        # What a unit of input adds to their membrane, of which ours sees 1 - beta_mem.
        gain = np.asarray(w_in) * (1 - beta_syn) * lif.r
        if not (gain > 0).all() or not np.isfinite(lif.v_threshold).all() or np.ndim(lif.v_threshold) != 1:
            raise ValueError(
                f"'{name}' must have positive r and w_in and a finite threshold for each of one row of neurons"
            )
        weight = told.get("cascade_weight")
        made = AssociativeLIFNode(
            lif.v_threshold.size,
            None if weight is None else len(weight),
            beta_mem=beta_mem,
            beta_syn=beta_syn,
            v_reset=float(told.get("v_reset", -0.1)),
            refractory_steps=int(told.get("refractory_steps", 0)),
            surrogate=_surrogate(name, told),
            alpha=float(told.get("alpha", 4.0)),
            step_mode="m",
        ).to(self.dtype)
        with torch.no_grad():
            # Anew in this precision: a logit in float32 is another decay.
            made.beta_mem_logit.fill_(float(np.log(beta_mem / (1 - beta_mem))))
            made.beta_syn_logit.fill_(float(np.log(beta_syn / (1 - beta_syn))))
            made.v_threshold.copy_(torch.from_numpy(np.asarray(lif.v_threshold / gain)))
            if made.cascade is not None:
                made.cascade.weight.copy_(torch.from_numpy(weight))
                made.cascade.gain.copy_(torch.from_numpy(told["cascade_gain"]))
        return made

    def decay(self, name: str, tau: Any, what: str) -> float:
        """Of a layer, whose neurons share it."""
        values = np.unique(tau)
        if values.size != 1:
            raise ValueError(f"{what} of '{name}' differs between neurons, where a layer of ours has one")
        beta = 1 - self.dt / float(values[0])
        if not 0 < beta < 1:
            raise ValueError(f"{what} of '{name}' must be finite and longer than a step of {self.dt} s")
        return beta

    def check(self, name: str, lif: Any, told: dict[str, Any]) -> None:
        if np.any(lif.v_leak):
            raise ValueError(f"'{name}' leaks towards v_leak, where our neurons leak towards 0")
        holds = int(told.get("refractory_steps", 0)) > 0
        if not holds and np.any(lif.v_reset):
            raise ValueError(f"'{name}' resets to v_reset without a refractory hold, which our neurons cannot")
        if not holds and told.get("reset") != "subtract" and not self.approximate:
            raise ValueError(
                f"'{name}' resets its membrane to 0 where ours subtracts the threshold; approximate=True takes it for that"
            )

    def feed_forward(self, name: str, graph: Any) -> SpikingFeedForward:
        up, down = (stateless(graph.nodes[key]) for key in ("n1_up", "n3_down"))
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        made = SpikingFeedForward(up.in_features, up.out_features, neuron=lambda n: nn.Identity())
        made.up, made.down = up.to(self.dtype), down.to(self.dtype)
        made.lif1, made.lif2 = (self.neurons(f"{name}/{key}", graph.nodes[key]) for key in ("n2_lif1", "n4_lif2"))
        return made

    def readout(self, name: str, graph: Any) -> MembraneReadout:
        lif, synapse = graph.nodes["lif"], graph.nodes["synapse"]
        node = self.layer_of(f"{name}/lif", lif, lif.tau, synapse.tau, synapse.r)
        made = MembraneReadout(node.n_features, neuron=lambda n: node).to(self.dtype)
        with torch.no_grad():
            made.decay_logit.copy_(torch.from_numpy(about(graph)["decay_logit"]))
        return made


def _surrogate(name: str, told: dict[str, Any]) -> str:
    surrogate = str(told.get("surrogate", "nord_atan"))
    if surrogate in SURROGATES:
        return surrogate
    log.warning("the surrogate of '%s' (%s) is not in the graph: it is nord_atan now", name, surrogate)
    return "nord_atan"
