"""Ablation study: change one mechanism at a time in the published block, the spike-fed block and the dense twin, over seeds.

    python studies/language_model/ablation.py                    # config "tiny", three seeds, all blocks
    python studies/language_model/ablation.py --blocks spike-fed --only cascade clamp

``recency`` is the published block with recency (scores fall with distance), so that every model depends on the order of the
positions. Every run has the config's peak learning rate, even if another rate would be better for the change, and the same
tokens in the same order. The tables show the held-out loss in nats per token, and its difference to the unchanged ("whole")
model with the same seed. Finished runs are saved, so the same command continues after a stop.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from nordlm.script import run_script
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
from trials import AfterStep, LearnerContext, Trials, no_learner, progress_bars
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

ModelEdit = Callable[[PreTrainedModel], None]


class Ablation(NamedTuple):
    """One change to a model.

    Attributes:
        mechanism: the mechanism that is changed.
        description: the change, in words; part of the name of the run and of its file.
        changes: fields of the model's config that are replaced.
        edit: function that changes the model in place after its construction.
        learner: context manager for a learning rule besides the optimizer.
    """

    mechanism: str
    description: str
    changes: dict[str, Any] = {}  # noqa: RUF012  # never written to
    edit: ModelEdit | None = None
    learner: LearnerContext = no_learner


class ConstantCurrent(nn.Module):
    """Replacement of the encoder: the same current at every time step, initially with the encoder's mean scale."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.projection, self.steps = encoder.projection, encoder.t_fast + encoder.t_slow
        gates = (encoder.fast_basis.sigmoid() * encoder.fast_scale, encoder.slow_basis.sigmoid() * encoder.slow_scale)
        self.scale = nn.Parameter(torch.cat(gates).mean().detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return currents ``[T, *, D]`` for ``x [*, D]``."""
        current = self.projection(x) * self.scale
        return current.expand(self.steps, *current.shape)


class Unclamped(nn.Module):
    """Replacement of LeakyClamp that adds a branch to the residual stream without a clamp."""

    def forward(self, x: Tensor, branch: Tensor, gain: Tensor) -> Tensor:
        """Return ``x + gain * branch``."""
        return x + gain * branch


class ClampedBranch(nn.Module):
    """Replacement of LeakyClamp that clamps the branch instead of the residual stream."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.clamp = LeakyClamp(n_features)

    def forward(self, x: Tensor, branch: Tensor, gain: Tensor) -> Tensor:
        """Return ``x + gain * clamp(branch)``."""
        return x + gain * self.clamp(branch)


def constant_current(model: PreTrainedModel) -> None:
    """Replace the encoder by a constant current."""
    model.encoder = ConstantCurrent(model.encoder)


def without_clamps(model: PreTrainedModel) -> None:
    """Remove the clamp of the residual stream from published blocks."""
    for block in model.blocks:
        block.clamp = Unclamped()


def clamped_branches(model: PreTrainedModel) -> None:
    """Clamp the output of the feed-forwards and, in spike-fed blocks, of the resonance."""
    width = model.config.hidden_size
    for block in model.blocks:
        if isinstance(block, SpikeFedBlock):
            resonance = cast(SpikeFedResonance, block.resonance)
            for projection in (resonance.o_proj, block.down):
                projection.add_module("clamp", LeakyClamp(width))
                projection.register_forward_hook(lambda module, _, x: module.clamp(x))
        else:
            block.clamp = ClampedBranch(width)


def clamped_currents(model: PreTrainedModel) -> None:
    """Clamp the input of every layer of neurons in the blocks instead of the residual stream."""
    if model.config.block == "published":
        without_clamps(model)
    for block in model.blocks:
        for neurons in [module for module in block.modules() if isinstance(module, AssociativeLIFNode)]:
            neurons.add_module("clamp", LeakyClamp(neurons.n_features))
            neurons.register_forward_pre_hook(lambda module, inputs: (module.clamp(inputs[0]),))


def clamped_stream(model: PreTrainedModel, floor: float = -0.1) -> None:
    """Add the published block's clamp after each spike-fed block."""
    for block in model.blocks:
        block.clamp = LeakyClamp(model.config.hidden_size, floor=floor)
        block.register_forward_hook(lambda module, _, x: module.clamp(x))


def distance_alone(model: PreTrainedModel) -> None:
    """Remove coincidences from the scores, so that only distance weights the positions."""
    for block in model.blocks:
        block.resonance.temperature.requires_grad_(False).zero_()


@contextmanager
def stdp(model: PreTrainedModel, rate: float, sign: float = 1.0) -> Iterator[AfterStep]:
    """Apply STDP between the layers of neurons of each feed-forward, with a reward for a loss below its running mean.

    Args:
        model: the model.
        rate: potentiation and depression per pair of spikes.
        sign: factor of the reward.
    """

    def rule(index: int, block: Any) -> RewardModulatedSTDP:
        is_spike_fed = isinstance(block, SpikeFedBlock)
        synapse, neurons = (block.up, block.lif_h) if is_spike_fed else (block.ffn.down, block.ffn.lif2)
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
_COMMON = [
    Ablation("cascade", "no cascade", {"n_clusters": None}),
    Ablation("encoder", "the same current at every step", edit=constant_current),
    Ablation("resonance", "no resonance: positions never meet", {"resonance": False}),
    Ablation("resonance", "no recency", {"recency": False}),
    Ablation("resonance", "recency alone, no coincidences", edit=distance_alone),
    *_STDP,
]


def _steps(fast: int, slow: int) -> Ablation:
    return Ablation("time", f"T = {fast + slow} ({fast} fast, {slow} slow)", {"t_fast": fast, "t_slow": slow})


def _rest(steps: int) -> Ablation:
    rest = {0: "no rest", 1: "one step of rest"}.get(steps, f"{steps} steps of rest")
    return Ablation("refractory", f"{rest} after a spike", {"refractory_steps": steps})


#: Fields of the config for neurons and time steps.
NEURONS = ("t_fast", "t_slow", "threshold", "beta_mem", "beta_syn", "refractory_steps", "surrogate", "alpha")
_PUBLISHED_NEURONS = {name: getattr(NordConfig(), name) for name in NEURONS}


def _floor(floor: float) -> Ablation:
    return Ablation("clamp", f"floor of the clamp starts at {floor}", {"clamp_floor": floor})


_NORMS = [
    Ablation("norms", "no norms behind linear maps and mixing", edit=without_norms),
    Ablation("norms", "no norm before the readout", edit=without_stream_norm),
    Ablation("norms", "neither of these norms", edit=without_these_norms),
]


#: Name of a model, called a block on the command line -> its maker, and the changes to it.
ABLATIONS: dict[str, tuple[Callable[..., Maker], list[Ablation]]] = {
    "recency": (
        partial(published, recency=True),
        [
            Ablation("clamp", "no clamp", edit=without_clamps),
            Ablation("clamp", "clamp on what is added, not on the stream", edit=clamped_branches),
            Ablation("clamp", "clamp on the currents of all neurons, not on the stream", edit=clamped_currents),
            _floor(-1.0),
            _floor(-0.01),
            *_COMMON,
            *map(_rest, (0, 1)),
            *(_steps(*steps) for steps in ((5, 1), (3, 1), (1, 1))),
            Ablation("neurons", "neurons and steps of the spike-fed config", {"keep": NEURONS}),
        ],
    ),
    "spike-fed": (
        partial(spike_fed, spiking_values=False),
        [
            Ablation("clamp", "published clamp on the stream", edit=clamped_stream),
            Ablation("clamp", "the same, its floor starts at -1", edit=partial(clamped_stream, floor=-1.0)),
            Ablation("clamp", "clamp on what is added", edit=clamped_branches),
            Ablation("clamp", "clamp on the currents of all neurons", edit=clamped_currents),
            *_COMMON,
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
            *(ablation for ablation in _COMMON if ablation.mechanism == "resonance"),
            *_NORMS,
        ],
    ),
}


def ablated_maker(make: Callable[..., Maker], ablation: Ablation) -> Maker:
    """Return a maker for the model with the change."""

    def make_ablated(settings: Any, tokenizer: Any) -> PreTrainedModel:
        model = make(**ablation.changes)(settings, tokenizer)
        if ablation.edit is not None:
            ablation.edit(model)
        return model

    return make_ablated


class Row(NamedTuple):
    """Results of one change.

    Attributes:
        block: key of :data:`ABLATIONS`.
        ablation: the change.
        runs: seed -> run with the change.
        whole: seed -> run of the unchanged model.
    """

    block: str
    ablation: Ablation
    runs: dict[int, dict[str, Any]]
    whole: dict[int, dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        """Return the held-out loss of each seed that did not diverge, in nats per token."""
        return [run["loss"] for run in self.runs.values() if not run["diverged"]]

    @property
    def differences(self) -> list[float]:
        """Return the loss minus that of the unchanged model for each seed."""
        return [
            run["loss"] - self.whole[seed]["loss"]
            for seed, run in self.runs.items()
            if not run["diverged"] and not self.whole[seed]["diverged"]
        ]


FULL_MODEL = Ablation("", "the whole model")


def ablate(trials: Trials, blocks: list[str], mechanisms: list[str], seeds: list[int]) -> list[Row]:
    """Train the unchanged models and every change with every seed."""
    trials.check(ablated_maker(ABLATIONS[block][0], FULL_MODEL) for block in blocks)
    rows, lr = [], trials.settings.training.lr
    with progress_bars() as bars:

        def run_one(block: str, ablation: Ablation, seed: int) -> dict[str, Any]:
            make = ablated_maker(ABLATIONS[block][0], ablation)
            return trials.run(f"{block}: {ablation.description}", make, lr, seed, bars, ablation.learner)

        for block in blocks:
            whole = {seed: run_one(block, FULL_MODEL, seed) for seed in seeds}
            rows.append(Row(block, FULL_MODEL, whole, whole))
            selected = [ablation for ablation in ABLATIONS[block][1] if ablation.mechanism in mechanisms]
            rows += [
                Row(block, ablation, {seed: run_one(block, ablation, seed) for seed in seeds}, whole)
                for ablation in selected
            ]
    return rows


def ablation_table(rows: list[Row], block: str) -> list[list[str]]:
    """Return a table with one line per change."""
    lines = [["mechanism", "change", "nats per token", "more than whole", "firing rates of the layers"]]
    for row in rows:
        if row.block != block:
            continue
        rates = [rate for run in row.runs.values() if not run["diverged"] for rate in run["firing_rates"].values()]
        diverged = len(row.runs) - len(row.losses)
        n_diverged = f"{diverged} of {len(row.runs)} diverged" if diverged else ""
        lines.append(
            [
                row.ablation.mechanism,
                row.ablation.description,
                ", ".join(filter(None, (spread(row.losses, "{:.3f}".format), n_diverged))),
                "" if row.ablation is FULL_MODEL else spread(row.differences, "{:+.3f}".format),
                f"{min(rates):.1%} to {max(rates):.1%}" if rates else "",
            ]
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    common_arguments(parser, "runs/ablation")
    steps_argument(parser)
    mechanisms = unique(ablation.mechanism for _, ablations in ABLATIONS.values() for ablation in ablations)
    parser.add_argument("--blocks", nargs="+", choices=ABLATIONS, default=list(ABLATIONS), help="default: all")
    parser.add_argument(
        "--only", nargs="+", choices=mechanisms, default=mechanisms, help="mechanisms to change (default: all)"
    )
    options = parser.parse_args(arguments)
    return run_trials(lambda: _run_ablation(options, command_line(arguments, "ablation.py")))


def _run_ablation(options: argparse.Namespace, command: str) -> None:
    trials = Trials(settings_for(options, ("data", "validation_data", "steps")), options.out, samples=False)
    blocks, seeds = unique(options.blocks), unique(options.seeds)
    rows = ablate(trials, blocks, options.only, seeds)
    tables = {block: ablation_table(rows, block) for block in blocks}
    note = (
        f"Mean (range) over seeds {', '.join(map(str, seeds))}; text: {trials.metadata['text']}; peak learning rate "
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
    sys.exit(run_script(main, keep_running=True))
