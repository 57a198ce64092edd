"""What a reader makes of a NIR graph: the nodes' equations by forward Euler."""

from functools import reduce
from operator import add
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, nn

from nord_snn.integrations.nir.graphs import Gate, about, plan, same_step
from nord_snn.integrations.nir.stateless import stateless
from nord_snn.ops.checks import compute_dtype

__all__ = ["simulate"]


@torch.no_grad()
def simulate(graph: nir.NIRGraph, x_seq: Tensor, dt: float | None = None, *, reset: str | None = None) -> Tensor:
    r"""Run a NIR graph as a reader would that knows nothing of this library.

    Every node follows NIR's equations by forward Euler, ``v += dt / tau * (v_leak - v + r * I)``, and fires above its
    threshold; what comes back through a loop arrives one step later. It is made to check exports with and is slow.

    Args:
        graph: the graph, of ``Linear``, ``Affine``, ``Scale``, ``CubaLIF``, ``CubaLI``, ``LIF``, ``LI``, ``IF``, ``I``,
            ``Threshold``, ``Conv1d``, ``Conv2d``, ``AvgPool2d``, ``SumPool2d``, ``Flatten`` and graphs of these.
        x_seq: input, ``[T, N, *]``.
        dt: length of a step in seconds; None: the one that an export of ours was made for, else 1e-4.
        reset: ``"value"`` resets membranes to ``v_reset``, as NIR's equations have it; ``"subtract"`` takes the threshold
            off; None does what each node's metadata asks for, and ``"value"`` where they are silent.

    Returns:
        Output of every step, ``[T, N, *]``, on the CPU in float32, or float64 for float64 input.

    Raises:
        ValueError: a node is of another kind, the graph cannot run, ``dt`` is not that of the graph, or ``reset`` is none of
            the three.

    Source: NIR (Pedersen et al. 2024).

    Example:
        >>> lif = nir.LIF(*(np.full(3, value) for value in (1e-3, 1.0, 0.0, 0.5)))
        >>> spikes = simulate(nir.NIRGraph.from_list(lif), torch.ones(20, 1, 3))
        >>> int(spikes[:, 0, 0].argmax())  # 1 - 0.9 ** 7 is the first above 0.5
        6
    """
    if reset not in (None, "value", "subtract"):
        raise ValueError(f"reset must be 'value', 'subtract' or None, got {reset!r}")
    dt = same_step(graph, dt)
    steps, output = plan(graph)
    x_seq = x_seq.to("cpu", compute_dtype(x_seq))
    modules = {step.name: _module(step.name, step.node, dt, reset).to(x_seq.dtype) for step in steps}
    before: dict[str, Tensor] = {}
    outputs = []
    for x in x_seq:
        now: dict[str, Tensor] = {}
        for step in steps:
            parts = [now[name] for name in step.sources] + [before[name] for name in step.delayed if name in before]
            now[step.name] = modules[step.name](reduce(add, parts) if parts else x)
        outputs.append(reduce(add, (now[name] for name in output.sources)))
        before = now
    return torch.stack(outputs)


def _module(name: str, node: nir.NIRNode, dt: float, reset: str | None) -> nn.Module:
    if isinstance(node, nir.CubaLIF | nir.CubaLI | nir.LIF | nir.LI | nir.IF | nir.I):
        return _Dynamics(node, dt, reset)
    if isinstance(node, nir.Input | Gate):
        return nn.Identity()
    module = stateless(node)
    if module is None:
        raise ValueError(f"cannot simulate '{name}', a {type(node).__name__}")
    return module


class _Dynamics(nn.Module):
    """Integrators: with a synapse or without, leaky or not, firing or not. One run from rest."""

    pull: Tensor
    push: Tensor
    v_leak: Tensor
    pull_syn: Tensor
    push_syn: Tensor
    v_threshold: Tensor
    v_reset: Tensor

    def __init__(self, node: Any, dt: float, reset: str | None) -> None:
        super().__init__()
        self.cuba, self.fires = hasattr(node, "tau_syn"), hasattr(node, "v_threshold")
        tau = getattr(node, "tau_mem" if self.cuba else "tau", None)
        pull = 0.0 if tau is None else dt / tau  # of the leak; an integrator has none
        self._hold(pull=pull, push=(dt if tau is None else pull) * node.r, v_leak=getattr(node, "v_leak", 0.0))
        if self.cuba:
            self._hold(pull_syn=dt / node.tau_syn, push_syn=dt / node.tau_syn * node.w_in)
        if self.fires:
            self._hold(v_threshold=node.v_threshold, v_reset=node.v_reset)
            self.subtract = (reset or about(node).get("reset", "value")) == "subtract"
        self.v: Tensor | float = 0.0
        self.i: Tensor | float = 0.0

    def _hold(self, **values: Any) -> None:
        for name, value in values.items():
            self.register_buffer(name, torch.from_numpy(np.array(value, dtype=np.float64)))

    def forward(self, x: Tensor) -> Tensor:
        if self.cuba:
            self.i = x = self.i - self.pull_syn * self.i + self.push_syn * x
        v = self.v + self.pull * (self.v_leak - self.v) + self.push * x
        if not self.fires:
            self.v = v
            return v
        spikes = (v > self.v_threshold).to(v.dtype)
        after = v - self.v_threshold if self.subtract else self.v_reset.expand_as(v)
        self.v = torch.where(spikes.bool(), after, v)
        return spikes
