"""From our networks to NIR."""

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
from nord_snn.integrations.nir.tracing import traced
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
from nord_snn.ops.checks import compute_dtype

__all__ = ["Export", "deviation", "export_to_nir"]

log = logging.getLogger("nord_snn")

ToNIR = Callable[[Any], nir.NIRNode]

#: More than rounding explains: one spike of a hundred may meet its threshold to the last bit, in half precision one of five.
ROUNDING, HALF = 0.01, 0.2

#: The identity where they stand: dropout in a network that is used, a clamp behind spikes.
_THROUGH = (nn.Identity, nn.Dropout, layer.Dropout, LeakyClamp)

_REFUSED: dict[type[nn.Module], str] = {
    CoFiringResonance: "NIR has no product of two spike trains and no top-K, which resonance is made of",
    SpikeFedResonance: "NIR has no product of two spike trains and no top-K, which resonance is made of",
    SpikeFedBlock: "NIR has no product of two spike trains, no top-K and no layer normalisation, which the block is made of",
    NordBlock: "NIR has no product of two spike trains, no top-K and no layer normalisation, which the block is made of",
    MultiScaleTemporalEncoder: "NIR has no gates that change with the step: export what follows the encoder, and feed it "
    "the encoder's output",
    AssociativeCascade: "the cascade is part of a neuron's loop: export the AssociativeLIFNode that owns it",
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
    r"""A network as a graph of NIR nodes, for every simulator and chip that reads NIR.

    A layer of :class:`~nord_snn.neurons.AssociativeLIFNode` becomes a ``CubaLIF`` with ``tau = dt / (1 - beta)``; with a
    cascade, a subgraph in which the ``CubaLIF`` is fed by itself through a ``Linear`` of
    ``beta_syn * gain[c] * sigmoid(weight[c, k]) / (D / C)``, one step later. Membranes are scaled by ``1 / (1 - beta_mem)``, so
    that ``r = tau_mem / dt`` and ``w_in = tau_syn / dt``, the only values that SpikingJelly and snnTorch read; spikes are the
    same. ``SpikingFeedForward`` becomes a subgraph of two such layers, and ``MembraneReadout`` one in which leaky integrators
    follow the membranes: what it returns is the graph's output at the last step.

    What NIR cannot say:

    * The refractory hold. A layer with ``refractory_steps > 0`` is refused, or, with ``approximate=True``, loses the hold and
      keeps the reset to ``v_reset`` that comes with it.
    * Subtracting the threshold, as a layer with ``refractory_steps=0`` resets. NIR describes continuous time, in which no
      membrane overshoots, so that subtracting and resetting to 0 are one thing; in steps they are not, and the reader has
      to subtract (Norse: ``reset_method=reset_subtract``). The metadata says ``reset: subtract``.
    * LeakyClamp below zero. Behind spikes it is the identity and needs no node; elsewhere it is refused.
    * Resonance, blocks, layer normalisation and the encoder, which are refused.

    Args:
        net: one of our parts, or any module built of them, of ``Linear``, of what ``more`` names, and of additions, as
            :func:`torch.fx.symbolic_trace` follows them. Its state is left alone; dropout counts as switched off.
        x_seq: input to try it with, ``[T, N, D]``: gives the readout its number of steps, and the deviation its data.
        dt: length of a step in seconds.
        approximate: leave out the refractory hold where there is one.
        more: further modules: class -> function that turns an instance into a ``nir.NIRNode``.

    Returns:
        The graph; ``nir.write`` puts it into a file. Its metadata have ``dt`` and ``deviation``, which is :func:`deviation` on
        ``x_seq`` with the resets that the metadata of the neurons name.

    Raises:
        ValueError: NIR cannot express a part (the message names it), the graph computes something else than the network,
            ``dt`` is not positive, or ``x_seq`` is no sequence.
        TypeError: a function in ``more`` made no node.

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
    export = Export(dt, len(x_seq), approximate)
    table: dict[type[nn.Module], ToNIR] = {**export.table, **(more or {})}
    _check_modules(net, table)
    with _as_used(net):
        graph = traced(net, table, _THROUGH, x_seq.shape[2:])
    graph.metadata = {"source": "nord-snn", "dt": dt}
    graph.metadata["deviation"] = measured = deviation(net, graph, x_seq)
    if export.holds_left_out:
        log.warning("export_to_nir left the refractory hold out: on x_seq, sum |a - b| / sum |a| is %.2f", measured)
    elif not measured <= (ROUNDING if _full_precision(net) else HALF):  # NaN is no agreement
        raise ValueError(
            f"the graph differs from the network by {measured:.2f} (sum |a - b| / sum |a| on x_seq): its forward does more than "
            "its modules show, a hook or state that two calls share"
        )
    return graph


def deviation(
    net: nn.Module, graph: nir.NIRGraph, x_seq: Tensor, dt: float | None = None, *, reset: str | None = None
) -> float:
    """How far a graph is from the network that it was made of: ``sum |a - b| / sum |a|`` over their outputs.

    For spikes that is the number of those which differ for each one that ``net`` fires, so that 0 is equal and more than 1
    is possible; 0 also where both are silent, and infinity where ``net`` alone is. ``net`` runs from rest and is left as it
    was; where it returns no sequence, the graph's last step is compared.

    Args:
        net: the network, in any step mode.
        graph: its export.
        x_seq: input, ``[T, N, D]``.
        dt: see :func:`simulate`.
        reset: see :func:`simulate`.
    """
    with torch.no_grad(), _as_used(net):
        ours = fire_from_rest(net, x_seq)
    ours = ours.to("cpu", compute_dtype(ours))
    theirs = simulate(graph, x_seq, dt, reset=reset)
    if ours.ndim < theirs.ndim:
        theirs = theirs[-1]
    difference, size = ((ours - theirs).abs().sum(), ours.abs().sum())
    if not size:
        log.warning("the network puts out nothing but zeros for x_seq, which tells little about its graph")
        return 0.0 if not difference else float("inf")
    return (difference / size).item()


@contextmanager
def _as_used(net: nn.Module) -> Iterator[None]:
    """Without dropout; modes are put back."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _full_precision(net: nn.Module) -> bool:
    return all(p.dtype.itemsize >= 4 for p in net.parameters())


class Export:
    """One export: turns modules into nodes, and remembers what had to be left out."""

    def __init__(self, dt: float, n_steps: int, approximate: bool) -> None:
        self.dt, self.n_steps, self.approximate = dt, n_steps, approximate
        self.holds_left_out = False
        self.table: dict[type[nn.Module], ToNIR] = {
            AssociativeLIFNode: self.neurons,
            SpikingFeedForward: self.feed_forward,
            MembraneReadout: self.readout,
            nn.Linear: self.linear,
            layer.Linear: self.linear,
        }

    def linear(self, module: nn.Linear) -> nir.NIRNode:
        """A Linear or, with a bias, an Affine."""
        if module.bias is None:
            return nir.Linear(weight=_array(module.weight))
        return nir.Affine(weight=_array(module.weight), bias=_array(module.bias))

    def neurons(self, node: Any) -> nir.NIRNode:
        """A CubaLIF, in the loop of its cascade if it has one."""
        alone = self.cuba(node)
        if node.cascade is None:
            return alone
        width = np.array([node.n_features])
        return nir.NIRGraph(
            nodes={
                "input": nir.Input(input_type=width),
                "lif": alone,
                "w_rec": self.recurrence(node),
                "output": nir.Output(output_type=width),
            },
            edges=[("input", "lif"), ("w_rec", "lif"), ("lif", "w_rec"), ("lif", "output")],
            metadata={"part": "AssociativeLIFNode"},
        )

    def cuba(self, node: AssociativeLIFNode) -> nir.CubaLIF:
        return nir.CubaLIF(**self.constants(node), metadata=self.about(node))

    def constants(self, node: AssociativeLIFNode) -> dict[str, np.ndarray]:
        """Of a CubaLIF, in float64: a rounded time constant is another decay."""
        if node.refractory_steps and not self.approximate:
            raise ValueError(
                f"NIR cannot express the refractory hold (refractory_steps={node.refractory_steps}): train with "
                "refractory_steps=0, or export with approximate=True, which leaves it out and measures what that changes"
            )
        self.holds_left_out |= node.refractory_steps > 0
        beta_mem, beta_syn = (
            logit.detach().double().sigmoid().item() for logit in (node.beta_mem_logit, node.beta_syn_logit)
        )
        for name, beta in (("beta_mem", beta_mem), ("beta_syn", beta_syn)):
            if not 0 < 1 - (1 - beta) < 1:  # as a reader gets it back from the time constant
                raise ValueError(f"{name} is {beta}: no time constant expresses a decay that has reached 0 or 1")
        every = np.ones(node.n_features)
        tau_mem, tau_syn = self.dt / (1 - beta_mem), self.dt / (1 - beta_syn)
        threshold = node.firing_threshold().detach().double().cpu().numpy()
        v_reset = node.v_reset if node.refractory_steps else 0.0
        return {
            "tau_syn": tau_syn * every,
            "tau_mem": tau_mem * every,
            "r": tau_mem / self.dt * every,
            "w_in": tau_syn / self.dt * every,
            "v_leak": 0.0 * every,
            "v_threshold": threshold / (1 - beta_mem),
            "v_reset": v_reset / (1 - beta_mem) * every,
        }

    def about(self, node: AssociativeLIFNode) -> dict[str, Any]:
        """What NIR has no place for, so that our own reader makes the same layer of it again."""
        about: dict[str, Any] = {
            "part": "AssociativeLIFNode",
            "reset": "value" if node.refractory_steps else "subtract",
            "refractory_steps": node.refractory_steps,
            "v_reset": node.v_reset,
            "alpha": node.alpha,
        }
        surrogate = node.surrogate_function
        about["surrogate"] = surrogate if isinstance(surrogate, str) else f"custom: {surrogate!r}"
        if node.cascade is not None:
            about |= {"cascade_weight": _array(node.cascade.weight), "cascade_gain": _array(node.cascade.gain)}
        return about

    def recurrence(self, node: AssociativeLIFNode) -> nir.Linear:
        """The cascade as a matrix between neurons. The node adds its current after a step, where it decays once."""
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
        """Two linear maps and two layers of neurons, in a subgraph whose names are in order for nirtorch."""
        for name, lif in (("lif1", ffn.lif1), ("lif2", ffn.lif2)):
            _check_ours(ffn, name, lif)
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
        """Membranes are linear in current and spikes, so leaky integrators can follow them beside the neurons.

        The neurons are a LIF behind the integrator that is their synapse, since a CubaLIF keeps its current to itself.
        """
        _check_ours(readout, "lif", readout.lif)
        node, dt = readout.lif, self.dt
        lif, every = self.constants(node), np.ones(node.n_features)
        beta_mem = 1 - dt / lif["tau_mem"]
        decay = readout.decay_logit.detach().double().sigmoid().item()
        width = np.array([node.n_features])
        nodes: dict[str, nir.NIRNode] = {
            "input": nir.Input(input_type=width),
            "synapse": nir.LI(tau=lif["tau_syn"], r=lif["w_in"], v_leak=0.0 * every),
            "lif": nir.LIF(
                tau=lif["tau_mem"],
                **{name: lif[name] for name in ("r", "v_leak", "v_threshold", "v_reset")},
                metadata=self.about(node),
            ),
            "reset": nir.Scale(scale=lif["v_reset"] - lif["v_threshold"]),
            "membrane": nir.LI(tau=lif["tau_mem"], r=lif["r"], v_leak=0.0 * every),
            "mean": nir.LI(tau=dt / (1 - decay) * every, r=1 - beta_mem, v_leak=0.0 * every),
            "rate": nir.I(r=every / (dt * self.n_steps)),
            "sum": nir.Scale(scale=every),
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
        about = {"part": "MembraneReadout", "decay_logit": _array(readout.decay_logit), "n_steps": self.n_steps}
        return nir.NIRGraph(nodes=nodes, edges=edges, metadata=about)


def _check_modules(net: nn.Module, table: Mapping[type[nn.Module], ToNIR]) -> None:
    """Every module that computes must be known; the sentence names the first that is not."""
    known: list[str] = []
    for name, module in net.named_modules():
        if any(name.startswith(prefix) for prefix in known):
            continue
        if type(module) in table or type(module) in _THROUGH:
            known.append(f"{name}." if name else "")
        elif type(module) in _REFUSED or _computes(module, table):
            why = _REFUSED.get(type(module), "it is not known here; say in `more` what node it is")
            raise ValueError(f"cannot export {type(module).__name__}{f' at {name!r}' if name else ''}: {why}")


def _computes(module: nn.Module, table: Mapping[type[nn.Module], ToNIR]) -> bool:
    """Rather than only calling its children: it has none, has state, or is one of ours with something changed."""
    return not next(module.children(), None) or isinstance(module, (base.MemoryModule, *table, *_REFUSED))


def _check_ours(owner: nn.Module, name: str, neurons: nn.Module) -> None:
    if type(neurons) is not AssociativeLIFNode:
        raise ValueError(
            f"cannot export {type(owner).__name__} with {type(neurons).__name__} as its {name}: only with AssociativeLIFNode"
        )


def _array(x: Tensor) -> np.ndarray:
    """In float32 or, for float64, float64."""
    return x.detach().to("cpu", compute_dtype(x)).numpy().copy()
