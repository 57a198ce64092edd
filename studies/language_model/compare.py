"""Nord as published, Nord with every linear map fed by spikes, its dense twin, and a GPT-2: one protocol for all.

    python studies/language_model/compare.py                                  # tiny, three seeds
    python studies/language_model/compare.py --config small --data books.txt --lrs 1e-3 3e-3
    python studies/language_model/compare.py --models spike-fed dense-twin

All have the same width, blocks, heads, vocabulary and window, and get the same tokens in the same order, the same schedule and
the same search for a peak learning rate: with several ``--lrs`` each is trained with each of them at the first seed, and where
the best on the held-out text is the lowest or the highest, with half or twice of it, until it is neither. All its runs take
that rate.

``published`` is the published model in these sizes; ``recency`` the same with scores that fall with distance; ``spike-fed`` the
config itself; ``spiking-values`` the same where values spike, too; ``dense-twin`` the same with smooth activations and one time
step, so that only the spikes are missing; ``dense-plain`` the twin without the norms that stand there for the neurons' sake;
``gpt2`` has feed-forwards as wide as it takes to have as many parameters without embedding and head.

Every run is written down when it ends: the same command again goes on where it stopped, and commands for other models may work
on the same folder at the same time.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from nordlm.cli import number
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
from trials import COUNTED, Trials, progress_bars
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
        self.tried: dict[str, set[float]] = {}
        self.diverged: list[str] = []

    def add(self, kind: str, lr: float, runs: Runs, tried: list[dict[str, Any]]) -> None:
        """Add a kind with all that was tried at the first seed."""
        self.lrs[kind], self.runs[kind] = lr, runs
        self.tried[kind] = {run["lr"] for run in tried}
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
    trials.check(kinds.values())
    comparison = Comparison(trials, seeds)
    with progress_bars() as bars:
        for kind, make in kinds.items():
            tried = search(trials, kind, make, lrs, seeds[0], bars)
            chosen = best(kind, tried)
            comparison.add(kind, chosen, {seed: trials.run(kind, make, chosen, seed, bars) for seed in seeds}, tried)
    return comparison


def search(trials: Trials, kind: str, make: Maker, lrs: list[float], seed: int, bars: Progress) -> list[dict[str, Any]]:
    """The runs with these peak learning rates, and beyond them with half or twice the best until it is neither end.

    A single rate is not searched for.

    Raises:
        SettingsError: all runs diverged.
    """
    runs = {lr: trials.run(kind, make, lr, seed, bars) for lr in lrs}
    while len(runs) > 1:
        chosen = best(kind, list(runs.values()))
        if min(runs) < chosen < max(runs):
            break
        beyond = chosen / 2 if chosen == min(runs) else chosen * 2
        runs[beyond] = trials.run(kind, make, beyond, seed, bars)
    return list(runs.values())


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
    "macs": ("multiply-accumulates a token", "{:,.0f}".format),
    "acs": ("additions a token", "{:,.0f}".format),
    "joules": ("µJ a token, without memory", lambda joules: f"{1e6 * joules:.2f}"),
    "joules_with_sram": ("the same with all memory in SRAM", lambda joules: f"{1e6 * joules:.2f}"),
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
        for other in ("dense-twin", "dense-plain", "gpt2", "published", "recency"):
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
    tried = "; ".join(f"{kind} {', '.join(f'{lr:g}' for lr in sorted(lrs))}" for kind, lrs in comparison.tried.items())
    diverged = "; ".join(comparison.diverged) or "none"
    return (
        f"Mean (range) over seeds {', '.join(map(str, seeds))}; text: {about['text']}; by counting alone, nats per token: "
        f"{counted}. Peak learning rates tried at seed {seeds[0]}: {tried}; diverged: {diverged}. "
        f"tokens/s in training; operations and energy of a generated token at the end of a block, mean of {COUNTED} held-out "
        "blocks, 45 nm, float32. "
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
    steps_argument(parser)
    parser.add_argument("--models", nargs="+", choices=KINDS, default=list(KINDS), help="default: all of them")
    parser.add_argument(
        "--lrs",
        nargs="+",
        type=number(1e-9),
        help="peak learning rates to begin with (default: the config's, and no search)",
    )
    options = parser.parse_args(arguments)
    return run_trials(lambda: _run(options, command_line(arguments, "compare.py")))


def _run(options: argparse.Namespace, command: str) -> None:
    trials = Trials(settings_for(options, ("data", "validation_data", "steps")), options.out)
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
