"""SpikeMonitor: firing rates of neurons by layer, time step, neuron and zone, in one and several processes."""

import copy

import pytest
import torch
from helpers import Ranks, two_processes
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

from nord_snn.layers import NordBlock
from nord_snn.monitor import SpikeMonitor
from nord_snn.neurons import AssociativeLIFNode


@pytest.mark.quick
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
    assert monitor.rates() == rates  # a closed monitor does not count
    monitor.clear()
    assert monitor.rates() == {}


@pytest.mark.quick
def test_spikes_of_a_copy_of_the_network_are_not_counted():
    net = nn.Sequential(AssociativeLIFNode(8, n_clusters=4, step_mode="m"))
    with SpikeMonitor(net) as monitor:
        copy.deepcopy(net)(torch.rand(6, 3, 8))
    assert monitor.rates() == {}


def test_every_layer_of_neurons_of_a_block_is_counted_once():
    with SpikeMonitor(NordBlock(64, 4, 64)) as monitor:
        assert set(monitor._counters) == {"resonance.lif_q", "resonance.lif_k", "ffn.lif1", "ffn.lif2"}


def test_a_network_without_neurons_raises():
    with pytest.raises(ValueError, match="Linear has none"):
        SpikeMonitor(nn.Linear(2, 2))


@pytest.mark.quick
@pytest.mark.parametrize("init_hidden", [False, True])
def test_neurons_of_snntorch_are_counted_once(init_hidden):
    snntorch = pytest.importorskip("snntorch")
    from nord_snn.integrations.snntorch import AssociativeSynaptic

    net = nn.ModuleDict(
        {
            "leaky": snntorch.Leaky(beta=0.9, threshold=4.0, init_hidden=init_hidden, output=True),
            "synaptic": AssociativeSynaptic(8, n_clusters=4, init_hidden=init_hidden),
        }
    )
    x = 8 * torch.rand(6, 8)
    with SpikeMonitor(net) as monitor:
        spikes = {name: neuron(x) for name, neuron in net.items()}
    spikes = {name: out[0] if isinstance(out, tuple) else out for name, out in spikes.items()}
    rates = monitor.rates()
    assert rates == pytest.approx(
        {"leaky": spikes["leaky"].mean().item(), "synaptic.node": spikes["synaptic"].mean().item()}
    )
    assert all(0 < rate < 1 for rate in rates.values())


def firing(n=8, **more):
    """Return a node that fires for inputs of about 1."""
    return AssociativeLIFNode(n, n_clusters=4, step_mode="m", **more)


def test_activity_equals_the_means_of_recorded_spikes():
    """The means are per time step and per neuron; calls have different lengths and batch sizes."""
    node, recorded = firing(), []
    node.register_forward_hook(lambda module, inputs, output: recorded.append(output))
    with SpikeMonitor(node) as monitor:
        for steps, rows in ((7, 3), (5, 1), (9, 4)):
            node(3 * torch.rand(steps, rows, 8), stateless=True)
    activity = monitor.activity()[""]
    assert torch.allclose(activity.per_neuron, torch.cat([s.flatten(0, 1) for s in recorded]).mean(0).double())
    for step in range(9):
        spikes_of_step = torch.cat([s[step] for s in recorded if len(s) > step])
        assert activity.per_step[step] == pytest.approx(spikes_of_step.mean().item())
    assert activity.rows == 7 * 3 + 5 + 9 * 4
    assert activity.rate == pytest.approx(monitor.rates()[""]) == pytest.approx(activity.per_neuron.mean().item())


@pytest.mark.quick
def test_single_time_steps_count_as_one_sequence():
    """A call of a node at rest starts a sequence."""
    x = 3 * torch.rand(6, 3, 8)
    node = firing()
    with SpikeMonitor(node) as monitor_of_sequence:
        node(x, stateless=True)
    node.step_mode = "s"
    with SpikeMonitor(node) as monitor_of_steps:
        for _ in range(2):
            for step in x:
                node(step)
            functional.reset_net(node)
    a, b = monitor_of_sequence.activity()[""], monitor_of_steps.activity()[""]
    assert torch.allclose(a.per_step, b.per_step)
    assert torch.allclose(a.per_neuron, b.per_neuron)
    assert b.rows == 2 * a.rows


def test_max_steps_limits_the_stored_time_steps_of_a_node_that_is_never_reset():
    node = firing()
    node.step_mode = "s"
    with SpikeMonitor(node, max_steps=5) as monitor:
        for _ in range(12):
            node(3 * torch.rand(2, 8))
    activity = monitor.activity()[""]
    assert activity.per_step.shape == (5,)
    assert activity.rows == 24


def test_activity_has_dead_and_saturated_neurons_and_a_histogram_of_rates():
    """Neuron 0 never fires; neuron 1 fires in every third time step, when its refractory period is over."""
    node = AssociativeLIFNode(3, None, step_mode="m")
    x = torch.zeros(9, 2, 3)
    x[..., 1] = 50.0
    x[::5, :, 2] = 3.0
    with SpikeMonitor(node) as monitor:
        node(x)
    activity = monitor.activity()[""]
    assert activity.dead.tolist() == [True, False, False]
    assert activity.saturated.tolist() == [False, True, False]
    assert activity.ceiling == pytest.approx(1 / 3)
    counts, edges = activity.histogram(4)
    assert counts.sum() == 3
    assert counts[0] >= 1
    assert counts[-1] == 1
    assert edges[-1] == pytest.approx(1 / 3)


def test_without_a_refractory_period_a_saturated_neuron_fires_in_every_time_step():
    node = AssociativeLIFNode(2, None, refractory_steps=0, step_mode="m")
    x = torch.zeros(6, 1, 2)
    x[..., 1] = 100.0
    with SpikeMonitor(node) as monitor:
        node(x)
    assert monitor.activity()[""].ceiling == 1.0
    assert monitor.activity()[""].saturated.tolist() == [False, True]


@pytest.mark.quick
def test_the_rate_of_a_zone_is_the_mean_over_neurons_and_not_over_layers():
    block = NordBlock(16, 2, 64, neuron=lambda n: AssociativeLIFNode(n, n_clusters=4))
    zones = {"attention": ["resonance"], "both": ["resonance.lif_q", "ffn"], "all": [""]}
    with SpikeMonitor(block, zones) as monitor:
        block(5 * torch.randn(9, 2, 3, 16))
    rates, zone_rates = monitor.rates(), monitor.zone_rates()
    assert zone_rates["attention"] == pytest.approx((rates["resonance.lif_q"] + rates["resonance.lif_k"]) / 2)
    # ffn.lif1 has four times as many neurons as the other layers
    assert zone_rates["both"] == pytest.approx(
        (rates["resonance.lif_q"] + 4 * rates["ffn.lif1"] + rates["ffn.lif2"]) / 6
    )
    assert zone_rates["all"] > 0
    with pytest.raises(ValueError, match=r"zone 'eleven' has no layer.*resonance.lif_q"):
        SpikeMonitor(block, {"eleven": ["ffn.lif"]})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_pixels_are_separate_neurons_unless_feature_dims_is_smaller():
    net = nn.Sequential(LIFNode(v_threshold=0.5, step_mode="m"))
    x = torch.rand(4, 2, 3, 5, 7)
    for dims, shape in ((None, (3, 5, 7)), (1, (7,)), (2, (5, 7))):
        functional.reset_net(net)
        with SpikeMonitor(net, feature_dims=dims) as monitor:
            spikes = net(x)
        activity = monitor.activity()["0"]
        assert activity.per_neuron.shape == shape
        assert torch.allclose(activity.per_neuron, spikes.flatten(0, 4 - len(shape)).mean(0).double(), atol=1e-6)


def test_a_changed_number_of_neurons_raises():
    net = nn.Sequential(LIFNode(step_mode="m"))
    with SpikeMonitor(net):
        net(torch.rand(4, 2, 5, 8))
        functional.reset_net(net)
        with pytest.raises(
            ValueError, match=r"neurons of '0' must not change, got \[5, 8\] and then \[6, 8\].*feature_dims"
        ):
            net(torch.rand(4, 2, 6, 8))


def test_all_half_precision_spikes_are_counted():
    node = firing(refractory_steps=0).bfloat16()
    with SpikeMonitor(node) as monitor:
        spikes = node(torch.full((2, 5000, 8), 50.0, dtype=torch.bfloat16))
    assert spikes.all()
    assert monitor.rates()[""] == 1.0


@pytest.mark.parametrize("inside", [False, True], ids=["torch.compile", "compile()"])
def test_compiled_networks_are_counted_by_monitors_started_before_and_after_compilation(inside):
    """Compilation has no graph break; a paused or closed monitor does not count."""
    net = NordBlock(16, 2, 32, neuron=lambda n: AssociativeLIFNode(n, n_clusters=4))
    x = 5 * torch.randn(6, 5, 2, 3, 16)
    run = net if inside else torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        with SpikeMonitor(net) as plain:
            for part in x:
                net(part)
        if inside:
            net.compile(fullgraph=True, backend="eager")
        for _ in range(2):
            run(x[0])  # compiled without a monitor
            with SpikeMonitor(net) as monitor:
                torch._dynamo.utils.counters.clear()
                for part in x:
                    run(part)
                assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
                monitor.pause()
                run(3 * x[0])
                monitor.resume()
            run(3 * x[0])
            monitor.resume()  # has no effect on a closed monitor
            run(3 * x[0])
            assert monitor.rates() == pytest.approx(plain.rates())


@pytest.mark.quick
def test_a_closed_monitor_leaves_no_hook():
    net = NordBlock(16, 2, 32, neuron=lambda n: AssociativeLIFNode(n, n_clusters=4))
    SpikeMonitor(net).close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not any("forward" in module.__dict__ or "nord_snn" in str(list(module.__dict__)) for module in net.modules())


def test_multi_step_and_its_neuron_are_counted_as_one_layer():
    snntorch = pytest.importorskip("snntorch")
    from nord_snn.integrations.snntorch import AssociativeSynaptic, MultiStep

    net = nn.ModuleDict(
        {"leaky": MultiStep(snntorch.Leaky(beta=0.9)), "synaptic": MultiStep(AssociativeSynaptic(8, n_clusters=4))}
    )
    x = 3 * torch.rand(6, 3, 8)
    with SpikeMonitor(net) as monitor:
        for _ in range(2):
            spikes = {name: neuron(x) for name, neuron in net.items()}
    for name, activity in monitor.activity().items():
        assert torch.allclose(activity.per_step, spikes[name].flatten(1).mean(1).double(), atol=1e-6)


SCRIPT = """
import sys, torch
from torch import distributed
from nord_snn.monitor import SpikeMonitor
from nord_snn.neurons import AssociativeLIFNode
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
node = AssociativeLIFNode(8, n_clusters=4, step_mode="m")
x = 3 * torch.rand(7, 4, 8)
with SpikeMonitor(node) as monitor:
    node(x[: 7 - 2 * rank, rank::2], stateless=True)
monitor.gather()
activity = monitor.activity()[""]
torch.save((activity.per_neuron, activity.per_step, activity.rows), f"{folder}/{rank}.pt")
monitor.clear()
monitor.gather()
if rank:
    with SpikeMonitor(node) as monitor:
        node(x)
else:
    monitor = SpikeMonitor(node)
try:
    monitor.gather()
except ValueError as error:
    assert "has run in some only" in str(error)
else:
    raise SystemExit("no error although one of two processes ran nothing")
distributed.barrier()
import os; os._exit(0)
"""


def test_gather_sums_the_counts_of_two_processes(tmp_path):
    two_processes(SCRIPT, tmp_path)
    (a, a_steps, a_rows), (b, b_steps, b_rows) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.manual_seed(0)
    node = firing()
    x = 3 * torch.rand(7, 4, 8)
    with SpikeMonitor(node) as monitor:
        node(x[:, 0::2], stateless=True)
        node(x[:5, 1::2], stateless=True)
    expected = monitor.activity()[""]
    assert a_rows == b_rows == expected.rows
    for got, value in (
        (a, expected.per_neuron),
        (b, expected.per_neuron),
        (a_steps, expected.per_step),
        (b_steps, expected.per_step),
    ):
        assert torch.allclose(got, value)


def test_gather_sums_two_ranks_that_ran_different_numbers_of_time_steps(monkeypatch):
    nodes, x = [firing(), firing()], 3 * torch.rand(7, 4, 8)
    monitors = [SpikeMonitor(node) for node in nodes]
    monitor_of_both = SpikeMonitor(together := firing())
    for rank, steps in ((0, 7), (1, 5)):
        nodes[rank](x[:steps, rank::2], stateless=True)
        together(x[:steps, rank::2], stateless=True)
    assert Ranks(monkeypatch).run(lambda rank: monitors[rank].gather()) == [None, None]
    expected = monitor_of_both.activity()[""]
    for monitor in monitors:
        activity = monitor.activity()[""]
        assert activity.rows == expected.rows == 7 * 2 + 5 * 2
        assert torch.equal(activity.per_neuron, expected.per_neuron)
        assert torch.equal(activity.per_step, expected.per_step)


def test_gather_raises_in_both_ranks_if_a_layer_ran_in_one(monkeypatch):
    ranks, monitors = Ranks(monkeypatch), [SpikeMonitor(node) for node in (firing(), firing())]
    assert ranks.run(lambda rank: monitors[rank].gather()) == [None, None]  # neither has run
    monitors[1]._counters[""].module(torch.rand(3, 2, 8))
    for error in ranks.run(lambda rank: monitors[rank].gather()):
        assert isinstance(error, ValueError)
        assert "must have run in all processes before gather(), but has run in some only" in str(error)


def test_gather_raises_if_neurons_are_found_by_their_outputs(monkeypatch):
    class Step(torch.nn.Module):
        def forward(self, x):
            return (x > 0.5).float()

    monitor = SpikeMonitor(torch.nn.Sequential(Step()), kinds="spiking")
    monitor.gather()  # no process group: a no-op
    Ranks(monkeypatch)
    with pytest.raises(ValueError, match="needs neurons of known classes"):
        monitor.gather()


def test_a_time_step_that_raises_is_not_counted():
    node = AssociativeLIFNode(8, n_clusters=4)
    x = torch.rand(2, 3, 8)
    with SpikeMonitor(node) as monitor:
        node(x[0])
        with pytest.raises(ValueError, match="has state"):
            node(torch.rand(7, 8))
        node(x[1])
    assert len(monitor.activity()[""].per_step) == 2


def test_counting_can_start_in_inference_mode_and_continue_outside():
    """An example is evaluation before training."""
    node = AssociativeLIFNode(8, n_clusters=4, step_mode="m")
    x = 3 * torch.rand(5, 2, 8)
    with SpikeMonitor(node) as monitor:
        with torch.inference_mode():
            spikes = node(x, stateless=True)
        node(x, stateless=True)
    assert monitor.rates()[""] == pytest.approx(spikes.mean().item())
    assert monitor.activity()[""].rows == 2 * 2 * 5
