"""Learning rules in several processes: all processes have the same weight change, reward and baseline."""

import subprocess
import sys

import pytest
import torch
from helpers import Ranks

from nord_snn.learning_rules import RewardModulatedSTDP
from nord_snn.learning_rules.distributed import mean_over_ranks, raise_on_all_ranks
from nord_snn.neurons import AssociativeLIFNode

SCRIPT = """
import os, sys, torch
from torch import distributed, nn
from nord_snn.learning_rules import RewardModulatedSTDP
from nord_snn.neurons import AssociativeLIFNode

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if size > 1:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 6, bias=False), AssociativeLIFNode(6, n_clusters=2, step_mode="m"))
net[0].weight.data.abs_()
rule = RewardModulatedSTDP(step_mode="m", synapse=net[0], sn=net[1], reduction="mean")
x = (torch.rand(3, 10, 4, 8) < 0.5).float()
deltas = []
for step in range(3):
    if not (step == 2 and rank == 1):  # before the last update the network of one process is not called
        net(x[step, :, rank::size])
        rule.sn.reset()
    losses = [9.0 - step - 0.1 * row for row in range(4) if row % size == rank]
    deltas.append(rule.step(loss=sum(losses) / len(losses), on_grad=False))
    rule.reset()
assert rule.step(reward=1.0, on_grad=False) is None  # no process has recorded spikes
for outcome in ({"loss": float("nan")}, {"reward": float("nan")}):  # in one process: both raise, none waits
    try:
        rule.step(**(outcome if rank == 0 else {name: 1.0 for name in outcome}))
    except (ValueError, RuntimeError) as error:
        message = "must be finite" if rank == 0 else "failed in another process"
        assert message in str(error), error
    else:
        raise SystemExit("no error")
def assert_raises(message, on_rank_1="failed in another process", **outcome):
    # A step raises in both processes, and the next one has the same result in both.
    try:
        rule.step(**outcome)
    except (ValueError, RuntimeError, TypeError) as error:
        assert (message if rank == 0 else on_rank_1) in str(error), error
    else:
        raise SystemExit(f"no error after {message}")
    deltas.append(rule.step(loss=torch.tensor([8.0, 7.0]) if rank == 0 else 6.0, on_grad=False))  # of different types

measured = {"baseline": rule.baseline, "reward": rule.last_reward}
if size > 1:
    net(x[0, :, rank::size])
    assert_raises("pass either", **({} if rank == 0 else {"loss": 1.0}))
    net(x[1, :, rank::size])
    assert_raises("pass either", **({"loss": 1.0, "reward": 1.0} if rank == 0 else {"loss": 1.0}))
    net(x[0, :, rank::size])
    assert_raises("must be a number", **({"loss": "high"} if rank == 0 else {"reward": 1.0}))
    net(x[1, :, rank::size])
    message = "all processes must pass a loss, or all a reward"
    assert_raises(message, message, **({"loss": 1.0} if rank == 0 else {"reward": 1.0}))
    net(x[2, :, rank::size])
    reward_of = rule.source.reward
    rule.source.reward = lambda outcome: 1 / 0 if rank == 0 and outcome == 1.0 else reward_of(outcome)
    try:
        rule.step(loss=1.0)
    except (ZeroDivisionError, RuntimeError) as error:
        assert rank == 0 or "failed in another process" in str(error), error
    else:
        raise SystemExit("no error after an error of the source")
    rule.source.reward = reward_of
    deltas.append(rule.step(loss=1.0, on_grad=False))
torch.save(measured | {"deltas": deltas, "last_baseline": rule.baseline}, f"{folder}/{size}-{rank}.pt")
if size > 1:
    distributed.barrier()
os._exit(0)  # destroying the process group may abort a process that has finished
"""


def test_all_ranks_apply_the_same_change_as_one_process(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(size), str(tmp_path)], stderr=subprocess.PIPE)
        for size, rank in ((2, 0), (2, 1), (1, 0))
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
    first, second, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("2-0", "2-1", "1-0"))
    assert first["baseline"] == second["baseline"]
    assert first["last_baseline"] == second["last_baseline"]
    assert abs(first["baseline"] - alone["baseline"]) < 1e-6
    assert first["reward"] == second["reward"]
    assert abs(first["reward"] - alone["reward"]) < 1e-6  # an update without recorded spikes does not change it
    assert len(first["deltas"]) == 8  # three updates, and one after each of five errors
    for step in range(8):
        assert torch.equal(first["deltas"][step], second["deltas"][step])
        assert first["deltas"][step].abs().sum() > 0
    for step in range(2):
        assert torch.allclose(first["deltas"][step], alone["deltas"][step], atol=1e-8)


@pytest.mark.quick
@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True), (False, False)])
def test_the_mean_is_over_all_processes_and_none_counts_as_zeros(monkeypatch, present):
    tensors = [torch.full((2,), rank + 1.0) if is_present else None for rank, is_present in enumerate(present)]
    means = Ranks(monkeypatch).run(lambda rank: mean_over_ranks(tensors[rank], torch.ones(2)))
    expected = sum(rank + 1.0 for rank, is_present in enumerate(present) if is_present) / 2
    assert [None if mean is None else mean.tolist() for mean in means] == [[expected] * 2 if any(present) else None] * 2
    assert all(x is None or x.tolist() == [rank + 1.0] * 2 for rank, x in enumerate(tensors))  # inputs are unchanged


@pytest.mark.quick
@pytest.mark.parametrize("failing", [(), (0,), (1,), (0, 1)])
def test_an_error_in_one_process_raises_in_all(monkeypatch, failing):
    def compute(rank):
        if rank in failing:
            raise KeyError(f"rank {rank}")
        return rank

    outcomes = Ranks(monkeypatch).run(lambda rank: raise_on_all_ranks(lambda: compute(rank), torch.device("cpu")))
    for rank, outcome in enumerate(outcomes):
        if rank in failing:
            assert isinstance(outcome, KeyError)
        elif failing:
            assert isinstance(outcome, RuntimeError)
            assert "failed in another process" in str(outcome)
        else:
            assert outcome == rank


def test_a_single_process_does_not_communicate():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), AssociativeLIFNode(4, n_clusters=2, step_mode="m"))
    rule = RewardModulatedSTDP(step_mode="m", synapse=net[0], sn=net[1])
    torch.nn.init.constant_(net[0].weight, 0.5)
    net(torch.ones(5, 1, 4))
    assert rule.step(loss=1.0, on_grad=False) is not None
    assert abs(rule.baseline - 9.91) < 1e-9


def failing_in_one(what):
    """Return a rule of rank ``rank`` whose source fails in rank 1, and the weights before."""

    def run(rank):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), AssociativeLIFNode(4, n_clusters=2, step_mode="m"))
        torch.nn.init.constant_(net[0].weight, 0.5)
        rule = RewardModulatedSTDP(step_mode="m", synapse=net[0], sn=net[1])
        net(torch.ones(5, 1, 4))

        def fail(*_):
            raise KeyError("of one process")

        if rank == 1 and what in ("reward", "update"):
            setattr(rule.source, what, fail)
        arguments = {"loss": 1.0} | ({what: "nonsense"} if rank == 1 and what not in ("reward", "update") else {})
        try:
            rule.apply(rule.step(**{"on_grad": False} | arguments))
        except (KeyError, RuntimeError, TypeError) as error:
            return type(error), net[0].weight.unique().tolist()
        return None, None

    return run


@pytest.mark.parametrize("what", ["reward", "update", "scale", "on_grad", "loss"])
def test_an_error_of_one_process_leaves_the_weights_of_all(monkeypatch, what):
    """A source that fails in its reward or its update, and wrong arguments: both end with an error, none waits."""
    (first, weights), (second, other_weights) = Ranks(monkeypatch).run(failing_in_one(what))
    assert first is RuntimeError
    assert second in (KeyError, TypeError)
    assert weights == other_weights == [0.5]
