"""Tests of examples/conv_digits: the network learns, has the listed neurons, and its measured rates are correct."""

import conv_digits as script
import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

from nord_snn.layers import LeakyClamp
from nord_snn.neurons import AssociativeLIFNode

pytestmark = pytest.mark.quick


def test_neurons_of_a_channel_share_their_parameters_at_every_pixel():
    node = script.ours(16)
    x = 2 * torch.rand(4, 2, 16, 3, 3)
    spikes = node(x)
    assert spikes.shape == x.shape
    duplicate = script.ours(16)
    duplicate.load_state_dict(node.state_dict())
    assert torch.equal(duplicate(x[..., 1:2, 2:]), spikes[..., 1:2, 2:])  # each pixel is computed independently


@pytest.mark.parametrize(("name", "ours", "clamps"), [("SpikingJelly LIFNode", 0, 0), ("AssociativeLIFNode, cascade", 2, 0),
                                                      ("AssociativeLIFNode, cascade, LeakyClamp", 2, 2)])  # fmt: skip
def test_each_kind_has_the_neurons_in_its_name(name, ours, clamps):
    modules = list(script.Net(script.KINDS[name]).modules())
    assert sum(isinstance(m, AssociativeLIFNode) for m in modules) == ours
    assert sum(isinstance(m, LeakyClamp) for m in modules) == clamps
    assert sum(isinstance(m, neuron.BaseNode) for m in modules) == 2


def test_the_network_learns_digits():
    result = script.train(script.KINDS["AssociativeLIFNode, cascade"], 0, 2, script.digits())
    assert result.accuracy > 0.8
    assert 0 < result.rate < 1


def test_the_fractions_of_silent_and_of_firing_neurons_are_correct():
    net = script.Net(script.lif).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.zero_()
                module.bias.copy_(torch.where(torch.arange(len(module.bias)) % 4 == 0, 9.0, -9.0))
    images, labels = script.digits()[2:]
    result = script.measure(net, images[:20], labels[:20])
    assert result.silent == pytest.approx(0.75)
    assert result.rate == pytest.approx(0.25)


def test_the_script_prints_a_table_and_draws_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "KINDS", {"SpikingJelly LIFNode": script.lif})
    assert script.main(["--seeds", "2", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert "LIFNode" in capsys.readouterr().out
    assert (tmp_path / "conv_digits.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        script.main(["--seeds", "0"])
