"""replace_neurons replaces all selected neurons or none; errors and notes name what was expected."""

import re

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from nord_snn.convert import replace_neurons
from nord_snn.neurons import AssociativeLIFNode

pytestmark = pytest.mark.quick
X_SEQ = torch.rand(6, 3, 8, generator=torch.Generator().manual_seed(0)) * 3  # input current [T, N, D]


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 12), neuron.LIFNode(step_mode="m"), nn.Linear(12, 10), neuron.LIFNode(step_mode="m")
    )


def only_first(width, **options):
    """Make the neurons of the first layer, and raise for the second."""
    if width != 12:
        raise ValueError("there are 12 neurons here")
    return AssociativeLIFNode(width, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preset": "nord", "n_clusters": 4}, ValueError, "3 (LIFNode), no neuron is replaced: the number of neurons D must"),
        ({"overrides": {"3": {"n_clusters": 3}}}, ValueError, "3 (LIFNode), no neuron is replaced: the number of neurons D"),
        ({"overrides": {"3": {"tresh": 3}}}, TypeError, "3 (LIFNode), no neuron is replaced"),
        ({"overrides": {"3": {"channel_dim": 2}}}, ValueError, "channel_dim must be from 1 to 1, or from -1 to -1"),
        ({"overrides": {"3": {"channel_dim": 0}}}, ValueError, "a time step [3, 10] without that of the batch, got 0"),
        ({"overrides": {"3": {"backend": "gpu"}}, "like": True}, ValueError, "3 (LIFNode), no neuron is replaced: backend"),
        ({"neuron": only_first}, ValueError, "3 (LIFNode), no neuron is replaced: there are 12 neurons here"),
        ({"only": ["1"]}, TypeError, "only must be a class or a tuple of classes, the name of a neuron or"),
        ({"only": ("1", "3")}, TypeError, "function of name and module, got ('1', '3')"),
        ({"only": nn.ReLU()}, TypeError, "function of name and module, got ReLU()"),
        ({"only": "7"}, ValueError, "only must select at least one of the neurons '1' (LIFNode), '3' (LIFNode), got '7'"),
        ({"overrides": {"3": 5}}, TypeError, "overrides must be a dict of names and arguments, such as {'lif1': {'threshold'"),
        ({"overrides": ["3"]}, TypeError, "{'lif1': {'threshold': 0.7}}, got ['3']"),
        ({"n_clusters": True}, TypeError, "n_clusters must be a number, 'auto' or None, got True"),
        ({"learnable": "threshold"}, TypeError, "learnable must be a collection of names, such as ['threshold']"),
        ({"learnable": "threshold", "like": True}, TypeError, "with like=True, learnable must be True or False, got 'thr"),
    ],
)  # fmt: skip
def test_after_an_error_the_network_is_unchanged(options, error, message):
    net = two_layers()
    modules, parameters = list(net.modules()), dict(net.named_parameters())
    with pytest.raises(error, match=re.escape(message)):
        replace_neurons(net, X_SEQ, **options)
    assert list(net.modules()) == modules
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())


@pytest.mark.parametrize("options", [{}, {"only": neuron.LIFNode}])
def test_the_second_call_says_that_all_neurons_are_replaced_already(options):
    net = two_layers()
    replace_neurons(net, X_SEQ)
    with pytest.raises(ValueError, match=r"^all neurons of net are AssociativeLIFNodes already: \['1', '3'\]$"):
        replace_neurons(net, X_SEQ, **options)


class SharedNeurons(nn.Module):
    """One layer of neurons under two names."""

    def __init__(self):
        super().__init__()
        self.fc, self.a = nn.Linear(8, 8), neuron.LIFNode(step_mode="m")
        self.b = self.a

    def forward(self, x_seq):
        return self.b(self.fc(self.a(self.fc(x_seq))))


@pytest.mark.parametrize("only", ["a", "b", lambda name, _: name == "b", neuron.LIFNode, None])
def test_a_neuron_is_replaced_under_all_names_if_one_is_selected(only):
    net = SharedNeurons()
    report = replace_neurons(net, X_SEQ, only=only)
    assert [row.name for row in report.replaced] == ["a", "b"]
    assert isinstance(net.a, AssociativeLIFNode)
    assert net.a is net.b


def test_overrides_of_one_neuron_under_two_names_must_agree():
    for overrides in ({"b": {"threshold": 0.9}}, {"a": {"threshold": 0.9}, "b": {"threshold": 0.9, "n_clusters": 2}}):
        net = SharedNeurons()
        replace_neurons(net, X_SEQ, only="b", overrides=overrides)
        assert net.a is net.b
        assert net.a.v_threshold.tolist() == pytest.approx([0.9] * 8)
    thresholds = torch.full((8,), 0.9)
    replace_neurons(
        SharedNeurons(), X_SEQ, overrides={"a": {"threshold": thresholds}, "b": {"threshold": thresholds.clone()}}
    )
    net = SharedNeurons()
    with pytest.raises(
        ValueError,
        match=r"'a' and 'b' are the same module: overrides must have one threshold for it, got 0\.2 and 0\.9",
    ):
        replace_neurons(net, X_SEQ, overrides={"a": {"threshold": 0.2}, "b": {"threshold": 0.9}})
    assert isinstance(net.a, neuron.LIFNode)


class Residual(nn.Module):
    """Neurons after a residual sum, so that their channel dimension cannot be derived from the convolution."""

    def __init__(self, kind=layer.Conv1d, size=5):
        super().__init__()
        self.conv = kind(size, size, 3, padding=1) if kind is layer.Conv1d else kind(9, 9)
        self.lif = neuron.LIFNode()
        functional.set_step_mode(self, "m")

    def forward(self, x_seq):
        return self.lif(self.conv(x_seq) + x_seq)


def test_a_note_names_the_channel_dimension_that_the_neurons_may_have():
    net = Residual()
    report = replace_neurons(net, torch.rand(4, 2, 5, 9))
    [row] = report
    assert (row.width, row.channel_dim) == (9, -1)
    assert "the Conv1d before them has 5 channels in dimension 1" in row.note
    assert row.note.endswith("pass channel_dim=1 in overrides")
    assert "note on lif (LIFNode): the neurons are those of the last dimension" in str(report)
    assert max(map(len, str(report).splitlines())) <= 80
    functional.reset_net(net)
    with pytest.raises(ValueError, match=r"with D = 9, got \[4, 2, 5, 7\]: .*channel_dim=1"):
        net(torch.rand(4, 2, 5, 7))


def test_no_note_where_the_channel_dimension_is_an_argument_or_unambiguous():
    for net, x_seq, options in (
        (Residual(), torch.rand(4, 2, 5, 9), {"overrides": {"lif": {"channel_dim": 1}}}),
        (Residual(), torch.rand(4, 2, 5, 9), {"channel_dim": -1}),
        (Residual(), torch.rand(4, 2, 5, 5), {}),
        (Residual(nn.Linear), torch.rand(4, 2, 5, 9), {}),
        (
            nn.Sequential(layer.Conv1d(5, 5, 3, step_mode="m"), neuron.LIFNode(step_mode="m")),
            torch.rand(4, 2, 5, 9),
            {},
        ),
    ):
        [row] = replace_neurons(net, x_seq, **options)
        assert not row.note
