"""Export networks to NIR."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import nir
import torch
from spikingjelly.activation_based import base, layer
from torch import Tensor, nn

from nord_snn.integrations.nir.digest import DIGEST, digest_of
from nord_snn.integrations.nir.exporter import Exporter, ToNIR
from nord_snn.integrations.nir.simulator import simulate
from nord_snn.integrations.nir.tracing import trace
from nord_snn.layers import (
    CoFiringResonance,
    LeakyClamp,
    MultiScaleTemporalEncoder,
    NordBlock,
    SpikeFedBlock,
    SpikeFedResonance,
)
from nord_snn.neurons import AssociativeCascade, fire_from_rest
from nord_snn.neurons.factory import multi_step_mode
from nord_snn.ops.checks import compute_dtype

__all__ = ["deviation", "export_to_nir"]

log = logging.getLogger("nord_snn")

#: Upper limits of the deviation, in float32 and in half precision. Rounding changes a spike if the membrane potential is almost
#: equal to the threshold: we allow one spike in a hundred, in half precision one in five.
MAX_DEVIATION, MAX_DEVIATION_HALF = 0.01, 0.2

#: Modules that are the identity: dropout in evaluation mode, a clamp after spikes.
_IDENTITY_MODULES = (nn.Identity, nn.Dropout, layer.Dropout, LeakyClamp)

_UNSUPPORTED: dict[type[nn.Module], str] = {
    CoFiringResonance: "resonance needs products of spike trains and top-K selection, which NIR does not have",
    SpikeFedResonance: "resonance needs products of spike trains and top-K selection, which NIR does not have",
    SpikeFedBlock: "the block needs products of spike trains, top-K selection and layer normalisation, which NIR does not have",
    NordBlock: "the block needs products of spike trains, top-K selection and layer normalisation, which NIR does not have",
    MultiScaleTemporalEncoder: "NIR has no gates that change with the time step: export the part after the encoder, whose "
    "input is the encoder's output",
    AssociativeCascade: "the cascade is part of a layer of neurons: export the AssociativeLIFNode that contains it",
    nn.LayerNorm: "NIR has no layer normalisation",
}


def export_to_nir(
    net: nn.Module,
    x_seq: Tensor,
    dt: float = 1e-4,
    *,
    approximate: bool = False,
    extension: bool = False,
    more: Mapping[type[nn.Module], ToNIR] | None = None,
) -> nir.NIRGraph:
    r"""Return a network as a graph of NIR nodes, for any simulator or chip that reads NIR.

    A layer of :class:`~nord_snn.neurons.AssociativeLIFNode` becomes a ``CubaLIF`` with ``tau = dt / (1 - beta)``, without a
    synaptic current a ``LIF``, and without a leak an ``IF``. With a cascade it becomes a subgraph of a ``CubaLIF`` and a
    recurrent ``Linear``, delayed by one time step, with the weights ``beta_syn * gain[c] * sigmoid(weight[c, k]) / (D / C)``.
    Potentials of a ``CubaLIF`` are scaled by ``1 / (1 - beta_mem)``, so that ``r = tau_mem / dt`` and ``w_in = tau_syn / dt``,
    the only values that SpikingJelly and snnTorch read; spikes are the same. ``SpikingFeedForward`` becomes a subgraph of two
    such layers, and ``MembraneReadout`` a subgraph in which leaky integrators compute the potentials: its return value is the
    graph's output in the last time step. ``LeakyIntegrator`` becomes an ``LI``, a ``CubaLI`` or an ``I``; convolutions, pooling,
    ``Flatten`` and SpikingJelly's classes of them become their nodes.

    NIR cannot express:

    * The refractory period. A layer with ``refractory_steps > 0`` raises an error. With ``extension=True`` it becomes a node that
      NIR does not have, such as :class:`RefractoryCubaLIF`, which other readers refuse; with ``approximate=True`` it is
      exported without the period, but with the reset to ``v_reset``.
    * Reset by subtraction, as in a layer without a hard reset. NIR describes continuous time, in which a potential never exceeds
      the threshold, so that subtracting the threshold and resetting to 0 are equal. In discrete time they differ, and the reader
      must subtract (Norse: ``reset_method=reset_subtract``). The metadata has ``reset: subtract``.
    * LeakyClamp below zero. After spikes it is the identity and needs no node; elsewhere it raises an error.
    * Resonance, blocks, layer normalisation and the encoder, which raise errors.

    Args:
        net: a layer of nord-snn, or any module composed of these, layers of torch and SpikingJelly, the classes in ``more``,
            and additions, as :func:`torch.fx.symbolic_trace` traces them. It is exported in evaluation mode; its state is
            unchanged.
        x_seq: example input, ``[T, N, *]``: T is the number of time steps of the readout; the deviation is computed on it.
        dt: length of a time step in seconds.
        approximate: export layers with a refractory period without the period.
        extension: export layers with a refractory period as nodes of our extension, such as :class:`RefractoryCubaLIF`.
        more: class of a further module -> function that returns the ``nir.NIRNode`` of an instance.

    Returns:
        The graph; ``nir.write`` writes it to a file. Its metadata have ``dt``, ``deviation`` (:func:`deviation` on ``x_seq``,
        with the resets in the metadata of the neurons), and ``digest``, from which :func:`import_from_nir` recognises a damaged
        file.

    Raises:
        ValueError: NIR cannot express a part (the message names it), the outputs of graph and network differ, ``dt`` is not
            positive, or ``x_seq`` is not a sequence.
        TypeError: a function in ``more`` did not return a node.
        Exception: what the forward of ``net`` raises on ``x_seq``.

    Source: NIR (Pedersen et al. 2024).

    Example:
        >>> from nord_snn.neurons import AssociativeLIFNode
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
    exporter = Exporter(dt, len(x_seq), approximate, extension)
    table: dict[type[nn.Module], ToNIR] = {**exporter.table, **(more or {})}
    _check_modules(net, table)
    with torch.no_grad(), _eval_mode(net), multi_step_mode(net):  # in which the inputs of the modules are recorded
        exporter.inputs, out_features = _run(net, table, x_seq)
        graph = trace(net, table, _IDENTITY_MODULES, x_seq.shape[2:], out_features)
    graph.metadata = {"source": "nord-snn", "dt": dt}
    graph.metadata["deviation"] = measured = deviation(net, graph, x_seq)
    if exporter.omitted_refractory_period:
        log.warning("export_to_nir omitted the refractory period: on x_seq, sum |a - b| / sum |a| is %.2f", measured)
    elif not measured <= (MAX_DEVIATION if _full_precision(net) else MAX_DEVIATION_HALF):  # also if it is NaN
        raise ValueError(
            f"the graph must give the outputs of the network, but differs by {measured:.2f} (sum |a - b| / sum |a| on x_seq): "
            "the forward does more than its modules, for example in a hook, or calls a module twice with one state"
        )
    graph.metadata[DIGEST] = digest_of(graph.to_dict())
    return graph


def deviation(
    net: nn.Module, graph: nir.NIRGraph, x_seq: Tensor, dt: float | None = None, *, reset: str | None = None
) -> float:
    """Return the deviation of a graph from its network: ``sum |a - b| / sum |a|`` over their outputs.

    a is the output of ``net``, b that of ``graph``. For spikes this is the number of differing spikes divided by the number of
    spikes of ``net``: 0 means equal, and values above 1 are possible. It is 0 if both outputs are zero, and infinity if only that
    of ``net`` is. ``net`` runs from rest and its state is restored; if it does not return a sequence, its output is compared with
    the graph's last time step.

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
    """Set evaluation mode in a ``with`` block and restore the modes afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _run(
    net: nn.Module, table: Mapping[type[nn.Module], ToNIR], x_seq: Tensor
) -> tuple[dict[nn.Module, Tensor], tuple[int, ...]]:
    """Return the inputs of the modules of a network on ``x_seq``, and the shape of one row of its output."""
    inputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[module] = args[0]

    handles = [module.register_forward_pre_hook(record) for module in net.modules() if type(module) in table]
    try:
        out = fire_from_rest(net, x_seq)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, tuple(out.shape[2:]) if isinstance(out, Tensor) else ()


def _full_precision(net: nn.Module) -> bool:
    return all(p.dtype.itemsize >= 4 for p in net.parameters())


def _check_modules(net: nn.Module, table: Mapping[type[nn.Module], ToNIR]) -> None:
    """Raise a ValueError for the first module that computes something and has no node."""
    checked: list[str] = []  # prefixes of the names of modules inside supported ones
    for name, module in net.named_modules():
        if any(name.startswith(prefix) for prefix in checked):
            continue
        if type(module) in table or type(module) in _IDENTITY_MODULES:
            checked.append(f"{name}." if name else "")
        elif type(module) in _UNSUPPORTED or _computes(module, table):
            why = _UNSUPPORTED.get(type(module), "there is no NIR node for it: pass a function for it in `more`")
            raise ValueError(f"cannot export {type(module).__name__}{f' at {name!r}' if name else ''}: {why}")


def _computes(module: nn.Module, table: Mapping[type[nn.Module], ToNIR]) -> bool:
    """Return whether a module itself computes something: it has no children, has state, or is of a class with a node."""
    return not next(module.children(), None) or isinstance(module, (base.MemoryModule, *table, *_UNSUPPORTED))
