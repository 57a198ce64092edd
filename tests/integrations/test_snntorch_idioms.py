"""Our neurons in code as snnTorch's users write it: stored states, changed membrane potentials, compiled loops, its tutorials."""

import copy

import pytest
import torch
from torch import nn

snntorch = pytest.importorskip("snntorch")

from snntorch import utils  # noqa: E402

from nord_snn.convert import calibrate_thresholds  # noqa: E402
from nord_snn.integrations.snntorch import AssociativeLeaky, AssociativeSynaptic, MultiStep  # noqa: E402

STRONG = torch.full((2, 4), 9.0)


def fired():
    """Return neurons that have fired once and are refractory, and their states."""
    lif = AssociativeSynaptic(4, None)
    spk, syn, mem = lif(STRONG)
    assert spk.all()
    return lif, syn, mem


def add_in_place(mem):
    mem = mem.detach()
    mem += 0.01
    return mem


#: What users do with the membrane potential between two time steps.
CHANGES = {
    "same": lambda mem: mem,
    "in place": add_in_place,
    "masked": lambda mem: mem.detach().index_fill_(1, torch.tensor([0]), 0.0),
    "detached": lambda mem: mem.detach(),
    "copied": lambda mem: mem.clone(),
    "computed": lambda mem: mem + 0.01 * torch.rand(2, 4),
    "listed": lambda mem: [mem][0],
}


@pytest.mark.quick
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_neurons_stay_refractory_if_their_membrane_potential_is_changed(change):
    lif, syn, mem = fired()
    changed = change(mem)
    spk, syn, mem = lif(STRONG, syn, changed)
    assert not spk.any()
    assert not lif(STRONG, syn, change(mem))[0].any()


@pytest.mark.quick
def test_passing_zeros_or_assigning_mem_ends_the_refractory_period():
    lif, syn, _ = fired()
    zeros = torch.zeros(2, 4)
    assert lif(STRONG, zeros, zeros)[0].all()
    lif, syn, mem = fired()
    lif.mem = mem
    assert lif(STRONG, syn, mem)[0].all()


@pytest.mark.quick
def test_two_alternating_sequences_raise_with_and_work_without_a_refractory_period():
    lif, syn, mem = fired()
    lif(STRONG)
    with pytest.raises(ValueError, match=r"mem of an earlier call.*refractory_steps=0"):
        lif(STRONG, syn, mem)
    lif = AssociativeSynaptic(4, n_clusters=2, refractory_steps=0, v_reset=None)
    a, b = torch.rand(2, 6, 3, 4) * 2

    def spikes_of_one_sequence(x):
        states, spikes = (torch.zeros(3, 4), torch.zeros(3, 4)), []
        for x_t in x:
            spk, *states = lif(x_t, *states)
            spikes.append(spk)
        return torch.stack(spikes)

    expected = spikes_of_one_sequence(a), spikes_of_one_sequence(b)
    states, spikes = [(torch.zeros(3, 4), torch.zeros(3, 4))] * 2, [[], []]
    for x in zip(a, b, strict=True):
        for i in range(2):
            spk, *states[i] = lif(x[i], *states[i])
            spikes[i].append(spk)
    assert all(torch.equal(torch.stack(s), e) for s, e in zip(spikes, expected, strict=True))
    assert torch.stack(spikes[0]).any()


@pytest.mark.quick
@pytest.mark.parametrize("neuron_class", [AssociativeLeaky, AssociativeSynaptic])
def test_a_call_without_states_continues_from_the_stored_ones(neuron_class):
    with_passed_states = neuron_class(16) if neuron_class is AssociativeLeaky else neuron_class(16, n_clusters=4)
    stored = copy.deepcopy(with_passed_states)
    states = with_passed_states.reset_mem()
    states = states if isinstance(states, tuple) else (states,)
    for x in 3 * torch.rand(8, 5, 16):
        spk, *states = with_passed_states(x, *states)
        assert torch.equal(stored(x)[0], spk)
    stored.reset_mem()
    stored(torch.rand(3, 16))
    with pytest.raises(ValueError, match="call reset_mem"):
        stored(torch.rand(2, 16))


@pytest.mark.quick
@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("learned", [False, True])
def test_associative_leaky_has_the_spikes_potentials_and_gradients_of_leaky(mechanism, learned):
    torch.manual_seed(0)
    options = {"reset_mechanism": mechanism, "learn_beta": learned, "learn_threshold": learned}
    associative_leaky, leaky = AssociativeLeaky(16, beta=0.9, **options), snntorch.Leaky(beta=0.9, **options)
    inputs = (torch.rand(20, 4, 16) * 0.5).requires_grad_(), None
    inputs = inputs[0], inputs[0].detach().clone().requires_grad_()
    weights = torch.randn(2, 20, 4, 16)
    for lif, x in zip((associative_leaky, leaky), inputs, strict=True):
        mem, spikes, membranes = lif.init_leaky(), [], []
        for x_t in x:
            spk, mem = lif(x_t, mem)
            spikes.append(spk)
            membranes.append(mem)
        lif.recorded = torch.stack(spikes), torch.stack(membranes)
        sum((w * r).sum() for w, r in zip(weights, lif.recorded, strict=True)).backward()
    assert associative_leaky.recorded[0].any()
    assert torch.equal(associative_leaky.recorded[0], leaky.recorded[0])
    assert torch.allclose(associative_leaky.recorded[1], leaky.recorded[1], atol=1e-5)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-4, rtol=1e-3)
    if learned:
        assert torch.allclose(associative_leaky.threshold.grad.sum(), leaky.threshold.grad, rtol=1e-3)
        derivative = 0.9 * 0.1  # of the decay by its logit
        assert torch.allclose(associative_leaky.node.beta_mem_logit.grad, leaky.beta.grad * derivative, rtol=1e-3)


class Tutorial5(nn.Module):
    """Fully connected network whose states are arguments, as in snnTorch's tutorial 5."""

    def __init__(self, leaky):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(64, 40), leaky(beta=0.95)
        self.fc2, self.lif2 = nn.Linear(40, 10), leaky(beta=0.95)

    def forward(self, x):
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        membranes = []
        for _ in range(8):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            _, mem2 = self.lif2(self.fc2(spk1), mem2)
            membranes.append(mem2)
        return torch.stack(membranes)


class Tutorial6(nn.Module):
    """Convolutional ``nn.Sequential`` with stored states, as in snnTorch's tutorial 6."""

    def __init__(self, leaky):
        super().__init__()
        grad = snntorch.surrogate.fast_sigmoid(slope=25)
        hidden = {"beta": 0.5, "spike_grad": grad, "init_hidden": True}
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.MaxPool2d(2), leaky(**hidden),
            nn.Flatten(), nn.Linear(54, 10), leaky(**hidden, output=True),
        )  # fmt: skip

    def forward(self, x):
        utils.reset(self.net)
        return torch.stack([self.net(x.reshape(-1, 1, 8, 8))[1] for _ in range(6)])


@pytest.mark.parametrize("network", [Tutorial5, Tutorial6])
def test_networks_of_the_tutorials_have_the_same_losses_with_leaky_and_associative_leaky(network):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    with_leaky = network(snntorch.Leaky)
    with_associative_leaky = network(AssociativeLeaky)
    weights = {name: p for name, p in with_leaky.state_dict().items() if name.endswith(("weight", "bias"))}
    with_associative_leaky.load_state_dict(copy.deepcopy(weights), strict=False)
    losses = []
    for net in (with_associative_leaky, with_leaky):
        optimizer = torch.optim.Adam([p for n, p in net.named_parameters() if n in weights], lr=5e-3)
        history = []
        for step in range(6):
            rows = slice(64 * step, 64 * (step + 1) - step)  # batches of several sizes
            loss = sum(nn.functional.cross_entropy(mem, y[rows]) for mem in net(x[rows])) / 6
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.quick
def test_number_of_neurons_channel_dim_and_preset_are_as_in_the_node():
    x = 3 * torch.rand(2, 12, 5, 5)
    for lif in (AssociativeLeaky(), AssociativeSynaptic(n_clusters="auto", preset="images")):
        out = lif(x)
        assert (lif.node.n_features, lif.node.channel_dim) == (12, 1)
        assert torch.equal(copy.deepcopy(lif)(x)[0], lif(x)[0])
        assert all(part.shape == x.shape for part in out)
    assert AssociativeSynaptic(48, n_clusters="auto").node.cascade.n_clusters == 48
    with pytest.raises(ValueError, match="12 channels: pass channel_dim=1"):
        AssociativeLeaky(12)(torch.rand(2, 12, 12, 12))


@pytest.mark.quick
def test_misuse_raises():
    with pytest.raises(TypeError, match="pass beta by name"):
        AssociativeLeaky(0.9)
    with pytest.raises(TypeError, match="does not support inhibition=True, refractory_steps"):
        AssociativeLeaky(4, inhibition=True, refractory_steps=2)
    with pytest.raises(ValueError, match="'subtract', 'zero', 'none'"):
        AssociativeLeaky(4, reset_mechanism="hard")
    with pytest.raises(TypeError, match="do not pass mem"):
        AssociativeLeaky(4, init_hidden=True)(torch.rand(2, 4), torch.zeros(2, 4))


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("neuron_class", [AssociativeLeaky, AssociativeSynaptic])
def test_a_compiled_loop_is_one_graph_with_the_same_spikes(neuron_class, hidden):
    torch._dynamo.reset()
    more = {} if neuron_class is AssociativeLeaky else {"n_clusters": 4}
    lif = neuron_class(16, init_hidden=hidden, **more)

    def loop(x):
        states = lif.reset_mem()
        states = states if isinstance(states, tuple) else (states,)
        spikes = []
        for x_t in x:
            if hidden:
                spikes.append(lif(x_t))
            else:
                spk, *states = lif(x_t, *states)
                spikes.append(spk)
        return torch.stack(spikes)

    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    for rows in (3, 3, 5):
        x = 3 * torch.rand(4, rows, 16)
        expected = loop(x)
        assert expected.any()
        assert torch.equal(compiled(x), expected)


def test_a_compiled_multi_step_is_one_graph():
    torch._dynamo.reset()
    multi = MultiStep(AssociativeLeaky(16))
    x = 3 * torch.rand(4, 3, 16)
    expected = multi(x)
    multi.neuron(x[0])  # stores a state, from which the sequence does not start
    assert torch.equal(torch.compile(multi, fullgraph=True, backend="aot_eager")(x), expected)


def test_calibration_runs_associative_synaptic_and_raises_for_associative_leaky():
    torch.manual_seed(0)
    x_seq = torch.rand(12, 6, 8)

    def over_time(lif):
        return lambda x: [lif(step) for step in x]

    lif = AssociativeSynaptic(8, n_clusters=None, refractory_steps=0, init_hidden=True)
    [row] = calibrate_thresholds(lif, x_seq, rate=0.2, forward=over_time(lif))
    assert 0.17 < row.after < 0.23
    leaky = AssociativeLeaky(8, init_hidden=True)
    with pytest.raises(ValueError, match="AssociativeLeaky resets its membrane between the time steps"):
        calibrate_thresholds(leaky, x_seq, forward=over_time(leaky))


def test_in_bfloat16_the_reset_uses_the_decay_in_float32():
    lif = AssociativeLeaky(4, beta=0.9).to(torch.bfloat16)
    mem = torch.full((1, 4), 1.5)
    exact = 1.5 - 1.0 / lif.node.beta_mem_logit.float().sigmoid()
    assert torch.allclose(lif._reset(mem), exact.expand(1, 4), atol=1e-6)


def test_neurons_with_a_negative_threshold_are_reset_in_the_first_call_as_in_snntorch():
    associative_leaky, leaky = AssociativeLeaky(beta=0.5, threshold=-0.5), snntorch.Leaky(beta=0.5, threshold=-0.5)
    spikes, mem = associative_leaky(torch.zeros(1, 1))
    expected_spikes, expected_mem = leaky(torch.zeros(1, 1), torch.zeros(1, 1))
    assert torch.equal(mem, expected_mem)
    assert torch.equal(spikes, expected_spikes)


@pytest.mark.parametrize(
    "invalid", [{"n_features": 48, "n_clusters": 64}, {"beta": 2.0}, {"n_features": 8, "alpha": "fast"}]
)
def test_neurons_whose_constructor_raises_are_in_no_list_of_snntorch(invalid):
    """A neuron that was not made is not reset by ``utils.reset`` of another network."""
    before = list(snntorch.SpikingNeuron.instances)
    with pytest.raises((TypeError, ValueError)):
        AssociativeSynaptic(**invalid)
    assert snntorch.SpikingNeuron.instances == before
    net = torch.nn.Sequential(AssociativeSynaptic(8, n_clusters=4, init_hidden=True))
    net(torch.rand(2, 8))
    utils.reset(net)
    assert not net[0].mem.any()
