"""SpikeMonitor counts true spikes."""

import copy

import pytest
import torch
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

from nord_snn.layers import NordBlock
from nord_snn.monitor import SpikeMonitor
from nord_snn.neurons import AssociativeLIFNode


def test_rates_are_the_means_of_the_outputs_over_all_calls():
    net = nn.Sequential(AssociativeLIFNode(8, n_clusters=4, step_mode="m"), nn.Linear(8, 4), LIFNode(step_mode="m"))
    x = torch.rand(6, 3, 8)
    with SpikeMonitor(net) as monitor:
        outputs = [net[0](x, stateless=True) for _ in range(2)]
        net[2](5 * torch.rand(6, 3, 4))
        net[0](x[:, :1], stateless=True)
    rates = monitor.rates()
    expected = (2 * outputs[0].sum() + outputs[0][:, :1].sum()) / (6 * 7 * 8)
    assert rates["0"] == pytest.approx(expected.item())
    assert set(rates) == {"0", "2"}
    net[0](x, stateless=True)
    assert monitor.rates() == rates  # closed: counts no more
    monitor.clear()
    assert monitor.rates() == {}


def test_what_a_copy_of_the_network_does_is_not_counted():
    net = nn.Sequential(AssociativeLIFNode(8, n_clusters=4, step_mode="m"))
    with SpikeMonitor(net) as monitor:
        copy.deepcopy(net)(torch.rand(6, 3, 8))
    assert monitor.rates() == {}


def test_every_neuron_layer_of_a_block_is_seen_once():
    with SpikeMonitor(NordBlock(64, 4, 64)) as monitor:
        assert set(monitor._layers) == {"resonance.lif_q", "resonance.lif_k", "ffn.lif1", "ffn.lif2"}


def test_a_network_without_neurons_is_refused():
    with pytest.raises(ValueError, match="Linear has no neuron layers"):
        SpikeMonitor(nn.Linear(2, 2))


@pytest.mark.parametrize("init_hidden", [False, True])
def test_neurons_of_snntorch_are_counted_once(init_hidden):
    snntorch = pytest.importorskip("snntorch")
    from nord_snn.integrations.snntorch import AssociativeSynaptic

    net = nn.ModuleDict(
        {
            "theirs": snntorch.Leaky(beta=0.9, threshold=4.0, init_hidden=init_hidden, output=True),
            "ours": AssociativeSynaptic(8, n_clusters=4, init_hidden=init_hidden),
        }
    )
    x = 8 * torch.rand(6, 8)
    with SpikeMonitor(net) as monitor:
        spikes = {name: neuron(x) for name, neuron in net.items()}
    spikes = {name: out[0] if isinstance(out, tuple) else out for name, out in spikes.items()}
    rates = monitor.rates()
    assert rates == pytest.approx({"theirs": spikes["theirs"].mean().item(), "ours.node": spikes["ours"].mean().item()})
    assert all(0 < rate < 1 for rate in rates.values())
