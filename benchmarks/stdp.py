"""One STDP update from recorded spikes of a layer of the language model, pre and post [T, batch, tokens, D]."""

import math
from collections.abc import Callable

import torch
from spikingjelly.activation_based.learning import STDPLearner
from torch import Tensor, nn

from nord_snn.learning_rules import STDP, RewardModulatedSTDP, TripletSTDP

__all__ = ["FLOOR", "ROWS", "SHAPE", "case", "contestants", "gate", "ours"]

SHAPE, N_OUT = (10, 32, 128, 512), 512
RATE = 0.1
ROWS = 64  # that the peer is given: a row costs it the same wherever it stands
FLOOR = "the two matrix products alone"
TAU_SJ = 1 / (1 - math.exp(-1 / 20))  # where its traces decay as ours do at 20 steps


def case() -> tuple[Tensor, Tensor]:
    """Spikes on both sides."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.rand(SHAPE, generator=generator) < RATE
    post = torch.rand(*SHAPE[:-1], N_OUT, generator=generator) < RATE
    return pre.float(), post.float()


def peer(pre: Tensor, post: Tensor, rows_at_once: int) -> Callable[[], Tensor]:
    """SpikingJelly's learner: it takes no tokens, so the rows are given one after the other, or some at once."""
    synapse = nn.Linear(pre.shape[-1], post.shape[-1], bias=False)
    learner = STDPLearner("m", synapse, nn.Identity(), TAU_SJ, TAU_SJ, lambda w: 0.005, lambda w: 0.005)
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
    """One of our learners, given all rows at once."""
    learner = kind("m", nn.Linear(pre.shape[-1], post.shape[-1], bias=False), nn.Identity())

    def run() -> Tensor:
        learner._pre, learner._post = [pre], [post]
        learner._was_called = True
        delta = learner.step(on_grad=False, **outcome)
        learner.reset()
        assert delta is not None
        return delta

    return run


def contestants(pre: Tensor, post: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The peer on :data:`ROWS` rows, ours on all of them, and the floor."""
    x, y = pre.flatten(0, 2), post.flatten(0, 2)
    return {
        "SpikingJelly `STDPLearner`, row by row": peer(pre, post, 1),
        "SpikingJelly `STDPLearner`, 16 rows at once": peer(pre, post, 16),
        "**nord-snn** `TripletSTDP`": ours(TripletSTDP, pre, post),
        "**nord-snn** `RewardModulatedSTDP`, a reward for each token": ours(
            RewardModulatedSTDP, pre, post, reward=torch.randn(pre.shape[1:3])
        ),
        "**nord-snn** `STDP`": ours(STDP, pre, post),
        FLOOR: lambda: (y.mT @ x) - (y.mT @ x),
    }


def gate(pre: Tensor, post: Tensor) -> str:
    """Ours and the peer's on the rows that both can be given."""
    rows = [x.flatten(1, 2)[:, None, :ROWS] for x in (pre, post)]
    expected, got = peer(pre, post, 1)(), ours(STDP, *rows)()
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    if error > 1e-5:
        raise SystemExit(f"STDP differs from SpikingJelly's by {error:.1e}")
    return f"the update differs from SpikingJelly's by {error:.1e} of the largest change"
