"""STDP learners: sign of the change, reward, bounds, revert, life cycle, and bad input."""

import copy
import warnings

import pytest
import torch
from spikingjelly.activation_based.learning import STDPLearner
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

from nord_snn.learning_rules import STDP, GivenReward, RewardModulatedSTDP, TripletSTDP
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import stdp

pytestmark = pytest.mark.quick


class FixedSpikes(nn.Module):
    """Neurons with fixed spikes."""

    def __init__(self, spikes):
        super().__init__()
        self.spikes = spikes

    def forward(self, x):
        """Ignore the input."""
        return self.spikes


def synapse_with_spikes(pre, post, rule=STDP, **more):
    """Return a function that runs a synapse with spikes ``pre`` and ``post`` ``[T]``, the synapse, and its learner."""
    synapse, sn = nn.Linear(1, 1, bias=False), FixedSpikes(post.reshape(-1, 1, 1))
    learner = rule(step_mode="m", synapse=synapse, sn=sn, **more)
    return lambda: sn(synapse(pre.reshape(-1, 1, 1))), synapse, learner


EARLY, LATE = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])


@pytest.mark.parametrize(("pre", "post", "sign"), [(EARLY, LATE, 1), (LATE, EARLY, -1)])
def test_the_order_of_spikes_sets_the_sign_of_the_change_and_a_negative_reward_reverses_it(pre, post, sign):
    run, _, learner = synapse_with_spikes(pre, post)
    run()
    assert learner.step(on_grad=False).sign().item() == sign
    run, _, learner = synapse_with_spikes(pre, post, RewardModulatedSTDP)
    for reward in (1.0, -1.0, 0.0):
        run()
        assert learner.step(reward=reward, on_grad=False).sign().item() == sign * reward
        learner.reset()


def network(n_in=6, n_out=4, rule=STDP, step_mode="m", **more):
    """Return a synapse with its neurons, and a learner."""
    net = nn.Sequential(nn.Linear(n_in, n_out), AssociativeLIFNode(n_out, n_clusters=2, step_mode=step_mode))
    with torch.no_grad():
        net[0].weight.abs_()
    return net, rule(step_mode=step_mode, synapse=net[0], sn=net[1], **more)


def test_the_learner_equals_the_op_over_all_rows():
    net, rule = network()
    x = (torch.rand(7, 2, 3, 6) < 0.4).float()
    spikes = net(x)
    assert spikes.sum() > 0
    expected, _ = stdp(x.flatten(1, 2), spikes.detach().flatten(1, 2))
    assert torch.allclose(rule.step(on_grad=False), expected, atol=1e-7)
    _, mean = network(reduction="mean")
    mean._pre, mean._post = [x], [spikes.detach()]
    assert torch.allclose(mean.step(on_grad=False), expected / 6, atol=1e-7)


def test_changes_of_single_time_steps_sum_to_that_of_the_sequence():
    x = (torch.rand(7, 2, 6) < 0.4).float()
    net, rule = network()
    net(x)
    whole = rule.step(on_grad=False)
    single_net, single = network(step_mode="s")
    single_net.load_state_dict(net.state_dict())
    parts = []
    for x_t in x:
        single_net(x_t)
        parts.append(single.step(on_grad=False))
    assert torch.allclose(sum(parts), whole, atol=1e-7)


def test_the_change_equals_that_of_spikingjellys_learner():
    """SpikingJelly's traces decay by 1 - 1 / tau, ours by exp(-1 / tau): they are equal for tau_sj = 1 / (1 - exp(-1 / tau))."""
    synapse, sn = nn.Linear(5, 3, bias=False), LIFNode(step_mode="m")
    with torch.no_grad():
        synapse.weight.abs_().add_(0.5)
    tau_sj = 1 / (1 - torch.tensor(-1 / 20.0, dtype=torch.float64).exp().item())
    spikingjelly_learner = STDPLearner(
        step_mode="m",
        synapse=synapse,
        sn=sn,
        tau_pre=tau_sj,
        tau_post=tau_sj,
        f_pre=lambda w: 0.005,
        f_post=lambda w: 0.005,
    )
    our_learner = STDP(step_mode="m", synapse=synapse, sn=sn)
    spikes = sn(synapse((torch.rand(9, 1, 5) < 0.6).float()))
    assert spikes.sum() > 0
    assert torch.allclose(our_learner.step(on_grad=False), spikingjelly_learner.step(on_grad=False), atol=1e-6)


def test_with_on_grad_the_optimizer_adds_the_change():
    net, rule = network()
    x = (torch.rand(7, 2, 6) < 0.6).float()
    net(x)
    before = net[0].weight.detach().clone()
    record = (list(rule._pre), list(rule._post))
    delta = rule.step(on_grad=False, scale=2.0)
    rule.reset()
    rule._pre, rule._post = record
    net[0].weight.grad = torch.ones_like(before)
    assert rule.step(scale=2.0) is None
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert torch.allclose(net[0].weight, before - 1 + delta, atol=1e-6)


def test_the_reward_is_relative_to_a_running_mean_of_the_loss_which_reset_does_not_change():
    net, rule = network(rule=RewardModulatedSTDP, baseline=3.0, baseline_decay=0.9)
    x = (torch.rand(7, 2, 6) < 0.6).float()
    net(x)
    good = rule.step(loss=torch.tensor(2.0), on_grad=False)
    assert rule.baseline == pytest.approx(0.9 * 3.0 + 0.1 * 2.0)
    rule.reset()
    net[1].reset()
    net(x)
    bad = rule.step(loss=5.0, on_grad=False)
    assert rule.baseline == pytest.approx(0.9 * 2.9 + 0.5)
    assert (good * bad <= 0).all()
    assert (good != 0).any()
    _, other = network(rule=RewardModulatedSTDP)
    other.load_state_dict(rule.state_dict())
    assert other.baseline == rule.baseline


def test_apply_stays_within_bounds_and_revert_restores_the_weights():
    net, rule = network(bounds=(-0.3, 1.0))
    with torch.no_grad():
        net[0].weight[0] = torch.tensor([0.99, -0.29, 0.5, 1.5, -2.0, 0.0])  # 1.5 and -2.0 are outside of the bounds
    before = net[0].weight.detach().clone()
    rule.apply(torch.full((4, 6), 0.1))
    assert torch.allclose(net[0].weight[0], torch.tensor([1.0, -0.19, 0.6, 1.5, -1.9, 0.1]))
    rule.apply(torch.full((4, 6), -0.5))
    assert net[0].weight[0, 3].item() == pytest.approx(1.0)
    assert net[0].weight[0, 4].item() == pytest.approx(-1.9)
    assert net[0].weight[0, 1].item() == pytest.approx(-0.3)
    rule.revert()
    assert torch.equal(net[0].weight, before)
    rule.revert()
    assert torch.equal(net[0].weight, before)
    _, free = network(bounds=None)
    free.apply(torch.full((4, 6), 9.0))
    assert free.synapse.weight.max() > 8


def test_revert_keeps_the_changes_of_an_optimizer():
    net, rule = network(bounds=None)
    before = net[0].weight.detach().clone()
    rule.apply(torch.full((4, 6), 0.125))
    with torch.no_grad():
        net[0].weight.add_(1.0)
    rule.revert()
    assert torch.allclose(net[0].weight, before + 1.0, atol=1e-6)


def test_revert_keeps_optimizer_changes_between_two_applies():
    net, rule = network(bounds=None)
    before = net[0].weight.detach().clone()
    rule.apply(torch.full((4, 6), 0.125))
    with torch.no_grad():
        net[0].weight.add_(1.0)
    rule.apply(torch.full((4, 6), 0.25))
    rule.revert()
    assert torch.allclose(net[0].weight, before + 1.0, atol=1e-6)


def test_a_non_finite_change_raises_and_does_not_change_the_weights():
    net, rule = network()
    before = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match="finite weight change"):
        rule.apply(torch.full((4, 6), float("nan")))
    assert torch.equal(net[0].weight, before)


def test_only_selected_positions_are_recorded():
    net, rule = network()
    x = (torch.rand(7, 2, 3, 6) < 0.4).float()
    spikes = net(x).detach()
    expected, _ = stdp(x[:, :, 1:].flatten(1, 2), spikes[:, :, 1:].flatten(1, 2))
    assert torch.allclose(rule.step(on_grad=False, positions=slice(1, None)), expected, atol=1e-7)


def test_spikes_of_a_copy_are_not_recorded():
    net, rule = network()
    x = (torch.rand(4, 2, 6) < 0.5).float()
    copied = copy.deepcopy(net)
    net(x)
    assert rule.step(on_grad=False) is not None
    copied(x)
    assert rule.step(on_grad=False) is None


def test_the_loss_of_a_training_step_can_have_a_graph():
    x, gradient_changes = (torch.rand(4, 2, 6) < 0.5).float(), []
    for convert in (lambda loss: loss, lambda loss: loss.item()):
        torch.manual_seed(0)
        net, rule = network(rule=RewardModulatedSTDP)
        loss = net(x).mean()
        loss.backward()
        before = net[0].weight.grad.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rule.step(loss=convert(loss))
        gradient_changes.append(net[0].weight.grad - before)
    assert gradient_changes[0].any()
    assert torch.equal(*gradient_changes)


def test_disabled_reset_and_closed_learners_record_no_spikes():
    net, rule = network()
    x = (torch.rand(4, 2, 6) < 0.5).float()
    with pytest.raises(RuntimeError, match="neither Linear\\[4, 6\\] nor its neurons were ever called"):
        rule.step(on_grad=False)
    rule.disable()
    net(x)
    assert rule.step(on_grad=False) is None
    rule.enable()
    net(x)
    assert rule.step(on_grad=False) is not None
    assert rule.step(on_grad=False) is None  # no new spikes
    assert rule.trace_pre is not None
    rule.reset()
    assert rule.trace_pre is None
    rule.close()
    net(x)
    assert rule.step(on_grad=False) is None
    with pytest.raises(RuntimeError, match="closed"):
        rule.enable()


def test_the_learner_does_not_register_parameters_of_the_synapse():
    _, rule = network()
    assert list(rule.parameters()) == []
    assert "trace" not in str(rule)
    assert "tau_plus=20.0" in str(rule)
    assert "tau_x=" in str(network(rule=TripletSTDP)[1])


def test_misuse_raises():
    net, rule = network(rule=RewardModulatedSTDP)
    x = (torch.rand(4, 2, 6) < 0.5).float()
    net(x)
    with pytest.raises(ValueError, match="either a loss or a reward"):
        rule.step()
    with pytest.raises(ValueError, match="either a loss or a reward"):
        rule.step(loss=1.0, reward=1.0)
    with pytest.raises(ValueError, match="loss must be finite"):
        rule.step(loss=float("nan"))
    assert rule.step(reward=1.0, on_grad=False) is not None  # the errors did not delete the recorded spikes
    net[0](x)
    with pytest.raises(RuntimeError, match="equally often, got 1 and 0 calls"):
        rule.step(reward=1.0)
    rule.reset()
    net[1].reset()
    net(x[:, :1])
    rule.step(reward=1.0)
    net[1].reset()
    net(x)
    with pytest.raises(ValueError, match="when the batch shape changes"):
        rule.step(reward=1.0)
    with pytest.raises(ValueError, match=r"\[n_out, n_in\] = \[4, 6\], got \[6, 4\]"):
        rule.apply(torch.zeros(6, 4))
    with pytest.raises(ValueError, match="got None"):
        rule.apply(None)
    assert rule.extra_repr()


def test_two_batch_shapes_in_one_recording_raise():
    net, rule = network()
    for n in (1, 2):
        net[1].reset()
        net((torch.rand(4, n, 6) < 0.5).float())
    with pytest.raises(ValueError, match=r"batch shape must not change between two updates"):
        rule.step()
    net, rule = network()
    rule._pre, rule._post = [torch.zeros(4, 6)], [torch.zeros(4, 4)]
    with pytest.raises(ValueError, match=r"step_mode 'm' the rule expects \[T, N, \*, D\]"):
        rule.step()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"synapse": nn.ConvTranspose2d(1, 1, 1)},
            TypeError,
            "Linear, Conv1d or Conv2d of torch.nn, got ConvTranspose2d",
        ),
        ({"sn": torch.relu}, TypeError, "sn must be a torch.nn.Module, got builtin"),
        ({"mu": 1.0, "bounds": None}, ValueError, "got None with mu = 1.0"),
        ({"mu": -1.0}, ValueError, "mu must be at least 0"),
        ({"max_norm": 0.0}, ValueError, "max_norm must be positive"),
        ({"tau_eligibility": 0.0}, ValueError, "tau_eligibility = 0.0"),
        ({"a_plus": lambda w: w}, TypeError, "a_plus must be a number, got function"),
        ({"source": GivenReward(), "baseline": 3.0}, ValueError, "configure the default source"),
        ({"source": lambda loss: loss}, TypeError, "source must be a RewardSource, got function"),
        ({"per_sample": True}, ValueError, "per_sample=True needs an eligibility trace"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
        ({"bounds": (1.0, 0.0)}, ValueError, "lower < upper"),
        ({"tau_plus": -1.0}, ValueError, "time constants must be positive"),
        ({"step_mode": "x"}, ValueError, "step_mode"),
        ({"baseline_decay": 1.0}, ValueError, "decay must lie in"),
    ],
)
def test_bad_constructor_arguments_raise(change, error, message):
    arguments = {"step_mode": "m", "synapse": nn.Linear(2, 2), "sn": nn.ReLU()} | change
    with pytest.raises(error, match=message):
        RewardModulatedSTDP(**arguments)
