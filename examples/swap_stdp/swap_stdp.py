"""Train SpikingJelly and snnTorch networks on digits by unsupervised STDP, with the rules of their library and of nord-snn.

    python examples/swap_stdp/swap_stdp.py          # scikit-learn's digits, no download; half a minute on two cores

At each time step, each of 64 inputs fires with a probability equal to the brightness of its pixel. 100 neurons compete (after
Diehl and Cook 2015): for each image only the neuron with the largest mean current can fire, the winner, and STDP moves its
weights towards the image. A penalty is subtracted from the current of neurons that win often. Labels are used only after
training, to assign a digit to each neuron. The runs of a network differ only in the line that constructs the learner.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import snntorch
import torch
from nordlm.cli import number
from nordlm.script import run_script
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from snntorch.functional.stdp_learner import STDPLearner as SnnTorchSTDPLearner
from spikingjelly.activation_based import functional, layer, learning, neuron
from torch import Tensor, nn

from nord_snn.learning_rules import STDP, TripletSTDP

STEPS, N_NEURONS, BATCH, EPOCHS = 16, 100, 32, 8
TAU = 5.0  # time constant of the traces, in time steps
POTENTIATION, DEPRESSION = 0.003, 0.001  # weight change per pair of spikes
TRIPLETS: dict[str, Any] = {
    "a2_plus": POTENTIATION,
    "a2_minus": DEPRESSION,
    "a3_plus": POTENTIATION,
    "a3_minus": 0.0,
}
WEIGHT_NORM = 2.0  # of the weights of one neuron
PENALTY = 5.0  # learning rate of the penalty for frequent winners


class Digits(NamedTuple):
    """Images ``[n, 64]`` with values from 0 to 1, and labels ``[n]``."""

    images: Tensor
    labels: Tensor


def digits() -> tuple[Digits, Digits]:
    """Return training and test images."""
    data = load_digits()
    split = train_test_split(data.data / 16.0, data.target, test_size=0.25, random_state=0, stratify=data.target)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in split)
    return Digits(train_x.float(), train_y), Digits(test_x.float(), test_y)


def encode(images: Tensor) -> Tensor:
    """Return spikes ``[T, N, 64]`` with the brightness as their probability."""
    return (torch.rand(STEPS, *images.shape) < images).float()


class Competition(nn.Module):
    """Winner-take-all: only the neuron with the largest current, minus its penalty, fires."""

    penalty: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("penalty", torch.zeros(N_NEURONS))
        self.winners = torch.zeros(1, N_NEURONS)

    def choose(self, current: Tensor) -> None:
        """Select the winner for every image from the mean current ``[N, D]``; in training, update the penalties."""
        self.winners = nn.functional.one_hot((current - self.penalty).argmax(-1), N_NEURONS).to(current)
        if self.training:
            self.penalty += PENALTY * (self.winners.mean(0) - 1 / N_NEURONS)

    def forward(self, spikes: Tensor) -> Tensor:
        """Return the spikes ``[*, N, D]`` of the winners only."""
        return spikes * self.winners


class SpikingJellyNet(nn.Module):
    """SpikingJelly network, which receives all time steps ``[T, N, 64]`` in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = layer.Linear(64, N_NEURONS, bias=False, step_mode="m")
        self.lif = neuron.LIFNode(tau=2.0, step_mode="m")
        self.competition = Competition()

    def forward(self, x: Tensor) -> Tensor:
        """Return spikes ``[T, N, 100]``."""
        functional.reset_net(self)
        current = self.fc(x)
        self.competition.choose(current.mean(0))
        return self.competition(self.lif(current))


class SnnTorchNet(nn.Module):
    """SnnTorch network, whose neurons receive one time step ``[N, 64]`` in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, N_NEURONS, bias=False)
        self.lif = snntorch.Leaky(beta=0.5)
        self.competition = Competition()

    def forward(self, x: Tensor) -> Tensor:
        """Return spikes ``[T, N, 100]``."""
        self.competition.choose(nn.functional.linear(x.mean(0), self.fc.weight))
        membrane, spikes = self.lif.init_leaky(), []
        for x_t in x:
            spike, membrane = self.lif(self.fc(x_t), membrane)
            spikes.append(self.competition(spike))
        return torch.stack(spikes)


#: Constructors of the learners, the only difference between the runs. None: the initial weights are not trained.
LEARNERS: dict[str, dict[str, Callable[[Any], Any] | None]] = {
    "SpikingJelly": {
        "none": None,
        "STDPLearner": lambda net: learning.STDPLearner(
            "m", net.fc, net.competition, TAU, TAU, depression, potentiation
        ),
        "nord-snn STDP": lambda net: STDP("m", net.fc, net.competition, TAU, TAU, POTENTIATION, DEPRESSION),
        "nord-snn TripletSTDP": lambda net: TripletSTDP("m", net.fc, net.competition, TAU, TAU, **TRIPLETS),
    },
    "snnTorch": {
        "none": None,
        "STDPLearner": lambda net: SnnTorchSTDPLearner(net.fc, net.competition, TAU, TAU, depression, potentiation),
        "nord-snn STDP": lambda net: STDP("s", net.fc, net.competition, TAU, TAU, POTENTIATION, DEPRESSION),
        "nord-snn TripletSTDP": lambda net: TripletSTDP("s", net.fc, net.competition, TAU, TAU, **TRIPLETS),
    },
}
NETS: dict[str, type[SpikingJellyNet | SnnTorchNet]] = {"SpikingJelly": SpikingJellyNet, "snnTorch": SnnTorchNet}


def potentiation(weight: Tensor) -> float:
    """Return the weight change of potentiation; the learners of SpikingJelly and snnTorch take functions of the weight."""
    return POTENTIATION


def depression(weight: Tensor) -> float:
    """Return the weight change of depression, see :func:`potentiation`."""
    return DEPRESSION


@torch.no_grad()
def train(net: SpikingJellyNet | SnnTorchNet, make: Callable[[Any], Any] | None, data: Digits, epochs: int) -> None:
    """Train the weights of ``net.fc`` with the learner on all images, in each epoch in another order."""
    normalise(net.fc)
    if make is None:
        return
    learner = make(net)
    optimizer = torch.optim.SGD([net.fc.weight], lr=1.0)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.images)).split(BATCH):
            if len(batch) < BATCH:  # traces are not reset between batches, so all batches must have the same size
                continue
            net(encode(data.images[batch]))
            optimizer.zero_grad()
            learner.step(on_grad=True)  # subtracts its change from the gradient
            optimizer.step()
            normalise(net.fc)


@torch.no_grad()
def normalise(fc: nn.Linear) -> None:
    """Set negative weights to 0, and normalise the weights of each neuron."""
    weight = fc.weight.clamp_(min=0)
    weight *= WEIGHT_NORM / weight.norm(dim=1, keepdim=True).clamp(min=1e-6)


@torch.no_grad()
def accuracy(net: SpikingJellyNet | SnnTorchNet, train_data: Digits, test_data: Digits) -> float:
    """Return the test accuracy: a neuron has the label for which it fires most, an image the label of its winner."""
    net.eval()
    counts = net(encode(train_data.images)).sum(0)
    by_label = torch.stack([counts[train_data.labels == label].sum(0) for label in range(10)])  # [10, D]
    label_of = by_label.argmax(0)
    votes = net(encode(test_data.images)).sum(0) @ nn.functional.one_hot(label_of, 10).float()
    return (votes.argmax(1) == test_data.labels).float().mean().item()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=number(1, 1000, int), default=3)
    parser.add_argument("--epochs", type=number(0, kind=int), default=EPOCHS)
    options = parser.parse_args(arguments)
    train_data, test_data = digits()
    table = Table("network", "learner", f"test accuracy, mean of {options.seeds} seeds", "lowest to highest")
    runs = [(name, rule, make) for name, rules in LEARNERS.items() for rule, make in rules.items()]
    for name, rule, make in track(runs, "training", transient=True):
        results = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            net = NETS[name]()
            nn.init.uniform_(net.fc.weight)
            train(net, make, train_data, options.epochs)
            results.append(accuracy(net, train_data, test_data))
        table.add_row(name, rule, f"{statistics.mean(results):.1%}", f"{min(results):.1%} to {max(results):.1%}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
