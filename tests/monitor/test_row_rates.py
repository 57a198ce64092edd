"""RowRates: the firing rate of each row, the mean over its time steps and neurons."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

from nord_snn.layers import NordBlock
from nord_snn.monitor import RowRates, SpikeMonitor
from nord_snn.neurons import AssociativeLIFNode


def node(n):
    return AssociativeLIFNode(n, n_clusters=4)


@pytest.mark.quick
def test_the_rate_of_a_row_is_the_mean_of_its_spikes():
    net = nn.Sequential(AssociativeLIFNode(12, n_clusters=4, step_mode="m"))
    x = 2 * torch.rand(7, 3, 5, 12)
    with RowRates(net) as rows:
        spikes = net(x)
        rates = rows.take()
    assert torch.allclose(rates["0"], spikes.mean((0, 3)))
    assert rows.take() == {}
    assert rows.neurons() == {"0": 12}
    assert not net[0]._forward_hooks


@pytest.mark.quick
def test_the_rate_of_a_row_does_not_depend_on_the_batch():
    """A row is a position of a sequence; it does not depend on later positions."""
    torch.manual_seed(0)
    block = NordBlock(16, 2, 32, neuron=node)
    x = 4 * torch.randn(9, 2, 6, 16)
    with RowRates(block) as rows:
        block(x)
        all_rows = rows.take()
        block(x[:, 1:, :4])
        some_rows = rows.take()
    assert set(all_rows) == set(SpikeMonitor(block)._counters)
    for name, rates in all_rows.items():
        assert rates.shape == (2, 6)
        assert torch.equal(rates[1:, :4], some_rows[name])


@pytest.mark.quick
def test_the_mean_over_rows_is_the_rate_of_the_layer():
    block = NordBlock(16, 2, 32, neuron=node)
    with RowRates(block) as rows, SpikeMonitor(block) as monitor:
        block(4 * torch.randn(9, 2, 6, 16))
    rates = monitor.rates()
    for name, of_rows in rows.take().items():
        assert of_rows.mean().item() == pytest.approx(rates[name], rel=1e-5)


def test_single_time_steps_give_the_rates_of_the_sequence():
    single, all_rows = LIFNode(v_threshold=0.5), LIFNode(v_threshold=0.5, step_mode="m")
    x = torch.rand(6, 3, 2, 4)
    with RowRates(single) as steps, RowRates(all_rows) as sequence:
        for x_t in x:
            single(x_t)
        all_rows(x)
        rates = steps.take()[""]
        assert torch.equal(rates, sequence.take()[""])
        assert rates.shape == (3,)  # for SpikingJelly's nodes all dimensions after the batch are neurons
    functional.reset_net(single)
    with RowRates(single, feature_dims=1) as steps:
        single(x[0])
        assert steps.take()[""].shape == (3, 2)


def test_another_number_of_rows_raises_and_copies_are_not_counted():
    net = nn.Sequential(AssociativeLIFNode(8, None, step_mode="m"))
    with RowRates(net):
        net(torch.rand(4, 3, 8))
        functional.reset_net(net)
        copy.deepcopy(net)(torch.rand(4, 2, 8))
        with pytest.raises(ValueError, match=r"rows of '0' must not change, got \[3\] and then \[2\]: call take\(\)"):
            net(torch.rand(4, 2, 8))
    functional.reset_net(net)
    for monitor in (RowRates, SpikeMonitor):
        with pytest.raises(ValueError, match="feature_dims must be at least 1, got 0"):
            monitor(net, feature_dims=0)
        with (
            pytest.raises(
                ValueError, match=r"feature_dims must be less than the 3 dimensions of the spikes \[4, 3, 8\], got 3"
            ),
            monitor(net, feature_dims=3),
        ):
            net(torch.rand(4, 3, 8))
    with pytest.raises(ValueError, match="Linear has none"):
        RowRates(nn.Linear(2, 2))


def test_an_empty_batch_has_no_rate_and_a_copy_of_an_observed_network_can_be_saved(tmp_path):
    net = nn.Sequential(AssociativeLIFNode(8, None, step_mode="m"))
    with RowRates(net), SpikeMonitor(net) as monitor:
        net(torch.rand(4, 0, 8))
        torch.save(copy.deepcopy(net), tmp_path / "net.pt")
    assert monitor.rates() == {}


def test_compiled_networks_are_counted():
    net = AssociativeLIFNode(8, n_clusters=4, step_mode="m", backend="torch")
    compiled = torch.compile(nn.Sequential(net), backend="eager")
    x = 2 * torch.rand(5, 3, 8)
    compiled(x)
    functional.reset_net(net)
    with RowRates(net) as rows:
        spikes = compiled(x)
        assert torch.allclose(rows.take()[""], spikes.mean((0, 2)))


def test_compiled_code_counts_many_calls_without_recompilation():
    net = nn.Sequential(AssociativeLIFNode(8, n_clusters=4, step_mode="m", backend="torch"))
    compiled = torch.compile(lambda x: net[0](x, stateless=True), backend="eager", fullgraph=True)
    x = 2 * torch.rand(5, 3, 8)
    with RowRates(net) as rows:
        for _ in range(20):  # more than torch's limit of recompilations
            spikes = compiled(x)
        assert torch.allclose(rows.take()["0"], spikes.mean((0, 2)))
