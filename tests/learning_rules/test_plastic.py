"""The plastic part, which stores what a rule has changed apart from the trained weights; its file; reward sources."""

import json
import signal

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from nord_snn.learning_rules import (
    STDP,
    GivenReward,
    LossBelowBaseline,
    PlasticPart,
    RewardModulatedSTDP,
    RewardSource,
    load_plastic,
    save_plastic,
)
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import reward_from_loss

pytestmark = pytest.mark.quick


def network(**more):
    """Return a network of one layer and a reward-modulated rule."""
    net = nn.Sequential(nn.Linear(6, 4, bias=False), AssociativeLIFNode(4, n_clusters=2, step_mode="m"))
    with torch.no_grad():
        net[0].weight.abs_()
    return net, RewardModulatedSTDP("m", net[0], net[1], **more)


def synapse_with(weight):
    synapse = nn.Linear(7, 5, bias=False)
    synapse.weight = nn.Parameter(weight.clone())
    return synapse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loaded_file_gives_the_saved_weights_on_the_same_trained_weights(tmp_path, dtype):
    trained = torch.randn(5, 7).to(dtype)
    part = PlasticPart(synapse_with(trained))
    for scale in (1e-3, 1e-8, 3.0):
        part.apply((scale * torch.randn(5, 7)).to(dtype))
    save_plastic(tmp_path / "mine.safetensors", {"fc": part})
    other = PlasticPart(synapse_with(trained))
    other.apply(torch.ones(5, 7, dtype=dtype))  # loading replaces this change
    load_plastic(tmp_path / "mine.safetensors", {"fc": other})
    assert torch.equal(other.weight, part.weight) or (dtype == torch.float64 and other.weight.allclose(part.weight))
    other.revert()
    assert torch.equal(other.weight, trained)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_apply_changes_a_parameter_that_replaced_the_weight():
    net, rule = network(bounds=None)
    net[0].weight = nn.Parameter(torch.zeros(4, 6))
    rule.apply(torch.ones(4, 6))
    assert net[0].weight.sum() == 24
    rule.revert()
    assert not net[0].weight.any()


def test_changes_of_few_rows_make_a_small_file(tmp_path):
    """In the head of a language model only the rows of the tokens of a text change."""
    head = nn.Linear(16, 5000, bias=False)
    trained = head.weight.detach().clone()
    part = PlasticPart(head)
    rows = torch.tensor([7, 4999, 3])
    part.apply(torch.ones(3, 16), rows)
    with torch.no_grad():
        head.weight[5] += 1.0  # as by an optimizer
        head.weight[7] += 1.0
    part.apply(torch.ones(1, 16), torch.tensor([7]))
    expected = trained.clone()
    expected[rows] += 1
    expected[5] += 1
    expected[7] += 2
    assert torch.allclose(head.weight, expected)
    save_plastic(tmp_path / "a.safetensors", {"head": part})
    assert (tmp_path / "a.safetensors").stat().st_size < 2000
    part.revert()
    expected[rows] -= 1
    expected[7] -= 1
    assert torch.allclose(head.weight, expected, atol=1e-6)
    untouched = torch.ones(5000, dtype=torch.bool)
    untouched[[5, 7]] = False
    assert torch.equal(head.weight[untouched], trained[untouched])  # bit for bit
    with pytest.raises(ValueError, match=r"\[n_out, n_in\] = \[1, 16\], got \[2, 16\]"):
        part.apply(torch.ones(2, 16), torch.tensor([7]))


def test_the_file_has_the_plastic_part_and_no_optimizer_changes(tmp_path):
    net, rule = network(bounds=None)
    rule.apply(torch.full((4, 6), 0.25))
    with torch.no_grad():
        net[0].weight.add_(1.0)
    save_plastic(tmp_path / "a.safetensors", {"fc": rule})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {"fc/rows", "fc/delta"}
        assert torch.allclose(file.get_tensor("fc/delta"), torch.full((4, 6), 0.25, dtype=torch.float64))
    assert (tmp_path / "a.safetensors").stat().st_size < 1000


def test_loading_reverts_synapses_that_were_unchanged_when_saved(tmp_path):
    (_, first), (_, second) = network(), network()
    first.apply(torch.full((4, 6), 0.1))
    save_plastic(tmp_path / "a.safetensors", {"first": first, "second": second})
    trained = second.synapse.weight.detach().clone()
    second.apply(torch.full((4, 6), 0.1))
    load_plastic(tmp_path / "a.safetensors", {"first": first, "second": second})
    assert torch.equal(second.synapse.weight, trained)


def test_files_that_do_not_match_raise_and_change_no_weight(tmp_path):
    (_, rule), (_, other_rule) = network(), network()
    good = tmp_path / "good.safetensors"
    with pytest.raises(ValueError, match="nothing to save"):
        save_plastic(good, {"fc": rule})
    rule.apply(torch.full((4, 6), 0.1))
    save_plastic(good, {"fc": rule})
    before = good.read_bytes()
    with pytest.raises(OSError, match="nowhere"):
        save_plastic(tmp_path / "nowhere" / "a.safetensors", {"fc": rule})
    weight = other_rule.synapse.weight.detach().clone()

    def assert_raises(path, message, learned=other_rule, name="fc"):
        with pytest.raises(ValueError, match=message):
            load_plastic(path, {name: learned})
        assert torch.equal(other_rule.synapse.weight, weight)

    assert_raises(good, "fc was learned on top of other trained weights")
    assert_raises(good, "expected changes of head only, got changes of fc", name="head")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"fc": torch.zeros(4, 6)}, foreign)
    assert_raises(foreign, "not a file of plastic weights")
    (tmp_path / "text").write_text("no tensors")
    assert_raises(tmp_path / "text", "not a file of plastic weights")
    (tmp_path / "short").write_bytes(before[: len(before) // 2])
    assert_raises(tmp_path / "short", "not a file of plastic weights")
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    broken = tmp_path / "nan.safetensors"
    rows = {"fc/rows": torch.arange(4)}
    save_file({"fc/delta": torch.full((4, 6), float("nan"), dtype=torch.float64), **rows}, broken, metadata)
    rule.revert()
    assert_raises(broken, "must be finite", learned=rule)
    for change, tensors in (
        ({"trained": json.dumps(["?"])}, {"fc/delta": torch.zeros(4, 6), **rows}),
        ({"trained": "null"}, {"fc/delta": torch.zeros(4, 6), **rows}),
        ({"trained": "{}"}, {"fc/delta": torch.zeros(4, 6), **rows}),
        ({}, rows),
        ({}, {"fc/delta": torch.zeros(4, 5, dtype=torch.float64), **rows}),
        ({}, {"fc/delta": torch.zeros(1, 6, dtype=torch.float64), "fc/rows": torch.tensor([4])}),
    ):
        save_file(tensors, foreign, {**metadata, **change})
        assert_raises(foreign, "not a file of plastic weights", learned=rule)
    with pytest.raises(FileNotFoundError):
        load_plastic(tmp_path / "none", {"fc": rule})


def test_another_file_is_not_overwritten(tmp_path):
    _, rule = network()
    rule.apply(torch.full((4, 6), 0.1))
    model = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, model)
    before = model.read_bytes()
    with pytest.raises(ValueError, match="expected a new file"):
        save_plastic(model, {"fc": rule})
    assert model.read_bytes() == before
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="expected a new file"):
        save_plastic(tmp_path / "text", {"fc": rule})
    assert (tmp_path / "text").read_text() == "no tensors"
    with pytest.raises(FileNotFoundError, match="expected a file in a folder"):
        save_plastic(tmp_path, {"fc": rule})


def test_ctrl_c_during_a_change_never_prevents_revert(request):
    """The signal is delayed until weight and plastic part agree."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    fc = nn.Linear(400, 400, bias=False)
    trained = fc.weight.detach().clone()
    part = PlasticPart(fc)
    stopped = 0
    for delay in range(60):
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 2e-4 * (1 + delay % 12))
        try:
            for _ in range(20):
                part.apply(torch.full((400, 400), 0.01))
                part.revert()
        except KeyboardInterrupt:
            stopped += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        part.revert()
        assert torch.equal(fc.weight, trained)
    assert stopped > 30  # of 60


def test_a_change_that_would_overflow_raises_and_changes_no_weight():
    net, rule = network(bounds=None)
    before = net[0].weight.detach().clone()
    for delta in (torch.full((4, 6), 1e300, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="apply expects"):
            rule.apply(delta)
        assert torch.equal(net[0].weight, before)
    rule.apply(torch.full((4, 6), 3e38))
    with pytest.raises(ValueError, match="keeps the weights finite"):
        rule.apply(torch.full((4, 6), 3e38))
    rule.revert()
    assert torch.equal(net[0].weight, before)


def test_revert_does_not_change_reloaded_weights():
    net, rule = network(bounds=None)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    rule.apply(torch.full((4, 6), 0.5))
    net.load_state_dict(state)
    rule.revert()
    assert torch.equal(net[0].weight, state["0.weight"])


def test_an_invalid_state_of_a_reward_source_raises():
    for source, state in (
        (LossBelowBaseline(), {}),
        (LossBelowBaseline(), {"baseline": float("nan")}),
        (GivenReward(), {"mean": "x"}),
    ):
        with pytest.raises(ValueError, match="must have a finite"):
            source.load_state_dict(state)
    source = LossBelowBaseline()
    with pytest.raises(ValueError, match="not empty"):
        source(torch.empty(0))
    with pytest.raises(TypeError, match=r"must be a real tensor.* torch\.complex64"):
        source(torch.tensor(1j))
    assert source.baseline == 10.0


def test_a_full_disk_does_not_damage_the_existing_file(tmp_path, monkeypatch):
    _, rule = network()
    rule.apply(torch.full((4, 6), 0.1))
    path = tmp_path / "a.safetensors"
    save_plastic(path, {"fc": rule})
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("nord_snn.learning_rules.plastic.os.replace", fail)
    rule.apply(torch.full((4, 6), 0.1))
    with pytest.raises(OSError, match="no space"):
        save_plastic(path, {"fc": rule})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_error_of_the_file_format_is_an_os_error_with_the_path(tmp_path, monkeypatch):
    _, rule = network()
    rule.apply(torch.full((4, 6), 0.1))

    def fail(*_, **__):
        raise SafetensorError("I/O error")

    monkeypatch.setattr("nord_snn.learning_rules.plastic.save_file", fail)
    with pytest.raises(OSError, match=r"a\.safetensors could not be written \(I/O error\)"):
        save_plastic(tmp_path / "a.safetensors", {"fc": rule})
    assert list(tmp_path.iterdir()) == []


def test_replace_raises_for_an_invalid_change_and_changes_no_weight():
    net, rule = network(bounds=None)
    rule.apply(torch.full((4, 6), 0.1))
    before = net[0].weight.detach().clone()
    for delta, message in (
        (torch.zeros(6, 4), r"replace expects a change delta of shape \[4, 6\], got \[6, 4\]"),
        (torch.full((4, 6), 1e300, dtype=torch.float64), "keeps the weights finite"),
    ):
        with pytest.raises(ValueError, match=message):
            rule.plastic.replace(delta)
        assert torch.equal(net[0].weight, before)


def test_the_trained_weights_move_with_the_network():
    net, rule = network(bounds=None)
    rule.apply(torch.full((4, 6), 0.1))
    net.to("meta")
    assert rule.plastic.weight is net[0].weight
    assert rule.plastic._trained.device.type == rule.plastic._written.device.type == "meta"


# --- reward sources


def test_the_reward_of_a_loss_is_relative_to_its_running_mean():
    source = LossBelowBaseline(scale=2.0, baseline=3.0, decay=0.9)
    assert source(2.5) == pytest.approx(reward_from_loss(2.5, 3.0, 2.0))
    assert source.baseline == pytest.approx(0.9 * 3.0 + 0.1 * 2.5)
    losses = torch.tensor([1.0, 2.0, 6.0])
    expected = [reward_from_loss(loss, source.baseline, 2.0) for loss in losses.tolist()]
    assert torch.allclose(source(losses), torch.tensor(expected))
    assert source.baseline == pytest.approx(0.9 * 2.95 + 0.1 * 3.0)
    loaded = LossBelowBaseline()
    loaded.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert loaded.baseline == source.baseline


def test_the_first_loss_can_set_the_baseline():
    source = LossBelowBaseline(baseline=None)
    assert source.state_dict() == {"baseline": None}
    assert source(4.0) == 0
    assert source.baseline == 4.0
    assert source(3.0) > 0


def test_a_given_reward_can_be_relative_to_its_running_mean():
    source = GivenReward()
    assert source(0.5) == 0.5
    assert torch.equal(source(torch.tensor([1.0, -1.0])), torch.tensor([1.0, -1.0]))
    with_baseline = GivenReward(decay=0.5)
    assert [with_baseline(1.0), with_baseline(1.0), with_baseline(1.0)] == [1.0, 0.5, 0.25]
    other = GivenReward(decay=0.5)
    other.load_state_dict(with_baseline.state_dict())
    assert other(1.0) == 0.125


def test_a_rule_uses_its_reward_source_and_saves_its_state():
    net, rule = network(source=GivenReward(decay=0.5))
    for expected in (1.0, 0.5):
        net((torch.rand(6, 3, 6) < 0.6).float())
        rule.step(reward=1.0)
        assert rule.last_reward == expected
        rule.reset()
        net[1].reset()
    _, other = network(source=GivenReward(decay=0.5))
    other.load_state_dict(rule.state_dict())
    assert other.source.mean == 0.75
    with pytest.raises(ValueError, match="GivenReward, expects a reward"):
        rule.step(loss=1.0)
    assert not hasattr(rule, "baseline")


def test_a_user_reward_source_is_used():
    class Twice(RewardSource):
        seen = ()

        def reward(self, outcome):
            return 2 * outcome

        def update(self, outcome):
            self.seen = (*self.seen, outcome)

    net, rule = network(source=Twice())
    net((torch.rand(6, 3, 6) < 0.6).float())
    rule.step(reward=0.25)
    assert rule.last_reward == 0.5
    assert rule.source.seen == (0.25,)
    assert Twice()(torch.tensor([1.0, 3.0])).tolist() == [2.0, 6.0]
    assert rule.state_dict()["_extra_state"] == {}


def test_without_recorded_spikes_the_baseline_does_not_change():
    net, rule = network(baseline=3.0)
    net((torch.rand(6, 3, 6) < 0.6).float())
    rule.step(loss=2.0)
    before = rule.baseline, rule.last_reward
    assert rule.step(loss=100.0) is None
    rule.disable()
    assert rule.step(loss=100.0) is None
    assert (rule.baseline, rule.last_reward) == before


def test_losses_per_sample_give_rewards_per_sample():
    net, rule = network(baseline=3.0)
    x = (torch.rand(6, 2, 6) < 0.6).float()
    net(x)
    change = rule.step(loss=torch.tensor([2.0, 4.0]), on_grad=False)
    assert rule.last_reward[0] > 0 > rule.last_reward[1]
    assert rule.baseline == pytest.approx(3.0)
    rule.reset()
    net[1].reset()
    net(x)
    rewards = torch.tensor([reward_from_loss(2.0, 3.0), reward_from_loss(4.0, 3.0)])
    assert torch.allclose(rule.step(reward=rewards, on_grad=False), change, atol=1e-7)


def test_a_step_that_raises_does_not_change_the_baseline():
    net, rule = network(baseline=3.0)
    net(torch.full((6, 2, 6), float("nan")))
    with pytest.raises(ValueError, match="NaN"):
        rule.step(loss=1.0)
    assert rule.baseline == 3.0


@pytest.mark.parametrize("source", [LossBelowBaseline, GivenReward])
def test_reward_sources_raise_on_bad_input(source):
    with pytest.raises(ValueError, match="decay must lie in"):
        source(decay=1.0)
    with pytest.raises(ValueError, match="must be finite"):
        source()(float("inf"))
    with pytest.raises(TypeError, match="got list"):
        source()([1.0])


def test_accelerate_can_checkpoint_a_source(tmp_path):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    source = LossBelowBaseline(baseline=3.0)
    accelerator.register_for_checkpointing(source)
    accelerator.save_state(str(tmp_path))
    source(1.0)
    accelerator.load_state(str(tmp_path))
    assert source.baseline == 3.0


def test_a_closed_rule_keeps_its_applied_change():
    net, _ = network()
    rule = STDP("m", net[0], net[1])
    trained = net[0].weight.detach().clone()
    rule.apply(torch.full((4, 6), 0.1))
    rule.close()
    assert not torch.equal(net[0].weight, trained)
    rule.revert()
    assert torch.equal(net[0].weight, trained)
