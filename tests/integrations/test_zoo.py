"""Models of SpikingJelly with our neurons, by ``spiking_neuron=AssociativeLIFNode`` and by ``replace_neurons``."""

import io

import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet
from torch import nn
from zoo import MODELS, MeanOverTime, difference, networks, training_step

from nord_snn import AssociativeLIFNode, replace_neurons

SMALL_INPUT_MODELS = {"sew_resnet18", "spiking_resnet18", "spiking_vgg11_bn", "ms_resnet18"}


def small_input(name):
    """Return the function that makes a model, and images of two time steps, smaller ones if the model accepts them."""
    make, shape = MODELS[name]
    if name in SMALL_INPUT_MODELS:
        shape = (2, 2, 3, 16, 16) if "vgg" not in name else (2, 2, 3, 32, 32)
    return make, torch.rand(shape if name in SMALL_INPUT_MODELS else (*shape[:-4], 2, *shape[-3:]))


def our_nodes(net):
    return [module for module in net.modules() if isinstance(module, AssociativeLIFNode)]


@pytest.mark.parametrize(
    ("name", "steps"),
    [*((name, 2) for name in MODELS), *(pytest.param(name, 10, marks=pytest.mark.slow) for name in MODELS)],
)
def test_a_model_with_our_neuron_trains_and_is_saved(name, steps):
    make, x = small_input(name)
    net = MeanOverTime(make(AssociativeLIFNode))
    functional.set_step_mode(net, "m")
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)  # the nodes infer their number of neurons later
    losses = [training_step(net, optimizer, x) for _ in range(steps)]
    assert steps == 2 or min(losses) < losses[0]
    assert all(node.n_features > 0 for node in our_nodes(net))
    assert all(isinstance(node.v, float) for node in our_nodes(net))  # at rest after reset
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    loaded = MeanOverTime(make(AssociativeLIFNode))
    loaded.load_state_dict(torch.load(file))
    functional.set_step_mode(loaded, "m")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), net.eval()(x))


@pytest.mark.parametrize("name", MODELS)
def test_replace_neurons_replaces_all_neurons_and_the_network_has_gradients(name):
    make, x = small_input(name)
    net = MeanOverTime(make(neuron.LIFNode))
    functional.set_step_mode(net, "m")
    names = set(net.state_dict())
    report = replace_neurons(net, x)
    assert not report.skipped
    assert not [m for m in net.modules() if isinstance(m, neuron.LIFNode)]
    assert names <= set(net.state_dict())
    net(x).sum().backward()
    assert all(node.v_threshold.grad is not None for node in our_nodes(net))


@pytest.mark.parametrize("single_steps", [False, True], ids=["sequences", "single steps"])
def test_neurons_with_the_constants_of_a_model_give_its_outputs(single_steps):
    nets, x = networks("sew_resnet18", single_steps)
    assert difference(nets, x[:2, :2]) < 1e-6


@pytest.mark.parametrize(
    ("neuron_class", "options", "tolerance"),
    [
        (neuron.LIFNode, {"v_reset": None}, 0.0),
        (neuron.IFNode, {"v_reset": None}, 0.0),
        (neuron.LIFNode, {"v_reset": 0.0}, 1e-6),
        (neuron.LIFNode, {"v_reset": 0.0, "decay_input": False}, 1e-6),
        (neuron.LIFNode, {"v_reset": None, "decay_input": False}, 1e-6),
        (neuron.ParametricLIFNode, {"v_reset": None}, 1e-6),
        (neuron.ParametricLIFNode, {"v_reset": 0.0}, 1e-6),
    ],
)
@torch.no_grad()
def test_a_residual_network_has_the_same_outputs_with_like(neuron_class, options, tolerance):
    torch.manual_seed(1)
    more = {"tau": 2.0} if neuron_class is neuron.LIFNode else {}
    net = sew_resnet.sew_resnet18(
        num_classes=10, cnf="ADD", spiking_neuron=neuron_class, surrogate_function=surrogate.ATan(), **more, **options
    )
    functional.set_step_mode(net, "m")
    x = 3 * torch.rand(4, 2, 3, 16, 16)
    expected = net(x)
    functional.reset_net(net)
    replace_neurons(net, x, like=True)
    result = net(x)
    assert expected.std() > 0.01
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_model_for_images_needs_channel_dim_only_if_it_is_ambiguous():
    x = torch.rand(2, 12, 12, 12)
    with pytest.raises(ValueError, match="channel_dim=1"):
        AssociativeLIFNode(12)(x)
    assert AssociativeLIFNode(12, n_clusters=None, channel_dim=1)(x).shape == x.shape
    net = nn.Sequential(nn.Conv2d(3, 12, 3), AssociativeLIFNode(12))
    with pytest.raises(ValueError, match="channel_dim"):
        net(torch.rand(2, 3, 14, 14))
