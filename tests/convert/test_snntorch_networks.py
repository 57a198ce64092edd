"""replace_neurons and calibrate_thresholds in networks of snnTorch, written as in its tutorials 5 and 6."""

import copy
import pickle

import pytest
import torch
from torch import nn

import nord_snn
from nord_snn.convert import calibrate_thresholds, replace_neurons
from nord_snn.monitor import SpikeMonitor

snn = pytest.importorskip("snntorch")
utils = pytest.importorskip("snntorch.utils")
surrogate = pytest.importorskip("snntorch.surrogate")

pytestmark = pytest.mark.quick


class Dense(nn.Module):
    """Fully connected network that runs 12 time steps per call."""

    def __init__(self, **options):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(20, 32), snn.Leaky(beta=0.9, **options)
        self.fc2, self.lif2 = nn.Linear(32, 5), snn.Leaky(beta=0.9, **options)

    def forward(self, x):
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes, membranes = [], []
        for _ in range(12):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            membranes.append(mem2)
        return torch.stack(spikes), torch.stack(membranes)


def convolutional():
    """Return a convolutional network whose neurons store their states, called once per time step."""
    torch.manual_seed(0)
    make = {"beta": 0.9, "threshold": 0.2, "spike_grad": surrogate.fast_sigmoid(slope=25), "init_hidden": True}
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), snn.Leaky(**make), nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), snn.Leaky(**make),
        nn.Flatten(), nn.Linear(24, 5), snn.Leaky(**make, output=True),
    )  # fmt: skip


def forward_pass(net, x, steps=5):
    """Return spikes and membrane potentials of ``steps`` time steps with the same input."""
    utils.reset(net)
    outputs = [net(x) for _ in range(steps)]
    return torch.stack([spk for spk, _ in outputs]), torch.stack([mem for _, mem in outputs])


def dense(**options):
    torch.manual_seed(0)
    net = Dense(**options)
    net.fc2.weight.data *= 5  # otherwise the second layer is silent
    return net


X = torch.rand(7, 20, generator=torch.Generator().manual_seed(0)) * 3
IMAGES = torch.rand(7, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 3


def train(net, run, x):
    """Return the losses of four training steps."""
    optimizer, losses, y = torch.optim.Adam(net.parameters(), 1e-2), [], torch.arange(len(x)) % 5
    for _ in range(4):
        _, membranes = run(net, x)
        loss = nn.functional.cross_entropy(membranes.mean(0), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("preset", ["lif", "nord"])
def test_one_call_replaces_the_neurons_of_a_fully_connected_network_and_it_learns(preset):
    net = dense()
    linear_parameters = {name: value for name, value in net.state_dict().items() if name.startswith("fc")}
    report = replace_neurons(net, X, preset=preset, n_clusters=None)
    assert [(row.name, row.was, row.now, row.width) for row in report] == [
        ("lif1", "Leaky", "AssociativeLIFNode", 32),
        ("lif2", "Leaky", "AssociativeLIFNode", 5),
    ]
    assert all(torch.equal(net.state_dict()[name], value) for name, value in linear_parameters.items())
    spikes, membranes = net(X)
    assert spikes.shape == membranes.shape == (12, 7, 5)
    assert spikes.unique().tolist() == [0, 1]
    losses = train(net, lambda net, x: net(x), X)
    assert losses[-1] < losses[0]


def test_one_call_replaces_the_neurons_of_a_convolutional_network_and_it_learns():
    net = convolutional()
    report = replace_neurons(net, IMAGES)
    assert [(row.name, row.width, row.channel_dim) for row in report] == [("2", 4, 1), ("5", 6, 1), ("8", 5, -1)]
    losses = train(net, forward_pass, IMAGES)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("options", [{}, {"reset_mechanism": "zero"}, {"reset_mechanism": "none"}])
def test_like_gives_the_same_spikes(options):
    net = dense(**options)
    expected, _ = net(X)
    assert 0.01 < expected.mean() < 0.99
    assert not replace_neurons(net, X, like=True).skipped
    assert torch.equal(net(X)[0], expected)


def test_like_gives_the_same_spikes_with_hidden_states():
    net = convolutional()
    expected, _ = forward_pass(net, IMAGES)
    assert expected.sum() > 0
    replace_neurons(net, IMAGES, like=True)
    assert torch.equal(forward_pass(net, IMAGES)[0], expected)


def test_a_sequence_does_not_depend_on_the_previous_sequence():
    for net, run in ((dense(), lambda net, x: net(x)), (convolutional(), forward_pass)):
        x = X if isinstance(net, Dense) else IMAGES
        replace_neurons(net, x, preset="nord", n_clusters=None)
        first = run(net, x)
        again = run(net, x)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        run(net, x[:3])  # another batch size


def test_synaptic_with_two_states_is_replaced():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(20, 6), snn.Synaptic(alpha=0.8, beta=0.9)

        def forward(self, x):
            syn, mem = self.lif.init_synaptic()
            spikes = []
            for _ in range(10):
                spk, syn, mem = self.lif(self.fc(x), syn, mem)
                spikes.append(spk)
            return torch.stack(spikes)

    torch.manual_seed(0)
    net = Net()
    expected = net(X)
    assert 0.01 < expected.mean() < 0.99
    replace_neurons(net, X, like=True)
    assert torch.equal(net(X), expected)
    assert torch.equal(net(X), expected)
    with pytest.raises(ValueError, match="pass both syn and mem, or neither"):
        net.lif(torch.rand(7, 6), torch.zeros(7, 6))


def test_a_call_without_states_continues_from_the_stored_states():
    net = nn.Sequential(nn.Linear(20, 6), snn.Leaky(beta=0.9))
    replaced, original = copy.deepcopy(net), net
    replace_neurons(replaced, X, like=True)
    for _ in range(8):
        assert torch.equal(replaced(X)[0], original(X)[0])
    nord_snn.reset(replaced)
    nord_snn.reset(original)
    assert torch.equal(replaced(X)[0], original(X)[0])
    hidden = convolutional()
    replace_neurons(hidden, IMAGES)
    with pytest.raises(TypeError, match="init_hidden=True"):
        hidden[8](torch.rand(7, 5), torch.zeros(7, 5))


def test_the_membrane_potential_passed_to_a_call_replaces_the_stored_one():
    net = dense()
    replace_neurons(net, X, preset="nord", n_clusters=None)
    lif = net.lif1
    mem = lif.init_leaky()
    _, mem = lif(torch.zeros(7, 32), mem)
    mem = lif.init_leaky()  # has the batch shape of the previous call
    mem += 1  # changed in place: above the threshold after one decay
    assert lif(torch.zeros(7, 32), mem)[0].all()
    assert lif(torch.zeros(3, 32), torch.ones(3, 32))[0].all()  # another shape: no neuron is refractory
    mem = lif.init_leaky()
    assert not lif(torch.zeros(5, 32), mem)[0].any()
    mem = lif.init_leaky()
    mem += 1
    with pytest.raises(
        ValueError, match=r"states of shape \[5, 32\], but got input of shape \[2, 32\]: call reset_mem"
    ):
        lif(torch.zeros(2, 32), mem)


def test_copies_pickles_and_state_dicts_of_a_replaced_network_give_the_same_spikes():
    net = dense()
    replace_neurons(net, X, preset="nord", n_clusters=None)
    expected = net(X)
    for duplicate in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(duplicate(X)[0], expected[0])
    loaded = Dense()
    replace_neurons(loaded, X, preset="nord", n_clusters=None)
    loaded.load_state_dict(net.state_dict())
    assert torch.equal(loaded(X)[0], expected[0])


def test_only_overrides_and_the_reason_why_a_neuron_is_skipped():
    class WithRecurrent(Dense):
        def __init__(self):
            super().__init__()
            self.recurrent = snn.RLeaky(beta=0.9, linear_features=5)

    assert [row.name for row in replace_neurons(dense(), X, only=snn.Leaky)] == ["lif1", "lif2"]
    assert [row.name for row in replace_neurons(dense(), X, only="lif2")] == ["lif2"]
    assert [row.name for row in replace_neurons(dense(), X, only=lambda name, _: name == "lif1")] == ["lif1"]
    net = WithRecurrent()
    report = replace_neurons(net, X, overrides={"lif2": {"threshold": 0.7}})
    assert net.lif2.node.v_threshold.tolist() == pytest.approx([0.7] * 5)
    [skipped] = report.skipped
    assert skipped.skipped == "snnTorch's Leaky, Lapicque and Synaptic can be replaced, RLeaky has other states"
    assert f"skipped recurrent (RLeaky): {skipped.skipped}" in " ".join(str(report).split())
    again = replace_neurons(net, X, only=lambda name, module: True)
    assert "lif1" not in [row.name for row in again.replaced]
    with pytest.raises(TypeError, match=r"in a network of snnTorch, neuron= must make an AssociativeLIFNode"):
        replace_neurons(dense(), X, neuron=lambda n, **_: nn.Linear(n, n))
    with pytest.raises(ValueError, match=r"the resting potential must be 0, got -0\.5"):
        replace_neurons(dense(), X, hard_reset=True, v_reset=-0.5)


def test_neurons_that_like_cannot_match_are_skipped_with_a_reason():
    [first, _] = replace_neurons(dense(reset_delay=False), X, like=True)
    assert "cannot match reset_delay=False" in first.skipped
    net = dense()
    net.lif2 = snn.Synaptic(alpha=1.0, beta=0.9, init_hidden=True)
    call = lambda x: net.lif2(net.fc2(net.lif1(net.fc1(x))[0]))  # noqa: E731
    report = replace_neurons(net, X, like=True, forward=call)
    assert [(row.name, row.skipped[:35]) for row in report] == [
        ("lif1", ""), ("lif2", "like() needs a synaptic decay alpha")
    ]  # fmt: skip


@pytest.mark.parametrize("beta", [1.0, 1.2])
def test_like_matches_neurons_without_leak(beta):
    net = dense()
    net.lif1 = snn.Leaky(beta=beta)
    expected, _ = net(X)
    assert not replace_neurons(net, X, like=True).skipped
    assert torch.equal(net(X)[0], expected)
    assert 0.01 < expected.mean() < 0.99


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_calibration_in_a_loop_over_time(rate):
    net = dense()
    replace_neurons(net, X)
    layers = calibrate_thresholds(net, X, rate=rate)
    assert [one.name for one in layers] == ["lif1.node", "lif2.node"]
    spikes = []
    handles = [
        module.register_forward_hook(lambda m, a, out: spikes.append(out[0] if isinstance(out, tuple) else out))
        for module in (net.lif1, net.lif2)
    ]
    net(X)
    for handle in handles:
        handle.remove()
    rates = [torch.stack(spikes[layer::2]).mean().item() for layer in (0, 1)]
    assert rates == pytest.approx([one.after for one in layers])
    assert all(abs(actual - rate) < 0.35 * rate for actual in rates)


def test_calibration_with_a_call_per_time_step():
    net = convolutional()
    replace_neurons(net, IMAGES)
    with pytest.raises(ValueError, match=r"2\.node runs single time steps and received one: pass forward="):
        calibrate_thresholds(net, IMAGES)
    layers = calibrate_thresholds(net, IMAGES, rate=0.2, forward=lambda x: forward_pass(net, x))
    assert len(layers) == 3
    assert all(0.1 < one.after < 0.3 for one in layers)
    assert forward_pass(net, IMAGES)[0].mean().item() == pytest.approx(layers[2].after)


def test_a_monitor_lists_each_replaced_neuron_once():
    net = dense()
    replace_neurons(net, X)
    with SpikeMonitor(net) as monitor:
        net(X)
    assert list(monitor.rates()) == ["lif1.node", "lif2.node"]
