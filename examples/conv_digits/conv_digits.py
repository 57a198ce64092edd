"""Replace the neurons of a convolutional SpikingJelly network by those of nord-snn, and compare both on handwritten digits.

    python examples/conv_digits/conv_digits.py          # scikit-learn's digits, no download; half a minute on two cores

The network has one of four kinds of neurons: SpikingJelly's ``LIFNode``, nord-snn's ``AssociativeLIFNode`` without cascade, with
cascade, or with cascade and a ``LeakyClamp`` before each layer of neurons. The table and the plot show the accuracy, the mean
firing rate and the share of silent neurons (no spike for any test image), over seeds.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from nordlm.cli import file_name, number
from nordlm.script import run_script
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from nord_snn.layers import LeakyClamp
from nord_snn.monitor import SpikeMonitor
from nord_snn.neurons import AssociativeLIFNode

STEPS, BATCH, EPOCHS, LR = 4, 64, 8, 5e-3
CHANNELS = (16, 32)

Make = Callable[[int], nn.Module]


class ChannelsLast(nn.Module):
    """Apply modules whose parameters belong to the last dimension to the channels of images ``[T, N, C, H, W]``."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        """Move channels last, so that all pixels of a channel share its parameters."""
        return self.inner(x.movedim(2, -1)).movedim(-1, 2)


def lif(n_channels: int) -> nn.Module:
    """Construct a layer of SpikingJelly's neurons."""
    return neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")


def ours(n_channels: int, n_clusters: int | None = 4, clamp: bool = False) -> nn.Module:
    """Construct a layer of nord-snn's neurons, with a LeakyClamp before it if ``clamp``."""
    node = AssociativeLIFNode(n_channels, n_clusters, refractory_steps=0, step_mode="m")
    return ChannelsLast(LeakyClamp(n_channels), node) if clamp else ChannelsLast(node)


KINDS: dict[str, Make] = {
    "SpikingJelly LIFNode": lif,
    "AssociativeLIFNode, no cascade": lambda n: ours(n, None),
    "AssociativeLIFNode, cascade": ours,
    "AssociativeLIFNode, cascade, LeakyClamp": lambda n: ours(n, clamp=True),
}


class Net(nn.Module):
    """Network of two convolutions, each followed by neurons; the output is a mean over time steps."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        first, second = CHANNELS
        self.layers = nn.Sequential(
            layer.Conv2d(1, first, 3, padding=1, bias=False),
            layer.BatchNorm2d(first),
            make(first),
            layer.AvgPool2d(2),
            layer.Conv2d(first, second, 3, padding=1, bias=False),
            layer.BatchNorm2d(second),
            make(second),
            layer.AvgPool2d(2),
            layer.Flatten(),
            layer.Linear(second * 4, 10),
        )
        functional.set_step_mode(self, "m")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[N, 10]`` for images ``[N, 1, 8, 8]``, the input at every time step."""
        functional.reset_net(self)
        return self.layers(images.expand(STEPS, *images.shape)).mean(0)


class Result(NamedTuple):
    """Accuracy, mean firing rate of the two layers of neurons, and share of silent neurons, all on the test images."""

    accuracy: float
    rate: float
    silent: float


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels."""
    data = load_digits()
    parts = train_test_split(data.images / 16.0, data.target, test_size=0.25, random_state=0, stratify=data.target)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in parts)
    return train_x.float()[:, None], train_y, test_x.float()[:, None], test_y


def train(make: Make, seed: int, epochs: int, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> Result:
    """Train one network from scratch; return its test result."""
    torch.manual_seed(seed)
    train_x, train_y, test_x, test_y = data
    net = Net(make)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(train_x)).split(BATCH):
            loss = nn.functional.cross_entropy(net(train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return measure(net.eval(), test_x, test_y)


@torch.no_grad()
def measure(net: Net, images: Tensor, labels: Tensor) -> Result:
    """Measure accuracy, firing rate and share of silent neurons on the test images."""
    fired: dict[nn.Module, Tensor] = {}  # whether each neuron fires on any image

    def record(module: nn.Module, inputs: object, spikes: Tensor) -> None:
        fired[module] = spikes.flatten(0, 1).any(0)

    nodes = [module for module in net.modules() if isinstance(module, neuron.BaseNode)]
    hooks = [node.register_forward_hook(record) for node in nodes]
    with SpikeMonitor(net) as monitor:
        accuracy = (net(images).argmax(1) == labels).float().mean().item()
    for hook in hooks:
        hook.remove()
    firing = torch.cat([neurons.flatten() for neurons in fired.values()])
    return Result(accuracy, float(np.mean(list(monitor.rates().values()))), 1 - firing.float().mean().item())


def plot(results: dict[str, list[Result]], path: Path) -> None:
    """Plot mean and range over seeds of accuracy, firing rate and share of silent neurons."""
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), sharey=True, layout="constrained")
    for axis, field, title in zip(
        axes, Result._fields, ("test accuracy", "firing rate", "silent neurons"), strict=True
    ):
        values = [[100 * getattr(result, field) for result in of_seeds] for of_seeds in results.values()]
        means = [float(np.mean(seeds)) for seeds in values]
        errors = [
            [m - min(v) for m, v in zip(means, values, strict=True)],
            [max(v) - m for m, v in zip(means, values, strict=True)],
        ]
        axis.barh(list(results), means, xerr=errors, capsize=3, color="tab:blue")
        axis.set(title=f"{title}, %")
    axes[0].set_xlim(min(100 * r.accuracy for of_seeds in results.values() for r in of_seeds) - 3, 100)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=number(1, 1000, int), default=5)
    parser.add_argument("--epochs", type=number(1, kind=int), default=EPOCHS)
    parser.add_argument("--out", type=file_name, default=Path("runs"), help="folder for the plot")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: cannot be created ({error.strerror})")
    data = digits()
    runs = [(name, seed) for name in KINDS for seed in range(options.seeds)]
    results: dict[str, list[Result]] = {name: [] for name in KINDS}
    for name, seed in track(runs, "training", transient=True):
        results[name].append(train(KINDS[name], seed, options.epochs, data))
    table = Table("neurons", "accuracy", "lowest to highest", "firing rate", "silent", title=f"{options.seeds} seeds")
    for name, of_seeds in results.items():
        accuracy, rate, silent = (np.mean([getattr(result, field) for result in of_seeds]) for field in Result._fields)
        low, high = (f(result.accuracy for result in of_seeds) for f in (min, max))
        table.add_row(name, f"{accuracy:.1%}", f"{low:.1%} to {high:.1%}", f"{rate:.1%}", f"{silent:.1%}")
    Console().print(table)
    plot(results, options.out / "conv_digits.png")
    print(f"conv_digits.png is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
