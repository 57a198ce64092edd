"""Compare the cost of each part with a linear map of the same width: ``python benchmarks/parts.py`` writes ``docs/costs.md``.

A part is a neuron, layer or block of nord-snn. First its output is compared with its output in plain PyTorch.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from language_model import keep_freed_memory
from run import machine
from timing import peak_bytes, time_in_turns
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
LINEAR_MAP = "a linear map, `nn.Linear(256, 256)`"


def parts() -> dict[str, nn.Module]:
    """Return one module of each kind, all of width 256; the linear map is first."""
    torch.manual_seed(0)
    return {
        LINEAR_MAP: nn.Linear(WIDTH, WIDTH, bias=False),
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
    """Return currents ``[10, 8, 128, 256]``, or features ``[8, 128, 256]`` for the encoder."""
    shape = (BATCH, LENGTH, WIDTH)
    return torch.randn(shape if isinstance(part, MultiScaleTemporalEncoder) else (STEPS, *shape))


def call(part: nn.Module, x: Tensor) -> Tensor:
    """Run a part from rest."""
    return part(x, stateless=True) if isinstance(part, AssociativeLIFNode) else part(x)


def training_step(part: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a function that runs forward and backward of a part, with the gradient of the input."""
    x = x.clone().requires_grad_()
    grad = torch.randn_like(call(part, x))
    return lambda: call(part, x).backward(grad)


def check(all_parts: dict[str, nn.Module]) -> str:
    """Compare every part with its output in plain PyTorch; exit if they differ.

    A value differs if its error is more than 1e-4 of the largest output; at most 1e-4 of the values may differ.
    """
    worst = 0.0
    for name, part in all_parts.items():
        x = inputs(part)
        with torch.no_grad():
            ours = call(part, x)
            backends = {m: m.backend for m in part.modules() if hasattr(m, "backend")}
            for module in backends:
                module.backend = "torch"
            plain = call(part, x)
            for module, backend in backends.items():
                module.backend = backend
        worst = max(worst, ((ours - plain).abs() > 1e-4 * plain.abs().max()).float().mean().item())
        if worst > 1e-4:
            raise SystemExit(f"{name} differs from plain PyTorch in {worst:.1e} of its values")
    return f"at most {worst:.1e} of the values of a part differ from plain PyTorch"


def table(seconds: float) -> str:
    """Return the sentence on the correctness check and the table of all parts, each column measured for ``seconds``."""
    all_parts = parts()
    lines = [f"Correctness check: {check(all_parts)}.\n"]
    data = {name: inputs(part) for name, part in all_parts.items()}
    with torch.no_grad():
        forward = time_in_turns(
            {name: lambda p=part, x=data[name]: call(p, x) for name, part in all_parts.items()}, seconds
        )
    steps = {name: training_step(part, data[name]) for name, part in all_parts.items()}
    training = time_in_turns(steps, seconds)
    lines.append(
        "| part | parameters | forward, ms | relative to the linear map | forward and backward, ms | relative to the linear map "
        "| peak, MB |"
    )
    lines.append("|---|---|---|---|---|---|---|")
    for (name, part), one_way, both_ways in zip(all_parts.items(), forward, training, strict=True):
        weights = sum(p.numel() for p in part.parameters())
        megabytes = peak_bytes(steps[name]) / 1e6
        lines.append(
            f"| {name} | {weights:,} | {one_way.milliseconds:.1f} | {1 / one_way.speedup:.2f} | "
            f"{both_ways.milliseconds:.1f} | {1 / both_ways.speedup:.2f} | {megabytes:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="time to measure each column")
    arguments = parser.parse_args()
    keep_freed_memory()
    page = (
        "# What the parts cost\n\n"
        "Written by `python benchmarks/parts.py`. Each part (a neuron, layer or block of nord-snn) runs on currents "
        "`[10, 8, 128, 256]` (10 time steps, 8 sequences of 128 positions, width 256, float32) and is compared with one linear "
        "map of that width on the same currents. The parts run in turns of a few calls, which are interleaved. Times are "
        "milliseconds per call; times and ratios are medians over the turns. `peak` is the peak memory in forward and "
        "backward, without the input and its gradient.\n\n"
        f"{machine()}\n\n{table(arguments.seconds)}"
    )
    OUT.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
