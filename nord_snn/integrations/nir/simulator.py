"""What a reader makes of a NIR graph: the nodes' equations by forward Euler, wired by nirtorch."""

from typing import Any

import nir
import nirtorch
import numpy as np
import torch
from torch import Tensor, nn

from nord_snn.integrations.nir.graphs import inline, text

__all__ = ["simulate"]


def simulate(graph: nir.NIRGraph, x_seq: Tensor, dt: float = 1e-4, *, reset: str | None = None) -> Tensor:
    r"""Run a NIR graph as a reader would that knows nothing of this library.

    Every node follows NIR's equations by forward Euler, ``v += dt / tau * (v_leak - v + r * I)``, and fires above its
    threshold; what comes back through a loop arrives one step later. It is made to check exports with and is slow.

    Args:
        graph: the graph, of ``Linear``, ``Affine``, ``Scale``, ``CubaLIF``, ``CubaLI``, ``LIF``, ``LI``, ``IF``, ``I``,
            ``Threshold`` and what nirtorch maps by itself.
        x_seq: input, ``[T, N, *]``.
        dt: length of a step in seconds.
        reset: ``"value"`` resets membranes to ``v_reset``, as NIR's equations have it; ``"subtract"`` takes the threshold
            off; None does what each node's metadata asks for, and ``"value"`` where they are silent.

    Returns:
        Output of every step, ``[T, N, *]``.

    Raises:
        ValueError: a node is of another kind, or ``reset`` is none of the three.

    Source: NIR (Pedersen et al. 2024).

    Example:
        >>> lif = nir.LIF(*(np.full(3, value) for value in (1e-3, 1.0, 0.0, 0.5)))
        >>> spikes = simulate(nir.NIRGraph.from_list(lif), torch.ones(20, 1, 3))
        >>> int(spikes[:, 0, 0].argmax())  # 1 - 0.9 ** 7 is the first above 0.5
        6
    """
    if reset not in (None, "value", "subtract"):
        raise ValueError(f"reset must be 'value', 'subtract' or None, got {reset!r}")
    kinds = {
        nir.Linear: _Linear,
        nir.Affine: _Linear,
        nir.Scale: _Scale,
        nir.Threshold: _Threshold,
        **dict.fromkeys((nir.CubaLIF, nir.CubaLI, nir.LIF, nir.LI, nir.IF, nir.I), _Dynamics),
    }
    table = {kind: lambda node, made=made: made(node, dt, reset) for kind, made in kinds.items()}
    network = nirtorch.nir_to_torch(inline(graph), table, dtype=x_seq.dtype)
    state, outputs = None, []
    with torch.no_grad():
        for x in x_seq:
            out, state = network(x, state)
            outputs.append(out)
    return torch.stack(outputs)


class _Node(nn.Module):
    def __init__(self, node: nir.NIRNode, dt: float, reset: str | None) -> None:
        super().__init__()

    def hold(self, **values: Any) -> None:
        for name, value in values.items():
            self.register_buffer(name, torch.from_numpy(np.array(value, dtype=np.float64)))


class _Linear(_Node):
    weight: Tensor
    bias: Tensor

    def __init__(self, node: Any, dt: float, reset: str | None) -> None:
        super().__init__(node, dt, reset)
        self.hold(weight=node.weight, bias=getattr(node, "bias", np.zeros(len(node.weight))))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class _Scale(_Node):
    scale: Tensor

    def __init__(self, node: Any, dt: float, reset: str | None) -> None:
        super().__init__(node, dt, reset)
        self.hold(scale=node.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class _Threshold(_Node):
    threshold: Tensor

    def __init__(self, node: Any, dt: float, reset: str | None) -> None:
        super().__init__(node, dt, reset)
        self.hold(threshold=node.threshold)

    def forward(self, x: Tensor) -> Tensor:
        return (x > self.threshold).to(x.dtype)


class _Dynamics(_Node):
    """Integrators: with a synapse or without, leaky or not, firing or not."""

    pull: Tensor
    push: Tensor
    v_leak: Tensor
    pull_syn: Tensor
    push_syn: Tensor
    v_threshold: Tensor
    v_reset: Tensor

    def __init__(self, node: Any, dt: float, reset: str | None) -> None:
        super().__init__(node, dt, reset)
        self.cuba, self.fires = hasattr(node, "tau_syn"), hasattr(node, "v_threshold")
        tau = getattr(node, "tau_mem" if self.cuba else "tau", None)
        pull = 0.0 if tau is None else dt / tau  # of the leak; an integrator has none
        self.hold(pull=pull, push=(dt if tau is None else pull) * node.r, v_leak=getattr(node, "v_leak", 0.0))
        if self.cuba:
            self.hold(pull_syn=dt / node.tau_syn, push_syn=dt / node.tau_syn * node.w_in)
        if self.fires:
            self.hold(v_threshold=node.v_threshold, v_reset=node.v_reset)
            self.subtract = (reset or text(node.metadata.get("reset", "value"))) == "subtract"

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        v, i = (torch.zeros_like(x), torch.zeros_like(x)) if state is None else state
        if self.cuba:
            i = i - self.pull_syn * i + self.push_syn * x
        v = v + self.pull * (self.v_leak - v) + self.push * (i if self.cuba else x)
        if not self.fires:
            return v, (v, i)
        spikes = (v > self.v_threshold).to(x.dtype)
        after = v - self.v_threshold if self.subtract else self.v_reset.expand_as(v)
        return spikes, (torch.where(spikes.bool(), after, v), i)
