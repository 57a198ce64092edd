"""Learning rules with inputs of every shape, in both step modes, and compared with SpikingJelly's learners; bad input."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import needs_spikingjelly_2
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.learning import MSTDPETLearner, MSTDPLearner, STDPLearner
from torch import nn

from nord_snn.learning_rules import STDP, RewardModulatedSTDP, TripletSTDP
from nord_snn.learning_rules.learner import _geometry
from nord_snn.ops import reward_modulated_stdp, stdp, triplet_stdp

pytestmark = pytest.mark.quick

RULES = [(STDP, stdp), (TripletSTDP, triplet_stdp)]


def spikes(*shape, rate=0.5):
    return (torch.rand(shape) < rate).float()


def with_positive_weights(module):
    """Set positive weights, so that the neurons after them fire."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.abs_().add_(0.3)
    return module


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "stride and padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation and groups": {"kernel_size": 2, "dilation": 2, "groups": 2},
    "same": {"kernel_size": 2, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("n_spatial", [1, 2])
@pytest.mark.parametrize(("rule", "op"), RULES)
def test_changes_of_convolutions_equal_those_of_the_op_in_both_step_modes(rule, op, n_spatial, options):
    conv_class = (layer.Conv1d, layer.Conv2d)[n_spatial - 1]
    net = with_positive_weights(
        nn.Sequential(conv_class(2, 4, bias=False, step_mode="m", **options), neuron.IFNode(step_mode="m"))
    )
    x = spikes(5, 3, 2, *(7, 6)[:n_spatial])
    learner = rule(step_mode="m", synapse=net[0], sn=net[1])
    y = net(x)
    assert y.sum() > 0
    expected, _ = op(x, y, geometry=_geometry(net[0]))
    assert torch.equal(learner.step(on_grad=False), expected)
    assert expected.any()
    learner.close()

    functional.reset_net(net)
    functional.set_step_mode(net, "s")
    single = rule(step_mode="s", synapse=net[0], sn=net[1])
    parts = []
    for x_t in x:
        net(x_t)
        parts.append(single.step(on_grad=False))
    assert torch.allclose(sum(parts), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 3, 8), (6, 2, 5, 8), (6, 2, 5, 4, 8)])
def test_the_change_of_a_linear_map_does_not_depend_on_the_layout_of_rows(shape):
    net = with_positive_weights(nn.Sequential(nn.Linear(8, 4), neuron.LIFNode(step_mode="m")))
    learner = STDP(step_mode="m", synapse=net[0], sn=net[1])
    x = spikes(*shape)
    y = net(x)
    expected, _ = stdp(x.flatten(1, -2), y.flatten(1, -2))
    assert torch.equal(learner.step(on_grad=False), expected)


def test_a_synapse_may_receive_time_steps_flattened_into_the_batch():
    """SpikingJelly's SeqToANNContainer does so, since nn.Conv2d takes no sequences."""
    conv, lif = with_positive_weights(nn.Conv2d(2, 3, 3, bias=False)), neuron.IFNode(step_mode="m")
    learner = STDP(step_mode="m", synapse=conv, sn=lif)
    x = spikes(4, 2, 2, 6, 6)
    y = lif(layer.SeqToANNContainer(conv)(x))
    expected, _ = stdp(x, y, geometry=_geometry(conv))
    assert torch.equal(learner.step(on_grad=False), expected)


def test_neurons_of_snntorch_which_return_spikes_and_states_are_supported():
    snntorch = pytest.importorskip("snntorch")
    fc, lif = with_positive_weights(nn.Linear(8, 4, bias=False)), snntorch.Leaky(beta=0.9)
    learner = STDP(step_mode="s", synapse=fc, sn=lif)
    x, mem, out = spikes(6, 3, 8), lif.init_leaky(), []
    for x_t in x:
        spk, mem = lif(fc(x_t), mem)
        out.append(spk)
    expected, _ = stdp(x, torch.stack(out).detach())
    assert torch.allclose(learner.step(on_grad=False), expected, atol=1e-6)
    assert expected.any()


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}], ids=str)
@pytest.mark.parametrize("conv_class", [layer.Conv1d, layer.Conv2d])
def test_changes_of_convolutions_equal_those_of_spikingjellys_learner(conv_class, options):
    conv = with_positive_weights(conv_class(2, 3, 3, bias=False, step_mode="m", **options))
    lif = neuron.IFNode(step_mode="m")
    tau_sj = 1 / (1 - torch.tensor(-1 / 20.0, dtype=torch.float64).exp().item())
    spikingjelly_learner = STDPLearner("m", conv, lif, tau_sj, tau_sj, lambda w: 0.005, lambda w: 0.005)
    our_learner = STDP("m", conv, lif)
    x = spikes(5, 2, 2, *(6, 5)[: conv.weight.ndim - 2])
    assert lif(conv(x)).sum() > 0
    expected = spikingjelly_learner.step(on_grad=False)
    assert torch.allclose(our_learner.step(on_grad=False), expected, atol=1e-6 * max(1, expected.abs().max().item()))


def test_changes_that_depend_on_the_weights_equal_those_of_spikingjellys_learner():
    """SpikingJelly's f_pre and f_post are our (w - lower) and (upper - w) for bounds 0 and 1."""
    fc, lif = nn.Linear(6, 4, bias=False), neuron.IFNode(step_mode="m", v_threshold=0.5)
    nn.init.uniform_(fc.weight, 0.05, 0.95)
    tau_sj = 1 / (1 - torch.tensor(-1 / 20.0, dtype=torch.float64).exp().item())
    spikingjelly_learner = STDPLearner("m", fc, lif, tau_sj, tau_sj, lambda w: 0.005 * w, lambda w: 0.005 * (1 - w))
    our_learner = STDP("m", fc, lif, bounds=(0.0, 1.0), mu=1.0)
    assert lif(fc(spikes(7, 3, 6))).sum() > 0
    assert torch.allclose(our_learner.step(on_grad=False), spikingjelly_learner.step(on_grad=False), atol=1e-6)


def run_both(make_spikingjelly_learner, make_our_learner, rewards, shape):
    """Return the changes in each time step of SpikingJelly's reward-modulated learner and of ours, for the same spikes."""
    fc, lif = with_positive_weights(nn.Linear(6, 4, bias=False)), neuron.IFNode()
    changes = ([], [])
    learners = make_spikingjelly_learner(fc, lif), make_our_learner(fc, lif)
    for reward, x in zip(rewards, spikes(len(rewards), *shape), strict=True):
        lif(fc(x))
        for changes_of_learner, learner in zip(changes, learners, strict=True):
            changes_of_learner.append(learner.step(reward, on_grad=False))
    return changes


@needs_spikingjelly_2
def test_reward_modulated_changes_equal_those_of_spikingjellys_learner():
    """SpikingJelly multiplies a reward by the spike pairs of the previous time step: our rule gets it one time step earlier."""
    rewards = torch.randn(9).tolist()
    expected, _ = run_both(
        lambda fc, lif: MSTDPLearner("s", fc, lif, 20.0, 20.0, lambda w: 0.005, lambda w: 0.005),
        lambda fc, lif: RewardModulatedSTDP("s", fc, lif),
        rewards,
        (3, 6),
    )
    torch.manual_seed(0)
    torch.randn(9)
    _, changes = run_both(
        lambda fc, lif: MSTDPLearner("s", fc, lif, 20.0, 20.0, lambda w: 0.005, lambda w: 0.005),
        lambda fc, lif: RewardModulatedSTDP("s", fc, lif),
        [*rewards[1:], 0.0],
        (3, 6),
    )
    assert not expected[0].any()
    for step in range(1, 9):
        assert torch.allclose(changes[step - 1], expected[step], atol=1e-6)


@needs_spikingjelly_2
def test_changes_with_an_eligibility_equal_those_of_spikingjellys_learner():
    """SpikingJelly delays spike pairs by one time step, divides by the time constant, and has no batch dimension."""
    rewards = [1.0] * 9
    expected, changes = run_both(
        lambda fc, lif: MSTDPETLearner("s", fc, lif, 20.0, 20.0, 5.0, lambda w: 0.005, lambda w: 0.005),
        lambda fc, lif: RewardModulatedSTDP("s", fc, lif, tau_eligibility=5.0),
        rewards,
        (6,),
    )
    assert changes[-1].any()
    for step in range(1, 9):
        assert torch.allclose(changes[step - 1], 5.0 * expected[step], atol=1e-6)


def test_the_change_of_a_batch_is_the_sum_or_mean_of_those_of_its_samples():
    net = with_positive_weights(nn.Sequential(nn.Linear(8, 4, bias=False), neuron.LIFNode(step_mode="m")))
    x = spikes(6, 5, 8)
    for options, divided in (({}, 1), ({"reduction": "mean"}, 5)):
        learner = STDP("m", net[0], net[1], **options)
        net(x)
        together = learner.step(on_grad=False)
        parts = []
        for n in range(5):
            functional.reset_net(net)
            learner.reset()
            net(x[:, n : n + 1])
            parts.append(learner.step(on_grad=False))
        functional.reset_net(net)
        learner.close()
        assert torch.allclose(together, sum(parts) / divided, atol=1e-6)


# --- rewards


def rewarded(**more):
    """Return a network of one layer whose neurons fire, and a reward-modulated rule."""
    net = with_positive_weights(nn.Sequential(nn.Linear(8, 4, bias=False), neuron.LIFNode(step_mode="m")))
    return net, RewardModulatedSTDP("m", net[0], net[1], **more)


def test_rewards_per_sample_token_and_neuron():
    x = spikes(6, 2, 5, 8)
    for shape in ((2,), (2, 5), (2, 5, 4)):
        net, rule = rewarded()
        y = net(x)
        reward = torch.randn(shape)
        expanded = reward.reshape(*shape, *[1] * (3 - len(shape))).expand(2, 5, 4).flatten(0, 1)
        expected, _ = reward_modulated_stdp(x.flatten(1, 2), y.flatten(1, 2), expanded)
        assert torch.allclose(rule.step(reward=reward, on_grad=False), expected, atol=1e-6)
        assert rule.last_reward.shape == shape
    net, rule = rewarded()
    y = net(x)
    expected, _ = reward_modulated_stdp(x[:, :, 2:].flatten(1, 2), y[:, :, 2:].flatten(1, 2), torch.ones(6))
    assert torch.allclose(
        rule.step(reward=torch.ones(2, 3), on_grad=False, positions=slice(2, None)), expected, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(6, 3, 8), (6, 3, 2, 8)])
def test_every_sample_has_its_own_eligibility(shape):
    """The change of a batch equals the sum over its samples, each with its own rewards."""
    net, rule = rewarded(tau_eligibility=5.0, per_sample=True)
    x, rewards = spikes(2, *shape), torch.randn(2, 3)
    changes = []
    for sequence, reward in zip(x, rewards, strict=True):
        net(sequence)
        changes.append(rule.step(reward=reward, on_grad=False))
    assert rule.eligibility.shape == (3, 4, 8)
    rule.disable()
    alone = [0, 0]
    for n in range(3):
        single = RewardModulatedSTDP("m", net[0], net[1], tau_eligibility=5.0)
        functional.reset_net(net)
        for i, sequence in enumerate(x):
            net(sequence[:, n : n + 1])
            alone[i] = alone[i] + single.step(reward=rewards[i, n], on_grad=False)
        single.close()
    for change, expected in zip(changes, alone, strict=True):
        assert torch.allclose(change, expected, atol=1e-6)
    assert rule.last_reward.shape == (3,)
    rule.enable()
    functional.reset_net(net)
    net(x[0])
    with pytest.raises(ValueError, match="a sample must have one reward, got several"):
        rule.step(reward=torch.randn(3, 4) if len(shape) == 3 else torch.randn(3, 2))
    rule.reset()
    assert rule.eligibility is None
    functional.reset_net(net)
    net(x[0])
    rule.step(reward=2.0)
    assert rule.eligibility.shape == (3, 4, 8)
    functional.reset_net(net)
    net(x[0][:, :2])
    with pytest.raises(ValueError, match=r"got \[3.*\] and then \[2.*\]"):
        rule.step(reward=2.0)
    rule.reset()
    functional.reset_net(net)
    net(x[0][:, :0])
    with pytest.raises(ValueError, match="at least one sample, got an empty batch"):
        rule.step(reward=2.0)


def test_a_late_reward_acts_through_the_eligibility():
    """The first sequence has spikes and no reward, the second a reward and no spikes: only an eligibility gives a change."""
    for options, has_eligibility in (({}, False), ({"tau_eligibility": 10.0}, True)):
        net, rule = rewarded(**options)
        net(spikes(6, 3, 8))
        rule.step(reward=0.0)
        functional.reset_net(net)
        rule.trace_pre, rule.trace_post = torch.zeros(3, 8), torch.zeros(3, 4)
        net(torch.zeros(6, 3, 8))
        with pytest.warns(UserWarning, match="did not fire") if not has_eligibility else contextlib.nullcontext():
            change = rule.step(reward=1.0, on_grad=False)
        assert bool(change.any()) is has_eligibility


# --- bad input


def state_of(rule, net):
    """Return copies of the weight and the traces."""
    return [net[0].weight.clone(), *(None if t is None else t.clone() for t in (rule.trace_pre, rule.trace_post))]


def same(one, other):
    """Return whether two lists of tensors or None are equal."""
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Each of the following functions makes one error in the use of a rule.


def bad_spike(net, rule):
    x = spikes(6, 3, 8)
    x[2, 1, 3] = float("nan")
    net(x)
    rule.step(reward=1.0)


def bad_weight(net, rule):
    net(spikes(6, 3, 8))
    net[0].weight.data[1, 2] = float("nan")
    try:
        rule.step(reward=1.0)
    finally:
        net[0].weight.data[1, 2] = 0.5


def another_batch(net, rule):
    net(spikes(6, 2, 8))
    rule.step(reward=1.0)


def long_reward(net, rule):
    net(spikes(6, 3, 8))
    rule.step(reward=torch.ones(4))


def text_as_reward(net, rule):
    net(spikes(6, 3, 8))
    rule.step(reward="good")


def infinite_reward(net, rule):
    net(spikes(6, 3, 8))
    rule.step(reward=torch.tensor([1.0, float("inf"), 1.0]))


def wrong_rank(net, rule):
    rule.sn(net[0](spikes(3, 8)))
    rule.step(reward=1.0)


def wrong_neurons(net, rule):
    net[0](spikes(6, 3, 8))
    net[1](spikes(6, 3, 5))
    rule.step(reward=1.0)


def positions_of_images(net, rule):
    net(spikes(6, 3, 8))
    rule.step(reward=1.0, positions=slice(2))


def no_positions(net, rule):
    net(spikes(6, 3, 5, 8))
    rule.step(reward=1.0, positions=slice(5, None))


def rewards_that_differ(net, rule):
    rule.tau_eligibility = 5.0
    net(spikes(6, 3, 8))
    rule.step(reward=torch.ones(3))


def infinite_scale(net, rule):
    net(spikes(6, 3, 8))
    rule.step(reward=1.0, scale=float("inf"))


def another_layout(net, rule):
    """Change the layout of the rows but not their number: the traces would belong to other rows."""
    rule.reset()
    net(spikes(6, 2, 4, 8))
    rule.step(reward=0.0, on_grad=False)
    functional.reset_net(net)
    net(spikes(6, 4, 2, 8))
    rule.step(reward=1.0)


def another_mode(net, rule):
    net[1].step_mode = "s"
    try:
        net(spikes(6, 3, 8))
        rule.step(reward=1.0)
    finally:
        net[1].step_mode = "m"


def a_buffer_used_again(net, rule):
    buffer = spikes(6, 3, 8)
    net(buffer)
    buffer.copy_(spikes(6, 3, 8))
    rule.step(reward=1.0)


def no_reward_at_all(net, rule):
    net(spikes(6, 3, 8))
    rule.step(reward=torch.empty(0))


@pytest.mark.parametrize(
    ("call_wrongly", "error", "message"),
    [
        (infinite_scale, ValueError, "scale must be finite"),
        (another_layout, ValueError, r"got \[2, 4\] and then \[4, 2\]"),
        (another_mode, ValueError, "must have the step_mode of the learner, 'm', got 's'"),
        (a_buffer_used_again, RuntimeError, "modified in place after they were recorded"),
        (no_reward_at_all, ValueError, r"finite and not empty, got shape \[0\]"),
        (
            bad_spike,
            ValueError,
            r"the input spikes of Linear\[4, 8\] must be finite, but contain NaN or infinity; the weights are unchanged",
        ),
        (bad_weight, ValueError, r"the weight of Linear\[4, 8\] must be finite"),
        (another_batch, ValueError, r"got \[3\] and then \[2\].*reset\(\) the learner when the batch shape changes"),
        (
            long_reward,
            ValueError,
            r"must be one number or have shape \[3\] \(samples\) or \[3, 4\] \(neurons\), got \[4\]",
        ),
        (text_as_reward, TypeError, "must be a number or a tensor, got 'good'"),
        (infinite_reward, ValueError, "the reward must be finite"),
        (wrong_rank, ValueError, r"\[T, N, \*, D\] before and after Linear\[4, 8\], got \[3, 8\] and \[3, 4\]"),
        (
            wrong_neurons,
            ValueError,
            r"expects 8 inputs and 4 neurons .* \[6, 3, 8\] before it and \[6, 3, 5\] after it",
        ),
        (rewards_that_differ, ValueError, "need per_sample=True"),
        (no_positions, ValueError, r"positions must select at least one of 5 positions, got slice\(5, None, None\)"),
        (
            positions_of_images,
            ValueError,
            r"slice of S in sequences \[T, B, S, D\], got slice\(None, 2, None\) for \[6, 3, 8\]",
        ),
    ],
)
def test_bad_input_raises_and_changes_neither_weights_nor_traces(call_wrongly, error, message):
    net, rule = rewarded()
    net(spikes(6, 3, 8))
    rule.step(reward=1.0)
    net[0].weight.grad = None
    functional.reset_net(net)
    before = state_of(rule, net)
    if call_wrongly is another_layout:
        before = None
    with pytest.raises(error, match=message):
        call_wrongly(net, rule)
    after = state_of(rule, net)
    if before is None:
        before = after
    if call_wrongly is bad_weight:
        before[0][1, 2] = after[0][1, 2] = 0.0
    assert same(before, after)
    assert net[0].weight.grad is None
    rule.tau_eligibility = None
    rule.reset()  # after a reset the rule works
    functional.reset_net(net)
    net(spikes(6, 3, 8))
    assert rule.step(reward=1.0, on_grad=False).any()


def test_rules_work_in_inference_mode():
    net, rule = rewarded()
    x = spikes(6, 3, 8)
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            net(x)
            rule.apply(rule.step(reward=1.0, on_grad=False))
            functional.reset_net(net)
    net(x)
    rule.step(reward=1.0)
    functional.reset_net(net)
    with torch.inference_mode():
        net(x)
        rule.step(reward=1.0)
    assert net[0].weight.grad.any()


def test_an_unreferenced_learner_is_freed_and_copies_of_the_network_have_none():
    net, rule = rewarded()
    reference = weakref.ref(rule)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    copied(spikes(6, 3, 8))
    assert not rule._pre
    del rule
    gc.collect()
    assert reference() is None
    net(spikes(6, 3, 8))


def test_a_parametrised_weight_raises():
    with pytest.raises(TypeError, match="weight without parametrization"):
        STDP("m", nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Identity())


def test_large_changes_in_half_precision_can_be_limited():
    net, _ = rewarded()
    net.half()
    rule = STDP("m", net[0], net[1], a_plus=200.0, a_minus=0.0, max_norm=1.0)
    net(spikes(6, 3, 8).half())
    assert rule.step(on_grad=False).float().norm() == pytest.approx(1.0, rel=1e-2)


def test_modules_that_are_not_called_raise():
    net, _ = rewarded()
    for synapse, sn, message in (
        (nn.Linear(8, 4), net[1], "equally often, got 0 and 1 calls"),
        (nn.Linear(8, 4), neuron.LIFNode(), "neither fc1 nor its neurons were ever called"),
    ):
        rule = STDP("m", synapse, sn, name="fc1")
        functional.reset_net(net)
        net(spikes(6, 3, 8))
        with pytest.raises(RuntimeError, match=message):
            rule.step()
        rule.close()


def test_neurons_that_return_no_tensor_raise():
    net = nn.Sequential(nn.Linear(8, 4), nn.Identity())
    rule = STDP("m", net[0], net[1])
    with pytest.raises(TypeError, match="the neurons returned str"):
        net[1]("spikes")
    assert not rule._post


def test_silent_neurons_warn_once():
    net, rule = rewarded()
    for expected in (True, False):
        net(torch.zeros(6, 3, 8))
        if expected:
            with pytest.warns(UserWarning, match=r"the input and the neurons of Linear\[4, 8\] did not fire") as record:
                assert not rule.step(reward=1.0, on_grad=False).any()
            assert record[0].filename == __file__  # the line of the step, not one of the library
        else:
            assert not rule.step(reward=1.0, on_grad=False).any()


def test_single_time_steps_without_spikes_warn_only_at_the_twentieth():
    net = with_positive_weights(nn.Sequential(nn.Linear(8, 4, bias=False), neuron.LIFNode()))
    rule = STDP("s", net[0], net[1])
    for _ in range(19):
        net(torch.zeros(3, 8))
        rule.step()
    net(torch.zeros(3, 8))
    with pytest.warns(UserWarning, match="did not fire"):
        rule.step()


def test_a_non_binary_input_warns_once():
    net, rule = rewarded(name="blocks.0.ffn.up")
    net(torch.rand(6, 3, 8))
    with pytest.warns(UserWarning, match=r"the input of blocks\.0\.ffn\.up must be spikes"):
        rule.step(reward=1.0)
    net(torch.rand(6, 3, 8))
    rule.step(reward=1.0)


def test_the_norm_of_a_change_can_be_limited():
    net, unlimited = rewarded()
    limited = RewardModulatedSTDP("m", net[0], net[1], max_norm=0.01)
    net(spikes(6, 3, 8))
    unlimited_change, limited_change = (rule.step(reward=1.0, on_grad=False) for rule in (unlimited, limited))
    assert unlimited_change.norm() > 0.02
    assert limited_change.norm() == pytest.approx(0.01)
    assert torch.allclose(limited_change / limited_change.norm(), unlimited_change / unlimited_change.norm(), atol=1e-6)
    net(spikes(6, 3, 8))
    small_change = limited.step(reward=1e-4, on_grad=False)
    assert 0 < small_change.norm() < 0.01
