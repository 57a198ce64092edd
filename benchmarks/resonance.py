"""Compare time and memory of the resonance op: kernel, PyTorch in tiles (backend ``torch``) and reference."""

from collections.abc import Callable

import torch
from torch import Tensor

from nord_snn.ops import resonance
from nord_snn.ops.topk_resonance.reference import reference

__all__ = ["bytes_moved", "check", "implementations", "make_inputs"]

HEADS, TOP_K = 4, 64


def make_inputs(T: int, B: int, S: int, D: int) -> dict[str, Tensor]:
    """Return the arguments of the op, all with gradients; q and k ``[T, B, S, D]`` are spikes with a firing rate of 15 %."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "q": (torch.rand(T, B, S, D, generator=generator) < 0.15).float(),
        "k": (torch.rand(T, B, S, D, generator=generator) < 0.15).float(),
        "v": torch.randn(B, S, D, generator=generator),
        "temperature": torch.tensor([(D / HEADS) ** -0.5]),
        "recency": 2.0 ** -(1 + 2 * torch.arange(HEADS)),
    }
    return {name: value.requires_grad_() for name, value in inputs.items()}


def ours(inputs: dict[str, Tensor], backend: str = "auto") -> Tensor:
    """Return the output of nord-snn's op."""
    return resonance(**inputs, n_heads=HEADS, top_k=TOP_K, backend=backend)


def plain(inputs: dict[str, Tensor]) -> Tensor:
    """Return the output of the reference."""
    return reference(
        inputs["q"], inputs["k"], inputs["v"], HEADS, TOP_K, inputs["temperature"], inputs["recency"], True
    )


def implementations(inputs: dict[str, Tensor], compiled: bool = True) -> dict[str, Callable[[], object]]:
    """Return a call of forward and backward of each implementation, by name; the reference is first."""

    def timed(forward: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[], object]:
        def run() -> None:
            for leaf in inputs.values():
                leaf.grad = None
            forward(inputs).sum().backward()

        return run

    functions = {
        "reference": timed(plain),
        "nord-snn, `torch`": timed(lambda inputs: ours(inputs, "torch")),
        "**nord-snn**": timed(ours),
    }
    if compiled:
        functions["torch.compile of the reference"] = timed(torch.compile(plain))
    return functions


def bytes_moved(inputs: dict[str, Tensor]) -> int:
    """Return the minimum number of bytes that any implementation reads and writes.

    Forward reads q, k, v and writes the output. Backward reads q, k, v and the gradient of the output, and writes the
    gradients of q, k, v.
    """
    spikes, values = inputs["q"].numel() * 4, inputs["v"].numel() * 4
    return 6 * spikes + 5 * values


def check(inputs: dict[str, Tensor]) -> str:
    """Compare output and gradients with the reference; return the largest differences, or exit if they are too large."""
    leaves = list(inputs.values())
    contexts = plain(inputs), ours(inputs)
    weight = torch.randn(contexts[0].shape)
    expected, actual = (torch.autograd.grad(context, leaves, weight) for context in contexts)
    difference = float((contexts[0] - contexts[1]).detach().abs().max())
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True))
    if difference > 1e-5 or worst > 1e-4:
        raise SystemExit(f"resonance differs from the reference: context by {difference:.1e}, gradients by {worst:.1e}")
    return f"context within {difference:.1e} of the reference, gradients within {worst:.1e}"
