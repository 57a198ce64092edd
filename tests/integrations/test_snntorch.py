"""AssociativeSynaptic, our neuron with snnTorch's signature and resets, and snnTorch's neurons in our layers."""

import copy
import warnings

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

snntorch = pytest.importorskip("snntorch")

from snntorch import utils  # noqa: E402
from snntorch.functional import ce_rate_loss  # noqa: E402

import nord_snn  # noqa: E402
from nord_snn.integrations.snntorch import AssociativeSynaptic, MultiStep  # noqa: E402
from nord_snn.layers import MembraneReadout, NordBlock, SpikingFeedForward  # noqa: E402
from nord_snn.monitor import SpikeMonitor  # noqa: E402
from nord_snn.neurons import AssociativeLIFNode  # noqa: E402

pytestmark = pytest.mark.quick


def pair(**more):
    """Return an AssociativeLIFNode and an AssociativeSynaptic with the same parameters."""
    node = AssociativeLIFNode(16, n_clusters=4, step_mode="m", store_v_seq=True)
    lif = AssociativeSynaptic(16, n_clusters=4, **more)
    with torch.no_grad():
        for parameter in node.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lif.node.load_state_dict(node.state_dict())
    return node, lif


def test_spikes_and_gradients_equal_those_of_our_node_in_single_time_steps():
    node, lif = pair()
    x = torch.rand(12, 3, 16)
    spikes = node(x)
    assert 0 < spikes.mean() < 1
    syn = mem = None
    out, membranes = [], []
    for x_t in x:
        spk, syn, mem = lif(x_t, syn, mem)
        out.append(spk)
        membranes.append(mem)
    assert torch.equal(torch.stack(out), spikes)
    assert torch.allclose(torch.stack(membranes), node.v_seq, atol=1e-6)
    weights = torch.randn(12, 3, 16)
    (spikes * weights).sum().backward()
    (torch.stack(out) * weights).sum().backward()
    for expected, actual in zip(node.parameters(), lif.node.parameters(), strict=True):
        assert torch.allclose(actual.grad, expected.grad, atol=1e-5, rtol=1e-4)


def test_stored_and_returned_states_give_the_same_spikes():
    _, lif = pair()
    hidden = AssociativeSynaptic(16, n_clusters=4, init_hidden=True)
    both = AssociativeSynaptic(16, n_clusters=4, init_hidden=True, output=True)
    for neurons in (hidden, both):
        neurons.load_state_dict(lif.state_dict())
    syn, mem = lif.reset_mem()
    for x_t in torch.rand(8, 3, 16):
        spk, syn, mem = lif(x_t, syn, mem)
        assert torch.equal(hidden(x_t), spk)
        assert all(torch.equal(a, b) for a, b in zip(both(x_t), (spk, syn, mem), strict=True))
        assert torch.equal(hidden.mem, mem)


def test_associative_synaptic_fires_above_the_threshold_and_the_node_also_at_it():
    node = AssociativeLIFNode(4, None, threshold=0.0625, beta_mem=0.5)
    lif = AssociativeSynaptic(4, None, threshold=0.0625, beta=0.5)
    x = torch.full((1, 4), 0.125)  # the membrane potential is (1 - 0.5) * 0.125, the threshold
    assert node(x).tolist() == [[1.0] * 4]
    assert lif(x)[0].tolist() == [[0.0] * 4]
    assert lif(torch.nextafter(x, torch.ones(1)) * 1.0001)[0].tolist() == [[1.0] * 4]


def test_neurons_are_refractory_after_a_spike_until_a_reset_with_and_without_passed_states():
    lif = AssociativeSynaptic(4, None)
    strong = torch.full((2, 4), 9.0)
    spk, syn, mem = lif(strong)
    assert spk.all()
    assert not lif(strong, syn.detach(), mem.detach())[0].any()  # refractory
    lif.reset_mem()
    assert lif(strong)[0].all()
    assert not lif(strong)[0].any()  # without states the sequence continues
    utils.reset(nn.Sequential(lif))
    assert lif(strong)[0].all()


def test_reset_resets_neurons_of_all_three_libraries():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.associative = AssociativeSynaptic(16, n_clusters=4, init_hidden=True)
            self.leaky = snntorch.Leaky(beta=0.9, init_hidden=True)
            self.nested = nn.Sequential(nn.Sequential(snntorch.Synaptic(0.5, 0.9, init_hidden=True)), neuron.LIFNode())
            self.node = AssociativeLIFNode(16, n_clusters=4)

        def forward(self, x):
            return self.node(self.nested(self.leaky(self.associative(x))))

    net = Net()
    x = 4 * torch.rand(3, 16)
    first = [net(x) for _ in range(4)]
    for reset in (nord_snn.reset, lambda net: (utils.reset(net), nord_snn.reset(net))):
        reset(net)
        assert not net.associative.mem.any()
        assert not net.associative._refractory.any()
        assert not net.leaky.mem.any()
        assert not net.nested[0][0].syn.any()
        assert net.node.v == 0.0
        assert all(torch.equal(net(x), out) for out in first)
        nord_snn.reset(net)
        net(x[:2])  # another batch size
        nord_snn.reset(net)


def test_the_reset_of_snntorch_clears_the_refractory_counter():
    net = nn.Sequential(nn.Linear(16, 16), AssociativeSynaptic(16, n_clusters=4, init_hidden=True))
    x = 9 * torch.rand(3, 16)
    first = [net(x) for _ in range(5)]
    utils.reset(net)
    assert all(torch.equal(net(x), out) for out in first)
    utils.reset(net)
    net(x[:1])


def test_states_of_another_shape_raise_and_are_not_reset_silently():
    hidden = AssociativeSynaptic(16, n_clusters=4, init_hidden=True)
    hidden(torch.rand(3, 16))
    with pytest.raises(
        ValueError, match=r"states of shape \[3, 16\], but got input of shape \[2, 16\]: call reset_mem"
    ):
        hidden(torch.rand(2, 16))
    hidden.mem = torch.ones(3, 16)
    with pytest.raises(ValueError, match="reset_mem"):
        hidden(torch.rand(2, 16))
    _, lif = pair()
    _, syn, mem = lif(torch.rand(3, 16))
    for states, message in (
        ((syn, torch.ones(2, 16)), "states of shape"),
        ((syn, None), "both syn and mem"),
        ((None, mem), "both syn and mem"),
    ):
        with pytest.raises(ValueError, match=message):
            lif(torch.rand(3, 16), *states)
    with pytest.raises(TypeError, match="do not pass mem or syn"):
        hidden(torch.rand(3, 16), syn, mem)
    with pytest.raises(ValueError, match=r"\[N, \*, D\] with D = 16"):
        lif(torch.rand(3, 15))


def test_after_a_reset_a_batch_may_have_any_size():
    """The last batch of an epoch may be smaller."""
    _, lif = pair()
    for rows in (4, 3, 5):
        syn, mem = lif.reset_mem()
        x = 3 * torch.rand(rows, 16)
        spk, syn, mem = lif(x, syn, mem)
        lif(x, syn, mem)
        lif.reset_mem()
        assert torch.equal(spk, lif(x)[0])
    lif.reset_mem()
    with pytest.raises(ValueError, match="states of shape"):  # zeros passed by the caller are not the state of rest
        lif(torch.rand(3, 16), torch.zeros(5, 16), torch.zeros(5, 16))


def test_surrogates_of_snntorch_are_accepted():
    with_spike_grad = AssociativeSynaptic(16, n_clusters=4, spike_grad=snntorch.surrogate.atan(alpha=2.0))
    named = AssociativeLIFNode(16, n_clusters=4, surrogate="atan", alpha=2.0)
    named.load_state_dict(with_spike_grad.node.state_dict())
    x = 3 * torch.rand(5, 16)
    with_spike_grad(x)[0].sum().backward()
    named(x).sum().backward()
    for name in ("v_threshold", "beta_mem_logit"):
        assert torch.allclose(getattr(with_spike_grad.node, name).grad, getattr(named, name).grad, atol=1e-6)
    assert with_spike_grad.node.v_threshold.grad.abs().sum() > 0


def test_constants_that_are_not_learned_have_no_gradient():
    lif = AssociativeSynaptic(16, n_clusters=4, learn_alpha=False, learn_beta=False, learn_threshold=False)
    assert [name for name, p in lif.named_parameters() if p.requires_grad] == [
        "node.cascade.weight",
        "node.cascade.gain",
    ]
    assert (lif.alpha.item(), lif.beta.item()) == pytest.approx((0.5, 0.9))
    assert lif.threshold.shape == (16,)
    loaded = AssociativeSynaptic(16, n_clusters=4, alpha=0.3, threshold=0.7)
    loaded.load_state_dict(lif.state_dict())
    assert torch.equal(loaded.threshold, lif.threshold)
    copied = copy.deepcopy(lif)
    assert torch.equal(copied.alpha, lif.alpha)
    assert "init_hidden=False" in repr(lif)


@pytest.mark.parametrize("truncated", [True, False])
def test_the_training_loop_of_snntorch_runs(truncated):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from snntorch import backprop
    net = nn.Sequential(nn.Linear(8, 16), AssociativeSynaptic(16, n_clusters=4, init_hidden=True, output=True))
    shape = (5, 8) if truncated else (6, 5, 8)
    data = [(2 * torch.rand(shape), torch.randint(0, 16, (5,))) for _ in range(2)]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    before = [parameter.clone() for parameter in net.parameters()]
    for _ in range(2):
        if truncated:
            loss = backprop.TBPTT(
                net, data, optimizer, ce_rate_loss(), num_steps=6, time_var=False, time_first=True, K=3
            )
        else:
            loss = backprop.BPTT(net, data, optimizer, ce_rate_loss(), time_var=True)
    assert torch.isfinite(loss)
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_spike_monitor_counts_the_spikes_of_associative_synaptic():
    net = nn.Sequential(nn.Linear(8, 16), AssociativeSynaptic(16, n_clusters=4, init_hidden=True))
    with SpikeMonitor(net) as monitor:
        out = torch.stack([net(3 * torch.rand(5, 8)) for _ in range(4)])
    assert out.any()
    assert monitor.rates() == {"1.node": pytest.approx(out.mean().item())}
    assert net[1].node.v == 0.0  # the node stores no second state


def test_the_output_monitor_of_snntorch_records_the_spikes_of_associative_synaptic():
    from snntorch.functional import probe

    net = nn.Sequential(nn.Linear(8, 16), AssociativeSynaptic(16, n_clusters=4, init_hidden=True))
    monitor = probe.OutputMonitor(net, instance=AssociativeSynaptic)
    out = [net(3 * torch.rand(5, 8)) for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(monitor.records, out, strict=True))
    assert monitor.monitored_layers == ["1"]


# --- snnTorch's neurons in our layers

NEURONS = {
    "Leaky": lambda n: snntorch.Leaky(beta=0.9, threshold=0.2),
    "Leaky, hidden": lambda n: snntorch.Leaky(beta=0.9, threshold=0.2, init_hidden=True, output=True),
    "Lapicque": lambda n: snntorch.Lapicque(beta=0.9, threshold=0.2),
    "Synaptic": lambda n: snntorch.Synaptic(alpha=0.5, beta=0.9, threshold=0.2),
    "Alpha": lambda n: snntorch.Alpha(alpha=0.9, beta=0.8, threshold=0.1),
    "RLeaky": lambda n: snntorch.RLeaky(beta=0.9, threshold=0.2, all_to_all=False),
    "RSynaptic": lambda n: snntorch.RSynaptic(alpha=0.5, beta=0.9, threshold=0.2, all_to_all=False),
    "AssociativeSynaptic": lambda n: AssociativeSynaptic(n, n_clusters=4),
}


@pytest.mark.parametrize("make", NEURONS.values(), ids=NEURONS)
def test_our_layers_accept_any_neuron_of_snntorch(make):
    torch.manual_seed(1)
    readout = MembraneReadout(16, neuron=lambda n: MultiStep(make(n)))
    x = (2 * torch.rand(7, 3, 16)).requires_grad_()
    first = readout(x)
    assert torch.equal(readout(x), first)  # every call starts from rest
    assert torch.equal(readout(x[:, :1]), first[:1])
    first.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
    block = NordBlock(16, 2, 32, neuron=lambda n: MultiStep(make(n)))
    assert block(torch.randn(4, 2, 5, 16)).shape == (4, 2, 5, 16)


@pytest.mark.parametrize("make", NEURONS.values(), ids=NEURONS)
def test_multi_step_gives_the_spikes_of_single_time_steps(make):
    torch.manual_seed(1)
    single, whole = make(16), MultiStep(make(16))
    whole.neuron.load_state_dict(single.state_dict())
    x = 2 * torch.rand(7, 3, 16)
    states, spikes = (), []
    if not single.init_hidden:
        states = tuple(
            torch.zeros(3, 16)
            for _ in range(len(single.reset_mem()) if not isinstance(single.reset_mem(), torch.Tensor) else 1)
        )
    for x_t in x:
        parts = single(x_t, *states)
        spikes.append(parts[0])
        states = () if single.init_hidden else parts[-len(states) :]
    assert torch.equal(whole(x), torch.stack(spikes))
    assert torch.stack(spikes).any()


def test_multi_step_restores_the_stored_state_of_its_neuron():
    leaky = snntorch.Leaky(beta=0.9, init_hidden=True)
    leaky(torch.rand(2, 16))
    mem = leaky.mem
    MultiStep(leaky)(torch.rand(5, 3, 16))
    assert leaky.mem is mem
    synaptic = AssociativeSynaptic(16, n_clusters=4, init_hidden=True)
    strong = torch.full((2, 16), 9.0)
    assert synaptic(strong).all()
    MultiStep(synaptic)(torch.rand(5, 3, 16))
    assert not synaptic(strong).any()  # still refractory


def test_misuse_raises():
    with pytest.raises(TypeError, match="does not support reset_delay, reset_mechanism"):
        AssociativeSynaptic(16, n_clusters=4, reset_mechanism="zero", reset_delay=False)
    with pytest.raises(TypeError, match="expects a neuron of snnTorch, got LIFNode"):
        MultiStep(neuron.LIFNode())
    with pytest.raises(TypeError, match="got SLSTM, whose states are unknown"):
        MultiStep(snntorch.SLSTM(4, 4))(torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match=r"\[T, N, \*, D\] with at least one time step"):
        MultiStep(snntorch.Leaky(beta=0.9))(torch.rand(0, 3, 4))
    readout = MembraneReadout(4, neuron=lambda n: MultiStep(snntorch.Leaky(beta=0.9, init_hidden=True)))
    with pytest.raises(ValueError, match="must have output=True if a layer reads v_seq"):
        readout(torch.rand(3, 2, 4))
    ffn = SpikingFeedForward(4, 8, neuron=lambda n: MultiStep(snntorch.Leaky(beta=0.9, init_hidden=True)))
    assert ffn(torch.rand(3, 2, 4)).shape == (3, 2, 4)


def test_the_error_for_channels_after_a_convolution_names_channel_dim():
    """With 12 channels of 12 x 12 pixels the last dimension could be the neurons, too."""
    neuron = AssociativeSynaptic(12, n_clusters=4)
    with pytest.raises(ValueError, match="12 channels: pass channel_dim=1"):
        neuron(torch.rand(2, 12, 12, 12))
    x = torch.rand(2, 12, 3, 5)
    spk, syn, mem = AssociativeSynaptic(12, n_clusters=4, channel_dim=1)(x)
    assert spk.shape == syn.shape == mem.shape == x.shape
