"""Networks written for ``spikingjelly.clock_driven``, a package of SpikingJelly 0.0.0.0.14; for release 2 we have a shim."""

import pickle
import subprocess
import sys

import pytest
import torch
from helpers import SPIKINGJELLY_2, needs_spikingjelly_2
from spikingjelly.activation_based import neuron as current
from torch import nn

from nord_snn.convert import calibrate_thresholds, replace_neurons
from nord_snn.integrations.clock_driven import install

pytestmark = pytest.mark.quick

#: Code of a network as in repositories that use the package.
CODE = """
import torch.nn as nn
from spikingjelly.clock_driven import functional, layer
from spikingjelly.clock_driven.neuron import MultiStepLIFNode, MultiStepParametricLIFNode
from spikingjelly.clock_driven import neuron, surrogate

class Block(nn.Module):
    def __init__(self, channels, **more):
        super().__init__()
        self.conv = layer.SeqToANNContainer(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.lif = MultiStepLIFNode(tau=2.0, detach_reset=True, backend="torch", **more)

    def forward(self, x):
        return self.lif(self.conv(x)) + x

class Net(nn.Module):
    def __init__(self, **more):
        super().__init__()
        self.stem = layer.SeqToANNContainer(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.stem_lif = neuron.MultiStepIFNode(surrogate_function=surrogate.ATan(), detach_reset=True, **more)
        self.block = Block(8, **more)
        self.head = nn.Linear(8, 5)
        self.drop = layer.MultiStepDropout(0.1)
        self.head_lif = MultiStepParametricLIFNode(init_tau=2.0, v_threshold=0.05, backend="torch", **more)

    def forward(self, x):
        x = self.block(self.stem_lif(self.stem(x))).flatten(3).mean(3)
        return self.head_lif(self.drop(self.head(x))).mean(0)
"""
X = torch.rand(4, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 4


def has_clock_driven():
    """Return whether SpikingJelly has the package; if not, install the shim."""
    if not SPIKINGJELLY_2:
        with pytest.raises(RuntimeError, match="is for SpikingJelly without the package clock_driven"):
            install()
        return True
    install()
    return False


def network(**more):
    """Return a network of ``CODE`` and the module ``functional`` of ``clock_driven``; ``more`` are arguments of its neurons."""
    has_clock_driven()
    scope = {"__name__": "code"}
    exec(CODE, scope)
    torch.manual_seed(0)
    return scope["Net"](**more), scope["functional"]


def test_replace_neurons_replaces_all_neurons_of_a_network_that_then_trains():
    net, functional = network()
    linear_parameters = {name: value.clone() for name, value in net.state_dict().items() if "lif" not in name}
    report = replace_neurons(net, X)
    assert [(row.name, row.was, row.width, row.channel_dim) for row in report] == [
        ("stem_lif", "MultiStepIFNode", 8, 1),
        ("block.lif", "MultiStepLIFNode", 8, 1),
        ("head_lif", "MultiStepParametricLIFNode", 5, -1),
    ]
    assert all(torch.equal(net.state_dict()[name], value) for name, value in linear_parameters.items())
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(3):
        loss = nn.functional.cross_entropy(net(X), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        functional.reset_net(net)
    assert net.stem_lif.v == 0.0
    assert [one.name for one in calibrate_thresholds(net, X)] == ["stem_lif", "block.lif", "head_lif"]


@pytest.mark.parametrize("v_reset", [None, 0.0])
def test_like_gives_the_output_of_the_network_with_its_own_neurons(v_reset):
    net, functional = network(v_reset=v_reset)
    net.eval()
    with torch.no_grad():
        expected = net(X)
        functional.reset_net(net)
        assert not replace_neurons(net, X, like=True).skipped
        assert expected.sum() > 0
        assert torch.equal(net(X), expected)


@needs_spikingjelly_2
def test_nodes_and_layers_of_the_shim_equal_those_of_activation_based():
    assert not has_clock_driven()
    install()  # a second call changes nothing
    from spikingjelly.clock_driven import functional, layer, neuron

    old_node = neuron.MultiStepLIFNode(2.0, v_reset=None)
    current_node = current.LIFNode(2.0, v_reset=None, step_mode="m")
    assert torch.equal(old_node(X), current_node(X))
    assert neuron.LIFNode is current.LIFNode
    assert torch.equal(pickle.loads(pickle.dumps(old_node))(X), old_node(X))
    functional.reset_net(old_node)
    assert old_node.v == 0.0
    dropout = layer.MultiStepDropout(0.5)
    masked = dropout(torch.ones(3, 4, 8))
    assert torch.equal(masked[0], masked[2])
    with pytest.raises(ValueError, match="backend must be 'torch' or 'cupy', got 'lava'"):
        neuron.MultiStepIFNode(backend="lava")
    with pytest.raises(AttributeError, match=r"spikingjelly.clock_driven.neuron has no MultiStepGeneralNode here"):
        _ = neuron.MultiStepGeneralNode
    with pytest.raises(ModuleNotFoundError, match=r"spikingjelly.clock_driven.ann2snn"):
        import spikingjelly.clock_driven.ann2snn  # noqa: F401


@needs_spikingjelly_2
def test_the_shim_is_installed_by_install_and_not_by_its_import():
    code = (
        "import sys, nord_snn, nord_snn.integrations.clock_driven as shim; "
        "assert 'spikingjelly.clock_driven' not in sys.modules; "
        "shim.install(); import spikingjelly.clock_driven.neuron"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
