"""NIR: modules, nodes and arguments that export, import or simulation do not support raise an error with their name."""

import math

import pytest
import torch
from spikingjelly.activation_based import functional, layer
from spikingjelly.activation_based import neuron as spikingjelly
from torch import Tensor, nn

from nord_snn.layers import MembraneReadout
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import Dynamics

nir = pytest.importorskip("nir")
np = pytest.importorskip("numpy")
nord_nir = pytest.importorskip("nord_snn.integrations.nir")
export_to_nir, import_from_nir, simulate = nord_nir.export_to_nir, nord_nir.import_from_nir, nord_nir.simulate

pytestmark = pytest.mark.quick

D = 4


def neurons(n_clusters: int | None = None, **more) -> AssociativeLIFNode:
    """Return a node in step mode "s" without a refractory period."""
    return AssociativeLIFNode(D, n_clusters, **{"refractory_steps": 0, "threshold": 0.1, **more})


def recurrent(inner: nn.Module) -> nn.Module:
    """Return neurons with a linear map from their spikes to their input."""
    return nord_nir.importing.recurrent_layer(inner, nn.Linear(D, D))


class WithForward(nn.Module):
    """Network whose forward has a second argument and is a function of the caller."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.fc, self.lif, self.traced = nn.Linear(D, D), neurons(), forward

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.traced(self, x, scale)


MODULES = {
    "integration of a synaptic current": (
        lambda: neurons(dynamics=Dynamics("leak", math.inf), beta_syn=0.5),
        "no neurons that integrate a synaptic current without a leak",
    ),
    "average without a leak": (
        lambda: neurons(dynamics=Dynamics("relax", math.inf), beta_syn=0.0),
        "no neurons that integrate a synaptic current without a leak",
    ),
    "readout with another reset": (
        lambda: MembraneReadout(D, neuron=lambda n: neurons(preset="lif", hard_reset=True, v_reset=0.0)),
        "cannot export MembraneReadout: its neurons must have the published dynamics",
    ),
    "SpikingJelly's recurrent neurons": (
        lambda: recurrent(spikingjelly.LIFNode()),
        "must contain AssociativeLIFNode and AddFeedback, got LIFNode and AddFeedback",
    ),
    "recurrent neurons with a cascade": (lambda: recurrent(neurons(2)), "its neurons must have no cascade"),
    "a second input": (
        lambda: WithForward(lambda net, x, scale: net.lif(net.fc(x) + scale)),
        "must have one input, as a graph has, but also uses 'scale'",
    ),
    "a keyword": (
        lambda: WithForward(lambda net, x, scale: net.lif(net.fc(x), stateless=True)),
        "'lif' must be called with one input, as a node of a graph, got more",
    ),
    "flattened rows": (
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(D, D)),
        "start_dim must be 1 or more, as NIR has no batch dimension, got 0",
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_nir_cannot_express_raise(name: str) -> None:
    make, sentence = MODULES[name]
    with pytest.raises(ValueError, match=sentence):
        export_to_nir(make(), torch.rand(3, 2, D))


def test_a_cascade_between_channels_raises() -> None:
    node = neurons(2, channel_dim=1)
    with pytest.raises(ValueError, match="must have a synaptic current, and its neurons in the last dimension"):
        export_to_nir(nn.Sequential(layer.Conv2d(2, D, 1), node), torch.rand(3, 2, 2, 5, 5))


def test_neurons_of_snntorch_in_multi_step_raise() -> None:
    snntorch = pytest.importorskip("snntorch")
    multi_step = pytest.importorskip("nord_snn.integrations.snntorch").MultiStep
    with pytest.raises(
        ValueError, match="its neuron must be an AssociativeSynaptic, got Leaky; snnTorch has an export"
    ):
        export_to_nir(nn.Sequential(nn.Linear(D, D), multi_step(snntorch.Leaky(beta=0.5))), torch.rand(3, 2, D))


def lif(**changes):
    fields = {"tau": 1e-3, "r": 1.0, "v_leak": 0.0, "v_threshold": 0.1, "v_reset": 0.0}
    return nir.LIF(**{name: np.full(D, value) for name, value in {**fields, **changes}.items()})


def refractory(**changes):
    return nord_nir.extension.with_refractory_time(lif(**changes), 2e-4)


NODES = {
    "a late reset and a refractory period": (
        lambda: refractory(),
        {"reset": "delayed_value"},
        "has a refractory period: reset must be 'value' or 'subtract', got 'delayed_value'",
    ),
    "refractory potentials": (
        lambda: refractory(v_reset=np.arange(D)),
        {"reset": "subtract"},
        "v_reset of '.*' must be the same for all neurons, because they have a refractory period",
    ),
    "shapes": (
        lambda: nir.LIF(*(np.full((1, 1), value) for value in (1e-3, 1.0, 0.0, 0.1))),
        {},
        r"the constants of '.*' must have the shape \[4\], got \[1, 1\]",
    ),
    "unknown": (lambda: nir.Delay(np.ones(D)), {}, "there is no module for Delay 'delay': pass a function for it"),
}


@pytest.mark.parametrize("name", NODES)
def test_nodes_without_an_equal_module_raise(name: str) -> None:
    make, options, sentence = NODES[name]
    graph = nir.NIRGraph.from_list(nir.Linear(np.ones((D, 3))), make(), type_check=False)
    with pytest.raises(ValueError, match=sentence):
        import_from_nir(graph, **options)


@pytest.mark.parametrize("dt", [0.0, -1e-4, math.nan])
def test_a_time_step_that_is_not_positive_raises(dt: float) -> None:
    graph = nir.NIRGraph.from_list(lif())
    for function in (lambda: simulate(graph, torch.rand(3, 2, D), dt), lambda: import_from_nir(graph, dt)):
        with pytest.raises(ValueError, match="dt must be positive"):
            function()


def test_neurons_without_input_raise_instead_of_being_dropped() -> None:
    graph = nir.NIRGraph(
        nodes={"i": nir.Input(np.array([D])), "lif": lif(), "on": lif(v_leak=1.0), "o": nir.Output(np.array([D]))},
        edges=[("i", "lif"), ("lif", "o"), ("on", "o")],
        type_check=False,  # the check would add an input to "on"
    )
    for function in (lambda: simulate(graph, torch.rand(3, 2, D)), lambda: import_from_nir(graph)):
        with pytest.raises(ValueError, match="must have a path from its input, 'on' has none"):
            function()


def test_scale_and_threshold_nodes_are_imported_simulated_and_exported() -> None:
    nodes = nir.Scale(np.arange(1.0, D + 1)), nir.Threshold(np.full(D, 0.9))
    graph, x = nir.NIRGraph.from_list(*nodes), torch.rand(5, 2, D)
    expected = (x * torch.arange(1.0, D + 1) > 0.9).float()
    net = import_from_nir(graph)
    assert torch.equal(net(x), expected)
    assert torch.equal(simulate(graph, x), expected)
    assert torch.equal(import_from_nir(export_to_nir(net, x))(x), expected)


def test_a_readout_whose_neurons_have_a_cascade_is_exported_and_imported() -> None:
    torch.manual_seed(0)
    readout = MembraneReadout(D, neuron=lambda n: neurons(2))
    x = 2 * torch.rand(9, 3, D)
    graph = export_to_nir(readout, x)
    assert graph.metadata["deviation"] < 1e-5
    torch.testing.assert_close(import_from_nir(graph)(x), readout(x))


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_networks_for_images_are_exported_in_either_step_mode(step_mode: str) -> None:
    net = nn.Sequential(
        layer.Conv2d(2, D, 3), neurons(channel_dim=1), layer.Flatten(), layer.Linear(D * 9, D), neurons()
    )
    functional.set_step_mode(net, step_mode)
    graph = export_to_nir(net, torch.rand(3, 2, 2, 5, 5))
    assert graph.metadata["deviation"] == 0
    assert [module.step_mode for module in net] == [step_mode] * 5
