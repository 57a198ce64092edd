"""Import NIR graphs as networks of nord-snn parts."""

import logging
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
from nord_snn.integrations.nir.neurons import RESETS, NIRNeurons, integrator, neurons
from nord_snn.integrations.nir.recurrent import Loop, fold_loops, recurrent_layer
from nord_snn.integrations.nir.stateless import known_shape, output_shape, stateless_module
from nord_snn.layers import MembraneReadout, SpikingFeedForward
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import SURROGATES, Dynamics

__all__ = ["NIRNetwork", "import_from_nir"]

log = logging.getLogger("nord_snn")

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
    """Return a network of nord-snn parts from a NIR graph, exported by :func:`export_to_nir` or by other libraries.

    Graphs from :func:`export_to_nir` are restored as the original parts, with the refractory period, the cascade and its
    weights; a part that was changed after the export raises. In other graphs ``Linear``, ``Affine``, ``Scale``,
    ``Threshold``, convolutions, pooling, ``Flatten``, graphs of these, and ``CubaLIF`` with one time constant per layer are
    supported.

    Args:
        graph: the graph, or a file with one.
        dt: length of a time step in seconds; None: that of the graph's metadata, as our exports have it, else 1e-4.
        dtype: dtype of the network's parameters.
        approximate: accept a ``CubaLIF`` of other libraries, which resets to ``v_reset = 0``, although ours subtracts its
            threshold; the two are equal in continuous time only.
        more: further nodes: class -> function that turns an instance into a module on sequences ``[T, N, *]``.

    Returns:
        A module on sequences, ``[T, N, *]``. Its neurons keep state between calls, as in every SpikingJelly network. A custom
        surrogate cannot be stored in a graph: it is replaced by the default, and a warning is logged.

    Raises:
        TypeError: ``graph`` is neither a graph nor a file name, or a function in ``more`` did not return a module.
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
        graph = read(graph)
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(f"expected a NIRGraph or the name of a file, got {type(graph).__name__}")
    if approximate:
        warnings.warn('approximate=True is now reset="subtract"', FutureWarning, stacklevel=2)
        reset = reset or "subtract"
    if reset not in (None, *RESETS):
        raise ValueError(f"reset must be one of {list(RESETS)} or None, got {reset!r}")
    # Build half-precision modules in float32 first: a rounded parameter would no longer match the graph.
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    importer = _Importer(resolve_dt(graph, dt), precision, reset, strict, more or {})
    whole = importer.convert_node("the graph", graph)
    if isinstance(whole, _ModuleNode):
        return NIRNetwork([whole.module.to(dtype)], [(), (0,)])
    scheduled, output = schedule(whole)
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
    """Run the parts of a graph, each on the sum of its sources.

    Args:
        parts: modules on sequences, in execution order.
        sources: for each part, and last for the output, the indices of the parts that are its sources; none for the input.

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
    """A node that contains a module."""

    def __init__(self, module: nn.Module, like: nir.NIRNode) -> None:
        self.module = module
        self.metadata: dict[str, Any] = {}
        self.input_type, self.output_type = like.input_type, like.output_type


class _Importer:
    """Turn nodes into modules."""

    def __init__(
        self, dt: float, dtype: torch.dtype, reset: str | None, strict: bool, more: Mapping[type[nir.NIRNode], _FromNIR]
    ) -> None:
        self.dt, self.dtype, self.reset, self.strict, self.more = dt, dtype, reset, strict, more

    def convert_graph(self, graph: nir.NIRGraph) -> nir.NIRGraph:
        """Return the graph with modules in place of the nodes and subgraphs that are parts of nord-snn."""
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
        """Return a part of nord-snn, checked by exporting it again."""
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
            name: of the node.
            node: the node.
            shape: shape of one row of its input, if it is known.
            loop: the map of its spikes that leads back to it.
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
        """Return the neurons of other libraries, with the map of their spikes that leads back to them."""
        reset = self.reset or str(metadata_of(node).get("reset", "value"))
        made = neurons(
            name, node, self.dt, shape, reset=reset, strict=self.strict, step_mode="m"
        ).to(self.dtype)
        made.reset_parameters()  # in this precision
        row = np.shape(node.v_threshold) if np.size(node.v_threshold) > 1 else shape or (made.n_features,)
        return (made, row) if loop is None else (self.with_feedback(made, loop), row)

    def with_feedback(self, made: Any, loop: Loop) -> nn.Module:
        """Return neurons with the map of their spikes that leads back to them."""
        made.step_mode = "s"
        feedback = nn.Identity() if loop.node is None else stateless_module(loop.node)
        assert feedback is not None
        return recurrent_layer(made, feedback)

    def neurons(self, name: str, node: Any) -> AssociativeLIFNode:
        """Return the neurons of a CubaLIF, or of a subgraph with its recurrent cascade."""
        lif = node.nodes["lif"] if isinstance(node, nir.NIRGraph) else node
        if "threshold" in metadata_of(lif):
            return self.restored(name, metadata_of(lif))
        return self.lif_layer(name, lif, lif.tau_mem, lif.tau_syn, lif.w_in)  # of an earlier release

    def restored(self, name: str, metadata: dict[str, Any]) -> AssociativeLIFNode:
        """Return the neurons with these parameters."""
        dynamics = Dynamics(**{field: _plain(metadata[field]) for field in Dynamics._fields if field in metadata})
        mem, syn = (metadata.get(f"{beta}_logit") for beta in ("beta_mem", "beta_syn"))
        weight = metadata.get("cascade_weight")
        bias = metadata.get("bias")
        arguments: dict[str, Any] = {
            "preset": "nord",
            "n_clusters": None if weight is None else len(weight),
            "beta_mem": 0.5,
            "beta_syn": 0.0 if syn is None else 0.5,
            "own_decays": any(np.size(logit) > 1 for logit in (mem, syn) if logit is not None),
            "learnable": [name for name in str(metadata["learnable"]).split(",") if name],
            "v_reset": float(metadata["v_reset"]) if "v_reset" in metadata else None,
            "refractory_steps": int(metadata["refractory_steps"]),
            "surrogate": _surrogate(name, metadata),
            "alpha": float(metadata["alpha"]),
            "hard_reset": dynamics.hard_reset,
            "dynamics": dynamics,
            "channel_dim": int(metadata["channel_dim"]) if "channel_dim" in metadata else None,
            "step_mode": "m",
        }
        if "strict" in metadata:
            bias = None if bias is None else torch.from_numpy(bias)
            arguments |= {"strict": bool(metadata["strict"]), "bias": bias}
        kind: Any = NIRNeurons if "strict" in metadata else AssociativeLIFNode
        node = kind(len(metadata["threshold"]), **arguments).to(self.dtype)
        values = {"v_threshold": metadata["threshold"], "beta_mem_logit": mem, "beta_syn_logit": syn}
        with torch.no_grad():
            for field, value in values.items():
                if value is not None:
                    getattr(node, field).copy_(torch.from_numpy(np.asarray(value)))
            if node.cascade is not None:
                node.cascade.weight.copy_(torch.from_numpy(weight))
                node.cascade.gain.copy_(torch.from_numpy(metadata["cascade_gain"]))
        return node

    def lif_layer(self, name: str, lif: Any, tau_mem: Any, tau_syn: Any, w_in: Any) -> AssociativeLIFNode:
        metadata = metadata_of(lif)
        beta_mem, beta_syn = (self.decay(name, tau, kind) for tau, kind in ((tau_mem, "tau_mem"), (tau_syn, "tau_syn")))
        # Increase of the membrane potential per unit of input; in our neurons it is scaled by 1 - beta_mem.
        gain = np.asarray(w_in) * (1 - beta_syn) * lif.r
        if not (gain > 0).all() or not np.isfinite(lif.v_threshold).all() or np.ndim(lif.v_threshold) != 1:
            raise ValueError(f"'{name}' must have positive r and w_in, and a finite v_threshold with one dimension")
        weight = metadata.get("cascade_weight")
        node = AssociativeLIFNode(
            lif.v_threshold.size,
            None if weight is None else len(weight),
            beta_mem=beta_mem,
            beta_syn=beta_syn,
            v_reset=float(metadata.get("v_reset", -0.1)),
            refractory_steps=int(metadata.get("refractory_steps", 0)),
            surrogate=_surrogate(name, metadata),
            alpha=float(metadata.get("alpha", 4.0)),
            step_mode="m",
        ).to(self.dtype)
        with torch.no_grad():
            # Recompute in this precision: a logit rounded to float32 would change the decay.
            node.beta_mem_logit.fill_(float(np.log(beta_mem / (1 - beta_mem))))
            node.beta_syn_logit.fill_(float(np.log(beta_syn / (1 - beta_syn))))
            node.v_threshold.copy_(torch.from_numpy(np.asarray(lif.v_threshold / gain)))
            if node.cascade is not None:
                node.cascade.weight.copy_(torch.from_numpy(weight))
                node.cascade.gain.copy_(torch.from_numpy(metadata["cascade_gain"]))
        return node

    def decay(self, name: str, tau: Any, kind: str) -> float:
        """Return the decay of a layer, which all its neurons must share."""
        values = np.unique(tau)
        if values.size != 1:
            raise ValueError(f"{kind} of '{name}' must be the same for all neurons of a layer")
        beta = 1 - self.dt / float(values[0])
        if not 0 < beta < 1:
            raise ValueError(f"{kind} of '{name}' must be finite and longer than a time step of {self.dt} s")
        return beta

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
            node = self.restored(f"{name}/lif", metadata_of(lif))
        else:
            node = self.lif_layer(f"{name}/lif", lif, lif.tau, synapse.tau, synapse.r)
        readout = MembraneReadout(node.n_features, neuron=lambda n: node).to(self.dtype)
        with torch.no_grad():
            readout.decay_logit.copy_(torch.from_numpy(metadata_of(graph)["decay_logit"]))
        return readout


def _surrogate(name: str, metadata: dict[str, Any]) -> str:
    surrogate = str(metadata.get("surrogate", "nord_atan"))
    if surrogate in SURROGATES:
        return surrogate
    log.warning("the surrogate of '%s' (%s) cannot be stored in a graph: nord_atan replaces it", name, surrogate)
    return "nord_atan"


def _is_extended(node: Any) -> bool:
    """Return whether a node, or one in a subgraph, is of our extension."""
    if isinstance(node, nir.NIRGraph):
        return any(_is_extended(inner) for inner in node.nodes.values())
    return hasattr(node, "refractory_time")


def _plain(value: Any) -> Any:
    """Return a number or text of the metadata as Python has it."""
    return value.item() if isinstance(value, np.generic) else value
