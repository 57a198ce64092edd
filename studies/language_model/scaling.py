"""Scaling study: fit the loss of spike-fed Nord, its dense twin and a GPT-2 as a function of parameters and tokens.

    python studies/language_model/scaling.py --data books.txt
    python studies/language_model/scaling.py --sizes 64x2 128x2 256x4 --steps 250 500 --seeds 0

A size is width x number of blocks; a head has width 32 and the feed-forward twice the width of the model. Each number of training
steps is a complete run with its own schedule. For each size and number of training steps, the peak learning rate of every model
is searched at the first seed, as in ``compare.py``. The first search starts with ``--lrs``. Later searches start with half, once
and twice the best learning rate of the previous size, or else of fewer training steps, because short runs and small models often
need higher learning rates. With several ``--lrs``, a second search starts with lower learning rates, because the loss as a
function of the learning rate can have two minima (it has for the small GPT-2).

The curve of a model is ``L(N, D) = E + A / N^a + B / D^b`` (Hoffmann et al. 2022), where L is the held-out loss in
nats per token, N the number of parameters without embedding and head, and D the number of training tokens (with repetitions if
the text is shorter). It is fitted by least squares with Huber's loss. Intervals are from a bootstrap of the residuals around the
fitted curve. The curve describes these runs and is not reliable outside their range. Runs are saved as in ``compare.py``;
``runs.jsonl`` includes those of the searches.
"""

import argparse
import io
import itertools
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from compare import best_lr, search_lr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator
from nordlm.cli import number
from nordlm.script import run_script
from nordlm.training.checkpoints import write_bytes
from nordlm.training.progress import print_table
from nordlm.training.settings import Settings
from rich.console import Console
from scipy.optimize import least_squares
from study_cli import (
    command_line,
    common_arguments,
    markdown_table,
    run_trials,
    settings_for,
    spread,
    unique,
    write_results,
)
from trials import Trials, check_makers, prepare_study_data, progress_bars
from variants import MODEL_MAKERS

__all__ = ["Curve", "Point", "best_lr_runs", "fit", "intervals", "plot_scaling"]

COLOURS = {"spike-fed": "#c44e52", "dense-twin": "#4878a8", "dense-plain": "#55a868", "gpt2": "#6b6b6b"}
MODELS = tuple(COLOURS)
LOW_LRS = [1e-3, 2e-3, 4e-3]  # start of the second search
HEAD_DIM = 32  # width of an attention head
MIN_DISTINCT = 3  # minimum of different numbers of parameters, and of tokens, for a fit
BOOTSTRAP_DRAWS = 200  # bootstrap samples of the residuals, for the intervals


class Size(NamedTuple):
    """Size of a model: width and number of blocks."""

    width: int
    blocks: int

    def __str__(self) -> str:
        """Return the text form, ``128x2``."""
        return f"{self.width}x{self.blocks}"

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Parse the text form, ``128x2``."""
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if match is None or int(match[1]) % HEAD_DIM or not int(match[1]) or not int(match[2]):
            raise argparse.ArgumentTypeError(
                f"expected width x blocks, the width a multiple of {HEAD_DIM}, such as 128x2, got {text!r}"
            )
        return cls(int(match[1]), int(match[2]))

    def apply_to(self, settings: Settings, steps: int) -> Settings:
        """Return the settings with this size and number of training steps."""
        model = {
            "hidden_size": self.width,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.width // HEAD_DIM,
            "intermediate_size": 2 * self.width,
        }
        training = replace(settings.training, steps=steps)
        return replace(settings, name=f"{self}, {steps} steps", model=settings.model | model, training=training)


class Point(NamedTuple):
    """One run of the study.

    Attributes:
        size: size of the model.
        tokens: number of training tokens.
        run: results, see :meth:`trials.Trials.run`.
    """

    size: Size
    tokens: int
    run: dict[str, Any]

    @property
    def kind(self) -> str:
        """Return the name of the model."""
        return str(self.run["kind"])

    @property
    def parameters(self) -> int:
        """Return the number of parameters without embedding and head."""
        return int(self.run["parameters_without_vocabulary"])

    @property
    def loss(self) -> float:
        """Return the held-out loss, in nats per token."""
        return float(self.run["loss"])

    @property
    def rates(self) -> list[float]:
        """Return the firing rates of all layers of neurons."""
        return list(self.run["firing_rates"].values())


class Curve(NamedTuple):
    """``L(N, D) = floor + a / N^alpha + b / D^beta``, in nats per token."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def __call__(self, parameters: Any, tokens: Any) -> Any:
        """Return the loss for numbers or arrays."""
        return self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def __str__(self) -> str:
        """Return the equation."""
        return f"{self.floor:.2f} + {self.a:.3g} / N^{self.alpha:.2f} + {self.b:.3g} / D^{self.beta:.2f}"


def fit(points: list[Point]) -> Curve | None:
    """Fit a curve to the points of one model, from several initial values; return None if there are too few points."""
    sizes, budgets = {point.parameters for point in points}, {point.tokens for point in points}
    if min(len(sizes), len(budgets)) < MIN_DISTINCT:
        return None
    lowest = min(point.loss for point in points)
    starts = itertools.product((0.5 * lowest, 0.9 * lowest), (0.1, 0.5), (0.1, 0.5), (0.1, 0.5), (0.3,))
    return _fit_losses(points, [point.loss for point in points], starts)


def _fit_losses(points: list[Point], losses: Any, starts: Iterable[tuple[float, ...]]) -> Curve:
    """Fit the logarithms of the curve's constants, so that all are positive.

    Args:
        points: the runs.
        losses: their losses.
        starts: initial values, with N in units of 100,000 parameters and D in units of a million tokens.
    """
    n, d = _coordinates(points)

    def residuals(x: Any) -> Any:
        floor, a, alpha, b, beta = np.exp(x)
        return floor + a * (n / 1e5) ** -alpha + b * (d / 1e6) ** -beta - losses

    fits = [least_squares(residuals, np.log(start), loss="huber", f_scale=0.02) for start in starts]
    floor, a, alpha, b, beta = np.exp(min(fits, key=lambda result: result.cost).x)
    return Curve(float(floor), float(a * 1e5**alpha), float(alpha), float(b * 1e6**beta), float(beta))


def _coordinates(points: list[Point]) -> tuple[Any, Any]:
    return np.array([point.parameters for point in points], float), np.array([point.tokens for point in points], float)


def intervals(points: list[Point], curve: Curve) -> dict[str, tuple[float, float]]:
    """Return 95 % bootstrap intervals of floor and exponents: refits to the curve plus resampled residuals."""
    predicted = curve(*_coordinates(points))
    residuals = np.array([point.loss for point in points]) - predicted
    generator = np.random.default_rng(0)
    start = (curve.floor, curve.a / 1e5**curve.alpha, curve.alpha, curve.b / 1e6**curve.beta, curve.beta)
    refits = [
        _fit_losses(points, predicted + generator.choice(residuals, len(points)), [start])
        for _ in range(BOOTSTRAP_DRAWS)
    ]
    names = {"E": "floor", "a": "alpha", "b": "beta"}
    ends = {name: np.percentile([getattr(c, field) for c in refits], (2.5, 97.5)) for name, field in names.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def plot_scaling(points: list[Point], curves: dict[str, Curve | None]) -> Figure:
    """Plot loss against parameters for each number of tokens (top) and against tokens for each size (bottom)."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
    by_tokens = {f"{n:,} tokens": [p for p in points if p.tokens == n] for n in unique(p.tokens for p in points)}
    by_size = {str(size): [p for p in points if p.size == size] for size in unique(p.size for p in points)}
    losses = [point.loss for point in points]
    for row, field, groups in ((top, "parameters", by_tokens), (bottom, "tokens", by_size)):
        panels = row.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axis, (title, group) in zip(panels, groups.items(), strict=True):
            _panel(axis, group, curves, field)
            axis.set_title(title, fontsize="medium")
        panels[0].set_ylim(min(losses) - 0.1, max(losses) + 0.1)
        row.supylabel("held-out loss, nats per token", fontsize="medium")
        row.supxlabel(
            {"parameters": "parameters without embedding and head", "tokens": "training tokens"}[field],
            fontsize="medium",
        )
    top.axes[-1].legend(fontsize="small")
    return figure


def _panel(axis: Axes, points: list[Point], curves: dict[str, Curve | None], field: str) -> None:
    for kind in unique(point.kind for point in points):
        own = [point for point in points if point.kind == kind]
        x = [getattr(point, field) for point in own]
        axis.scatter(x, [point.loss for point in own], s=14, color=COLOURS[kind], label=kind)
        curve = curves[kind]
        if curve is not None:
            line = np.geomspace(min(x) * 0.9, max(x) * 1.1)
            fixed = own[0].tokens if field == "parameters" else own[0].parameters
            losses = curve(line, fixed) if field == "parameters" else curve(fixed, line)
            axis.plot(line, losses, color=COLOURS[kind], linewidth=1)
    axis.set_xscale("log")
    if field == "tokens":  # explicit ticks: automatic labels of a short logarithmic axis overlap
        axis.set_xticks(unique(point.tokens for point in points), minor=False)
        axis.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def train_points(
    settings: Settings,
    sizes: list[Size],
    steps: list[int],
    kinds: list[str],
    seeds: list[int],
    lrs: list[float],
    out: Path,
) -> list[Point]:
    """Train all missing runs; return all runs, including those of the learning-rate searches."""
    text = prepare_study_data(sizes[0].apply_to(settings, steps[0]), out, samples=False)  # all sizes share the text
    for size in sizes:
        check_makers((MODEL_MAKERS[kind] for kind in kinds), size.apply_to(settings, steps[0]), text)
    points = []
    lr_of_size: dict[tuple[str, int], float] = {}  # model, training steps -> best learning rate at the previous size
    lr_of_steps: dict[str, float] = {}  # model -> best learning rate with the previous number of training steps
    with progress_bars() as bars:
        for size, budget in itertools.product(sizes, sorted(steps)):
            sized = size.apply_to(settings, budget)
            trials = Trials(sized, out / str(size) / str(budget), text)
            for kind in kinds:
                make, previous = MODEL_MAKERS[kind], lr_of_size.get((kind, budget), lr_of_steps.get(kind))
                first = [previous / 2, previous, previous * 2] if previous else lrs
                starts = [lrs] if len(lrs) == 1 else [first, LOW_LRS]
                tried = [run for start in starts for run in search_lr(trials, kind, make, start, seeds[0], bars)]
                lr = lr_of_size[kind, budget] = lr_of_steps[kind] = best_lr(kind, tried)
                other_seeds = [trials.run(kind, make, lr, seed, bars) for seed in seeds[1:]]
                # Both searches can try the same learning rate.
                runs = {(run["lr"], run["seed"]): run for run in [*tried, *other_seeds]}
                points += [Point(size, _tokens(sized), run) for run in runs.values()]
    return points


def best_lr_runs(points: list[Point], seed: int) -> list[Point]:
    """Return the runs with the best learning rate at ``seed``, for each model, size and number of tokens."""
    groups: dict[tuple[Size, int, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.size, point.tokens, point.kind), []).append(point)
    best = []
    for (_, _, kind), group in groups.items():
        lr = best_lr(kind, [point.run for point in group if point.run["seed"] == seed])
        best += [point for point in group if point.run["lr"] == lr]
    return best


def _tokens(settings: Settings) -> int:
    options = settings.training
    return options.steps * options.batch_size * options.grad_accum * settings.block_size


def scaling_table(points: list[Point]) -> list[list[str]]:
    """Return a table with a line per size and number of tokens: losses, paired ratios of bits per byte, firing rates."""
    kinds = unique(point.kind for point in points)
    others = [kind for kind in kinds if kind != "spike-fed"] if "spike-fed" in kinds else []
    lines = [["size", "parameters", "tokens", *kinds, *(f"spike-fed / {kind}" for kind in others), "firing rates"]]
    for size, tokens in unique((point.size, point.tokens) for point in points):
        here = [point for point in points if (point.size, point.tokens) == (size, tokens)]
        losses = {kind: [point.loss for point in here if point.kind == kind] for kind in kinds}
        bits = {(point.kind, point.run["seed"]): point.run["bits_per_byte"] for point in here}
        seeds = unique(seed for _, seed in bits)
        ratios = {
            kind: [
                bits["spike-fed", s] / bits[kind, s] - 1 for s in seeds if {("spike-fed", s), (kind, s)} <= bits.keys()
            ]
            for kind in others
        }
        rates = [rate for point in here for rate in point.rates]
        lines.append(
            [
                str(size),
                f"{here[0].parameters:,}",
                f"{tokens:,}",
                *(spread(losses[kind], "{:.3f}".format) for kind in kinds),
                *(spread(ratios[kind], "{:+.1%}".format) for kind in others),
                f"{min(rates):.1%} to {max(rates):.1%}" if rates else "",
            ]
        )
    return lines


def describe_fits(points: list[Point], curves: dict[str, Curve | None]) -> list[str]:
    """Return a sentence per model: its curve, and its learning rates at each size, ordered by number of tokens."""
    sentences = []
    for kind, curve in curves.items():
        own = [point for point in points if point.kind == kind]
        trained = {(point.size, point.tokens): f"{point.run['lr']:g}" for point in own}
        learning_rates = "; ".join(
            f"{size} {', '.join(lr for (at, _), lr in trained.items() if at == size)}"
            for size in unique(size for size, _ in trained)
        )
        ends = intervals(own, curve) if curve else {}
        ranges = ", ".join(f"{name} {low:.2f} to {high:.2f}" for name, (low, high) in ends.items())
        fitted = f"L(N, D) = {curve} (95 %: {ranges})" if curve else "too few sizes and numbers of tokens for a curve"
        sentences.append(f"- {kind}: {fitted}; peak learning rates: {learning_rates}")
    return sentences


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    common_arguments(parser, "runs/scaling")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all of them")
    sizes = [Size(64, 2), Size(128, 2), Size(192, 3), Size(256, 4)]
    parser.add_argument(
        "--sizes", nargs="+", type=Size.parse, default=sizes, help=f"default: {' '.join(map(str, sizes))}"
    )
    parser.add_argument("--steps", nargs="+", type=number(1, kind=int), default=[260, 520, 1040])
    parser.add_argument(
        "--lrs",
        nargs="+",
        type=number(1e-9),
        default=[8e-3, 1.6e-2, 3.2e-2],
        help="peak learning rates at the start of the first search; a single one is used without a search",
    )
    options = parser.parse_args(arguments)
    return run_trials(lambda: _run_scaling(options, command_line(arguments, "scaling.py")))


def _run_scaling(options: argparse.Namespace, command: str) -> None:
    settings = settings_for(options)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds, kinds = unique(options.seeds), unique(options.models)
    sizes, steps, lrs = (unique(values) for values in (options.sizes, options.steps, options.lrs))
    tried = train_points(settings, sizes, steps, kinds, seeds, lrs, options.out)
    runs = best_lr_runs(tried, seeds[0])
    points = [point for point in runs if not point.run["diverged"]]
    diverged = [f"{p.size}, {p.tokens:,} tokens, {p.kind}, seed {p.run['seed']}" for p in runs if p.run["diverged"]]
    curves = {kind: fit([point for point in points if point.kind == kind]) for kind in kinds}
    sentences = describe_fits(points, curves)
    note = (
        f"Nats per token, mean (range) over seeds {', '.join(map(str, seeds))}; ratios of bits per byte; "
        f"firing rates are the lowest and the highest of all layers of neurons; diverged: {'; '.join(diverged) or 'none'}. "
        "Fitted, with peak learning rates in the order of the numbers of tokens:"
    )
    parts = [markdown_table(scaling_table(points)), note, "\n".join(sentences), f"`{command}`"]
    write_results(options.out, parts, ({"size": str(p.size), "tokens": p.tokens} | p.run for p in tried))
    buffer = io.BytesIO()
    plot_scaling(points, curves).savefig(buffer, format="png", dpi=120)
    write_bytes(options.out / "scaling.png", buffer.getvalue())
    head, *rows = scaling_table(points)
    console = Console()
    print_table(console, settings.name, head, rows)
    console.print("\n".join([note, *sentences]), highlight=False, markup=False)
    print(f"table in {options.out / 'table.md'}, picture in {options.out / 'scaling.png'}")


if __name__ == "__main__":
    sys.exit(run_script(main, keep_running=True))
