"""Compare our neuron's op with a plain PyTorch loop, torch.compile of the loop, and neurons of SpikingJelly and snnTorch."""

from collections.abc import Callable

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor

from nord_snn.ops import associative_lif
from nord_snn.ops.cascade import ring_weight

__all__ = ["bytes_moved", "check", "implementations", "make_inputs"]


def make_inputs(shape: tuple[int, int, int], n_clusters: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return the arguments of the op, all with gradients. The scale of ``x`` gives firing rates of about 5 to 20 %.

    Args:
        shape: ``[T, N, D]`` of the input current ``x``.
        n_clusters: number of clusters of the cascade.
        dtype: dtype of ``x``; the other arguments are float32.
        device: device of all arguments.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": 0.6 * torch.randn(shape, generator=generator),
        "threshold": torch.full(shape[-1:], 0.25),
        "beta_mem": torch.tensor([0.9]),
        "beta_syn": torch.tensor([0.5]),
        "cascade_weight": ring_weight(n_clusters, 3).sigmoid(),
        "cascade_gain": torch.full((n_clusters,), 0.8),
    }
    inputs["x"] = inputs["x"].to(dtype)
    return {name: value.to(device).requires_grad_() for name, value in inputs.items()}


def ours(inputs: dict[str, Tensor], backend: str) -> Tensor:
    """Return the spikes of nord-snn's op."""
    return associative_lif(inputs["x"], **{k: v for k, v in inputs.items() if k != "x"}, backend=backend)[0]


def implementations(inputs: dict[str, Tensor], backward: bool) -> dict[str, Callable[[], object]]:
    """Return a call of each implementation, by name; the plain loop is first."""
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
    functions = {
        "plain PyTorch loop": timed(lambda: ours(inputs, "torch")),
        "torch.compile of the loop": timed(compiled),
        "SpikingJelly `LIFNode`": timed(spikingjelly_lif(x)),
    }
    if (synaptic := snntorch_synaptic(x)) is not None:
        functions["snnTorch `Synaptic`"] = timed(synaptic)
    functions["**nord-snn**"] = timed(lambda: ours(inputs, "auto"))
    return functions


def spikingjelly_lif(x: Tensor) -> Callable[[], Tensor]:
    """Return a call of a multi-step ``LIFNode`` from rest, without synaptic current, refractory period or cascade."""
    node = neuron.LIFNode(surrogate_function=surrogate.ATan(), step_mode="m").to(x.device)

    def forward() -> Tensor:
        functional.reset_net(node)
        return node(x)

    return forward


def snntorch_synaptic(x: Tensor) -> Callable[[], Tensor] | None:
    """Return a loop over ``Synaptic`` from rest, without refractory period or cascade; None if snnTorch is missing."""
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


def bytes_moved(x: Tensor, backward: bool) -> int:
    """Return the minimum number of bytes that any implementation reads and writes.

    Forward reads x and writes spikes. Backward reads x and the gradient of the spikes, and writes the gradient of x.
    """
    return x.numel() * x.element_size() * (5 if backward else 2)


def check(inputs: dict[str, Tensor]) -> str:
    """Compare spikes and gradients with the reference; return the largest differences, or exit if they are too large."""
    results = {}
    grad = torch.randn(inputs["x"].shape, device=inputs["x"].device)
    for backend in ("torch", "auto"):
        spikes = ours(inputs, backend)
        results[backend] = (spikes, torch.autograd.grad(spikes, list(inputs.values()), grad.to(spikes.dtype)))
    n_different = int((results["torch"][0] != results["auto"][0]).sum())
    worst = max(
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(results["auto"][1], results["torch"][1], strict=True)
    )
    limit = 1e-4 if inputs["x"].dtype == torch.float32 else 1e-2
    if n_different > 1e-5 * inputs["x"].numel() or (not n_different and worst > limit):
        raise SystemExit(f"the neuron differs from the reference: {n_different} spikes, gradients by {worst:.1e}")
    return (
        f"{n_different} of {inputs['x'].numel():,} spikes differ from the reference, gradients by at most {worst:.1e}"
    )
