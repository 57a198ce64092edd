"""What each mechanism is worth: both blocks, and the dense twin, with one thing changed at a time, over seeds.

    python studies/language_model/ablation.py                                 # tiny, three seeds, all blocks
    python studies/language_model/ablation.py --blocks spike-fed --only cascade clamp

``recency`` is the published block with scores that fall with distance, so that all know the order of the positions. Every run
has the config's peak learning rate, also where another would suit the change better, and the same tokens in the same order;
what is shown is the held-out loss, and by how much it is higher without the mechanism, seed by seed. Runs are kept as those of
``compare.py`` are.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from nordlm.training.progress import print_table
from rich.console import Console
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
from torch import Tensor, nn
from transformers import PreTrainedModel
from trials import AfterStep, Learner, Trials, nobody, progress_bars
from variants import (
    DENSE,
    Maker,
    published,
    spike_fed,
    without_norms,
    without_stream_norm,
    without_these_norms,
)

from nord_snn.layers import LeakyClamp, SpikeFedBlock, SpikeFedResonance
from nord_snn.learning_rules import RewardModulatedSTDP
from nord_snn.models.nord import NordConfig
from nord_snn.neurons import AssociativeLIFNode

__all__ = ["ABLATIONS", "Ablation", "ablate"]

Surgery = Callable[[PreTrainedModel], None]


class Ablation(NamedTuple):
    """One change to a model.

    Attributes:
        mechanism: what it is about.
        says: the change, in words.
        changes: fields of the model's config.
        surgery: done to the model that was made.
        learner: what else learns.
    """

    mechanism: str
    says: str
    changes: dict[str, Any] = {}  # noqa: RUF012  # never written to
    surgery: Surgery | None = None
    learner: Learner = nobody


class ConstantCurrent(nn.Module):
    """In the encoder's place: the same current at every step, at first as strong as the encoder's is on average."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.projection, self.steps = encoder.projection, encoder.t_fast + encoder.t_slow
        gates = (encoder.fast_basis.sigmoid() * encoder.fast_scale, encoder.slow_basis.sigmoid() * encoder.slow_scale)
        self.scale = nn.Parameter(torch.cat(gates).mean().detach())

    def forward(self, x: Tensor) -> Tensor:
        """``[*, D]`` -> ``[T, *, D]``."""
        current = self.projection(x) * self.scale
        return current.expand(self.steps, *current.shape)


class Unclamped(nn.Module):
    """In LeakyClamp's place: the sum itself."""

    def forward(self, x: Tensor, branch: Tensor, gain: Tensor) -> Tensor:
        """``x + gain * branch``."""
        return x + gain * branch


class ClampedBranch(nn.Module):
    """In LeakyClamp's place: what is added is clamped, and not the stream."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.clamp = LeakyClamp(n_features)

    def forward(self, x: Tensor, branch: Tensor, gain: Tensor) -> Tensor:
        """``x + gain * clamp(branch)``."""
        return x + gain * self.clamp(branch)


def constant_current(model: PreTrainedModel) -> None:
    """The encoder without its scales of time."""
    model.encoder = ConstantCurrent(model.encoder)


def without_clamps(model: PreTrainedModel) -> None:
    """The published blocks with a stream that nothing cuts."""
    for block in model.blocks:
        block.clamp = Unclamped()


def clamped_branches(model: PreTrainedModel) -> None:
    """What a feed-forward adds is clamped; in spike-fed blocks what the resonance adds is, too."""
    width = model.config.hidden_size
    for block in model.blocks:
        if isinstance(block, SpikeFedBlock):
            resonance = cast(SpikeFedResonance, block.resonance)
            for map_out in (resonance.o_proj, block.down):
                map_out.add_module("clamp", LeakyClamp(width))
                map_out.register_forward_hook(lambda module, _, x: module.clamp(x))
        else:
            block.clamp = ClampedBranch(width)


def clamped_currents(model: PreTrainedModel) -> None:
    """Nothing cuts the stream; what every layer of neurons in the blocks gets is clamped."""
    if model.config.block == "nord":
        without_clamps(model)
    for block in model.blocks:
        for neurons in [module for module in block.modules() if isinstance(module, AssociativeLIFNode)]:
            neurons.add_module("clamp", LeakyClamp(neurons.n_features))
            neurons.register_forward_pre_hook(lambda module, inputs: (module.clamp(inputs[0]),))


def clamped_stream(model: PreTrainedModel, floor: float = -0.1) -> None:
    """Spike-fed blocks with the published block's clamp behind each."""
    for block in model.blocks:
        block.clamp = LeakyClamp(model.config.hidden_size, floor=floor)
        block.register_forward_hook(lambda module, _, x: module.clamp(x))


def distance_alone(model: PreTrainedModel) -> None:
    """Scores that count no coincidences: positions are mixed by their distance, whatever their queries and keys are."""
    for block in model.blocks:
        block.resonance.temperature.requires_grad_(False).zero_()


@contextmanager
def stdp(model: PreTrainedModel, rate: float, sign: float = 1.0) -> Iterator[AfterStep]:
    """STDP between the two layers of neurons of each feed-forward, rewarded where the loss is below its running mean."""

    def rule(index: int, block: Any) -> RewardModulatedSTDP:
        fed = isinstance(block, SpikeFedBlock)
        synapse, neurons = (block.up, block.lif_h) if fed else (block.ffn.down, block.ffn.lif2)
        return RewardModulatedSTDP(
            step_mode="m",
            synapse=synapse,
            sn=neurons,
            a_plus=rate,
            a_minus=rate,
            reduction="mean",
            bounds=None,
            baseline=None,
            name=f"blocks.{index}",
        )

    rules = [rule(index, block) for index, block in enumerate(model.blocks)]

    @torch.no_grad()
    def after_step(loss: float) -> None:
        for rule in rules:
            rule.apply(cast(Tensor, rule.step(loss=loss, on_grad=False, scale=sign)))

    try:
        yield after_step
    finally:
        for rule in rules:
            rule.close()


_RATES = {"0.05": 0.05, "1": 1.0}
_STDP = [
    *(
        Ablation("STDP", f"STDP while it trains, rate {name}", learner=partial(stdp, rate=rate))
        for name, rate in _RATES.items()
    ),
    Ablation("STDP", "control: rate 1, reward of the opposite sign", learner=partial(stdp, rate=1.0, sign=-1.0)),
]
_BOTH = [
    Ablation("cascade", "no cascade", {"n_clusters": None}),
    Ablation("encoder", "the same current at every step", surgery=constant_current),
    Ablation("resonance", "no resonance: positions never meet", {"resonance": False}),
    Ablation("resonance", "no recency", {"recency": False}),
    Ablation("resonance", "recency alone, no coincidences", surgery=distance_alone),
    *_STDP,
]


def _steps(fast: int, slow: int) -> Ablation:
    return Ablation("time", f"T = {fast + slow} ({fast} fast, {slow} slow)", {"t_fast": fast, "t_slow": slow})


def _rest(steps: int) -> Ablation:
    rest = {0: "no rest", 1: "one step of rest"}.get(steps, f"{steps} steps of rest")
    return Ablation("refractory", f"{rest} after a spike", {"refractory_steps": steps})


#: Fields that make the neurons, and how many steps they have.
NEURONS = ("t_fast", "t_slow", "threshold", "beta_mem", "beta_syn", "refractory_steps", "surrogate", "alpha")
_PUBLISHED_NEURONS = {name: getattr(NordConfig(), name) for name in NEURONS}


def _floor(floor: float) -> Ablation:
    return Ablation("clamp", f"floor of the clamp starts at {floor}", {"clamp_floor": floor})


_NORMS = [
    Ablation("norms", "no norms behind linear maps and mixing", surgery=without_norms),
    Ablation("norms", "no norm before the readout", surgery=without_stream_norm),
    Ablation("norms", "neither of these norms", surgery=without_these_norms),
]


#: The model of each block that is changed, and the changes.
ABLATIONS: dict[str, tuple[Callable[..., Maker], list[Ablation]]] = {
    "recency": (
        partial(published, recency=True),
        [
            Ablation("clamp", "no clamp", surgery=without_clamps),
            Ablation("clamp", "clamp on what is added, not on the stream", surgery=clamped_branches),
            Ablation("clamp", "clamp on the currents of all neurons, not on the stream", surgery=clamped_currents),
            _floor(-1.0),
            _floor(-0.01),
            *_BOTH,
            *map(_rest, (0, 1)),
            *(_steps(*steps) for steps in ((5, 1), (3, 1), (1, 1))),
            Ablation("neurons", "neurons and steps of the spike-fed config", {"keep": NEURONS}),
        ],
    ),
    "spike-fed": (
        partial(spike_fed, spiking_values=False),
        [
            Ablation("clamp", "published clamp on the stream", surgery=clamped_stream),
            Ablation("clamp", "the same, its floor starts at -1", surgery=partial(clamped_stream, floor=-1.0)),
            Ablation("clamp", "clamp on what is added", surgery=clamped_branches),
            Ablation("clamp", "clamp on the currents of all neurons", surgery=clamped_currents),
            *_BOTH,
            *map(_rest, (1, 2)),
            *(_steps(*steps) for steps in ((8, 2), (5, 1), (1, 1))),
            Ablation("neurons", "neurons and steps of the published model", _PUBLISHED_NEURONS),
            Ablation("surrogate", "published surrogate", {"surrogate": "nord_atan", "alpha": 4.0}),
            *_NORMS,
        ],
    ),
    "dense-twin": (
        partial(spike_fed, spiking_values=False, **DENSE),
        [
            *(ablation for ablation in _BOTH if ablation.mechanism == "resonance"),
            *_NORMS,
        ],
    ),
}


def maker(make: Callable[..., Maker], ablation: Ablation) -> Maker:
    """The model with the change."""

    def changed(settings: Any, tokenizer: Any) -> PreTrainedModel:
        model = make(**ablation.changes)(settings, tokenizer)
        if ablation.surgery is not None:
            ablation.surgery(model)
        return model

    return changed


class Row(NamedTuple):
    """What came out of one change: runs by seed, and those without it."""

    block: str
    ablation: Ablation
    runs: dict[int, dict[str, Any]]
    whole: dict[int, dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        """Held-out loss of each seed, in nats per token."""
        return [run["loss"] for run in self.runs.values() if not run["diverged"]]

    @property
    def differences(self) -> list[float]:
        """By how much the loss of each seed is higher than without the change."""
        return [
            run["loss"] - self.whole[seed]["loss"]
            for seed, run in self.runs.items()
            if not run["diverged"] and not self.whole[seed]["diverged"]
        ]


WHOLE = Ablation("", "the whole model")


def ablate(trials: Trials, blocks: list[str], mechanisms: list[str], seeds: list[int]) -> list[Row]:
    """Train every change of the blocks with every seed."""
    trials.check(maker(ABLATIONS[block][0], WHOLE) for block in blocks)
    rows, lr = [], trials.settings.training.lr
    with progress_bars() as bars:

        def one(block: str, ablation: Ablation, seed: int) -> dict[str, Any]:
            make = maker(ABLATIONS[block][0], ablation)
            return trials.run(f"{block}: {ablation.says}", make, lr, seed, bars, ablation.learner)

        for block in blocks:
            whole = {seed: one(block, WHOLE, seed) for seed in seeds}
            rows.append(Row(block, WHOLE, whole, whole))
            chosen = [ablation for ablation in ABLATIONS[block][1] if ablation.mechanism in mechanisms]
            rows += [
                Row(block, ablation, {seed: one(block, ablation, seed) for seed in seeds}, whole) for ablation in chosen
            ]
    return rows


def table(rows: list[Row], block: str) -> list[list[str]]:
    """A line a change."""
    lines = [["mechanism", "change", "nats per token", "more than whole", "rates of the layers"]]
    for row in rows:
        if row.block != block:
            continue
        rates = [rate for run in row.runs.values() if not run["diverged"] for rate in run["firing_rates"].values()]
        diverged = len(row.runs) - len(row.losses)
        lost = f"{diverged} of {len(row.runs)} diverged" if diverged else ""
        lines.append(
            [
                row.ablation.mechanism,
                row.ablation.says,
                ", ".join(filter(None, (spread(row.losses, "{:.3f}".format), lost))),
                "" if row.ablation is WHOLE else spread(row.differences, "{:+.3f}".format),
                f"{min(rates):.1%} to {max(rates):.1%}" if rates else "",
            ]
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    common_arguments(parser, "runs/ablation")
    steps_argument(parser)
    mechanisms = unique(ablation.mechanism for _, ablations in ABLATIONS.values() for ablation in ablations)
    parser.add_argument("--blocks", nargs="+", choices=ABLATIONS, default=list(ABLATIONS), help="default: all")
    parser.add_argument("--only", nargs="+", choices=mechanisms, default=mechanisms, help="mechanisms (default: all)")
    options = parser.parse_args(arguments)
    return run_trials(lambda: _run(options, command_line(arguments, "ablation.py")))


def _run(options: argparse.Namespace, command: str) -> None:
    trials = Trials(settings_for(options, ("data", "validation_data", "steps")), options.out, samples=False)
    blocks, seeds = unique(options.blocks), unique(options.seeds)
    rows = ablate(trials, blocks, options.only, seeds)
    tables = {block: table(rows, block) for block in blocks}
    note = (
        f"Mean (range) over seeds {', '.join(map(str, seeds))}; text: {trials.about['text']}; peak learning rate "
        f"{trials.settings.training.lr:g} in all. Rates are the lowest and highest of all layers of neurons."
    )
    parts = [f"## {block}\n\n{markdown_table(lines)}" for block, lines in tables.items()]
    write_results(options.out, [*parts, note, f"`{command}`"], trials.on_file())
    console = Console()
    for block, lines in tables.items():
        print_table(console, block, lines[0], lines[1:])
    console.print(note, highlight=False, markup=False)
    print(f"tables in {options.out / 'table.md'}, all figures in {options.out / 'runs.jsonl'}")


if __name__ == "__main__":
    sys.exit(main())
