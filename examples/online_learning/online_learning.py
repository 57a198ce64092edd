"""Measure whether reading a text once with reward-modulated STDP lowers the loss on that text, compared with controls.

    python examples/online_learning/online_learning.py                  # trains five models first: ten minutes on two cores
    python examples/online_learning/online_learning.py --text book.txt --models runs/tiny-0001/model ...
    python examples/online_learning/online_learning.py --search         # compare synapses that learn, learning rates, rewards

STDP is spike-timing-dependent plasticity. Every model (one per seed) reads the new text in order, one sequence of the model's
context length at a time. Each sequence is predicted before the model learns from it, so the loss is always on unseen text. For
``lm_head`` (the synapses from the readout neurons to the vocabulary), every actual token of a sequence has reward +1, and every
token sampled from the prediction has reward -1. For the synapses inside the feed-forwards, ``--reward error`` is the prediction
error projected to each neuron, and ``--reward loss`` the running mean of the loss minus the loss of a token
(``nordlm/inference/plasticity.py``). The conditions are:

    on        reward-modulated STDP
    off       control: no learning
    shuffled  control: the rewards of each sequence in random order
    zero      control: every reward is 0
    tokens    ablation: the spikes of the readout neurons are permuted over the tokens of each sequence
    steps     ablation: the time steps of each token's spikes are permuted; only the firing rates stay the same

Then the loss is measured on the following part of the new text, and on old text: held-out documents of the training text.
Differences are paired by seed; intervals are 95 % intervals of Student's t over the seeds. ``--search`` uses the text after both
parts of the new text, so that settings are not evaluated on the text on which they were selected.
"""

import argparse
import ast
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from nordlm.analysis.perplexity import score
from nordlm.cli import file_name, number
from nordlm.data.corpus import encode, split
from nordlm.data.sources import read_documents
from nordlm.errors import DataError, ModelError
from nordlm.inference.loading import open_model
from nordlm.inference.plasticity import Control, Plasticity, PlasticityError, add_plasticity_options
from nordlm.script import run_script
from nordlm.training.checkpoints import CheckpointError, write_json
from nordlm.training.progress import print_table
from nordlm.training.settings import Settings, SettingsError
from rich.console import Console
from rich.progress import track
from scipy import stats
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from nord_snn.models.nord import NordForCausalLM

LANGUAGE_MODEL = Path(__file__).parents[1] / "nord_lm"
CONTROLS, ABLATIONS = ("off", "shuffled", "zero"), ("tokens", "steps")
COLOURS = {
    "on": "tab:green",
    "off": "tab:gray",
    "shuffled": "tab:orange",
    "zero": "tab:blue",
    "tokens": "tab:purple",
    "steps": "tab:olive",
}
LOSSES = {"new, while read": "while_reading", "new, later": "later", "old": "old"}  # title -> field of Outcome
SEARCHED = (  # synapses that learn, learning rate, reward
    *((("lm_head",), rate, "error") for rate in (2e-5, 5e-5, 1e-4, 2e-4)),
    *((("blocks.*.ffn.down",), rate, "error") for rate in (0.005, 0.05, 0.2)),
    *((("blocks.*.ffn.down",), rate, "loss") for rate in (0.0005, 0.005, 0.05)),
    (("blocks.0.ffn.down",), 0.05, "error"),
    (("blocks.1.ffn.down",), 0.05, "error"),
    (("lm_head", "blocks.*.ffn.down"), None, "error"),  # each at its default
)


@dataclass
class Outcome:
    """Losses of one model under one condition, in nats per token.

    Attributes:
        windows: loss on each sequence of the new text, before learning from this sequence.
        later: loss on the following part of the new text, after reading the new text.
        old: loss on held-out text of the training corpus, after reading the new text.
    """

    windows: list[float]
    later: float
    old: float

    @property
    def while_reading(self) -> float:
        """Return the mean loss on the new text during reading."""
        return sum(self.windows) / len(self.windows)


class Interval(NamedTuple):
    """Mean over seeds, and half the width of its 95 % confidence interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


class Learning(NamedTuple):
    """Arguments of Plasticity: patterns of module names and learning rate, each None for its default, and reward."""

    synapses: Sequence[str] | None
    learning_rate: float | None
    reward: str


class Texts(NamedTuple):
    """Token ids: ``new [sequences, S]`` for reading, ``later [n]`` and ``old [n]`` for measuring."""

    new: Tensor
    later: Tensor
    old: Tensor


# --- text


def source_code() -> Iterator[str]:
    """Yield code of the running Python's standard library, without docstrings and comments; parsed, not imported."""
    library = Path(sysconfig.get_path("stdlib"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        yield ast.unparse(tree)


def read_texts(options: argparse.Namespace, folder: Path, length: int, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Return the new text and the old text, which is ``--old`` or the held-out text of the model's training run."""
    n_read, n_measured = options.read, options.measure
    needed = n_read + n_measured
    text = source_code() if options.text is None else read_documents(str(options.text)).read()
    new = _tokens(text, tokenizer, needed * (2 if options.search else 1))[needed if options.search else 0 :]
    if len(new) < needed or n_read < length:
        raise DataError(
            f"the new text has {len(new):,} tokens left, expected {n_read:,} to read (at least one sequence of {length}) and "
            f"{n_measured:,} to measure: give more text, or change --read or --measure"
        )
    old = _tokens(_old_text(options.old, folder), tokenizer, n_measured)
    if len(old) < n_measured:
        raise DataError(f"the old text has {len(old):,} tokens, expected {n_measured:,} to measure")
    return Texts(new[: n_read // length * length].view(-1, length), new[n_read:], old)


def _old_text(path: Path | None, folder: Path) -> Iterator[str]:
    if path is not None:
        return read_documents(str(path)).read()
    if not (folder.parent / "settings.yaml").is_file():
        raise DataError(f"{folder} is not in the folder of a run of train.py: give the old text with --old")
    training = Settings.read(folder.parent / "settings.yaml").training
    _, validation = split(read_documents(training.data), training.held_out)
    return validation()


def _tokens(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> Tensor:
    parts, n = [torch.tensor([tokenizer.eos_token_id])], 1
    for text in texts:
        parts += [ids.long() for ids in encode([text], tokenizer)]
        n += len(parts[-1])
        if n >= limit:
            break
    return torch.cat(parts)[:limit]


# --- the experiment


def changes_of(condition: str) -> Control:
    """Return the functions that change rewards and spikes under a condition."""
    if condition == "shuffled":
        return Control(rewards=lambda rewards: rewards[torch.randperm(len(rewards), device=rewards.device)])
    if condition == "zero":
        return Control(rewards=torch.zeros_like)
    if condition == "tokens":
        return Control(spikes=lambda spikes: spikes[:, torch.randperm(spikes.shape[1], device=spikes.device)])
    if condition == "steps":
        return Control(spikes=_permute_steps)
    return Control()


def _permute_steps(spikes: Tensor) -> Tensor:
    """Permute the time steps of spikes ``[T, n, D]`` separately for each token."""
    order = torch.rand(spikes.shape[:2], device=spikes.device).argsort(0)
    return spikes.gather(0, order[..., None].expand_as(spikes))


def read_once(
    model: NordForCausalLM,
    texts: Texts,
    condition: str,
    learning: Learning,
    seed: int,
) -> Outcome:
    """Read the new text under one condition, starting from the trained weights, and restore the weights."""
    torch.manual_seed(seed)  # for the tokens that are sampled from predictions, and for permutations
    plasticity = Plasticity(model, *learning, changes_of(condition))
    length = texts.new.shape[1]
    losses = []
    try:
        for sequence in texts.new:
            loss = None if condition == "off" else plasticity.learn_from(sequence[None].to(model.device), length - 1)
            losses.append(score(model, sequence, length, length) / (length - 1) if loss is None else loss)
        later, old = (score(model, text, length, length) / (len(text) - 1) for text in (texts.later, texts.old))
    finally:
        plasticity.close()
    return Outcome(losses, later, old)


def compare(outcomes: dict[str, list[Outcome]], measure: str, other: str) -> Interval:
    """Return the difference of a loss (a field of Outcome), ``on`` minus another condition, paired by seed."""
    pairs = zip(outcomes["on"], outcomes[other], strict=True)
    return interval([getattr(on, measure) - getattr(control, measure) for on, control in pairs])


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and half the width of the 95 % interval of Student's t, which is NaN for a single value."""
    x = np.asarray(values)
    return Interval(float(x.mean()), float(half_interval(x)))


def half_interval(x: np.ndarray) -> np.ndarray:
    """Return half the width of the 95 % interval of the mean over the first dimension."""
    if len(x) < 2:
        return np.full(x.shape[1:], np.nan)
    return stats.t.ppf(0.975, len(x) - 1) * x.std(0, ddof=1) / np.sqrt(len(x))


def percent_old(outcomes: dict[str, list[Outcome]]) -> Interval:
    """Return the increase of the loss on old text from ``off`` to ``on``, in per cent."""
    pairs = zip(outcomes["on"], outcomes["off"], strict=True)
    return interval([100 * (on.old / off.old - 1) for on, off in pairs])


def helps(outcomes: dict[str, list[Outcome]]) -> bool:
    """Return whether the criterion is met.

    The criterion is that the loss on new text is significantly lower than under every control that was run, and that the loss on
    old text rises by significantly less than 1 %.
    """
    differences = [compare(outcomes, "while_reading", name) for name in outcomes if name in CONTROLS]
    increase = percent_old(outcomes)
    return all(x.mean + x.half < 0 for x in differences) and increase.mean + increase.half < 1


# --- output


def report(console: Console, outcomes: dict[str, list[Outcome]]) -> None:
    """Print two tables and a summary."""
    columns = ["", *LOSSES]
    rows = [
        [name, *(f"{np.mean([getattr(o, measure) for o in of_seeds]):.4f}" for measure in LOSSES.values())]
        for name, of_seeds in outcomes.items()
    ]
    print_table(console, "loss, nats per token, mean over seeds", columns, rows)
    rows = [
        [f"on - {name}", *(str(compare(outcomes, measure, name)) for measure in LOSSES.values())]
        for name in outcomes
        if name != "on"
    ]
    print_table(console, "paired differences with 95 % intervals", columns, rows)
    increase, met = percent_old(outcomes), helps(outcomes)
    console.print(
        f"increase of the loss on old text: {increase.mean:+.2f} % ± {increase.half:.2f} %\n"
        f"reading once {'helps' if met else 'does not help'}: the criterion "
        f"(significantly better on new text than every control, less than 1 % worse on old) is {'met' if met else 'not met'}",
        highlight=False,
    )


def plot(outcomes: dict[str, list[Outcome]], path: Path) -> None:
    """Plot the loss minus that of ``off``: during reading (mean over the sequences so far), and afterwards."""
    mpl.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 1), layout="constrained")
    off = outcomes["off"]
    for name, of_seeds in outcomes.items():
        difference = np.array([np.subtract(a.windows, b.windows) for a, b in zip(of_seeds, off, strict=True)])
        so_far = difference.cumsum(1) / np.arange(1, difference.shape[1] + 1)
        middle, half = so_far.mean(0), half_interval(so_far)
        x = np.arange(1, len(middle) + 1)
        left.plot(x, middle, color=COLOURS[name], label=name, linestyle="--" if name == "steps" else "-")
        left.fill_between(x, middle - half, middle + half, color=COLOURS[name], alpha=0.2)
    left.set(
        xlabel="sequences read", ylabel="loss - loss with STDP off, nats per token", title="new text, while it is read"
    )
    left.legend()
    others = [name for name in outcomes if name != "off"]
    for shift, (title, measure) in enumerate((("new text, later", "later"), ("old text", "old"))):
        bars = [
            interval([getattr(a, measure) - getattr(b, measure) for a, b in zip(outcomes[name], off, strict=True)])
            for name in others
        ]
        right.bar(
            [place + 0.4 * shift for place in range(len(others))],
            [bar.mean for bar in bars],
            0.4,
            yerr=[bar.half for bar in bars],
            capsize=3,
            label=title,
        )
    right.set_xticks([place + 0.2 for place in range(len(others))], others)
    right.set(title="afterwards")
    right.axhline(0, color="black", linewidth=0.5)
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- command line


def train_models(runs: Path, n_seeds: int) -> list[Path]:
    """Train a model with config ``tiny-published`` for each seed, unless a finished run exists; return their folders."""
    models = []
    for seed in range(n_seeds):
        out = runs / f"seed-{seed}"
        finished = sorted(out.glob("*/results.json"))
        if not finished:
            print(f"training the model of seed {seed}", flush=True)
            command = [sys.executable, str(LANGUAGE_MODEL / "train.py"), "--config", "tiny-published"]
            command += ["--seed", str(seed), "--out", str(out)]
            subprocess.run(command, check=True)
            finished = sorted(out.glob("*/results.json"))
        models.append(finished[-1].parent / "model")
    return models


def _open(options: argparse.Namespace, folder: Path) -> tuple[NordForCausalLM, Texts]:
    model, tokenizer = open_model(folder)
    return model, read_texts(options, folder, model.config.max_position_embeddings, tokenizer)


def experiment(options: argparse.Namespace, models: list[Path], console: Console) -> dict[str, list[Outcome]]:
    """Run all conditions on all models; the ablations only if ``lm_head`` is the only synapse that learns, as by default."""
    learning = Learning(options.synapses, options.learning_rate, options.reward)
    ablations = ABLATIONS if options.synapses in (None, ["lm_head"]) else ()
    outcomes: dict[str, list[Outcome]] = {condition: [] for condition in ("on", *CONTROLS, *ablations)}
    for seed, folder in enumerate(track(models, "reading", console=console, transient=True)):
        model, texts = _open(options, folder)
        for condition, of_seeds in outcomes.items():
            of_seeds.append(read_once(model, texts, condition, learning, seed))
    return outcomes


def search(options: argparse.Namespace, models: list[Path], console: Console) -> list[list[str]]:
    """Print and return the table of settings: differences to ``off`` and to ``shuffled``; ``zero`` is not run."""
    models_and_texts = [_open(options, folder) for folder in models]

    def outcomes_of(condition: str, learning: Learning) -> list[Outcome]:
        return [
            read_once(model, texts, condition, learning, seed) for seed, (model, texts) in enumerate(models_and_texts)
        ]

    off = outcomes_of("off", Learning(None, None, "error"))
    rows = []
    for learning in track([Learning(*setting) for setting in SEARCHED], "searching", console=console, transient=True):
        synapses, rate, reward = learning
        outcomes = {name: outcomes_of(name, learning) for name in ("on", "shuffled")} | {"off": off}
        increase = percent_old(outcomes)
        rows.append(
            [
                f"{' '.join(synapses or ())}, {reward}",
                "default" if rate is None else f"{rate:g}",
                *(str(compare(outcomes, measure, "off")) for measure in ("while_reading", "later")),
                str(compare(outcomes, "while_reading", "shuffled")),
                f"{increase.mean:+.2f} ± {increase.half:.2f}",
                "yes" if helps(outcomes) else "no",
            ]
        )
    columns = [
        "synapses, reward",
        "learning rate",
        "new - off",
        "later - off",
        "new - shuffled",
        "old, %",
        "meets criterion",
    ]
    print_table(console, f"paired differences over {len(models)} seeds, nats per token", columns, rows)
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--text", type=file_name, help="the new text (default: source code of Python's standard library)"
    )
    parser.add_argument("--old", type=file_name, help="old text (default: the held-out text of the run of each model)")
    parser.add_argument(
        "--models", type=file_name, nargs="+", help="folders of trained models (default: train --seeds models)"
    )
    parser.add_argument(
        "--runs", type=file_name, default=Path("runs/online"), help="folder for the runs that train the models"
    )
    parser.add_argument("--seeds", type=number(2, kind=int), default=5, help="number of models to train (default: 5)")
    parser.add_argument("--read", type=number(2, kind=int), default=16_384, help="tokens to read (default: 16384)")
    parser.add_argument(
        "--measure",
        type=number(2, kind=int),
        default=12_288,
        help="tokens of the later and of the old text on which the loss is measured (default: 12288)",
    )
    parser.add_argument(
        "--out", type=file_name, default=Path("runs/online"), help="folder for results.json and the plot"
    )
    parser.add_argument("--search", action="store_true", help="compare synapses, learning rates and rewards")
    add_plasticity_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parse(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console = Console()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        models = options.models or train_models(options.runs, options.seeds)
        if options.search:
            write_json(options.out / "search.json", search(options, models, console))
            return 0
        outcomes = experiment(options, models, console)
        report(console, outcomes)
        write_json(
            options.out / "results.json", {name: [asdict(o) for o in of_seeds] for name, of_seeds in outcomes.items()}
        )
        plot(outcomes, options.out / "online_learning.png")
        console.print(f"results.json and online_learning.png are in {options.out}", highlight=False)
    except (ModelError, DataError, PlasticityError, CheckpointError, SettingsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, keep_running=True))
