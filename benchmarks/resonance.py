"""The resonance: its kernel and its blockwise form against the reference, in time and in memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from nord_snn.ops import resonance
from nord_snn.ops.topk_resonance.reference import reference

__all__ = ["case", "contestants", "floor", "gate"]

HEADS, TOP_K = 4, 64


def case(T: int, B: int, S: int, D: int) -> dict[str, Tensor]:
    """Spikes of which 15 % fire, values, temperature and slopes, all of which want gradients."""
    generator = torch.Generator().manual_seed(0)
    made = {
        "q": (torch.rand(T, B, S, D, generator=generator) < 0.15).float(),
        "k": (torch.rand(T, B, S, D, generator=generator) < 0.15).float(),
        "v": torch.randn(B, S, D, generator=generator),
        "temperature": torch.tensor([(D / HEADS) ** -0.5]),
        "recency": 2.0 ** -(1 + 2 * torch.arange(HEADS)),
    }
    return {name: value.requires_grad_() for name, value in made.items()}


def ours(inputs: dict[str, Tensor], backend: str = "auto") -> Tensor:
    """Our op."""
    return resonance(**inputs, n_heads=HEADS, top_k=TOP_K, backend=backend)


def plain(inputs: dict[str, Tensor]) -> Tensor:
    """The reference."""
    return reference(
        inputs["q"], inputs["k"], inputs["v"], HEADS, TOP_K, inputs["temperature"], inputs["recency"], True
    )


def contestants(inputs: dict[str, Tensor], compiled: bool = True) -> dict[str, Callable[[], object]]:
    """Forward and backward of each, the reference first."""

    def timed(forward: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[], object]:
        def run() -> None:
            for leaf in inputs.values():
                leaf.grad = None
            forward(inputs).sum().backward()

        return run

    made = {
        "reference": timed(plain),
        "nord-snn, `torch`": timed(lambda inputs: ours(inputs, "torch")),
        "**nord-snn**": timed(ours),
    }
    if compiled:
        made["torch.compile of the reference"] = timed(torch.compile(plain))
    return made


def floor(inputs: dict[str, Tensor]) -> int:
    """Bytes: q, k, v in and the context out; backward the same in, its gradient in, and three gradients out."""
    spikes, values = inputs["q"].numel() * 4, inputs["v"].numel() * 4
    return 6 * spikes + 5 * values


def gate(inputs: dict[str, Tensor]) -> str:
    """Compare context and gradients with the reference; raises if they differ, else says how closely they agree."""
    leaves = list(inputs.values())
    contexts = plain(inputs), ours(inputs)
    weight = torch.randn(contexts[0].shape)
    expected, got = (torch.autograd.grad(context, leaves, weight) for context in contexts)
    off = float((contexts[0] - contexts[1]).detach().abs().max())
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))
    if off > 1e-5 or worst > 1e-4:
        raise SystemExit(f"correctness gate: context off by {off:.1e}, gradients by {worst:.1e}")
    return f"context within {off:.1e} of the reference, gradients within {worst:.1e}"
