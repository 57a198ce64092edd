"""Compare published Nord, spike-fed Nord, its dense twin and a GPT-2 under one protocol.

    python studies/language_model/compare.py                     # config "tiny", three seeds
    python studies/language_model/compare.py --config small --data books.txt --lrs 1e-3 3e-3
    python studies/language_model/compare.py --models spike-fed dense-twin

All models have the same width, number of blocks, heads, vocabulary and context, the same tokens in the same order, the same
schedule and the same search for a peak learning rate. With several ``--lrs``, each model is trained with each of these learning
rates at the first seed. While the best learning rate on the held-out text is the lowest or the highest, half or twice this
learning rate is also tried. The other seeds use the best learning rate.

``published`` is the published Nord model with these sizes; ``recency`` is ``published`` with scores that fall with distance.
``spike-fed`` is the model of the config, whose blocks have spikes as input of every linear map; ``spiking-values`` is
``spike-fed`` with spikes as values of the resonance. ``dense-twin`` is ``spike-fed`` with GELU instead of neurons and with one
time step; ``dense-plain`` is the twin without the norms that only the neurons need. ``gpt2`` has feed-forwards of the width that
gives the same number of parameters without embedding and head.

Every finished run is saved: the same command continues after a stop, and commands for other models can use the same folder at
the same time.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from nordlm.cli import number
from nordlm.script import run_script
from nordlm.training.progress import print_table
from nordlm.training.settings import SettingsError
from rich.console import Console
from rich.progress import Progress
from study_cli import (
    command_line,
    common_arguments,
    markdown_table,
    run_trials,
    settings_for,
    spread,
    steps_argument,
    unique,
    write_results,
)
from trials import ENERGY_SEQUENCES, Trials, progress_bars
from variants import MODEL_MAKERS, Maker

__all__ = ["Comparison", "compare"]

#: Runs of a model by seed, including diverged ones.
Runs = dict[int, dict[str, Any]]


class Comparison:
    """Results of a comparison: for each model its best learning rate, and its runs over the seeds.

    Args:
        trials: the runs of the study.
        seeds: seeds of the runs; the learning-rate search uses the first one.
    """

    def __init__(self, trials: Trials, seeds: list[int]) -> None:
        self.metadata, self.seeds = trials.metadata, seeds
        self.lrs: dict[str, float] = {}
        self.runs: dict[str, Runs] = {}
        self.tried: dict[str, set[float]] = {}
        self.diverged: list[str] = []

    def add(self, kind: str, lr: float, runs: Runs, tried: list[dict[str, Any]]) -> None:
        """Add a model, with all runs of its learning-rate search."""
        self.lrs[kind], self.runs[kind] = lr, runs
        self.tried[kind] = {run["lr"] for run in tried}
        names = {(run["lr"], run["seed"]) for run in [*tried, *runs.values()] if run["diverged"]}
        self.diverged += [f"{kind}, peak lr {lr:g}, seed {seed}" for lr, seed in sorted(names)]

    def done(self, kind: str) -> Runs:
        """Return the runs of a model that did not diverge, by seed."""
        return {seed: run for seed, run in self.runs[kind].items() if not run["diverged"]}


def compare(trials: Trials, kinds: dict[str, Maker], seeds: list[int], lrs: list[float]) -> Comparison:
    """Search the learning rate of every model, and train it with every seed.

    Raises:
        SettingsError: a model cannot be constructed from this config, or diverged with every learning rate.
    """
    trials.check(kinds.values())
    comparison = Comparison(trials, seeds)
    with progress_bars() as bars:
        for kind, make in kinds.items():
            tried = search_lr(trials, kind, make, lrs, seeds[0], bars)
            lr = best_lr(kind, tried)
            comparison.add(kind, lr, {seed: trials.run(kind, make, lr, seed, bars) for seed in seeds}, tried)
    return comparison


def search_lr(
    trials: Trials, kind: str, make: Maker, lrs: list[float], seed: int, bars: Progress
) -> list[dict[str, Any]]:
    """Train with these peak learning rates; add half or twice the best rate until the best is not the lowest or highest.

    A single rate is used without a search.

    Raises:
        SettingsError: all runs diverged.
    """
    runs = {lr: trials.run(kind, make, lr, seed, bars) for lr in lrs}
    while len(runs) > 1:
        best = best_lr(kind, list(runs.values()))
        if min(runs) < best < max(runs):
            break
        next_lr = best / 2 if best == min(runs) else best * 2
        runs[next_lr] = trials.run(kind, make, next_lr, seed, bars)
    return list(runs.values())


def best_lr(kind: str, tried: list[dict[str, Any]]) -> float:
    """Return the peak learning rate with the lowest held-out loss.

    Raises:
        SettingsError: all runs diverged.
    """
    finished = [run for run in tried if not run["diverged"]]
    if not finished:
        raise SettingsError(f"{kind} diverged with every peak learning rate: give lower ones with --lrs")
    return float(min(finished, key=lambda run: run["loss"])["lr"])


#: Rows of the table: key in a run -> title and format.
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", "{:,}".format),
    "parameters_without_vocabulary": ("without embedding and head", "{:,}".format),
    "lr": ("peak learning rate", "{:g}".format),
    "loss": ("nats per token", "{:.3f}".format),
    "bits_per_byte": ("bits per byte", "{:.3f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "macs": ("multiply-accumulates a token", "{:,.0f}".format),
    "acs": ("additions a token", "{:,.0f}".format),
    "joules": ("µJ a token, without memory", lambda joules: f"{1e6 * joules:.2f}"),
    "joules_with_sram": ("µJ a token, with all memory in SRAM", lambda joules: f"{1e6 * joules:.2f}"),
    "repetition": ("repetition", "{:.1%}".format),
    "coherence": ("topic coherence", "{:.3f}".format),
}


def comparison_table(comparison: Comparison) -> list[list[str]]:
    """Return the table: one column per model with mean and range over seeds, and one for the held-out text."""
    columns = {kind: list(comparison.done(kind).values()) for kind in comparison.runs}
    columns["held-out text"] = [comparison.metadata["held_out_text"]]
    lines = [["", *columns]]
    for figure, (title, show) in FIGURES.items():
        lines.append(
            [title, *(spread([run[figure] for run in runs if figure in run], show) for runs in columns.values())]
        )
    return lines


def rate_tables(comparison: Comparison) -> list[list[list[str]]]:
    """Return tables of firing rates with one row per layer: one table for all models with the same layers."""
    by_layers: dict[tuple[str, ...], list[str]] = {}
    for kind in comparison.runs:
        layers = unique(layer for run in comparison.done(kind).values() for layer in run["firing_rates"])
        if layers:
            by_layers.setdefault(tuple(layers), []).append(kind)
    tables = []
    for names, kinds in by_layers.items():
        rates = {kind: [run["firing_rates"] for run in comparison.done(kind).values()] for kind in kinds}
        lines = [
            [layer, *(spread([r[layer] for r in rates[kind]], "{:.1%}".format) for kind in kinds)] for layer in names
        ]
        tables.append([["layer", *kinds], *lines])
    return tables


def gaps(comparison: Comparison) -> list[str]:
    """Return sentences on the differences of the spike-fed models to the other models with the same seeds."""
    sentences = []
    for first in ("spike-fed", "spiking-values"):
        for second in ("dense-twin", "dense-plain", "gpt2", "published", "recency"):
            if first in comparison.runs and second in comparison.runs:
                runs, others = comparison.done(first), comparison.done(second)
                seeds = [seed for seed in comparison.seeds if seed in runs and seed in others]
                nats = [runs[seed]["loss"] - others[seed]["loss"] for seed in seeds]
                ratio = [runs[seed]["bits_per_byte"] / others[seed]["bits_per_byte"] - 1 for seed in seeds]
                if seeds:
                    sentences.append(
                        f"{first} against {second}: {spread(ratio, '{:+.1%}'.format)} bits per byte, "
                        f"{spread(nats, '{:+.3f}'.format)} nats per token"
                    )
    return sentences


def notes(comparison: Comparison) -> str:
    """Return a note that explains the figures of the table."""
    metadata, seeds = comparison.metadata, comparison.seeds
    baselines = ", ".join(f"{name} {loss:.3f}" for name, loss in metadata["baselines"].items())
    tried = "; ".join(f"{kind} {', '.join(f'{lr:g}' for lr in sorted(lrs))}" for kind, lrs in comparison.tried.items())
    diverged = "; ".join(comparison.diverged) or "none"
    return (
        f"Mean (range) over seeds {', '.join(map(str, seeds))}; text: {metadata['text']}; baselines, nats per token: "
        f"{baselines}. Peak learning rates tried at seed {seeds[0]}: {tried}; diverged: {diverged}. "
        "tokens/s in training; operations and energy of a generated token at the end of a sequence, mean of "
        f"{ENERGY_SEQUENCES} held-out sequences, 45 nm, float32. "
        f"Samples: after {metadata['held_out_text']['prompts']} held-out prompts; repetition is the share of 4-grams that "
        "occur earlier in the sample, topic coherence the probability that a sample is more similar to the document of its "
        "prompt than to another one (TF-IDF; 0.5 is chance)."
    )


def markdown(comparison: Comparison, command: str) -> list[str]:
    """Return the parts of ``table.md``; the command is the last."""
    parts = [markdown_table(comparison_table(comparison)), notes(comparison)]
    parts += ["\n".join(f"- {sentence}" for sentence in gaps(comparison))] if gaps(comparison) else []
    parts += [markdown_table(lines) for lines in rate_tables(comparison)]
    return [*parts, f"`{command}`"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    common_arguments(parser, "runs/compare")
    steps_argument(parser)
    parser.add_argument(
        "--models", nargs="+", choices=MODEL_MAKERS, default=list(MODEL_MAKERS), help="default: all of them"
    )
    parser.add_argument(
        "--lrs",
        nargs="+",
        type=number(1e-9),
        help="peak learning rates at the start of the search (default: the config's, without a search)",
    )
    options = parser.parse_args(arguments)
    return run_trials(lambda: _run_comparison(options, command_line(arguments, "compare.py")))


def _run_comparison(options: argparse.Namespace, command: str) -> None:
    trials = Trials(settings_for(options, ("data", "validation_data", "steps")), options.out)
    kinds = {kind: MODEL_MAKERS[kind] for kind in unique(options.models)}
    lrs = unique(options.lrs or [trials.settings.training.lr])
    comparison = compare(trials, kinds, unique(options.seeds), lrs)
    write_results(options.out, markdown(comparison, command), trials.on_file())
    console = Console()
    for title, lines in [
        (trials.settings.name, comparison_table(comparison)),
        *(("firing rates", t) for t in rate_tables(comparison)),
    ]:
        print_table(console, title, lines[0], lines[1:])
    console.print("\n".join([notes(comparison), *gaps(comparison)]), highlight=False, markup=False)
    print(f"table in {options.out / 'table.md'}, all figures in {options.out / 'runs.jsonl'}")


if __name__ == "__main__":
    sys.exit(run_script(main, keep_running=True))
