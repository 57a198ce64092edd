"""The state of neurons between calls: every operation keeps it correct or raises; it is never reset silently."""

import copy
import pickle

import pytest
import torch
from helpers import SPIKINGJELLY_2
from parts import LAYERS
from safetensors.torch import load_file, save_file
from spikingjelly.activation_based import base, functional, layer, neuron
from torch import Tensor, nn

import nord_snn
from nord_snn.layers import LeakyClamp, MembraneReadout, SpikingFeedForward
from nord_snn.neurons import AssociativeLIFNode

snntorch = pytest.importorskip("snntorch")
snntorch_utils = pytest.importorskip("snntorch.utils")
nord_snntorch = pytest.importorskip("nord_snn.integrations.snntorch")

D = 12
X = 3 * torch.rand(8, 3, D, generator=torch.Generator().manual_seed(0))


def make_node(n: int = D) -> AssociativeLIFNode:
    return AssociativeLIFNode(n, n_clusters=4, step_mode="m")


class OverTime(nn.Module):
    """AssociativeSynaptic that stores its states, called with whole sequences as the node is."""

    def __init__(self) -> None:
        super().__init__()
        self.lif = nord_snntorch.AssociativeSynaptic(D, n_clusters=4, init_hidden=True)

    def forward(self, x_seq: Tensor) -> Tensor:
        return torch.stack([self.lif(x) for x in x_seq])


NEURONS = {"node": make_node, "AssociativeSynaptic": OverTime}


@pytest.fixture(params=NEURONS)
def neurons(request: pytest.FixtureRequest) -> nn.Module:
    return NEURONS[request.param]()


def state_of(net: nn.Module) -> list[Tensor]:
    if isinstance(net, OverTime):
        return [net.lif.mem, net.lif.syn, net.lif._refractory]
    return [net.v, net.i_syn, net.refractory]


def run_copy(net: nn.Module, x_seq: Tensor = X) -> Tensor:
    """Return the output of a copy of the network for a whole sequence from rest."""
    duplicate = copy.deepcopy(net)
    nord_snn.reset(duplicate)
    return duplicate(x_seq)


@pytest.mark.quick
def test_another_batch_size_raises_and_does_not_change_the_state(neurons: nn.Module) -> None:
    expected = run_copy(neurons)
    first = neurons(X[:4])
    for rows in (1, 2, 4):  # one row would broadcast
        with pytest.raises(ValueError, match=r"state.* of shape \[3, 12\].*input of shape .*reset"):
            neurons(X[:1, :1].expand(1, rows, D))
    assert torch.equal(torch.cat((first, neurons(X[4:]))), expected)
    nord_snn.reset(neurons)
    assert torch.equal(neurons(X[:, :2]), run_copy(neurons, X[:, :2]))


#: The reset of the library of the neurons, and ours, which resets the neurons of all libraries.
RESETS = {
    "node": (functional.reset_net, nord_snn.reset),
    "AssociativeSynaptic": (snntorch_utils.reset, nord_snn.reset),
}


@pytest.mark.quick
def test_every_reset_returns_to_rest(neurons: nn.Module) -> None:
    expected = run_copy(neurons)
    for reset in RESETS["AssociativeSynaptic" if isinstance(neurons, OverTime) else "node"]:
        neurons(X)
        reset(neurons)
        assert torch.equal(neurons(X), expected)
        reset(neurons)


@pytest.mark.quick
def test_the_state_is_converted_to_another_dtype(neurons: nn.Module) -> None:
    """After conversion the sequence continues in float64 from the float32 state."""
    neurons(X[:4])
    before = [part.clone() for part in state_of(neurons)]
    neurons.double()
    for expected_part, part in zip(before, state_of(neurons), strict=True):
        assert torch.equal(expected_part.double(), part.double())
    after = neurons(X[4:].double())
    assert after.dtype == torch.float64
    assert state_of(neurons)[0].dtype == torch.float64
    assert torch.equal(after.float(), run_copy(neurons.float())[4:])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_stays_float32_in_half_precision(neurons: nn.Module, dtype: torch.dtype) -> None:
    neurons(X[:4])
    before = [part.clone() for part in state_of(neurons)]
    neurons.to(dtype)
    assert all(torch.equal(expected_part, part) for expected_part, part in zip(before, state_of(neurons), strict=True))
    assert neurons(X[4:].to(dtype)).dtype == dtype
    assert state_of(neurons)[0].dtype == torch.float32


def test_the_state_moves_to_another_device(neurons: nn.Module) -> None:
    """The other device is "meta": a tensor that is not moved would raise."""
    neurons(X[:4])
    neurons.to("meta")
    assert all(part.device.type == "meta" for part in state_of(neurons))
    assert neurons(X[4:].to("meta")).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_state_moves_to_the_gpu_and_back(neurons: nn.Module) -> None:
    expected = run_copy(neurons)
    first = neurons(X[:4])
    second = neurons.cuda()(X[4:6].cuda())
    third = neurons.cpu()(X[6:])
    differs = torch.cat((first, second.cpu(), third)) != expected
    assert differs.float().mean() < 0.01  # kernels may round differently at the threshold


@pytest.mark.parametrize("single", [False, True])
def test_stored_membrane_potentials_move_to_another_device(single: bool) -> None:
    node = AssociativeLIFNode(D, 4, step_mode="s" if single else "m", store_v_seq=True)
    multi = nord_snntorch.MultiStep(snntorch.Leaky(beta=0.9))
    multi.store_v_seq = True
    for module, x in ((node, X[0] if single else X), (multi, X)):
        module(x)
        before = module.v_seq.clone()
        module.half()
        assert torch.equal(module.v_seq, before)
        module.to("meta")
        assert module.v_seq.is_meta
    node(X[0].to("meta") if single else X.to("meta"))


def test_emptying_the_weights_module_by_module_as_fsdp_does_does_not_change_the_state(neurons: nn.Module) -> None:
    expected = run_copy(neurons)
    weights = copy.deepcopy(neurons.state_dict())
    first = neurons(X[:4])
    for module in neurons.modules():
        module.to_empty(device="cpu", recurse=False)
    neurons.load_state_dict(weights)
    assert torch.equal(torch.cat((first, neurons(X[4:]))), expected)


def test_emptying_the_weights_does_not_change_the_state(neurons: nn.Module) -> None:
    expected = run_copy(neurons)
    weights = copy.deepcopy(neurons.state_dict())
    first = neurons(X[:4])
    neurons.to_empty(device="cpu")
    neurons.load_state_dict(weights)
    assert torch.equal(torch.cat((first, neurons(X[4:]))), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["Leaky", "RLeaky", "Synaptic"])
def test_neurons_of_snntorch_keep_the_precision_of_a_layer(name: str, dtype: torch.dtype) -> None:
    """The surrogates of snnTorch return float32 for any dtype; the output is converted."""
    kinds = {
        "Leaky": {"beta": 0.9},
        "RLeaky": {"beta": 0.9, "all_to_all": False, "V": 0.1},
        "Synaptic": {"alpha": 0.5, "beta": 0.9},
    }
    part = SpikingFeedForward(D, 8, neuron=lambda n: nord_snntorch.MultiStep(getattr(snntorch, name)(**kinds[name])))
    out = part.to(dtype)(X.to(dtype))
    assert out.dtype == dtype


def test_a_state_without_data_raises() -> None:
    node = make_node()
    weights = node.state_dict()
    node.to("meta")(X.to("meta"))
    node.load_state_dict(weights, assign=True)
    with pytest.raises(ValueError, match=r"has state without data.*reset"):
        node(X)
    node.reset()
    assert node(X).any()


def test_input_of_another_dtype_continues_from_the_state(neurons: nn.Module) -> None:
    expected = run_copy(neurons)
    first = neurons(X[:4])
    rest = neurons(X[4:].double())
    assert rest.dtype == torch.float64
    assert torch.equal(torch.cat((first, rest.float())), expected)


@pytest.mark.quick
def test_backward_through_a_freed_graph_raises_and_detaching_or_a_reset_helps(neurons: nn.Module) -> None:
    neurons(X).sum().backward()
    # The first message is that of our kernels, the second that of torch.
    with pytest.raises(
        RuntimeError, match=r"earlier backward has freed.*detach.*reset|through the graph a second time"
    ):
        neurons(X).sum().backward()
    nord_snn.reset(neurons)
    neurons(X).sum().backward()
    if isinstance(neurons, OverTime):
        neurons.lif.detach_hidden()
    else:
        functional.detach_net(neurons)
    neurons(X).sum().backward()


def test_backward_twice_works_with_a_retained_graph(neurons: nn.Module) -> None:
    out = neurons(X).sum()
    out.backward(retain_graph=True)
    first = [p.grad.clone() for p in neurons.parameters() if p.grad is not None]
    out.backward()
    second = [p.grad for p in neurons.parameters() if p.grad is not None]
    assert all(torch.allclose(2 * a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_a_copy_continues_from_the_same_state_without_its_graph(neurons: nn.Module, make_copy) -> None:
    """The state has an autograd graph, as during training."""
    neurons(X[:4])
    assert state_of(neurons)[0].requires_grad
    duplicate = make_copy(neurons)
    assert not state_of(duplicate)[0].requires_grad
    assert state_of(neurons)[0].requires_grad
    assert torch.equal(duplicate(X[4:]), neurons(X[4:]))


def test_stored_membrane_potentials_are_copied() -> None:
    node = make_node()
    node.store_v_seq = True
    multi = nord_snntorch.MultiStep(snntorch.Leaky(beta=0.9, learn_beta=True))
    multi.store_v_seq = True
    for module in (node, multi):
        module(X)
        assert module.v_seq.requires_grad
        assert torch.equal(copy.deepcopy(module).v_seq, module.v_seq)


def test_step_modes_can_change_while_a_neuron_has_state() -> None:
    node = make_node()
    expected = run_copy(node)
    first = node(X[:4])
    functional.set_step_mode(node, "s")
    second = torch.stack([node(x) for x in X[4:6]])
    functional.set_step_mode(node, "m")
    assert torch.equal(torch.cat((first, second, node(X[6:]))), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_process_whole_sequences_in_step_mode_s_as_well(name: str) -> None:
    """SpikingJelly's set_step_mode also sets the mode of the neurons in a layer."""
    make, shape = LAYERS[name]
    part, x = make(), 2 * torch.rand(shape)
    expected = part(x)
    functional.set_step_mode(part, "s")
    assert torch.equal(part(x), expected)
    modes = {module.step_mode for module in part.modules() if hasattr(module, "step_mode")}
    assert modes <= {"s"}


def test_spikingjellys_neurons_in_a_layer_process_whole_sequences_in_step_mode_s_as_well() -> None:
    for make in (lambda n: neuron.LIFNode(), lambda n: nn.Sequential(neuron.LIFNode()),
                 lambda n: layer.MultiStepContainer(neuron.LIFNode())):  # fmt: skip
        part = SpikingFeedForward(D, 8, neuron=make)
        nn.init.constant_(part.up.weight, 1.0)
        nn.init.constant_(part.down.weight, 1.0)
        expected = part(X)
        assert expected.any()
        functional.set_step_mode(part, "s")
        assert torch.equal(part(X), expected)


@pytest.mark.quick
def test_an_error_during_a_call_does_not_change_the_state(neurons: nn.Module) -> None:
    expected = run_copy(neurons)
    first = neurons(X[:4])
    with pytest.raises(ValueError, match=r"\*, D\] with D = 12"):
        neurons(X[4:, :, :7])
    assert torch.equal(torch.cat((first, neurons(X[4:]))), expected)


@pytest.mark.quick
@pytest.mark.parametrize("name", LAYERS)
def test_layers_store_nothing_between_calls(name: str) -> None:
    """Any batch size, a second backward and a copy between calls give the result of a first call."""
    make, shape = LAYERS[name]
    part, x = make(), 2 * torch.rand(shape)
    first = part(x)
    first.sum().backward()
    part(x[:1] if name == "encoder" else x[:, :1]).sum().backward()
    assert torch.equal(copy.deepcopy(part)(x), first)
    assert torch.equal(part(x), first)
    for module in part.modules():
        if isinstance(module, base.MemoryModule):
            assert not any(isinstance(value, Tensor) for _, value in module.named_memories())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_other_precisions_are_close_to_float32(name: str, dtype: torch.dtype) -> None:
    """The output has the layer's precision; gradients are finite."""
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    part, x = make(), 2 * torch.rand(shape)
    expected = part(x)
    duplicate = copy.deepcopy(part).to(dtype)
    out = duplicate(x.to(dtype))
    assert out.dtype == dtype
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in duplicate.parameters())
    flips = (out.float() - expected).abs() > 0.1 * expected.abs().max()
    assert flips.float().mean() < 0.1


def mixed() -> nn.Module:
    """Return a network of our, SpikingJelly's and snnTorch's neurons."""
    return nn.Sequential(
        layer.Linear(D, D, step_mode="m"),
        make_node(),
        SpikingFeedForward(D, 8, neuron=make_node),
        LeakyClamp(D),
        neuron.ParametricLIFNode(step_mode="m"),
        MembraneReadout(
            D, neuron=lambda n: nord_snntorch.MultiStep(nord_snntorch.AssociativeSynaptic(n, n_clusters=4))
        ),
        nn.Linear(D, 3),
    )


def trained() -> tuple[nn.Module, Tensor]:
    """Return a network with changed weights, and its output."""
    torch.manual_seed(3)
    net = mixed()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    with torch.no_grad():
        expected = net(X)  # the network has state when it is saved
    return net, expected


@pytest.mark.quick
@pytest.mark.parametrize("method", ["state_dict", "safetensors", "whole module"])
def test_weights_are_saved_without_the_state_and_loaded(method: str, tmp_path) -> None:
    """By state_dict, by safetensors and as a whole module."""
    net, expected = trained()
    file = tmp_path / "net"
    if method == "whole module":
        nord_snn.reset(net)
        torch.save(net, file)
        loaded = torch.load(file, weights_only=False)
    else:
        loaded = mixed()
        if method == "safetensors":
            save_file(net.state_dict(), file)
            loaded.load_state_dict(load_file(file))
        else:
            torch.save(net.state_dict(), file)
            loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded(X), expected)


def test_a_state_dict_has_only_the_parameters() -> None:
    net, _ = trained()
    assert net.state_dict().keys() == dict(net.named_parameters()).keys()


def test_loading_weights_does_not_change_the_state() -> None:
    node = make_node()
    node(X)
    v = node.v.clone()
    node.load_state_dict(make_node().state_dict())
    assert torch.equal(node.v, v)


def test_weights_of_another_width_or_cascade_raise() -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for cascade.weight"):
        make_node().load_state_dict(AssociativeLIFNode(D, n_clusters=3).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*cascade"):
        AssociativeLIFNode(D, n_clusters=None).load_state_dict(make_node().state_dict())


@pytest.mark.skipif(not SPIKINGJELLY_2, reason="needs SpikingJelly 2")
def test_spikingjellys_functions_extract_and_load_states() -> None:
    net = nn.Sequential(make_node(), neuron.LIFNode(step_mode="m"))
    expected = run_copy(net)
    first = net(X[:4])
    memories = base.extract_memories(net)
    functional.reset_net(net)
    net(X)
    base.load_memories(net, memories)
    assert torch.equal(torch.cat((first, net(X[4:]))), expected)
