"""What each part costs beside the linear map of the same width: ``python benchmarks/parts.py`` writes ``docs/costs.md``.

A correctness gate runs first: every part is compared with itself on plain PyTorch.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from language_model import keep_freed_memory
from run import machine
from timing import peak_bytes, race
from torch import Tensor, nn

from nord_snn.layers import (
    CoFiringResonance,
    LeakyClamp,
    MembraneReadout,
    MultiScaleTemporalEncoder,
    NordBlock,
    SpikeFedBlock,
    SpikingFeedForward,
)
from nord_snn.neurons import AssociativeLIFNode

OUT = Path(__file__).parents[1] / "docs" / "costs.md"
STEPS, BATCH, LENGTH, WIDTH, HIDDEN, HEADS, CLUSTERS = 10, 8, 128, 256, 512, 4, 64
YARDSTICK = "a linear map, `nn.Linear(256, 256)`"


def parts() -> dict[str, nn.Module]:
    """Everything that a network is made of, at one width."""
    torch.manual_seed(0)
    return {
        YARDSTICK: nn.Linear(WIDTH, WIDTH, bias=False),
        "`MultiScaleTemporalEncoder`": MultiScaleTemporalEncoder(WIDTH),
        "`AssociativeLIFNode`, no cascade": AssociativeLIFNode(WIDTH, None, step_mode="m"),
        "`AssociativeLIFNode`, 64 clusters": AssociativeLIFNode(WIDTH, CLUSTERS, step_mode="m"),
        "`LeakyClamp`": LeakyClamp(WIDTH),
        "`CoFiringResonance`, 4 heads": CoFiringResonance(WIDTH, HEADS),
        "`SpikingFeedForward`, hidden 512": SpikingFeedForward(WIDTH, HIDDEN),
        "`MembraneReadout`": MembraneReadout(WIDTH),
        "`NordBlock`": NordBlock(WIDTH, HEADS, HIDDEN),
        "`SpikeFedBlock`": SpikeFedBlock(WIDTH, HEADS, HIDDEN),
        "`SpikeFedBlock`, spiking values": SpikeFedBlock(WIDTH, HEADS, HIDDEN, spiking_values=True),
    }


def inputs(part: nn.Module) -> Tensor:
    """Currents ``[10, 8, 128, 256]``; the encoder makes them from features."""
    shape = (BATCH, LENGTH, WIDTH)
    return torch.randn(shape if isinstance(part, MultiScaleTemporalEncoder) else (STEPS, *shape))


def call(part: nn.Module, x: Tensor) -> Tensor:
    """From rest, whatever the part."""
    return part(x, stateless=True) if isinstance(part, AssociativeLIFNode) else part(x)


def training_step(part: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward, the input's gradient included."""
    x = x.clone().requires_grad_()
    grad = torch.randn_like(call(part, x))
    return lambda: call(part, x).backward(grad)


def gate(all_parts: dict[str, nn.Module]) -> str:
    """Largest difference between a part and itself on plain PyTorch, beside its largest output."""
    worst = 0.0
    for name, part in all_parts.items():
        x = inputs(part)
        with torch.no_grad():
            ours = call(part, x)
            chosen = {m: m.backend for m in part.modules() if hasattr(m, "backend")}
            for module in chosen:
                module.backend = "torch"
            plain = call(part, x)
            for module, backend in chosen.items():
                module.backend = backend
        worst = max(worst, ((ours - plain).abs() > 1e-4 * plain.abs().max()).float().mean().item())
        if worst > 1e-4:
            raise SystemExit(f"{name} computes something else than plain PyTorch")
    return f"at most a fraction of {worst:.1e} of the values of a part differ from plain PyTorch"


def table(seconds: float) -> str:
    """The page."""
    made = parts()
    lines = [f"Correctness check: {gate(made)}.\n"]
    data = {name: inputs(part) for name, part in made.items()}
    with torch.no_grad():
        forward = race({name: lambda p=part, x=data[name]: call(p, x) for name, part in made.items()}, seconds)
    steps = {name: training_step(part, data[name]) for name, part in made.items()}
    training = race(steps, seconds)
    lines.append(
        "| part | parameters | forward, ms | relative to the linear map | forward and backward, ms "
        "| relative to the linear map | peak, MB |"
    )
    lines.append("|---|---|---|---|---|---|---|")
    for (name, part), a, b in zip(made.items(), forward, training, strict=True):
        weights = sum(p.numel() for p in part.parameters())
        megabytes = peak_bytes(steps[name]) / 1e6
        lines.append(
            f"| {name} | {weights:,} | {a.milliseconds:.1f} | {1 / a.speedup:.2f} | {b.milliseconds:.1f} | "
            f"{1 / b.speedup:.2f} | {megabytes:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the contestants of a column take turns")
    arguments = parser.parse_args()
    keep_freed_memory()
    page = (
        "# What the parts cost\n\n"
        "Written by `python benchmarks/parts.py`. Each part runs on currents `[10, 8, 128, 256]` (10 time steps, 8 "
        "sequences of 128 positions, width 256, float32) and is compared with one linear map of that width on the same "
        "currents. The parts take turns of a few calls. Times and ratios are medians over the turns. `peak` is the peak "
        "memory in forward and backward, without the input and its gradient.\n\n"
        f"{machine()}\n\n{table(arguments.seconds)}"
    )
    OUT.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
