"""One STDP update from recorded spikes of a layer of the language model, pre and post [T, batch, tokens, D]."""

import math
from collections.abc import Callable

import torch
from spikingjelly.activation_based.learning import STDPLearner
from torch import Tensor, nn

from nord_snn.learning_rules import STDP, RewardModulatedSTDP, TripletSTDP

__all__ = ["LOWER_BOUND", "ROWS", "SHAPE", "check", "implementations", "make_inputs", "ours"]

SHAPE, N_OUT = (10, 32, 128, 512), 512
RATE = 0.1
ROWS = 64  # rows for SpikingJelly's learner, whose time is proportional to their number
LOWER_BOUND = "the two matrix products alone"
TAU = 1 / (1 - math.exp(-1 / 20))  # same decay as a time constant of 20 time steps in our rules


def make_inputs() -> tuple[Tensor, Tensor]:
    """Return pre and post spikes."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.rand(SHAPE, generator=generator) < RATE
    post = torch.rand(*SHAPE[:-1], N_OUT, generator=generator) < RATE
    return pre.float(), post.float()


def spikingjelly(pre: Tensor, post: Tensor, rows_at_once: int) -> Callable[[], Tensor]:
    """Return an update of SpikingJelly's learner, which has no token dimension, on batches of ``rows_at_once`` rows."""
    synapse = nn.Linear(pre.shape[-1], post.shape[-1], bias=False)
    learner = STDPLearner("m", synapse, nn.Identity(), TAU, TAU, lambda w: 0.005, lambda w: 0.005)
    rows = [x.flatten(1, 2)[:, :ROWS].split(rows_at_once, dim=1) for x in (pre, post)]

    def run() -> Tensor:
        total = torch.zeros_like(synapse.weight)
        for row_pre, row_post in zip(*rows, strict=True):
            learner.in_spike_monitor.records.append(row_pre)
            learner.out_spike_monitor.records.append(row_post)
            total += learner.step(on_grad=False)
            learner.reset()
        return total

    return run


def ours(kind: type[STDP | TripletSTDP], pre: Tensor, post: Tensor, **outcome: Tensor) -> Callable[[], Tensor]:
    """Return an update of one of our rules, with all rows at once."""
    learner = kind("m", nn.Linear(pre.shape[-1], post.shape[-1], bias=False), nn.Identity())

    def run() -> Tensor:
        learner._pre, learner._post = [pre], [post]
        learner._was_called = True
        delta = learner.step(on_grad=False, **outcome)
        learner.reset()
        assert delta is not None
        return delta

    return run


def implementations(pre: Tensor, post: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return updates of SpikingJelly on :data:`ROWS` rows, of nord-snn on all rows, and the lower bound, by name."""
    x, y = pre.flatten(0, 2), post.flatten(0, 2)
    return {
        "SpikingJelly `STDPLearner`, row by row": spikingjelly(pre, post, 1),
        "SpikingJelly `STDPLearner`, 16 rows at once": spikingjelly(pre, post, 16),
        "**nord-snn** `TripletSTDP`": ours(TripletSTDP, pre, post),
        "**nord-snn** `RewardModulatedSTDP`, a reward for each token": ours(
            RewardModulatedSTDP, pre, post, reward=torch.randn(pre.shape[1:3])
        ),
        "**nord-snn** `STDP`": ours(STDP, pre, post),
        LOWER_BOUND: lambda: (y.mT @ x) - (y.mT @ x),
    }


def check(pre: Tensor, post: Tensor) -> str:
    """Compare our STDP with SpikingJelly's on :data:`ROWS` rows; exit if they differ."""
    rows = [x.flatten(1, 2)[:, None, :ROWS] for x in (pre, post)]
    expected, actual = spikingjelly(pre, post, 1)(), ours(STDP, *rows)()
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    if error > 1e-5:
        raise SystemExit(f"STDP differs from SpikingJelly's by {error:.1e}")
    return f"the update differs from SpikingJelly's by {error:.1e} of the largest change"
