"""``SpikeMonitor(kinds=...)``: neurons of any class or library, and of unknown classes, which are found by their outputs."""

import copy
import warnings

import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

from nord_snn.monitor import RowRates, SpikeMonitor, profile_energy
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.neurons.detection import is_neuron

pytestmark = pytest.mark.quick


class IntegrateAndFire(nn.Module):
    """Integrate-and-fire neurons with soft reset over a sequence [T, N, *], a class of no library."""

    def forward(self, x_seq):
        v, spikes = 0.0, []
        for x in x_seq:
            v = v + x
            spikes.append((v >= 1.0).to(x.dtype))
            v = v - spikes[-1]
        return torch.stack(spikes)


class WithStates(IntegrateAndFire):
    """Neurons that return spikes and a state, as snnTorch's and Norse's do."""

    def forward(self, x_seq):
        return super().forward(x_seq), x_seq[-1]


class WithSurrogate(IntegrateAndFire):
    """Neurons with a surrogate function as a child, as in research code that builds on SpikingJelly."""

    def __init__(self):
        super().__init__()
        self.surrogate_function = surrogate.ATan()

    def forward(self, x_seq):
        return self.surrogate_function(x_seq - 0.5)


class BooleanSpikes(nn.Module):
    def forward(self, x):
        return x > 0.5


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class ColumnDropout(nn.Module):
    """Dropout of every second column."""

    def forward(self, x):
        return x * (torch.arange(x.shape[-1]) % 2)


class MaxPool(nn.Module):
    def forward(self, x):
        return x.unflatten(-1, (-1, 2)).amax(-1)


class ReLUSubclass(nn.ReLU):
    """A ReLU of a class that torch does not have."""


def network():
    return nn.Sequential(
        IntegrateAndFire(), ColumnDropout(), MaxPool(), nn.Linear(4, 6), WithSurrogate(), nn.Identity()
    )


KINDS = {
    "class": IntegrateAndFire,
    "tuple": (WithSurrogate, IntegrateAndFire),
    "function": lambda module: isinstance(module, IntegrateAndFire),
    "outputs": "spiking",
}


@pytest.mark.parametrize("name", KINDS)
def test_the_rate_of_neurons_of_any_class_is_the_mean_of_their_outputs(name):
    net, recorded = network(), {"0": [], "4": []}
    for key, calls in recorded.items():
        net[int(key)].register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(output))
    with SpikeMonitor(net, {"first": ["0"]}, kinds=KINDS[name], step_mode="m") as monitor:
        for rows in (3, 2):
            net(torch.rand(6, rows, 8))
    activity = monitor.activity()
    assert set(activity) == {"0", "4"}
    for key, calls in recorded.items():
        spikes = torch.cat([call.flatten(0, 1) for call in calls]).double()
        assert torch.allclose(activity[key].per_neuron, spikes.mean(0))
        assert activity[key].per_step.shape == (6,)
        assert 0 < activity[key].rate < 1
    assert monitor.zone_rates()["first"] == pytest.approx(activity["0"].rate)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net[1:4])


def test_without_a_step_mode_a_call_is_one_time_step():
    net, x = nn.Sequential(IntegrateAndFire()), torch.rand(6, 3, 8)
    with (
        SpikeMonitor(net, kinds=IntegrateAndFire) as steps,
        SpikeMonitor(net, kinds=IntegrateAndFire, step_mode="m") as sequences,
    ):
        net(x)
    assert steps.activity()["0"].per_neuron.shape == (3, 8)
    assert sequences.activity()["0"].per_neuron.shape == (8,)
    assert steps.rates() == pytest.approx(sequences.rates())


def test_a_layer_that_returns_spikes_and_states_is_counted():
    net = nn.Sequential(WithStates())
    with (
        SpikeMonitor(net, kinds=WithStates, step_mode="m") as monitor,
        RowRates(net, kinds=IntegrateAndFire, step_mode="m") as rows,
    ):
        spikes, _ = net(torch.rand(6, 3, 8))
    assert monitor.rates()["0"] == pytest.approx(spikes.mean().item())
    assert torch.allclose(rows.take()["0"], spikes.mean((0, 2)))


def test_modules_that_copy_spikes_are_not_neurons_and_the_report_names_them():
    net = network()
    with SpikeMonitor(net, kinds="spiking", step_mode="m") as monitor:
        net(torch.rand(6, 3, 8))
    text = str(monitor)
    assert "| 0 | 0." in text
    assert (
        "Taken for neurons, because their outputs are exactly 0 and 1 and their inputs are not: '0' (IntegrateAndFire), "
        in text
    )
    assert "'4' (WithSurrogate)." in text
    assert "from inputs of 0 and 1 only, or copied from them: '1' (ColumnDropout), '2' (MaxPool)." in text


@pytest.mark.parametrize(
    ("module", "x", "verdict"),
    [
        (ReLUSubclass(), torch.tensor([[-1.0, 0.0, 1.0, -1.0]]), "copied from them: '0' (ReLUSubclass)"),
        (MaxPool(), torch.tensor([[-1.0, 0.0, 1.0, -1.0]]), "copied from them: '0' (MaxPool)"),
        (IntegrateAndFire(), torch.full((4, 1, 2), 0.1), "Outputs of 0 only: '0' (IntegrateAndFire)."),
        (IntegrateAndFire(), torch.full((4, 1, 2), 1.0), "Outputs of 1 only: '0' (IntegrateAndFire)."),
        (
            IntegrateAndFire(),
            (torch.arange(8).reshape(4, 1, 2) % 2).float(),
            "copied from them: '0' (IntegrateAndFire).",
        ),
        (Doubled(), torch.rand(4, 1, 2), "No module was taken for neurons"),
        (BooleanSpikes(), torch.rand(4, 1, 2), "No module was taken for neurons"),
    ],
)
def test_modules_that_are_not_neurons_by_their_outputs(module, x, verdict):
    net = nn.Sequential(module)
    with SpikeMonitor(net, kinds="spiking") as monitor:
        net(x)
    assert monitor.rates() == {}
    assert verdict in str(monitor)


def test_a_module_with_a_later_output_other_than_0_and_1_is_not_a_neuron():
    net = nn.Sequential(ReLUSubclass())
    with SpikeMonitor(net, kinds="spiking") as monitor:
        net(torch.tensor([[-1.0, 1.0]]))
        net(torch.tensor([[-1.0, 0.3]]))
    assert monitor.rates() == {}
    assert "ReLUSubclass" not in str(monitor)


def test_without_known_neurons_the_monitor_searches_by_outputs_and_warns_once():
    net = network()
    with SpikeMonitor(net, step_mode="m") as monitor:
        net(torch.rand(6, 3, 8))
    with pytest.warns(
        UserWarning, match=r"no neurons of known classes. Taken for neurons.*'0' \(IntegrateAndFire\)"
    ) as warned:
        monitor.rates()
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(monitor.rates()) == {"0", "4"}


def test_the_search_by_outputs_finds_neurons_in_addition_to_those_of_known_classes():
    net = nn.Sequential(neuron.LIFNode(step_mode="m"), nn.Linear(8, 8), IntegrateAndFire())
    with SpikeMonitor(net, kinds="spiking", step_mode="m") as monitor:
        net(3 * torch.rand(6, 3, 8))
    assert set(monitor.rates()) == {"0", "2"}
    with SpikeMonitor(net) as monitor:  # known classes only
        functional.reset_net(net)
        net(3 * torch.rand(6, 3, 8))
    assert set(monitor.rates()) == {"0"}


def test_the_search_by_outputs_ignores_copies_and_calls_while_paused():
    net = network()
    with SpikeMonitor(net, kinds="spiking", step_mode="m") as monitor:
        copy.deepcopy(net)(torch.rand(6, 3, 8))
        monitor.pause()
        net(torch.rand(6, 3, 8))
        assert monitor.rates() == {}
        assert "Not called: '0' (IntegrateAndFire)" in str(monitor)
        monitor.resume()
        net(torch.rand(6, 3, 8))
        assert set(monitor.rates()) == {"0", "4"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("kinds", [3, "neurons", (), (IntegrateAndFire, 3), int, [IntegrateAndFire]])
def test_an_invalid_kind_raises(kinds):
    with pytest.raises(TypeError, match=r"kinds must be a class of modules.*got"):
        SpikeMonitor(network(), kinds=kinds)


def test_networks_without_modules_of_the_kind_and_modules_that_cannot_be_observed_raise():
    with pytest.raises(
        ValueError, match="expected modules of class IntegrateAndFire or WithSurrogate, Linear has none"
    ):
        SpikeMonitor(nn.Linear(2, 2), kinds=(IntegrateAndFire, WithSurrogate))
    with pytest.raises(ValueError, match=r"expected modules for which kinds\(module\) is true, Linear has none"):
        SpikeMonitor(nn.Linear(2, 2), kinds=lambda module: False)
    scripted = nn.Sequential(torch.jit.script(nn.ReLU()))
    with pytest.raises(TypeError, match="'0' is a ScriptModule"):
        SpikeMonitor(scripted, kinds=lambda module: isinstance(module, torch.jit.ScriptModule))
    with pytest.raises(ValueError, match='step_mode must be "s" or "m", got 3'):
        SpikeMonitor(network(), kinds=IntegrateAndFire, step_mode=3)
    returns_list = nn.Sequential(ReturnsList())
    with (
        SpikeMonitor(returns_list, kinds=ReturnsList),
        pytest.raises(TypeError, match=r"must return spikes.*ReturnsList returned list"),
    ):
        returns_list(torch.rand(2))


class ReturnsList(nn.Module):
    def forward(self, x):
        return [x]


PARALLEL = {
    "PSN": lambda: neuron.PSN(6),
    "MaskedPSN": lambda: neuron.MaskedPSN(k=2, T=6, step_mode="m"),
    "SlidingPSN": lambda: neuron.SlidingPSN(k=2, step_mode="m"),
}
OTHERS = {
    "SimpleLIFNode": lambda: neuron.SimpleLIFNode(tau=2.0, decay_input=False, step_mode="m"),
    "SimpleIFNode": lambda: neuron.SimpleIFNode(step_mode="m"),
    "GatedLIFNode": lambda: neuron.GatedLIFNode(T=6),
}


@pytest.mark.parametrize("name", PARALLEL | OTHERS)
def test_neurons_of_spikingjelly_that_are_not_base_nodes_are_counted(name):
    if not hasattr(neuron, name):
        pytest.skip(f"this SpikingJelly has no {name}")
    node, x = (PARALLEL | OTHERS)[name](), 3 * torch.rand(6, 2, 3, 4, 4)
    with SpikeMonitor(nn.Sequential(node, nn.Flatten(2))) as monitor:
        spikes = node(x)
    activity = monitor.activity()["0"]
    assert activity.per_step.shape == (6,)
    assert activity.per_neuron.shape == (3, 4, 4)
    assert activity.rate == pytest.approx(spikes.mean().item())


@pytest.mark.parametrize(("name", "order"), [("PSN", 6), ("MaskedPSN", 2), ("SlidingPSN", 2)])
def test_parallel_neurons_cost_the_products_of_their_weighted_sums(name, order):
    if not hasattr(neuron, name):
        pytest.skip(f"this SpikingJelly has no {name}")
    profile = profile_energy(PARALLEL[name](), torch.rand(6, 2, 8))
    n = 6 * 2 * 8
    assert (profile.multiplications, profile.additions, profile.products) == (order * n, order * n, [])
    assert profile.time_steps == 6


def test_neurons_of_norse_are_counted():
    norse = pytest.importorskip("norse.torch")
    net = norse.SequentialState(nn.Linear(8, 8), norse.LIF(), nn.Linear(8, 5), norse.LIFRecurrent(5, 5), norse.LI())
    with SpikeMonitor(net) as monitor:
        net(20 * torch.rand(9, 3, 8))
    activity = monitor.activity()
    assert {name: a.per_step.shape for name, a in activity.items()} == {"1": (9,), "3": (9,)}
    assert {name: a.per_neuron.shape for name, a in activity.items()} == {"1": (8,), "3": (5,)}
    cell, state, count = norse.LIFBoxCell(), None, 0
    with SpikeMonitor(cell) as monitor:
        for x in 30 * torch.rand(20, 3, 8):
            spikes, state = cell(x, state)
            count += spikes.sum().item()
    assert monitor.rates()[""] == pytest.approx(count / (20 * 3 * 8))
    assert count > 0
    assert not any(is_neuron(module) for module in (norse.LI(), norse.LICell(), norse.LIBoxCell()))


def test_products_inside_neurons_of_unknown_cost_are_counted():
    norse = pytest.importorskip("norse.torch")
    profile = profile_energy(norse.LIFRecurrent(8, 5), torch.rand(6, 3, 8), time_steps=6)
    assert profile.dense == 6 * 3 * (8 * 5 + 5 * 5)
    assert profile.multiplications == 2 * 6 * 3 * 5


def test_recurrent_weights_of_snntorch_are_counted():
    snntorch = pytest.importorskip("snntorch")
    net = nn.Sequential(snntorch.RLeaky(beta=0.9, linear_features=8, init_hidden=True))
    profile = profile_energy(net, torch.rand(3, 8))
    assert [(product.name, product.dense) for product in profile.products] == [("0.recurrent", 3 * 8 * 8)]
    assert profile.elementwise == 0


def test_products_inside_neurons_with_an_update_cost_are_not_counted_in_addition():
    node = AssociativeLIFNode(8, n_clusters=4, step_mode="m", backend="torch")
    assert profile_energy(node, 5 * torch.rand(6, 3, 8)).products == []


def test_neurons_with_channels_are_counted_per_pixel():
    node = AssociativeLIFNode(3, preset="lif", channel_dim=1, step_mode="m")
    with SpikeMonitor(node) as monitor:
        node(torch.rand(4, 2, 3, 5, 6))
    assert monitor.activity()[""].per_neuron.shape == (3, 5, 6)
