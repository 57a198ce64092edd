"""One STDP update from recorded spikes of a layer of the language model, pre and post [T, batch, tokens, D]."""

import math
from collections.abc import Callable

import torch
from spikingjelly.activation_based.learning import STDPLearner
from torch import Tensor, nn

from nord_snn.learning_rules import STDP, RewardModulatedSTDP, TripletSTDP

__all__ = ["LOWER_BOUND", "ROWS", "SHAPE", "check", "implementations", "make_inputs", "ours"]

SHAPE, N_OUT = (10, 32, 128, 512), 512  # of the input spikes; number of output neurons
RATE = 0.1  # firing rate
ROWS = 64  # rows for SpikingJelly's learner, whose time is proportional to their number
LOWER_BOUND = "the two matrix products alone"
TAU = 1 / (1 - math.exp(-1 / 20))  # SpikingJelly's traces decay by 1 - 1 / TAU, ours by exp(-1 / 20)


def make_inputs() -> tuple[Tensor, Tensor]:
    """Return input spikes ``[T, batch, tokens, D]`` and output spikes ``[T, batch, tokens, N_OUT]``."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.rand(SHAPE, generator=generator) < RATE
    post = torch.rand(*SHAPE[:-1], N_OUT, generator=generator) < RATE
    return pre.float(), post.float()


def spikingjelly(pre: Tensor, post: Tensor, rows_at_once: int) -> Callable[[], Tensor]:
    """Return a function that computes an update with SpikingJelly's learner.

    The learner supports no dimension of tokens: the first :data:`ROWS` tokens are a batch, split into ``rows_at_once`` rows.
    """
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
    """Return a function that computes an update with one of our rules, with all rows at once."""
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
    """Return functions that compute an update: SpikingJelly on :data:`ROWS` rows, nord-snn on all, and the lower bound."""
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
