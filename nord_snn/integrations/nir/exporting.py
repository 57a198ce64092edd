"""Export networks to NIR."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import nir
import numpy as np
import torch
from spikingjelly.activation_based import base, layer
from torch import Tensor, nn

from nord_snn.integrations.nir.simulator import simulate
from nord_snn.integrations.nir.tracing import trace
from nord_snn.layers import (
    CoFiringResonance,
    LeakyClamp,
    MembraneReadout,
    MultiScaleTemporalEncoder,
    NordBlock,
    SpikeFedBlock,
    SpikeFedResonance,
    SpikingFeedForward,
)
from nord_snn.neurons import AssociativeCascade, AssociativeLIFNode, fire_from_rest
from nord_snn.ops import Dynamics
from nord_snn.ops.checks import compute_dtype

__all__ = ["Exporter", "deviation", "export_to_nir"]

log = logging.getLogger("nord_snn")

ToNIR = Callable[[Any], nir.NIRNode]

#: Largest deviations that rounding explains: for one spike in a hundred, the membrane potential may differ from the threshold
#: by rounding only; in half precision for one in five.
MAX_DEVIATION, MAX_DEVIATION_HALF = 0.01, 0.2

#: Modules that are the identity: dropout in eval mode, a clamp after spikes.
_IDENTITY_MODULES = (nn.Identity, nn.Dropout, layer.Dropout, LeakyClamp)

_UNSUPPORTED: dict[type[nn.Module], str] = {
    CoFiringResonance: "resonance needs products of spike trains and top-K selection, which NIR does not have",
    SpikeFedResonance: "resonance needs products of spike trains and top-K selection, which NIR does not have",
    SpikeFedBlock: "the block needs products of spike trains, top-K selection and layer normalisation, which NIR does not have",
    NordBlock: "the block needs products of spike trains, top-K selection and layer normalisation, which NIR does not have",
    MultiScaleTemporalEncoder: "NIR has no gates that change with the time step: export the part after the encoder, whose "
    "input is the encoder's output",
    AssociativeCascade: "the cascade is part of a neuron's loop: export the AssociativeLIFNode that contains it",
    nn.LayerNorm: "NIR has no layer normalisation",
}


def export_to_nir(
    net: nn.Module,
    x_seq: Tensor,
    dt: float = 1e-4,
    *,
    approximate: bool = False,
    more: Mapping[type[nn.Module], ToNIR] | None = None,
) -> nir.NIRGraph:
    r"""Export a network as a graph of NIR nodes, for any simulator or chip that reads NIR.

    A layer of :class:`~nord_snn.neurons.AssociativeLIFNode` becomes a ``CubaLIF`` with ``tau = dt / (1 - beta)``. With a
    cascade it becomes a subgraph of a ``CubaLIF`` and a recurrent ``Linear``, delayed by one time step, with the weights
    ``beta_syn * gain[c] * sigmoid(weight[c, k]) / (D / C)``. Potentials are scaled by
    ``1 / (1 - beta_mem)``, so that ``r = tau_mem / dt`` and ``w_in = tau_syn / dt``, the only values that SpikingJelly and
    snnTorch read; spikes are the same. ``SpikingFeedForward`` becomes a subgraph of two such layers, and ``MembraneReadout`` a
    subgraph in which leaky integrators compute the potentials: its return value is the graph's output in the last time step.

    NIR cannot express:

    * The refractory period. A layer with ``refractory_steps > 0`` raises or, with ``approximate=True``, is exported without
      it, but with the reset to ``v_reset``.
    * Reset by subtraction, as in a layer with ``refractory_steps=0``. NIR describes continuous time, where potentials do not
      overshoot, so that subtracting the threshold and resetting to 0 are equal. In discrete time they differ, and the reader
      must subtract (Norse: ``reset_method=reset_subtract``). The metadata has ``reset: subtract``.
    * LeakyClamp below zero. After spikes it is the identity and needs no node; elsewhere it raises.
    * Resonance, blocks, layer normalisation and the encoder, which raise.

    Args:
        net: a part of nord-snn, or any module composed of these parts, ``Linear``, the classes in ``more``, and additions, as
            :func:`torch.fx.symbolic_trace` traces them. Its state is unchanged; it is exported in eval mode.
        x_seq: example input, ``[T, N, D]``: T is the number of time steps of the readout; the deviation is computed on it.
        dt: length of a time step in seconds.
        approximate: export layers with a refractory period without it.
        more: further modules: class -> function that turns an instance into a ``nir.NIRNode``.

    Returns:
        The graph; ``nir.write`` writes it to a file. Its metadata have ``dt`` and ``deviation``, which is :func:`deviation` on
        ``x_seq`` with the resets in the metadata of the neurons.

    Raises:
        ValueError: NIR cannot express a part (the message names it), the outputs of graph and network differ, ``dt`` is not
            positive, or ``x_seq`` is not a sequence.
        TypeError: a function in ``more`` did not return a node.

    Source: NIR (Pedersen et al. 2024).

    Example:
        >>> net = nn.Sequential(nn.Linear(20, 64), AssociativeLIFNode(64, n_clusters=8, refractory_steps=0))
        >>> graph = export_to_nir(net, torch.rand(10, 4, 20))
        >>> sorted(type(node).__name__ for node in graph.nodes.values())
        ['Affine', 'Input', 'NIRGraph', 'Output']
        >>> graph.metadata["deviation"]
        0.0
    """
    if dt <= 0:
        raise ValueError(f"dt must be positive, got {dt}")
    if x_seq.ndim < 3 or not x_seq.numel():
        raise ValueError(f"x_seq must have shape [T, N, *, D] and not be empty, got {list(x_seq.shape)}")
    exporter = Exporter(dt, len(x_seq), approximate)
    table: dict[type[nn.Module], ToNIR] = {**exporter.table, **(more or {})}
    _check_modules(net, table)
    with _eval_mode(net):
        graph = trace(net, table, _IDENTITY_MODULES, x_seq.shape[2:])
    graph.metadata = {"source": "nord-snn", "dt": dt}
    graph.metadata["deviation"] = measured = deviation(net, graph, x_seq)
    if exporter.omitted_refractory_period:
        log.warning("export_to_nir omitted the refractory period: on x_seq, sum |a - b| / sum |a| is %.2f", measured)
    elif not measured <= (MAX_DEVIATION if _full_precision(net) else MAX_DEVIATION_HALF):  # raises for NaN too
        raise ValueError(
            f"the graph must give the outputs of the network, but differs by {measured:.2f} (sum |a - b| / sum |a| on x_seq): "
            "the forward does more than its modules, such as a hook or two calls that share state"
        )
    return graph


def deviation(
    net: nn.Module, graph: nir.NIRGraph, x_seq: Tensor, dt: float | None = None, *, reset: str | None = None
) -> float:
    """Return the deviation of a graph from its network: ``sum |a - b| / sum |a|`` over their outputs.

    For spikes this is the number of differing spikes divided by the number of spikes of ``net``: 0 means equal, and values
    above 1 are possible. It is 0 if both outputs are zero, and infinity if only that of ``net`` is. ``net`` runs from rest and
    its state is restored; if it does not return a sequence, the graph's last time step is compared.

    Args:
        net: the network, in any step mode.
        graph: its export.
        x_seq: input, ``[T, N, D]``.
        dt: see :func:`simulate`.
        reset: see :func:`simulate`.
    """
    with torch.no_grad(), _eval_mode(net):
        expected = fire_from_rest(net, x_seq)
    expected = expected.to("cpu", compute_dtype(expected))
    simulated = simulate(graph, x_seq, dt, reset=reset)
    if expected.ndim < simulated.ndim:
        simulated = simulated[-1]
    difference, size = ((expected - simulated).abs().sum(), expected.abs().sum())
    if not size:
        log.warning("all outputs of the network for x_seq are zero, so the deviation says little about its graph")
        return 0.0 if not difference else float("inf")
    return (difference / size).item()


@contextmanager
def _eval_mode(net: nn.Module) -> Iterator[None]:
    """Set eval mode in a ``with`` block and restore the modes afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _full_precision(net: nn.Module) -> bool:
    return all(p.dtype.itemsize >= 4 for p in net.parameters())


class Exporter:
    """Turn modules into nodes; ``omitted_refractory_period`` is True if a node is an approximation."""

    def __init__(self, dt: float, n_steps: int, approximate: bool) -> None:
        self.dt, self.n_steps, self.approximate = dt, n_steps, approximate
        self.omitted_refractory_period = False
        self.table: dict[type[nn.Module], ToNIR] = {
            AssociativeLIFNode: self.neurons,
            SpikingFeedForward: self.feed_forward,
            MembraneReadout: self.readout,
            nn.Linear: self.linear,
            layer.Linear: self.linear,
        }

    def linear(self, module: nn.Linear) -> nir.NIRNode:
        """Return a Linear or, with a bias, an Affine."""
        if module.bias is None:
            return nir.Linear(weight=_array(module.weight))
        return nir.Affine(weight=_array(module.weight), bias=_array(module.bias))

    def neurons(self, node: Any) -> nir.NIRNode:
        """Return a CubaLIF or, with a cascade, a subgraph with its recurrent connection."""
        lif = self.cuba(node)
        if node.cascade is None:
            return lif
        width = np.array([node.n_features])
        return nir.NIRGraph(
            nodes={
                "input": nir.Input(input_type=width),
                "lif": lif,
                "w_rec": self.recurrence(node),
                "output": nir.Output(output_type=width),
            },
            edges=[("input", "lif"), ("w_rec", "lif"), ("lif", "w_rec"), ("lif", "output")],
            metadata={"part": "AssociativeLIFNode"},
        )

    def cuba(self, node: AssociativeLIFNode) -> nir.CubaLIF:
        return nir.CubaLIF(**self.constants(node), metadata=self.metadata(node))

    def constants(self, node: AssociativeLIFNode) -> dict[str, np.ndarray]:
        """Return the constants of a CubaLIF, in float64: rounding a time constant would change the decay."""
        if node.dynamics != Dynamics() or node.beta_syn_logit is None or len(node.beta_mem_logit) > 1:
            raise ValueError(
                "export_to_nir writes neurons with the published dynamics, a synaptic current, and one decay for all neurons; "
                f"this one has {node.dynamics}, beta_syn {_described(node.beta_syn)} and beta_mem {_described(node.beta_mem)}"
            )
        if node.channel_dim not in (None, -1):
            raise ValueError(
                f"export_to_nir writes neurons in the last dimension, this one has channel_dim={node.channel_dim}"
            )
        if node.refractory_steps and not self.approximate:
            raise ValueError(
                f"NIR cannot express the refractory period (refractory_steps={node.refractory_steps}): train with "
                "refractory_steps=0, or export with approximate=True, which omits the period and measures the deviation"
            )
        self.omitted_refractory_period |= node.refractory_steps > 0
        beta_mem, beta_syn = (
            logit.detach().double().sigmoid().item() for logit in (node.beta_mem_logit, node.beta_syn_logit)
        )
        for name, beta in (("beta_mem", beta_mem), ("beta_syn", beta_syn)):
            if not 0 < 1 - (1 - beta) < 1:  # as a reader computes it from the time constant
                raise ValueError(f"1 - {name} must not round to 0 or 1, to have a time constant, got {name} = {beta}")
        ones = np.ones(node.n_features)
        tau_mem, tau_syn = self.dt / (1 - beta_mem), self.dt / (1 - beta_syn)
        threshold = node.firing_threshold().detach().double().cpu().numpy()
        v_reset = node.v_reset if node.refractory_steps else 0.0
        return {
            "tau_syn": tau_syn * ones,
            "tau_mem": tau_mem * ones,
            "r": tau_mem / self.dt * ones,
            "w_in": tau_syn / self.dt * ones,
            "v_leak": 0.0 * ones,
            "v_threshold": threshold / (1 - beta_mem),
            "v_reset": v_reset / (1 - beta_mem) * ones,
        }

    def metadata(self, node: AssociativeLIFNode) -> dict[str, Any]:
        """Return the constants that NIR nodes cannot express; the importer needs them to restore the layer."""
        metadata: dict[str, Any] = {
            "part": "AssociativeLIFNode",
            "reset": "value" if node.refractory_steps else "subtract",
            "refractory_steps": node.refractory_steps,
            "v_reset": node.v_reset,
            "alpha": node.alpha,
        }
        surrogate = node.surrogate_function
        metadata["surrogate"] = surrogate if isinstance(surrogate, str) else f"custom: {surrogate!r}"
        if node.cascade is not None:
            metadata |= {"cascade_weight": _array(node.cascade.weight), "cascade_gain": _array(node.cascade.gain)}
        return metadata

    def recurrence(self, node: AssociativeLIFNode) -> nir.Linear:
        """Return the cascade as a matrix between neurons. Its current arrives one time step later, so it decays once."""
        cascade = node.cascade
        assert cascade is not None
        with torch.no_grad():
            between = (cascade.gain.double()[:, None] * cascade.weight.double().sigmoid()).cpu()
            cluster = torch.arange(node.n_features) % cascade.n_clusters
            size = node.n_features // cascade.n_clusters
            beta_syn = node.beta_syn_logit.double().sigmoid().item()
            weight = beta_syn / size * between[cluster][:, cluster]
        return nir.Linear(weight=weight.to(compute_dtype(cascade.weight)).numpy())

    def feed_forward(self, ffn: SpikingFeedForward) -> nir.NIRGraph:
        """Return two linear maps and two layers of neurons, in a subgraph whose names are in execution order for nirtorch."""
        for name, lif in (("lif1", ffn.lif1), ("lif2", ffn.lif2)):
            _check_neurons(ffn, name, lif)
        parts = (self.linear(ffn.up), self.neurons(ffn.lif1), self.linear(ffn.down), self.neurons(ffn.lif2))
        width = np.array([ffn.n_features])
        names = ("input", "n1_up", "n2_lif1", "n3_down", "n4_lif2", "output")
        nodes = (nir.Input(input_type=width), *parts, nir.Output(output_type=width))
        return nir.NIRGraph(
            nodes=dict(zip(names, nodes, strict=True)),
            edges=list(pairwise(names)),
            metadata={"part": "SpikingFeedForward"},
        )

    def readout(self, readout: MembraneReadout) -> nir.NIRGraph:
        """Return a subgraph in which leaky integrators compute the membrane potentials, which are linear in current and spikes.

        The neurons are a LIF after an integrator as synapse, because a CubaLIF does not output its current.
        """
        _check_neurons(readout, "lif", readout.lif)
        node, dt = readout.lif, self.dt
        lif, ones = self.constants(node), np.ones(node.n_features)
        beta_mem = 1 - dt / lif["tau_mem"]
        decay = readout.decay_logit.detach().double().sigmoid().item()
        width = np.array([node.n_features])
        nodes: dict[str, nir.NIRNode] = {
            "input": nir.Input(input_type=width),
            "synapse": nir.LI(tau=lif["tau_syn"], r=lif["w_in"], v_leak=0.0 * ones),
            "lif": nir.LIF(
                tau=lif["tau_mem"],
                **{name: lif[name] for name in ("r", "v_leak", "v_threshold", "v_reset")},
                metadata=self.metadata(node),
            ),
            "reset": nir.Scale(scale=lif["v_reset"] - lif["v_threshold"]),
            "membrane": nir.LI(tau=lif["tau_mem"], r=lif["r"], v_leak=0.0 * ones),
            "mean": nir.LI(tau=dt / (1 - decay) * ones, r=1 - beta_mem, v_leak=0.0 * ones),
            "rate": nir.I(r=ones / (dt * self.n_steps)),
            "sum": nir.Scale(scale=ones),
            "output": nir.Output(output_type=width),
        }
        edges = [
            ("input", "synapse"),
            ("synapse", "lif"),
            ("synapse", "membrane"),
            ("lif", "reset"),
            ("reset", "membrane"),
            ("membrane", "mean"),
            ("mean", "sum"),
            ("lif", "rate"),
            ("rate", "sum"),
            ("sum", "output"),
        ]
        if node.cascade is not None:
            nodes["w_rec"] = self.recurrence(node)
            edges += [("lif", "w_rec"), ("w_rec", "synapse")]
        metadata = {"part": "MembraneReadout", "decay_logit": _array(readout.decay_logit), "n_steps": self.n_steps}
        return nir.NIRGraph(nodes=nodes, edges=edges, metadata=metadata)


def _check_modules(net: nn.Module, table: Mapping[type[nn.Module], ToNIR]) -> None:
    """Raise a ValueError for the first module that computes something and has no node."""
    known: list[str] = []
    for name, module in net.named_modules():
        if any(name.startswith(prefix) for prefix in known):
            continue
        if type(module) in table or type(module) in _IDENTITY_MODULES:
            known.append(f"{name}." if name else "")
        elif type(module) in _UNSUPPORTED or _computes(module, table):
            why = _UNSUPPORTED.get(type(module), "there is no NIR node for it: pass a function for it in `more`")
            raise ValueError(f"cannot export {type(module).__name__}{f' at {name!r}' if name else ''}: {why}")


def _computes(module: nn.Module, table: Mapping[type[nn.Module], ToNIR]) -> bool:
    """Return whether the module itself computes something: it is a leaf, has state, or is (a subclass of) a known part."""
    return not next(module.children(), None) or isinstance(module, (base.MemoryModule, *table, *_UNSUPPORTED))


def _check_neurons(owner: nn.Module, name: str, neurons: nn.Module) -> None:
    if type(neurons) is not AssociativeLIFNode:
        raise ValueError(
            f"cannot export {type(owner).__name__}: its {name} must be an AssociativeLIFNode, got {type(neurons).__name__}"
        )


def _described(beta: Tensor) -> str:
    return f"{beta.item():.3g}" if len(beta) == 1 else "per neuron"


def _array(x: Tensor) -> np.ndarray:
    """Return an array in float32, or in float64 for float64."""
    return x.detach().to("cpu", compute_dtype(x)).numpy().copy()
