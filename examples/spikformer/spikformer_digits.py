"""Replace the attention of SpikingJelly's Spikformer by resonance, and compare both on handwritten digits.

    python examples/spikformer/spikformer_digits.py            # scikit-learn's digits, no download; 8 minutes of CPU time
    python examples/spikformer/spikformer_digits.py --quick    # one seed, three epochs

Spikformer (Zhou et al. 2023) is a vision transformer with spiking neurons. Three versions are trained: with Spikformer's own
attention, with resonance (``SpikeFedResonance``, attention whose scores count coincident spikes) in each block, and, as a
control, without attention, so that only convolutions exchange information between patches. The tables have accuracy, CPU time of
a training step and firing rates, as mean and range over seeds. The example needs SpikingJelly 2; the older release 0.0.0.0.14 has
no Spikformer.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from nordlm.cli import number
from nordlm.script import run_script
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from nord_snn.layers import SpikeFedResonance
from nord_snn.monitor import SpikeMonitor

try:
    from spikingjelly.activation_based.model.spikformer import Spikformer
except ImportError as error:
    raise SystemExit("this example needs SpikingJelly 2: the installed release has no Spikformer") from error

STEPS, SIZE, PATCH, WIDTH, HEADS, BLOCKS = 4, 16, 4, 64, 4, 2
PATCHES = (SIZE // PATCH) ** 2
BATCH, EPOCHS, LR = 32, 8, 2e-3

Data = tuple[Tensor, Tensor, Tensor, Tensor]


class NoAttention(nn.Module):
    """Replacement of attention that exchanges no information between patches."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(x)


def resonance(n_features: int, n_heads: int) -> SpikeFedResonance:
    """Construct a resonance with the neurons, norms and layout of Spikformer's attention."""
    return SpikeFedResonance(
        n_features,
        n_heads,
        top_k=PATCHES,
        causal=False,
        neuron=lambda n: neuron.LIFNode(tau=2.0, detach_reset=True),
        spiking_values=True,
        spikes_out=True,
        norm="batch",
        channels_first=True,
    )


#: Constructors of the replacement of a block's attention, from width and number of heads; None: the attention is not replaced.
KINDS: dict[str, Callable[[int, int], nn.Module] | None] = {
    "Spikformer's attention": None,
    "resonance": resonance,
    "no attention": lambda n_features, n_heads: NoAttention(),
}


def spikformer(make: Callable[[int, int], nn.Module] | None) -> nn.Module:
    """Construct Spikformer, and replace the attention of its blocks unless ``make`` is None."""
    net = Spikformer(
        T=STEPS,
        in_channels=1,
        img_size_h=SIZE,
        img_size_w=SIZE,
        patch_size=PATCH,
        num_classes=10,
        embed_dims=WIDTH,
        num_heads=HEADS,
        mlp_ratio=2.0,
        depths=BLOCKS,
    )
    if make is not None:
        for block in net.blocks:
            block.attn = make(block.attn.dim, block.attn.num_heads)
    return net


class Result(NamedTuple):
    """Test accuracy, median CPU time of a training step in ms, number of parameters, firing rate of each layer of neurons."""

    accuracy: float
    step_ms: float
    parameters: int
    rates: dict[str, float]


def digits() -> Data:
    """Return training images ``[n, 1, 16, 16]`` and labels, test images and labels."""
    data = load_digits()
    parts = train_test_split(data.images / 16.0, data.target, test_size=0.25, random_state=0, stratify=data.target)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in parts)
    train_x, test_x = (
        nn.functional.interpolate(images.float()[:, None], size=(SIZE, SIZE), mode="bilinear")
        for images in (train_x, test_x)
    )
    return train_x, train_y, test_x, test_y


def predict(net: nn.Module, images: Tensor) -> Tensor:
    """Return logits ``[N, 10]``, the mean over time."""
    functional.reset_net(net)
    logits: Tensor = net(images).mean(0)
    return logits


def train(make: Callable[[int, int], nn.Module] | None, seed: int, epochs: int, data: Data) -> Result:
    """Train one network from scratch; return its test result."""
    torch.manual_seed(seed)
    train_x, train_y, test_x, test_y = data
    net = spikformer(make)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    order = torch.Generator().manual_seed(seed)  # separate, so that batches do not depend on the attention
    times = []
    for _ in range(epochs):
        for batch in torch.randperm(len(train_x), generator=order).split(BATCH):
            start = time.process_time()
            loss = nn.functional.cross_entropy(predict(net, train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(time.process_time() - start)
        schedule.step()
    net.eval()
    with SpikeMonitor(net) as monitor, torch.no_grad():
        accuracy = (predict(net, test_x).argmax(1) == test_y).float().mean().item()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return Result(accuracy, 1000 * statistics.median(times), parameters, monitor.rates())


def mean_range(values: list[float], show: Callable[[float], str]) -> str:
    """Return mean and range of the values as text."""
    return f"{show(statistics.mean(values))} ({show(min(values))} to {show(max(values))})"


def summary(results: dict[str, list[Result]]) -> Table:
    """Return the table of accuracies, CPU times and firing rates."""
    table = Table(
        "attention", "accuracy", "CPU time of a training step, ms", "parameters", "firing rate, mean over all layers"
    )
    for name, of_seeds in results.items():
        table.add_row(
            name,
            mean_range([result.accuracy for result in of_seeds], "{:.1%}".format),
            mean_range([result.step_ms for result in of_seeds], "{:.0f}".format),
            f"{of_seeds[0].parameters:,}",
            mean_range([statistics.mean(result.rates.values()) for result in of_seeds], "{:.1%}".format),
        )
    return table


def layer_rates(results: dict[str, list[Result]]) -> Table:
    """Return the table of firing rates of the neurons inside the attention."""
    table = Table("attention", "layer of neurons", "firing rate")
    for name, of_seeds in results.items():
        for layer in of_seeds[0].rates:
            if ".attn." in layer:
                table.add_row(name, layer, mean_range([result.rates[layer] for result in of_seeds], "{:.1%}".format))
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=number(1, 1000, int), default=3)
    parser.add_argument("--epochs", type=number(1, kind=int), default=EPOCHS)
    parser.add_argument("--quick", action="store_true", help="one seed and three epochs")
    options = parser.parse_args(arguments)
    seeds, epochs = (1, 3) if options.quick else (options.seeds, options.epochs)
    data = digits()
    results: dict[str, list[Result]] = {name: [] for name in KINDS}
    runs = [(name, seed) for seed in range(seeds) for name in KINDS]
    for name, seed in track(runs, "training", transient=True):
        results[name].append(train(KINDS[name], seed, epochs, data))
    console = Console()
    console.print(f"mean (range) over {seeds} seeds, after {epochs} epochs, on {len(data[3])} test images")
    console.print(summary(results))
    console.print(layer_rates(results))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
