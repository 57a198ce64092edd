"""The neuron: ours, its plain loop, torch.compile of that loop, and the nearest neuron of SpikingJelly and of snnTorch."""

from collections.abc import Callable

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor

from nord_snn.ops import associative_lif
from nord_snn.ops.cascade import ring_weight

__all__ = ["case", "contestants", "floor", "gate"]


def case(shape: tuple[int, int, int], n_clusters: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs that want gradients; currents of a size at which some 5 to 20 % of the neurons fire."""
    generator = torch.Generator().manual_seed(0)
    made = {
        "x": 0.6 * torch.randn(shape, generator=generator),
        "threshold": torch.full(shape[-1:], 0.25),
        "beta_mem": torch.tensor([0.9]),
        "beta_syn": torch.tensor([0.5]),
        "cascade_weight": ring_weight(n_clusters, 3).sigmoid(),
        "cascade_gain": torch.full((n_clusters,), 0.8),
    }
    made["x"] = made["x"].to(dtype)
    return {name: value.to(device).requires_grad_() for name, value in made.items()}


def ours(inputs: dict[str, Tensor], backend: str) -> Tensor:
    """Spikes of our op."""
    return associative_lif(inputs["x"], **{k: v for k, v in inputs.items() if k != "x"}, backend=backend)[0]


def contestants(inputs: dict[str, Tensor], backward: bool) -> dict[str, Callable[[], object]]:
    """What runs against each other, the plain loop first."""
    x = inputs["x"]
    grad = torch.randn(x.shape, device=x.device).to(x.dtype)

    def timed(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> None:
            if not backward:
                with torch.no_grad():
                    forward()
                return
            for leaf in inputs.values():
                leaf.grad = None
            forward().backward(grad)

        return run

    compiled = torch.compile(lambda: ours(inputs, "torch"))
    made = {
        "plain PyTorch loop": timed(lambda: ours(inputs, "torch")),
        "torch.compile of the loop": timed(compiled),
        "SpikingJelly `LIFNode`": timed(spikingjelly_lif(x)),
    }
    if (synaptic := snntorch_synaptic(x)) is not None:
        made["snnTorch `Synaptic`"] = timed(synaptic)
    made["**nord-snn**"] = timed(lambda: ours(inputs, "auto"))
    return made


def spikingjelly_lif(x: Tensor) -> Callable[[], Tensor]:
    """A multi-step ``LIFNode`` from rest: no synaptic current, no refractory period, no cascade."""
    node = neuron.LIFNode(surrogate_function=surrogate.ATan(), step_mode="m").to(x.device)

    def forward() -> Tensor:
        functional.reset_net(node)
        return node(x)

    return forward


def snntorch_synaptic(x: Tensor) -> Callable[[], Tensor] | None:
    """A loop over ``Synaptic`` from rest: no refractory period, no cascade; None if snnTorch is not installed."""
    try:
        import snntorch
    except ImportError:
        return None
    node = snntorch.Synaptic(alpha=0.5, beta=0.9, spike_grad=snntorch.surrogate.atan()).to(x.device)

    def forward() -> Tensor:
        syn, mem = node.reset_mem()
        spikes = []
        for step in x.unbind(0):
            spike, syn, mem = node(step, syn, mem)
            spikes.append(spike)
        return torch.stack(spikes)

    return forward


def floor(x: Tensor, backward: bool) -> int:
    """Bytes that must move: x in and spikes out; backward x and the gradient in, and the gradient of x out."""
    return x.numel() * x.element_size() * (5 if backward else 2)


def gate(inputs: dict[str, Tensor]) -> str:
    """Compare spikes and gradients with the reference; raises if they differ, else says how closely they agree."""
    results = {}
    grad = torch.randn(inputs["x"].shape, device=inputs["x"].device)
    for backend in ("torch", "auto"):
        spikes = ours(inputs, backend)
        results[backend] = (spikes, torch.autograd.grad(spikes, list(inputs.values()), grad.to(spikes.dtype)))
    flips = int((results["torch"][0] != results["auto"][0]).sum())
    worst = max(
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(results["auto"][1], results["torch"][1], strict=True)
    )
    limit = 1e-4 if inputs["x"].dtype == torch.float32 else 1e-2
    if flips > 1e-5 * inputs["x"].numel() or (not flips and worst > limit):
        raise SystemExit(f"correctness gate: {flips} flipped spikes, gradients off by {worst:.1e}")
    return f"{flips} of {inputs['x'].numel():,} spikes differ from the reference, gradients by at most {worst:.1e}"
