"""Nord as published, Nord with every product fed by spikes, its dense twin, and a GPT-2: one protocol for all.

    python examples/nord_lm/compare.py                                  # tiny, three seeds
    python examples/nord_lm/compare.py --config small --data books.txt --lrs 1e-3 3e-3
    python examples/nord_lm/compare.py --models spike-fed dense-twin

All have the same width, blocks, heads, vocabulary and window, and get the same tokens in the same order, the same schedule and
the same number of learning rates to choose from: with several ``--lrs`` each is trained with each of them at the first seed,
and all its runs take the peak learning rate at which it was best there on the held-out text.

``published`` is the published model in these sizes; ``recency`` the same with scores that fall with distance; ``spike-fed`` the
config itself; ``spiking-values`` the same where values spike, too; ``dense-twin`` the same with smooth activations and one time
step, so that only the spikes are missing; ``gpt2`` has feed-forwards as wide as it takes to have as many parameters without
embedding and head.

Every run is written down when it ends: the same command again goes on where it stopped, and commands for other seeds or models
may work on the same folder at the same time.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from commands import (
    command_line,
    common_arguments,
    markdown_table,
    run_trials,
    settings_for,
    spread,
    unique,
    write_results,
)
from generate import number
from progress import print_table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from settings import SettingsError
from trials import Trials
from variants import KINDS, Maker

__all__ = ["Comparison", "compare"]

#: Runs of a model by seed, diverged ones too.
Runs = dict[int, dict[str, Any]]


class Comparison:
    """What came out: for each kind the learning rate that was chosen, and its runs over the seeds.

    Args:
        trials: the runs on file.
        seeds: those that are compared; the learning rates were tried at the first.
    """

    def __init__(self, trials: Trials, seeds: list[int]) -> None:
        self.about, self.seeds = trials.about, seeds
        self.lrs: dict[str, float] = {}
        self.runs: dict[str, Runs] = {}
        self.tried: set[float] = set()
        self.diverged: list[str] = []

    def add(self, kind: str, lr: float, runs: Runs, tried: list[dict[str, Any]]) -> None:
        """Add a kind with all that was tried at the first seed."""
        self.lrs[kind], self.runs[kind] = lr, runs
        self.tried |= {run["lr"] for run in tried}
        names = {(run["lr"], run["seed"]) for run in [*tried, *runs.values()] if run["diverged"]}
        self.diverged += [f"{kind}, peak lr {lr:g}, seed {seed}" for lr, seed in sorted(names)]

    def done(self, kind: str) -> Runs:
        """Its runs that did not diverge, by seed."""
        return {seed: run for seed, run in self.runs[kind].items() if not run["diverged"]}


def compare(trials: Trials, kinds: dict[str, Maker], seeds: list[int], lrs: list[float]) -> Comparison:
    """Train every kind with every seed, after the choice of its learning rate.

    Raises:
        SettingsError: a kind cannot be made of this config, or diverged with every learning rate.
    """
    comparison = Comparison(trials, seeds)
    steps = trials.settings.training.steps
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), transient=True) as bars:

        def one(kind: str, lr: float, seed: int) -> dict[str, Any]:
            bar = bars.add_task(f"{kind}, peak lr {lr:g}, seed {seed}", total=steps)
            try:
                return trials.run(kind, kinds[kind], lr, seed, lambda: bars.advance(bar))
            finally:
                bars.remove_task(bar)

        for kind in kinds:
            for lr in lrs:
                one(kind, lr, seeds[0])
            tried = [run for run in trials.on_file() if (run["kind"], run["seed"]) == (kind, seeds[0])]
            chosen = best(kind, tried)
            comparison.add(kind, chosen, {seed: one(kind, chosen, seed) for seed in seeds}, tried)
    return comparison


def best(kind: str, tried: list[dict[str, Any]]) -> float:
    """The peak learning rate of the lowest held-out loss.

    Raises:
        SettingsError: all runs diverged.
    """
    finished = [run for run in tried if not run["diverged"]]
    if not finished:
        raise SettingsError(f"{kind} diverged with every peak learning rate: give lower ones with --lrs")
    return float(min(finished, key=lambda run: run["loss"])["lr"])


#: What is shown: title, and how a figure is written.
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", "{:,}".format),
    "parameters_without_vocabulary": ("without embedding and head", "{:,}".format),
    "lr": ("peak learning rate", "{:g}".format),
    "loss": ("nats per token", "{:.3f}".format),
    "bits_per_byte": ("bits per byte", "{:.3f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "macs": ("MACs a token", "{:,.0f}".format),
    "acs": ("ACs a token", "{:,.0f}".format),
    "joules": ("µJ a token", lambda joules: f"{1e6 * joules:.2f}"),
    "joules_with_sram": ("µJ with SRAM", lambda joules: f"{1e6 * joules:.2f}"),
    "repetition": ("repetition", "{:.1%}".format),
    "coherence": ("topic coherence", "{:.3f}".format),
}


def table(comparison: Comparison) -> list[list[str]]:
    """A column a model, mean and range over seeds; and the held-out text itself."""
    columns = {kind: list(comparison.done(kind).values()) for kind in comparison.runs}
    columns["held-out text"] = [comparison.about["held_out_text"]]
    shown = [["", *columns]]
    for figure, (title, show) in FIGURES.items():
        shown.append(
            [title, *(spread([run[figure] for run in runs if figure in run], show) for runs in columns.values())]
        )
    return shown


def rate_tables(comparison: Comparison) -> list[list[list[str]]]:
    """Firing rates: one table for all models with the same layers, a line a layer."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for kind in comparison.runs:
        layers = unique(layer for run in comparison.done(kind).values() for layer in run["firing_rates"])
        if layers:
            alike.setdefault(tuple(layers), []).append(kind)
    tables = []
    for names, kinds in alike.items():
        rates = {kind: [run["firing_rates"] for run in comparison.done(kind).values()] for kind in kinds}
        lines = [
            [layer, *(spread([r[layer] for r in rates[kind]], "{:.1%}".format) for kind in kinds)] for layer in names
        ]
        tables.append([["layer", *kinds], *lines])
    return tables


def gaps(comparison: Comparison) -> list[str]:
    """How the spike-fed models stand to the others, seed by seed."""
    sentences = []
    for ours in ("spike-fed", "spiking-values"):
        for other in ("dense-twin", "gpt2", "published", "recency"):
            if ours in comparison.runs and other in comparison.runs:
                one, two = comparison.done(ours), comparison.done(other)
                both = [seed for seed in comparison.seeds if seed in one and seed in two]
                nats = [one[seed]["loss"] - two[seed]["loss"] for seed in both]
                ratio = [one[seed]["bits_per_byte"] / two[seed]["bits_per_byte"] - 1 for seed in both]
                if both:
                    sentences.append(
                        f"{ours} against {other}: {spread(ratio, '{:+.1%}'.format)} bits per byte, "
                        f"{spread(nats, '{:+.3f}'.format)} nats per token"
                    )
    return sentences


def notes(comparison: Comparison) -> str:
    """What the figures of the table are."""
    about, seeds = comparison.about, comparison.seeds
    counted = ", ".join(f"{name} {loss:.3f}" for name, loss in about["baselines"].items())
    tried = ", ".join(f"{lr:g}" for lr in sorted(comparison.tried))
    diverged = "; ".join(comparison.diverged) or "none"
    return (
        f"Mean (range) over seeds {', '.join(map(str, seeds))}; text: {about['text']}; by counting alone, nats per token: "
        f"{counted}. Peak learning rates tried at seed {seeds[0]}: {tried}; diverged: {diverged}. "
        "tokens/s in training; operations and energy of a generated token at the end of a block, 45 nm, float32. "
        f"Samples: after {about['held_out_text']['prompts']} held-out beginnings; repetition is the share of 4-grams that "
        "stood there before, topic coherence the chance that a sample is nearer to the document of its prompt than to another "
        "(TF-IDF; 0.5 says nothing)."
    )


def markdown(comparison: Comparison, command: str) -> list[str]:
    """The parts of what is shown, with what made it."""
    parts = [markdown_table(table(comparison)), notes(comparison)]
    parts += ["\n".join(f"- {sentence}" for sentence in gaps(comparison))] if gaps(comparison) else []
    parts += [markdown_table(lines) for lines in rate_tables(comparison)]
    return [*parts, f"`{command}`"]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    common_arguments(parser, "runs/compare")
    parser.add_argument("--models", nargs="+", choices=KINDS, default=list(KINDS), help="default: all of them")
    parser.add_argument(
        "--lrs", nargs="+", type=number(1e-9), help="peak learning rates to choose from (default: the config's)"
    )
    options = parser.parse_args(arguments)
    return run_trials(lambda: _run(options, command_line(arguments, "compare.py")))


def _run(options: argparse.Namespace, command: str) -> None:
    trials = Trials(settings_for(options), options.out)
    kinds = {kind: KINDS[kind] for kind in unique(options.models)}
    lrs = unique(options.lrs or [trials.settings.training.lr])
    comparison = compare(trials, kinds, unique(options.seeds), lrs)
    write_results(options.out, markdown(comparison, command), trials.on_file())
    console = Console()
    for title, lines in [
        (trials.settings.name, table(comparison)),
        *(("firing rates", t) for t in rate_tables(comparison)),
    ]:
        print_table(console, title, lines[0], lines[1:])
    console.print("\n".join([notes(comparison), *gaps(comparison)]), highlight=False, markup=False)
    print(f"table in {options.out / 'table.md'}, all figures in {options.out / 'runs.jsonl'}")


if __name__ == "__main__":
    sys.exit(main())
