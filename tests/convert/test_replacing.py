"""replace_neurons and calibrate_thresholds in networks of SpikingJelly."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet, spiking_vgg
from torch import nn

from nord_snn.convert import calibrate_thresholds, replace_neurons
from nord_snn.neurons import AssociativeLIFNode

pytestmark = pytest.mark.quick
X = torch.rand(4, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # images [T, N, C, H, W]


def network(**options):
    """Return a small convolutional network in step mode "m"."""
    torch.manual_seed(0)
    make = lambda: neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), **options)  # noqa: E731
    net = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), layer.BatchNorm2d(8), make(), layer.MaxPool2d(2, 2),
        layer.Flatten(), layer.Linear(128, 10), make(),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def sizes(report):
    """Return name, number of neurons and channel dimension of each replaced layer."""
    return [(row.name, row.width, row.channel_dim) for row in report.replaced]


def test_the_number_of_neurons_and_the_channel_dimension_come_from_the_example():
    net = network()
    report = replace_neurons(net, X)
    assert sizes(report) == [("2", 8, 1), ("6", 10, -1)]
    assert isinstance(net[2], AssociativeLIFNode)
    assert "2     LIFNode  AssociativeLIFNode      8            1" in str(report)
    net(X).sum().backward()
    assert net[2].v_threshold.grad.abs().sum() > 0


def test_all_other_parameters_keep_their_names_and_values():
    net = network()
    before = copy.deepcopy(net.state_dict())
    replace_neurons(net, X)
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_like_gives_the_output_of_the_original_network_bit_for_bit():
    net = network(v_reset=None)
    expected = net(X)
    functional.reset_net(net)
    replace_neurons(net, X, like=True)
    assert torch.equal(net(X), expected)


def test_modes_and_values_of_modules_that_are_not_replaced_stay():
    net = network()
    net[1].eval()
    modes, before = {name: m.training for name, m in net.named_modules()}, copy.deepcopy(net.state_dict())
    with pytest.raises(
        ValueError, match=r"only must select .* neurons '2' \(LIFNode\), '6' \(LIFNode\), got <class .*IFNode'>"
    ):
        replace_neurons(net, X, only=neuron.IFNode)
    with pytest.raises(ValueError, match=r"net must have neurons of SpikingJelly, .*, it has modules \['Conv2d'\]"):
        replace_neurons(nn.Conv2d(1, 1, 1), X)
    replace_neurons(net, X, only="6")
    assert all(modes.get(name, True) == m.training for name, m in net.named_modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items() if name in before)
    assert isinstance(net[2], neuron.LIFNode)


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (neuron.LIFNode, ["2", "6"]),
        ("6", ["6"]),
        (lambda name, module: name == "2", ["2"]),
        ((neuron.IFNode, neuron.LIFNode), ["2", "6"]),
    ],
)
def test_only_accepts_classes_a_name_or_a_function(only, names):
    assert [row.name for row in replace_neurons(network(), X, only=only)] == names


def test_overrides_are_for_one_layer_and_other_keywords_for_all():
    net = network()
    replace_neurons(net, X, overrides={"6": {"threshold": 0.7, "channel_dim": -1}}, preset="nord", n_clusters="auto")
    assert net[2].cascade.n_clusters == 8
    assert net[6].v_threshold.tolist() == pytest.approx([0.7] * 10)
    with pytest.raises(
        ValueError, match=r"overrides for \['7'\], which are not among the selected neurons \['2', '6'\]"
    ):
        replace_neurons(network(), X, overrides={"7": {}})


def test_a_neuron_under_two_names_is_replaced_by_one_node():
    net = network()
    shared = nn.ModuleDict({"first": net, "again": net[6]})
    shared.forward = lambda x: shared["again"](shared["first"](x))
    report = replace_neurons(shared, X)
    assert [row.name for row in report] == ["first.2", "first.6", "again"]
    assert shared["again"] is shared["first"][6]


def test_the_report_has_the_reason_for_each_skipped_neuron():
    class WithSkippedNeurons(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.qif = network(), neuron.LIFNode(), neuron.QIFNode()

        def forward(self, x):
            return self.qif(self.used(x))

    report = replace_neurons(WithSkippedNeurons(), X, like=True)
    reasons = {row.name: row.skipped for row in report.skipped}
    assert reasons["unused"] == "the example input did not reach it"
    assert reasons["qif"].startswith("like() supports")
    assert len(report.replaced) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: sew_resnet.sew_resnet18(num_classes=4, cnf="ADD", spiking_neuron=neuron.IFNode),
        lambda: spiking_resnet.spiking_resnet18(num_classes=4, spiking_neuron=neuron.IFNode),
        lambda: spiking_vgg.spiking_vgg11_bn(num_classes=4, spiking_neuron=neuron.IFNode),
    ],
    ids=["sew_resnet18", "spiking_resnet18", "spiking_vgg11_bn"],
)
def test_one_call_replaces_all_neurons_of_spikingjelly_models(make):
    net = make()
    functional.set_step_mode(net, "m")
    report = replace_neurons(net, torch.rand(2, 1, 3, 32, 32))
    assert not report.skipped
    assert {row.channel_dim for row in report} <= {1, -1}
    assert not [module for module in net.modules() if isinstance(module, neuron.IFNode)]
    assert net(torch.rand(2, 2, 3, 32, 32)).shape == (2, 2, 4)


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_every_layer_fires_at_the_rate_after_calibration(rate):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 64), AssociativeLIFNode(64, preset="lif", step_mode="m"), nn.Linear(64, 64),
        AssociativeLIFNode(64, preset="nord", step_mode="m"),
    )  # fmt: skip
    x = torch.rand(10, 16, 8)
    layers = calibrate_thresholds(net, x, rate=rate)
    assert [one.name for one in layers] == ["1", "3"]
    spikes = net[1](net[0](x))
    assert spikes.mean().item() == pytest.approx(layers[0].after)
    assert all(abs(one.after - rate) < 0.2 * rate for one in layers)


def test_calibration_creates_lazy_nodes_and_keeps_the_thresholds_of_neurons_that_cannot_fire():
    net = nn.Sequential(layer.Conv2d(1, 8, 3), AssociativeLIFNode(), layer.Flatten(), AssociativeLIFNode())
    functional.set_step_mode(net, "m")
    first, _ = calibrate_thresholds(net, X)
    assert abs(first.after - 0.1) < 0.03
    silent = nn.Sequential(AssociativeLIFNode(4, preset="lif", step_mode="m"))
    with pytest.warns(UserWarning, match=r"rate=0\.1 cannot be reached by 0: its rate is at most 0\.00 %"):
        [entry] = calibrate_thresholds(silent, torch.zeros(3, 2, 4))
    assert (entry.before, entry.after, entry.scale) == (0, 0, 1)
    assert silent[0].v_threshold.tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (nn.Linear(4, 4), {}, "needs a network with AssociativeLIFNode"),
        (nn.Sequential(AssociativeLIFNode(4, None)), {}, "0 runs single time steps and received one: pass forward="),
        (AssociativeLIFNode(4, None, step_mode="m"), {"rate": 0.0}, r"rate must lie in \(0, 1\), got 0.0"),
        (AssociativeLIFNode(4, None, step_mode="m"), {"tolerance": -1}, "tolerance must be 0 or more, got -1"),
    ],
)
def test_calibration_raises_with_what_it_expects(net, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate_thresholds(net, torch.rand(3, 2, 4), **options)


def looped(net):
    """Return a function that calls a network once per time step."""
    return lambda x_seq: torch.stack([net(x) for x in x_seq])


def test_calibration_with_a_call_per_time_step_gives_the_thresholds_of_whole_sequences():
    sequences, steps = network().eval(), network().eval()  # statistics of a training batch would differ between the two
    for net in (sequences, steps):
        replace_neurons(net, X)
    functional.set_step_mode(steps, "s")
    expected = calibrate_thresholds(sequences, X, rate=0.2)
    actual = calibrate_thresholds(steps, X, rate=0.2, forward=looped(steps))
    assert [one.name for one in actual] == ["2", "6"]
    assert [one.scale for one in actual] == pytest.approx([one.scale for one in expected])
    assert [one.after for one in actual] == pytest.approx([one.after for one in expected])
    assert steps[2].step_mode == "s"
    assert not isinstance(steps[2].v, torch.Tensor)


def test_calibration_uses_batch_norms_in_training_mode_and_keeps_their_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(layer.Conv2d(1, 8, 3), layer.BatchNorm2d(8), AssociativeLIFNode(step_mode="m"))
    functional.set_step_mode(net, "m")
    x = 0.01 * torch.rand(4, 8, 1, 8, 8)  # far from the running statistics of an untrained batch norm
    net(x)
    functional.reset_net(net)
    statistics = net[1].running_mean.clone()
    [row] = calibrate_thresholds(net, x, rate=0.2)
    assert torch.equal(statistics, net[1].running_mean)
    assert 0.17 < row.after < 0.23
    assert 0.17 < net(x).mean() < 0.23
