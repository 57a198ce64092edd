"""Train six small spiking networks with SpikingJelly's ``LIFNode`` and with ``AssociativeLIFNode``; print accuracies.

The data are scikit-learn's digits (1,797 images of 8 x 8 pixels) and its breast cancer table (569 rows of 30 numbers). For each
seed another random 30 % are held out. The neuron modules of a network are constructed by a function without arguments, as in
SpikingJelly's models. Seeds, batches, optimizer (Adam, learning rate 0.002 with cosine schedule) and number of epochs are the
same for all neurons.

    python studies/drop_in.py                        # all networks: about ten minutes on one core
    python studies/drop_in.py --networks conv --seeds 2
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from nord_snn import AssociativeLIFNode

#: Returns a new neuron module.
Make = Callable[[], nn.Module]


def conv(in_channels: int, out_channels: int, make: Make, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution, a batch norm and neurons."""
    padding = kernel // 2 if stride == 1 else 0
    convolution = layer.Conv2d(in_channels, out_channels, kernel, stride, padding=padding, bias=False)
    return nn.Sequential(convolution, layer.BatchNorm2d(out_channels), make())


def linear(in_channels: int, out_channels: int, make: Make) -> nn.Sequential:
    """Return a linear map of each of L tokens ``[T, N, C, L]``, a batch norm and neurons."""
    return nn.Sequential(
        layer.Conv1d(in_channels, out_channels, 1, bias=False), layer.BatchNorm1d(out_channels), make()
    )


class Conv(nn.Module):
    """Two convolutions with pooling and two linear maps over four time steps; logits are 5 times the last firing rates."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.net = nn.Sequential(
            conv(1, 16, make), layer.MaxPool2d(2, 2), conv(16, 32, make), layer.MaxPool2d(2, 2), layer.Flatten(),
            layer.Linear(128, 64, bias=False), make(), layer.Linear(64, 10, bias=False), make(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for ``[N, 8, 8]``."""
        return 5 * self.net(images[None, :, None].repeat(4, 1, 1, 1, 1)).mean(0)


class Perceptron(nn.Module):
    """Two linear maps over eight time steps; logits are 5 times the last firing rates."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        first, second = layer.Linear(64, 128, bias=False), layer.Linear(128, 10, bias=False)
        self.net = nn.Sequential(layer.Flatten(), first, make(), second, make())

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for ``[N, 8, 8]``."""
        return 5 * self.net(images[None].repeat(8, 1, 1, 1)).mean(0)


class Rows(nn.Module):
    """Two linear maps of one image row at each time step, so that the result depends on the state of the neurons."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.net = nn.Sequential(layer.Linear(8, 64), make(), layer.Linear(64, 64), make())
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for ``[N, 8, 8]``."""
        return self.head(self.net(images.transpose(0, 1)).mean(0))


class Residual(nn.Module):
    """Two residual blocks that add spikes, as in SEW-ResNet (Fang et al. 2021), over four time steps."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.stem = conv(1, 16, make)
        self.blocks = nn.ModuleList(nn.Sequential(conv(16, 16, make), conv(16, 16, make)) for _ in range(2))
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for ``[N, 8, 8]``."""
        x = self.stem(images[None, :, None].repeat(4, 1, 1, 1, 1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((0, 3, 4)))


class Former(nn.Module):
    """One block of spiking self-attention without softmax over 16 patches and four time steps, as in Spikformer.

    Source: Zhou et al. 2023, including the factor 0.125 of the attention.
    """

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.embed = conv(1, 32, make, kernel=2, stride=2)
        self.q, self.k, self.v, self.project = (linear(32, 32, make) for _ in range(4))
        self.attention = make()
        self.mlp = nn.Sequential(linear(32, 64, make), linear(64, 32, make))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for ``[N, 8, 8]``."""
        x = self.embed(images[None, :, None].repeat(4, 1, 1, 1, 1)).flatten(3)
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.project(self.attention(v @ (k.mT @ q) * 0.125))
        x = x + self.mlp(x)
        return self.head(x.mean((0, 3)))


class Table(nn.Module):
    """Three linear maps of a row of numbers, over six time steps."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.net = nn.Sequential(layer.Linear(30, 32), make(), layer.Linear(32, 32), make(), layer.Linear(32, 2))

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits for ``[N, 30]``."""
        return self.net(rows[None].repeat(6, 1, 1)).mean(0)


def digits() -> tuple[Tensor, Tensor]:
    """Return images ``[N, 8, 8]`` in [0, 1] and their digits."""
    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)


def cancer() -> tuple[Tensor, Tensor]:
    """Return standardised rows ``[N, 30]`` and whether the tumour is benign."""
    data = load_breast_cancer()
    return torch.tensor(StandardScaler().fit_transform(data.data), dtype=torch.float32), torch.tensor(data.target)


class Task(NamedTuple):
    """A network, its data and its number of epochs."""

    network: Callable[[Make], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    epochs: int


TASKS = {
    "conv": Task(Conv, digits, 15),
    "perceptron": Task(Perceptron, digits, 25),
    "rows": Task(Rows, digits, 25),
    "residual": Task(Residual, digits, 15),
    "former": Task(Former, digits, 20),
    "table": Task(Table, cancer, 20),
}
NEURONS: dict[str, Make] = {
    "LIFNode": lambda: neuron.LIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan()),
    "ours": AssociativeLIFNode,
    "ours, nord": lambda: AssociativeLIFNode(preset="nord", n_clusters="auto"),
}


def accuracy(task: Task, make: Make, seed: int) -> float:
    """Train a network and return its accuracy on the held-out data, in percent."""
    x, y = task.data()
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.3, random_state=seed, stratify=y)
    torch.manual_seed(seed)
    net = task.network(make)
    functional.set_step_mode(net, "m")
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.epochs):
        for batch in torch.randperm(len(x_train), generator=generator).split(64):
            loss = nn.functional.cross_entropy(net(x_train[batch]), y_train[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            functional.reset_net(net)
        schedule.step()
    net.eval()
    with torch.no_grad():
        is_correct = net(x_test).argmax(1) == y_test
    return 100 * is_correct.float().mean().item()


def main() -> None:
    """Print a table of accuracies: mean and range over the seeds."""
    parser = argparse.ArgumentParser(
        description="Accuracy of small networks with SpikingJelly's neurons and with those of nord-snn."
    )
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | " + " | ".join(NEURONS) + " |\n|---|" + "---|" * len(NEURONS), flush=True)
    for name in arguments.networks:
        cells = []
        for make in NEURONS.values():
            values = [accuracy(TASKS[name], make, seed) for seed in range(arguments.seeds)]
            cells.append(f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
