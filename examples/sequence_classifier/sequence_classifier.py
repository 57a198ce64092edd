"""Classify passages of documentation by package, with softmax attention, with resonance, and without attention.

    python examples/sequence_classifier/sequence_classifier.py     # docstrings of Python, no download; about a minute and a half

The models are ``torch.nn.TransformerEncoder``, this encoder with the ``self_attn`` of every layer replaced by co-firing
resonance (attention whose scores count coincident spikes), and this encoder without attention. The data are passages of 32 words
from the docstrings of Python's standard library; whole modules are held out.
"""

import argparse
import ast
import re
import statistics
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from nordlm.cli import file_name, number
from nordlm.script import run_script
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from nord_snn.layers import CoFiringResonance
from nord_snn.monitor import SpikeMonitor
from nord_snn.neurons import AssociativeLIFNode

PACKAGES = ("asyncio", "concurrent", "ctypes", "email", "http", "idlelib", "importlib", "json", "lib2to3", "logging",
            "multiprocessing", "tkinter", "unittest", "urllib", "xml")  # fmt: skip
WORDS, VOCABULARY, WIDTH, HEADS, LAYERS, STEPS = 32, 2000, 64, 4, 2, 4
BATCH, EPOCHS, LR = 64, 6, 2e-3


class Data(NamedTuple):
    """Word ids ``[n, 32]`` and indices of packages ``[n]``, for training and test, and the names of the packages."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    names: list[str]


class ResonanceAttention(nn.Module):
    """Co-firing resonance with the signature of ``nn.MultiheadAttention``; its input current is constant over time steps."""

    batch_first = False  # disables the fused path of TransformerEncoderLayer, which would ignore this module

    def __init__(self, n_features: int, n_heads: int) -> None:
        super().__init__()
        self.resonance = CoFiringResonance(
            n_features, n_heads, top_k=16, causal=False, neuron=lambda n: AssociativeLIFNode(n, n_clusters=8)
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> tuple[Tensor, None]:
        """Return the output ``[B, S, D]`` and None for the weights; key and value must be ``query``."""
        if more.get("attn_mask") is not None or more.get("key_padding_mask") is not None:
            raise ValueError(
                "ResonanceAttention takes no masks, expected passages of one length in which every word attends to all words"
            )
        return self.resonance(query.expand(STEPS, *query.shape), False), None


class NoAttention(nn.Module):
    """Replacement of attention that exchanges no information between words."""

    batch_first = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **ignored: Any) -> tuple[Tensor, None]:
        """Return zeros."""
        return torch.zeros_like(query), None


#: Constructors of the replacement of ``self_attn``; None: it is not replaced.
KINDS: dict[str, Callable[[], nn.Module] | None] = {
    "softmax attention": None,
    "co-firing resonance": lambda: ResonanceAttention(WIDTH, HEADS),
    "no attention": NoAttention,
}


class Classifier(nn.Module):
    """Classifier of embedding, learned positions, encoder, mean over words and linear head."""

    def __init__(self, n_classes: int, make: Callable[[], nn.Module] | None) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(WORDS, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.2, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        if make is not None:
            for layer in self.encoder.layers:
                layer.self_attn = make()
        self.head = nn.Linear(WIDTH, n_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits ``[B, n_classes]`` for ``ids [B, 32]``."""
        return self.head(self.encoder(self.words(ids) + self.positions).mean(1))


def passages(module: Path) -> list[list[str]]:
    """Return the words of a module's docstrings in passages of 32; the module is parsed, not imported."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(module.read_bytes())) if isinstance(node, documented)]
    words = re.findall(r"[a-z]+|[^\sa-z]", " ".join(ast.get_docstring(node) or "" for node in nodes).lower())
    return [words[start : start + WORDS] for start in range(0, len(words) - WORDS + 1, WORDS)]


def documentation() -> Data:
    """Return the passages and their packages; every fourth module of each package is held out."""
    library = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[tuple[list[str], int]], list[tuple[list[str], int]]] = ([], [])  # training, held out
    names = [name for name in PACKAGES if (library / name).is_dir()]
    for label, name in enumerate(names):
        modules = [
            p for p in sorted((library / name).rglob("*.py")) if not {"test", "tests", "idle_test"} & set(p.parts)
        ]
        with_text = [module_passages for module in modules if (module_passages := passages(module))]
        for index, module_passages in enumerate(with_text):
            parts[index % 4 == 3].extend((words, label) for words in module_passages)
    counts = Counter(word for words, _ in parts[0] for word in words)
    ids = {word: index + 1 for index, (word, _) in enumerate(counts.most_common(VOCABULARY - 1))}  # 0: unknown
    (train_x, train_y), (test_x, test_y) = (
        (torch.tensor([[ids.get(word, 0) for word in words] for words, _ in part]), torch.tensor([y for _, y in part]))
        for part in parts
    )
    return Data(train_x, train_y, test_x, test_y, names)


def train(make: Callable[[], nn.Module] | None, seed: int, epochs: int, data: Data) -> tuple[float, dict[str, float]]:
    """Train a classifier; return its accuracy on held-out modules, and the firing rates of its neurons."""
    torch.manual_seed(seed)
    net = Classifier(len(data.names), make)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x)).split(BATCH):
            loss = nn.functional.cross_entropy(net(data.train_x[batch]), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    net.eval()
    has_neurons = any(isinstance(module, AssociativeLIFNode) for module in net.modules())
    monitor = SpikeMonitor(net) if has_neurons else None
    with torch.no_grad():
        correct = torch.cat([net(x).argmax(1) for x in data.test_x.split(256)]) == data.test_y
    if monitor is None:
        return correct.float().mean().item(), {}
    monitor.close()
    return correct.float().mean().item(), monitor.rates()


def plot(results: dict[str, list[float]], chance: float, path: Path) -> None:
    """Plot the accuracy of each seed as a dot."""
    mpl.use("Agg")
    figure, axis = plt.subplots(figsize=(6, 2.5), layout="constrained")
    for place, (name, values) in enumerate(results.items()):
        axis.scatter([100 * value for value in values], [place] * len(values), label=name)
    axis.axvline(100 * chance, color="gray", linestyle="--")
    axis.text(100 * chance, -0.6, " always the largest package", color="gray")
    axis.set_yticks(range(len(results)), list(results))
    axis.set(xlabel="accuracy on held-out modules, %", ylim=(-0.8, len(results) - 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=number(1, 1000, int), default=3)
    parser.add_argument("--epochs", type=number(1, kind=int), default=EPOCHS)
    parser.add_argument("--out", type=file_name, default=Path("runs"), help="folder for the plot")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: cannot be created ({error.strerror})")
    data = documentation()
    chance = data.test_y.bincount().max().item() / len(data.test_y)
    print(f"{len(data.train_x):,} passages to train on, {len(data.test_x):,} held out, {len(data.names)} packages")
    results: dict[str, list[float]] = {name: [] for name in KINDS}
    rates: dict[str, float] = {}
    for name, seed in track(
        [(name, seed) for name in KINDS for seed in range(options.seeds)], "training", transient=True
    ):
        accuracy, layer_rates = train(KINDS[name], seed, options.epochs, data)
        results[name].append(accuracy)
        rates = layer_rates or rates
    table = Table("attention", "accuracy", "lowest to highest", title=f"{options.seeds} seeds")
    for name, values in results.items():
        table.add_row(name, f"{statistics.mean(values):.1%}", f"{min(values):.1%} to {max(values):.1%}")
    table.add_row("always the largest package", f"{chance:.1%}", "")
    Console().print(table)
    print("firing rates: " + ", ".join(f"{name.split('.', 2)[2]} {rate:.1%}" for name, rate in rates.items()))
    plot(results, chance, options.out / "sequence_classifier.png")
    print(f"sequence_classifier.png is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
