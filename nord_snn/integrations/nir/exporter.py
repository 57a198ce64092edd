"""Convert modules to NIR nodes."""

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import nir
import numpy as np
import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from nord_snn.integrations.nir.extension import with_refractory_time
from nord_snn.integrations.nir.neurons import NIRNeurons
from nord_snn.integrations.nir.parameters import array_of, parameters_of
from nord_snn.integrations.nir.recurrent import AddFeedback
from nord_snn.integrations.nir.stateless import MODULE_NODES
from nord_snn.layers import MembraneReadout, SpikingFeedForward
from nord_snn.neurons import AssociativeLIFNode, LeakyIntegrator
from nord_snn.ops.checks import compute_dtype
from nord_snn.ops.lif.reference import PUBLISHED

__all__ = ["Exporter", "ToNIR"]

ToNIR = Callable[[Any], nir.NIRNode]


class Exporter:
    """Convert modules to NIR nodes.

    Args:
        dt: length of a time step in seconds.
        n_steps: number of time steps over which a readout takes its mean firing rate.
        approximate: omit refractory periods; ``omitted_refractory_period`` is then True if a node has lost one.
        extension: write neurons with a refractory period as nodes of nord-snn's extension of NIR.
        inputs: module -> its input in the network. None: inputs are set later.
    """

    def __init__(
        self,
        dt: float,
        n_steps: int,
        approximate: bool,
        extension: bool = False,
        inputs: dict[nn.Module, Tensor] | None = None,
    ) -> None:
        self.dt, self.n_steps, self.approximate, self.extension = dt, n_steps, approximate, extension
        self.inputs = {} if inputs is None else inputs
        self.omitted_refractory_period = False
        self.table: dict[type[nn.Module], ToNIR] = {
            AssociativeLIFNode: self.neurons,
            NIRNeurons: self.neurons,
            LeakyIntegrator: self.integrator,
            SpikingFeedForward: self.feed_forward,
            MembraneReadout: self.readout,
            layer.ElementWiseRecurrentContainer: self.recurrent,
            layer.SeqToANNContainer: self.over_steps,
            nn.Linear: self.linear,
            layer.Linear: self.linear,
            **dict.fromkeys(MODULE_NODES, self.stateless),
        }
        snntorch = sys.modules.get("nord_snn.integrations.snntorch")
        if snntorch is not None:  # a network has a MultiStep only if this module is imported
            self.table[snntorch.MultiStep] = self.multi_step

    def stateless(self, module: nn.Module) -> nir.NIRNode:
        """Return a convolution, a pooling, a Flatten, a Scale or a Threshold."""
        return MODULE_NODES[type(module)](module, self.inputs[module])

    def over_steps(self, container: Any) -> nir.NIRNode:
        """Return the node of the one module in a SeqToANNContainer."""
        if len(container) != 1 or type(container[0]) not in self.table:
            raise ValueError(
                "cannot export SeqToANNContainer: it must contain one module that NIR has a node for, got "
                f"{[type(module).__name__ for module in container]}"
            )
        return self.table[type(container[0])](container[0])

    def multi_step(self, module: Any) -> nir.NIRNode:
        """Return the neurons of an AssociativeSynaptic that runs on sequences."""
        if type(module.neuron).__name__ != "AssociativeSynaptic":
            raise ValueError(
                f"cannot export MultiStep: its neuron must be an AssociativeSynaptic, got {type(module.neuron).__name__}; "
                "snnTorch has an exporter for its own neurons"
            )
        return self.neurons(module.neuron.node, strict=True)

    def recurrent(self, container: Any) -> nir.NIRNode:
        """Return a subgraph of neurons and a map of their spikes of the last time step, as snnTorch's exporter does."""
        neurons, add = container.sub_module, container.element_wise_function
        is_supported = type(neurons) in (AssociativeLIFNode, NIRNeurons) and type(add) is AddFeedback
        if not is_supported or type(add.feedback) not in (nn.Identity, *self.table):
            raise ValueError(
                "cannot export ElementWiseRecurrentContainer: it must contain AssociativeLIFNode and AddFeedback, got "
                f"{type(neurons).__name__} and {type(add).__name__}"
            )
        self.inputs.setdefault(neurons, self.inputs[container][0])
        if neurons.cascade is not None:
            raise ValueError("cannot export ElementWiseRecurrentContainer: its neurons must have no cascade")
        lif: Any = self.neurons(neurons)
        width = np.array(lif.v_threshold.shape)
        nodes = {"input": nir.Input(input_type=width), "lif": lif, "output": nir.Output(output_type=width)}
        edges = [("input", "lif"), ("lif", "output")]
        if isinstance(add.feedback, nn.Identity):
            return nir.NIRGraph(nodes=nodes, edges=[*edges, ("lif", "lif")])
        self.inputs.setdefault(add.feedback, self.inputs[neurons])
        nodes["w_rec"] = self.table[type(add.feedback)](add.feedback)
        return nir.NIRGraph(nodes=nodes, edges=[*edges, ("lif", "w_rec"), ("w_rec", "lif")])

    def integrator(self, module: LeakyIntegrator) -> nir.NIRNode:
        """Return an LI, a CubaLI or, without a leak, an I."""
        beta, gain, v_rest, beta_syn = (
            np.broadcast_to(constant.detach().double().cpu().numpy(), module.shape)
            for constant in (module.beta_mem, module.gain, module.v_rest, module.beta_syn)
        )
        leak, leak_syn = 1 - beta, 1 - beta_syn
        if not leak.any() and not beta_syn.any() and not v_rest.any():
            return nir.I(r=gain / self.dt)
        if not leak.all():
            raise ValueError(
                "cannot export LeakyIntegrator: beta_mem must be below 1 for all, or 1 for all with v_rest 0 and beta_syn 0"
            )
        fields = {"r": gain / leak, "v_leak": v_rest.copy()}
        if not beta_syn.any():
            return nir.LI(tau=self.dt / leak, **fields)
        return nir.CubaLI(tau_mem=self.dt / leak, tau_syn=self.dt / leak_syn, w_in=1 / leak_syn, **fields)

    def linear(self, module: nn.Linear) -> nir.NIRNode:
        """Return a Linear or, with a bias, an Affine."""
        if module.bias is None:
            return nir.Linear(weight=array_of(module.weight))
        return nir.Affine(weight=array_of(module.weight), bias=array_of(module.bias))

    def neurons(self, node: Any, strict: bool | None = None) -> nir.NIRNode:
        """Return an IF, a LIF, a CubaLIF or, with a cascade, a subgraph with its recurrent connection.

        Args:
            node: the neurons.
            strict: whether they fire above their thresholds only, for the metadata. Default: None, as ``node`` does.
        """
        shape = self.row_shape(node)
        lif = self.single(node, shape)
        if strict is not None:
            lif.metadata["strict"] = strict
        if node.cascade is None:
            return lif
        if node.beta_syn_logit is None or len(shape) > 1:
            raise ValueError(
                "cannot export AssociativeLIFNode with a cascade: it must have a synaptic current, and its neurons in the last "
                "dimension"
            )
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

    def row_shape(self, node: AssociativeLIFNode) -> tuple[int, ...]:
        """Return the shape of one row: ``[D]``, or ``[D, *spatial]`` with a channel dimension."""
        if node.channel_dim in (None, -1):
            return (node.n_features,)
        x = self.inputs[node]
        step = tuple(x.shape[1:] if node.step_mode == "m" else x.shape)
        return step[node.channel_dim :]

    def single(self, node: Any, shape: tuple[int, ...]) -> Any:
        """Return the neurons without a cascade, of one row of ``shape``."""
        fields = {
            name: np.broadcast_to(value.reshape(-1, *[1] * (len(shape) - 1)), shape).copy()
            for name, value in self.constants(node).items()
        }
        kind = nir.CubaLIF if "tau_syn" in fields else nir.LIF if "tau" in fields else nir.IF
        lif = kind(**fields, metadata=parameters_of(node))
        if node.refractory_steps and self.extension:
            return with_refractory_time(lif, node.refractory_steps * self.dt)
        self.omitted_refractory_period |= node.refractory_steps > 0
        return lif

    def constants(self, node: AssociativeLIFNode) -> dict[str, np.ndarray]:
        """Return the fields of the NIR node, ``[D]`` or ``[1]``, in float64: rounding a time constant changes the decay."""
        charge, tau, v_rest, hard_reset, reset_scale, _ = node.dynamics
        if reset_scale != 1:
            raise ValueError(
                f"NIR cannot express a reset that subtracts another value than the threshold (reset_scale={reset_scale})"
            )
        if node.refractory_steps and not (self.approximate or self.extension):
            raise ValueError(
                f"NIR cannot express the refractory period (refractory_steps={node.refractory_steps}): train with "
                "refractory_steps=0, export with extension=True for readers that know the nodes of our extension, or with "
                "approximate=True, which omits the period and measures the deviation"
            )
        leak = np.array([1 / tau]) if tau else 1 - _decay(node, "beta_mem")
        averages = charge in ("average", "relax")
        threshold = node.v_threshold.detach().double().cpu().numpy()
        v_reset = float(node.v_reset or 0.0) if node.refractory_steps or hard_reset else v_rest
        v_leak = np.array([v_rest])
        bias = node.bias if isinstance(node, NIRNeurons) else None
        if bias is not None:
            v_leak = v_leak + bias.detach().double().cpu().numpy() / (1 if averages else leak)
        potentials = {"v_threshold": threshold, "v_reset": np.array([v_reset])}
        if not leak.any():
            if node.beta_syn_logit is not None or averages:
                raise ValueError(
                    "NIR has no neurons that integrate a synaptic current without a leak: tau of its dynamics must be finite"
                )
            return {"r": np.array([1 / self.dt]), **potentials}
        tau_mem = self.dt / leak
        potentials["v_leak"] = v_leak
        if node.beta_syn_logit is None:
            return {"tau": tau_mem, "r": np.ones(1) if averages else 1 / leak, **potentials}
        leak_syn = 1 - _decay(node, "beta_syn")
        if averages:  # r = tau_mem / dt is the only value that SpikingJelly and snnTorch read
            potentials = {name: value / leak for name, value in potentials.items()}
        tau_syn = self.dt / leak_syn
        return {"tau_mem": tau_mem, "tau_syn": tau_syn, "r": tau_mem / self.dt, "w_in": tau_syn / self.dt, **potentials}

    def recurrence(self, node: AssociativeLIFNode) -> nir.Linear:
        """Return the cascade as a matrix between neurons. Its current arrives one time step later, so it decays once."""
        cascade = node.cascade
        assert cascade is not None
        with torch.no_grad():
            between = (cascade.gain.double()[:, None] * cascade.weight.double().sigmoid()).cpu()
            cluster = torch.arange(node.n_features) % cascade.n_clusters
            size = node.n_features // cascade.n_clusters
            beta_syn = torch.from_numpy(_decay(node, "beta_syn"))[:, None]
            weight = beta_syn / size * between[cluster][:, cluster]
        return nir.Linear(weight=weight.to(compute_dtype(cascade.weight)).numpy())

    def feed_forward(self, ffn: SpikingFeedForward) -> nir.NIRGraph:
        """Return a subgraph of two linear maps and two layers of neurons; nirtorch needs names that sort in execution order."""
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

        The neurons are an LI, which outputs the synaptic current, and a LIF, because a CubaLIF does not output its current.
        """
        _check_neurons(readout, "lif", readout.lif)
        node, dt = readout.lif, self.dt
        if (
            node.dynamics != PUBLISHED
            or node.beta_syn_logit is None
            or (node.refractory_steps and not self.approximate)
        ):
            raise ValueError(
                "cannot export MembraneReadout: its neurons must have the published dynamics, a synaptic current, and no "
                f"refractory period unless approximate=True omits it, got {node}"
            )
        self.omitted_refractory_period |= node.refractory_steps > 0
        ones = np.ones(node.n_features)
        lif = {name: value * ones for name, value in self.constants(node).items()}
        beta_mem = 1 - dt / lif["tau_mem"]
        decay = readout.decay_logit.detach().double().sigmoid().item()
        width = np.array([node.n_features])
        nodes: dict[str, nir.NIRNode] = {
            "input": nir.Input(input_type=width),
            "synapse": nir.LI(tau=lif["tau_syn"], r=lif["w_in"], v_leak=0.0 * ones),
            "lif": nir.LIF(
                tau=lif["tau_mem"],
                **{name: lif[name] for name in ("r", "v_leak", "v_threshold", "v_reset")},
                metadata=parameters_of(node),
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
        metadata = {"part": "MembraneReadout", "decay_logit": array_of(readout.decay_logit), "n_steps": self.n_steps}
        return nir.NIRGraph(nodes=nodes, edges=edges, metadata=metadata)


def _check_neurons(owner: nn.Module, name: str, neurons: nn.Module) -> None:
    if type(neurons) is not AssociativeLIFNode:
        raise ValueError(
            f"cannot export {type(owner).__name__}: its {name} must be an AssociativeLIFNode, got {type(neurons).__name__}"
        )


def _decay(node: AssociativeLIFNode, name: str) -> np.ndarray:
    """Return a decay, ``[1]`` or ``[D]``, after checking that readers can compute it from its time constant."""
    beta = getattr(node, f"{name}_logit").detach().double().sigmoid().cpu().numpy()
    rounded = 1 - (1 - beta)
    if not ((rounded > 0) & (rounded < 1)).all():
        raise ValueError(
            f"1 - {name} must not round to 0 or 1: the time constant is dt / (1 - {name}), got {name} = {_described(beta)}"
        )
    return beta


def _described(beta: np.ndarray) -> str:
    return f"{beta.item()}" if beta.size == 1 else f"{beta.min()} to {beta.max()}"
