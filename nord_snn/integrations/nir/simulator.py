"""Simulate NIR graphs by forward Euler."""

from functools import reduce
from operator import add
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, nn

from nord_snn.integrations.nir.graphs import SubgraphPort, metadata_of, resolve_dt, schedule
from nord_snn.integrations.nir.stateless import stateless_module
from nord_snn.ops.checks import compute_dtype

__all__ = ["simulate"]


@torch.no_grad()
def simulate(graph: nir.NIRGraph, x_seq: Tensor, dt: float | None = None, *, reset: str | None = None) -> Tensor:
    r"""Run a NIR graph by NIR's equations, as any other reader of the graph does.

    NIR's equations are discretised by forward Euler, ``v += dt / tau * (v_leak - v + r * I)``, and neurons fire above their
    threshold. Edges that close a loop are delayed by one time step. Neurons with a reset to ``v_reset`` start at ``v_reset``,
    others and integrators at ``v_leak``. The simulator is meant for checking exports; it is slow.

    Args:
        graph: a graph of ``Linear``, ``Affine``, ``Scale``, ``CubaLIF``, ``CubaLI``, ``LIF``, ``LI``, ``IF``, ``I``, the nodes of
            our extension (with a refractory period), ``Threshold``, ``Conv1d``, ``Conv2d``, ``AvgPool2d``, ``SumPool2d``,
            ``Flatten`` and graphs of these.
        x_seq: input, ``[T, N, *]``.
        dt: length of a time step in seconds; None: that in the graph's metadata, which our exports have, else 1e-4.
        reset: ``"value"`` sets the potential to ``v_reset``, as in NIR's equations; ``"subtract"`` subtracts the threshold;
            None uses the reset in each node's metadata, or ``"value"`` if there is none.

    Returns:
        Output of every time step, ``[T, N, *]``, on the CPU in float32, or float64 for float64 input.

    Raises:
        ValueError: a node is of another class, the graph has no path from one input to one output, ``dt`` is not that of the
            graph, or ``reset`` is another value.

    Source: NIR (Pedersen et al. 2024).

    Example:
        >>> lif = nir.LIF(*(np.full(3, value) for value in (1e-3, 1.0, 0.0, 0.5)))
        >>> spikes = simulate(nir.NIRGraph.from_list(lif), torch.ones(20, 1, 3))
        >>> int(spikes[:, 0, 0].argmax())  # 1 - 0.9 ** 7 is the first value above 0.5
        6
    """
    if reset not in (None, "value", "subtract"):
        raise ValueError(f"reset must be 'value', 'subtract' or None, got {reset!r}")
    dt = resolve_dt(graph, dt)
    scheduled, output = schedule(graph)
    x_seq = x_seq.to("cpu", compute_dtype(x_seq))
    modules = {item.name: _build_module(item.name, item.node, dt, reset).to(x_seq.dtype) for item in scheduled}
    # In the first time step recurrent maps receive no spikes, but add their bias.
    no_spikes = {
        item.name: x_seq.new_zeros(item.node.weight.shape[1]) for item in scheduled if isinstance(item.node, nir.Affine)
    }
    previous: dict[str, Tensor] = {}
    outputs = []
    for x in x_seq:
        current: dict[str, Tensor] = {}
        for item in scheduled:
            inputs = [current[name] for name in item.sources]
            inputs += [previous[name] for name in item.delayed if name in previous]
            if not previous:
                inputs += [modules[name](no_spikes[name]) for name in item.delayed if name in no_spikes]
            current[item.name] = modules[item.name](reduce(add, inputs) if inputs else x)
        outputs.append(reduce(add, (current[name] for name in output.sources)))
        previous = current
    return torch.stack(outputs)


def _build_module(name: str, node: nir.NIRNode, dt: float, reset: str | None) -> nn.Module:
    if isinstance(node, nir.CubaLIF | nir.CubaLI | nir.LIF | nir.LI | nir.IF | nir.I):
        return _Integrator(node, dt, reset)
    if isinstance(node, nir.Input | SubgraphPort):
        return nn.Identity()
    module = stateless_module(node)
    if module is None:
        raise ValueError(
            f"cannot simulate '{name}', a {type(node).__name__}: simulate() lists the nodes that it supports"
        )
    return module


class _Integrator(nn.Module):
    """Run one sequence of neurons or integrators from rest, with or without synaptic current, leak and threshold."""

    leak: Tensor
    gain: Tensor
    v_leak: Tensor
    leak_syn: Tensor
    gain_syn: Tensor
    v_threshold: Tensor
    v_reset: Tensor

    def __init__(self, node: Any, dt: float, reset: str | None) -> None:
        super().__init__()
        self.has_synapse, self.fires = hasattr(node, "tau_syn"), hasattr(node, "v_threshold")
        tau = getattr(node, "tau_mem" if self.has_synapse else "tau", None)
        leak = 0.0 if tau is None else dt / tau
        self._register(leak=leak, gain=(dt if tau is None else leak) * node.r, v_leak=getattr(node, "v_leak", 0.0))
        if self.has_synapse:
            self._register(leak_syn=dt / node.tau_syn, gain_syn=dt / node.tau_syn * node.w_in)
        if self.fires:
            self._register(v_threshold=node.v_threshold, v_reset=node.v_reset)
            time = np.max(getattr(node, "refractory_time", 0.0))
            self.refractory_steps = round(float(time) / dt)
            self.refractory: Tensor | int = 0
            self.subtract = (reset or metadata_of(node).get("reset", "value")) == "subtract"
        metadata = metadata_of(node)  # our neurons with a refractory period start at rest
        starts_at_reset = (
            self.fires and not self.subtract and ("part" not in metadata or metadata.get("hard_reset", False))
        )
        start = node.v_reset if starts_at_reset else getattr(node, "v_leak", 0.0)
        self.register_buffer("v", torch.from_numpy(np.array(start, dtype=np.float64)))
        self.v: Tensor
        self.i: Tensor | float = 0.0

    def _register(self, **values: Any) -> None:
        for name, value in values.items():
            self.register_buffer(name, torch.from_numpy(np.array(value, dtype=np.float64)))

    def forward(self, x: Tensor) -> Tensor:
        if self.has_synapse:
            self.i = x = self.i - self.leak_syn * self.i + self.gain_syn * x
        v = self.v + self.leak * (self.v_leak - self.v) + self.gain * x
        if not self.fires:
            self.v = v
            return v
        if self.refractory_steps:
            v = torch.where(torch.as_tensor(self.refractory) > 0, self.v_reset.expand_as(v), v)
        spikes = (v > self.v_threshold).to(v.dtype)
        reset_v = v - self.v_threshold if self.subtract else self.v_reset.expand_as(v)
        self.v = torch.where(spikes.bool(), reset_v, v)
        if self.refractory_steps:
            left = (torch.as_tensor(self.refractory) - 1).clamp(min=0)
            self.refractory = torch.where(spikes.bool(), self.refractory_steps, left)
        return spikes
