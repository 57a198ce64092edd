"""EnergyProfile: counts of each product, totals, energy, and a Markdown table."""

from dataclasses import dataclass, field, fields, replace
from math import ceil, log2
from typing import Any

from nord_snn.monitor.energy.conventions import CONVENTIONS, find_convention

__all__ = ["EnergyProfile", "ProductCost"]


@dataclass
class ProductCost:
    """Counts of one matrix product or convolution of a network, summed over all its calls.

    Attributes:
        name: name of the module that computes the product.
        kind: ``"linear"``, ``"convolution"``, ``"activations"`` (product of two activations), ``"coincidences"`` (spikes of
            queries and keys of a resonance) or ``"values"`` (weighted sum of the values of a resonance).
        dense: multiply-accumulates of the dense product, without skipping zeros.
        macs: multiply-accumulates of calls whose input was not exactly zeros and ones.
        acs: accumulates of calls whose input was exactly zeros and ones: ones times their fan-out.
        weight_bytes: bytes of weights with a nonzero input, each weight read once per call.
        activation_bytes: bytes of inputs and outputs, with one bit per spike.
        dense_weight_bytes: bytes of all weights, each read once per call, or once per T calls if each call is one time step.
        dense_activation_bytes: bytes of inputs and outputs in their dtype.
        calls: number of calls.
        steps: T of the network if the product is computed in each time step, else 1.
        sop_macs: multiply-accumulates of calls whose input was not integers, in the SOP convention, see
            :meth:`EnergyProfile.sop_joules_under`.
        sops: synaptic operations in the SOP convention: the sum of integer inputs times their fan-out.
        effective_macs: multiply-accumulates with nonzero input and weight, as NeuroBench counts them.
        effective_acs: accumulates with nonzero input and weight, as NeuroBench counts them.
        unpadded: ``dense`` without the zero padding of convolutions, as NeuroBench counts them.
    """

    name: str
    kind: str
    dense: int = 0
    macs: int = 0
    acs: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    dense_weight_bytes: int = 0
    dense_activation_bytes: int = 0
    calls: int = 0
    steps: int = 1
    sop_macs: int = 0
    sops: int = 0
    effective_macs: int = 0
    effective_acs: int = 0
    unpadded: int = 0


#: All counts of a ProductCost at zero.
_ZERO_COUNTS: dict[str, Any] = {count.name: 0 for count in fields(ProductCost) if count.default == 0}


@dataclass
class EnergyProfile:
    """Operations of a network and their energy; ``str`` gives a Markdown table.

    The *dense twin* is the same network with an activation function in place of each layer of neurons, run for one time step.

    Attributes:
        products: every matrix product and convolution, by name and kind.
        multiplications: number of multiplications in the equations of neurons and cascades.
        additions: number of additions and comparisons in the equations of neurons and cascades.
        state_bytes: bytes of neurons' states, read and written in each time step.
        elementwise: number of outputs of pointwise float operations, means, sums, softmax, pooling and normalisation; in a
            resonance, of scaled scores, of scores lowered by recency, and of weights of selected keys.
        twin_elementwise: ``elementwise`` of the dense twin: operations repeated in each time step count once, and each
            neuron counts as one activation.
        time_steps: T of the network.
        outputs: number of outputs of neurons and of modules ``nn.ReLU`` and ``nn.Sigmoid``.
        active_outputs: number of these outputs that were not zero.
        weights: number of weights of linear maps, convolutions and recurrent modules.
        zero_weights: number of these weights that are zero.
        footprint: bytes of all parameters and buffers, before the first call; after the last call if some were lazy.
        notes: sentences on what the figures do not show: ScriptModules and padding.
    """

    products: list[ProductCost] = field(default_factory=list)
    multiplications: int = 0
    additions: int = 0
    state_bytes: int = 0
    elementwise: int = 0
    twin_elementwise: int = 0
    time_steps: int = 1
    outputs: int = 0
    active_outputs: int = 0
    weights: int = 0
    zero_weights: int = 0
    footprint: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates of all products."""
        return sum(product.macs for product in self.products)

    @property
    def acs(self) -> int:
        """Return the accumulates of all products."""
        return sum(product.acs for product in self.products)

    @property
    def sop_macs(self) -> int:
        """Return the multiply-accumulates of all products in the SOP convention, see :meth:`sop_joules_under`."""
        return sum(product.sop_macs for product in self.products)

    @property
    def sops(self) -> int:
        """Return the synaptic operations of all products in the SOP convention, see :meth:`sop_joules_under`."""
        return sum(product.sops for product in self.products)

    @property
    def dense(self) -> int:
        """Return the multiply-accumulates of all dense products, without skipping zeros."""
        return sum(product.dense for product in self.products)

    @property
    def neuron_ops(self) -> int:
        """Return the multiplications, additions and comparisons of neurons and cascades."""
        return self.multiplications + self.additions

    @property
    def bytes(self) -> int:
        """Return the bytes of weights, activations and state, read and written."""
        moved = sum(product.weight_bytes + product.activation_bytes for product in self.products)
        return moved + self.state_bytes

    @property
    def joules(self) -> float:
        """Return the energy in joules under the convention "45nm-fp32": 45 nm, float32, without memory."""
        return self.joules_under("45nm-fp32")

    @property
    def twin_joules(self) -> float:
        """Return the energy of the dense twin in joules under the convention "45nm-fp32", see :meth:`twin_joules_under`."""
        return self.twin_joules_under("45nm-fp32")

    def joules_under(self, convention: str) -> float:
        """Return the energy in joules under one of :data:`CONVENTIONS`. An elementwise output costs one multiply-accumulate."""
        energy = find_convention(convention)
        products = self.macs * energy.mac + self.acs * energy.ac
        neurons = self.multiplications * energy.mul + self.additions * energy.add
        return products + neurons + self.elementwise * energy.mac + self.bytes * energy.byte

    def sop_joules_under(self, convention: str) -> float:
        """Return the energy in joules in the SOP convention, with the energies of operations from one of :data:`CONVENTIONS`.

        SOPs are synaptic operations. The energy is ``mac * sop_macs + ac * sops``: that of products alone, without neurons,
        elementwise operations and memory. An integer input n counts as n spikes. If an input is not an integer, all inputs of
        this product cost a multiply-accumulate, as in the first layer of Spikformer.

        Source: SOPs of a layer as firing rate times T times FLOPs, Zhou et al. 2023, "Spikformer: when spiking neural network
        meets transformer".
        """
        energy = find_convention(convention)
        return self.sop_macs * energy.mac + self.sops * energy.ac

    def to_neurobench(self, samples: int) -> dict[str, Any]:
        """Return metrics under the names of NeuroBench 2: the dictionary that its ``Benchmark.run`` returns.

        ``Footprint`` in bytes, ``ConnectionSparsity`` and ``ActivationSparsity`` in 0 to 1, and ``SynapticOperations`` per
        sample, over all time steps: ``Effective_MACs``, ``Effective_ACs``, ``Dense``.

        Args:
            samples: number of samples, N, in all counted calls.

        Raises:
            ValueError: ``samples`` is not a positive integer.

        Source: Yik et al. 2025, "The NeuroBench framework for benchmarking neuromorphic computing algorithms and systems".

        Example:
            >>> import torch
            >>> from nord_snn.monitor import profile_energy
            >>> from torch import nn
            >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
            >>> profile_energy(net, torch.ones(5, 4)).to_neurobench(samples=5)["SynapticOperations"]
            {'Effective_MACs': 0.0, 'Effective_ACs': 12.0, 'Dense': 12.0}
        """
        if type(samples) is not int or samples < 1:
            raise ValueError(f"samples must be a positive integer, got {samples!r}")
        names = {"Effective_MACs": "effective_macs", "Effective_ACs": "effective_acs", "Dense": "unpadded"}
        return {
            "Footprint": self.footprint,
            "ConnectionSparsity": round(self.zero_weights / max(self.weights, 1), 4),
            "ActivationSparsity": (self.outputs - self.active_outputs) / max(self.outputs, 1),
            "SynapticOperations": {
                theirs: sum(getattr(product, ours) for product in self.products) / samples
                for theirs, ours in names.items()
            },
        }

    def twin_macs(self) -> int:
        """Return the multiply-accumulates of the dense twin, whose products run once instead of in T time steps."""
        return sum(product.dense // self._time_repetitions(product) for product in self.products)

    def twin_joules_under(self, convention: str) -> float:
        """Return the energy of the dense twin in joules under one of :data:`CONVENTIONS`.

        Each product runs once and reads all weights once, activations have their dtype's bytes, and elementwise operations
        are norms, softmax, and one activation function for each neuron.
        """
        energy = find_convention(convention)
        moved = sum(p.dense_weight_bytes + p.dense_activation_bytes // self._time_repetitions(p) for p in self.products)
        return (self.twin_macs() + self.twin_elementwise) * energy.mac + moved * energy.byte

    @property
    def quantised_twin_joules(self) -> float:
        """Return the energy in joules of the twin with activations of b = ``ceil(log2(T + 1))`` bits and weights of 8 bits.

        Spike counts over T time steps range from 0 to T, so b bits have the same information (Yan, Bai and Wong 2024,
        "Reconsidering the energy efficiency of spiking neural networks"). A product costs ``0.2 pJ * b / 8`` and its 32-bit
        accumulation 0.1 pJ (Horowitz 2014); memory is not counted.
        """
        bits = ceil(log2(self.time_steps + 1))
        return self.twin_macs() * (0.2e-12 * bits / 8 + 0.1e-12)

    def grouped(self) -> "EnergyProfile":
        """Return a profile with one entry for all products whose names differ in numbers only: ``blocks.*.ffn.up``."""
        groups: dict[tuple[str, str, int], ProductCost] = {}
        for product in self.products:
            name = ".".join("*" if part.isdigit() else part for part in product.name.split("."))
            group = groups.setdefault((name, product.kind, product.steps), replace(product, name=name, **_ZERO_COUNTS))
            for count in _ZERO_COUNTS:
                setattr(group, count, getattr(group, count) + getattr(product, count))
        return replace(self, products=list(groups.values()))

    def __str__(self) -> str:
        """Return the Markdown table."""
        header = ["product", "kind", "dense MACs", "MACs", "ACs", "bytes", "MACs (SOP convention)", "SOPs"]
        rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        rows += [
            f"| {p.name or 'network'} | {p.kind} | {p.dense:,} | {p.macs:,} | {p.acs:,} | "
            f"{p.weight_bytes + p.activation_bytes:,} | {p.sop_macs:,} | {p.sops:,} |"
            for p in self.products
        ]
        rows.append(f"| neurons and cascades | {self.neuron_ops:,} operations | | | | {self.state_bytes:,} | | |")
        rows.append(f"| elementwise | {self.elementwise:,} outputs | | | | | | |")
        totals = (self.dense, self.macs, self.acs, self.bytes, self.sop_macs, self.sops)
        rows.append(f"| **all** | | {' | '.join(f'{total:,}' for total in totals)} |")
        rows += [
            "",
            "| convention | this network, J | dense twin, J | published SOP convention, J |",
            "|---|---|---|---|",
        ]
        rows += [
            f"| {name} | {self.joules_under(name):.3g} | {self.twin_joules_under(name):.3g} | "
            f"{self.sop_joules_under(name):.3g} |"
            for name in CONVENTIONS
        ]
        rows.append(
            f"| quantised twin, {ceil(log2(self.time_steps + 1))} bits | | {self.quantised_twin_joules:.3g} | |"
        )
        return "\n".join([*rows, *(f"\n{note}" for note in self.notes)])

    def _time_repetitions(self, product: ProductCost) -> int:
        """Return how often the network computes a product that the dense twin computes once: T or 1."""
        return self.time_steps if product.steps == self.time_steps else 1
