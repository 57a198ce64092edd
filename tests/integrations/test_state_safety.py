"""Tests of the state between calls: every operation keeps it correct or raises an error; it is never reset silently."""

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
sut = pytest.importorskip("nord_snn.integrations.snntorch")

D = 12
X = 3 * torch.rand(8, 3, D, generator=torch.Generator().manual_seed(0))


def make_node(n: int = D) -> AssociativeLIFNode:
    return AssociativeLIFNode(n, n_clusters=4, step_mode="m")


class Steps(nn.Module):
    """Wrapper of AssociativeSynaptic with hidden states that processes a sequence, as the node does."""

    def __init__(self) -> None:
        super().__init__()
        self.lif = sut.AssociativeSynaptic(D, n_clusters=4, init_hidden=True)

    def forward(self, x_seq: Tensor) -> Tensor:
        return torch.stack([self.lif(x) for x in x_seq])


KINDS = {"node": make_node, "AssociativeSynaptic": Steps}


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> nn.Module:
    return KINDS[request.param]()


def state_of(net: nn.Module) -> list[Tensor]:
    if isinstance(net, Steps):
        return [net.lif.mem, net.lif.syn, net.lif._refractory]
    return [net.v, net.i_syn, net.refractory]


def whole(net: nn.Module, x_seq: Tensor = X) -> Tensor:
    """Run the whole sequence from rest in one call of a copy of the network."""
    other = copy.deepcopy(net)
    nord_snn.reset(other)
    return other(x_seq)


@pytest.mark.quick
def test_another_batch_size_raises_and_does_not_change_the_state(made: nn.Module) -> None:
    expected = whole(made)
    first = made(X[:4])
    for rows in (1, 2, 4):  # one row would broadcast
        with pytest.raises(ValueError, match=r"state.* of shape \[3, 12\].*input of shape .*reset"):
            made(X[:1, :1].expand(1, rows, D))
    assert torch.equal(torch.cat((first, made(X[4:]))), expected)
    nord_snn.reset(made)
    assert torch.equal(made(X[:, :2]), whole(made, X[:, :2]))


#: Each library resets its own neurons, and ours all of them.
RESETS = {
    "node": (functional.reset_net, nord_snn.reset),
    "AssociativeSynaptic": (snntorch_utils.reset, nord_snn.reset),
}


@pytest.mark.quick
def test_every_reset_returns_to_rest(made: nn.Module) -> None:
    expected = whole(made)
    for reset in RESETS["AssociativeSynaptic" if isinstance(made, Steps) else "node"]:
        made(X)
        reset(made)
        assert torch.equal(made(X), expected)
        reset(made)


@pytest.mark.quick
def test_the_state_is_converted_to_another_dtype(made: nn.Module) -> None:
    """After conversion the sequence continues in float64 from the float32 state."""
    made(X[:4])
    before = [part.clone() for part in state_of(made)]
    made.double()
    for was, now in zip(before, state_of(made), strict=True):
        assert torch.equal(was.double(), now.double())
    after = made(X[4:].double())
    assert after.dtype == torch.float64
    assert state_of(made)[0].dtype == torch.float64
    assert torch.equal(after.float(), whole(made.float())[4:])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_stays_float32_in_half_precision(made: nn.Module, dtype: torch.dtype) -> None:
    made(X[:4])
    before = [part.clone() for part in state_of(made)]
    made.to(dtype)
    assert all(torch.equal(was, now) for was, now in zip(before, state_of(made), strict=True))
    assert made(X[4:].to(dtype)).dtype == dtype
    assert state_of(made)[0].dtype == torch.float32


def test_the_state_moves_to_another_device(made: nn.Module) -> None:
    """The meta device stands for another device: a tensor that does not move would raise."""
    made(X[:4])
    made.to("meta")
    assert all(part.device.type == "meta" for part in state_of(made))
    assert made(X[4:].to("meta")).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_state_moves_along_to_the_gpu_and_back(made: nn.Module) -> None:
    expected = whole(made)
    first = made(X[:4])
    second = made.cuda()(X[4:6].cuda())
    third = made.cpu()(X[6:])
    assert (
        torch.cat((first, second.cpu(), third)) != expected
    ).float().mean() < 0.01  # at the threshold kernels may differ


@pytest.mark.parametrize("single", [False, True])
def test_stored_membrane_potentials_move_to_another_device(single: bool) -> None:
    node = AssociativeLIFNode(D, 4, step_mode="s" if single else "m", store_v_seq=True)
    multi = sut.MultiStep(snntorch.Leaky(beta=0.9))
    multi.store_v_seq = True
    for kept, x in ((node, X[0] if single else X), (multi, X)):
        kept(x)
        before = kept.v_seq.clone()
        kept.half()
        assert torch.equal(kept.v_seq, before)
        kept.to("meta")
        assert kept.v_seq.is_meta
    node(X[0].to("meta") if single else X.to("meta"))


def test_modules_are_emptied_one_by_one_as_sharding_does(made: nn.Module) -> None:
    expected = whole(made)
    weights = copy.deepcopy(made.state_dict())
    first = made(X[:4])
    for module in made.modules():
        module.to_empty(device="cpu", recurse=False)
    made.load_state_dict(weights)
    assert torch.equal(torch.cat((first, made(X[4:]))), expected)


def test_emptying_the_weights_does_not_change_the_state(made: nn.Module) -> None:
    expected = whole(made)
    weights = copy.deepcopy(made.state_dict())
    first = made(X[:4])
    made.to_empty(device="cpu")
    made.load_state_dict(weights)
    assert torch.equal(torch.cat((first, made(X[4:]))), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["Leaky", "RLeaky", "Synaptic"])
def test_neurons_of_snntorch_keep_the_precision_of_a_layer(name: str, dtype: torch.dtype) -> None:
    """SnnTorch's surrogates return float32 for any dtype."""
    kinds = {
        "Leaky": {"beta": 0.9},
        "RLeaky": {"beta": 0.9, "all_to_all": False, "V": 0.1},
        "Synaptic": {"alpha": 0.5, "beta": 0.9},
    }
    part = SpikingFeedForward(D, 8, neuron=lambda n: sut.MultiStep(getattr(snntorch, name)(**kinds[name])))
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


def test_input_of_another_dtype_continues_from_the_state(made: nn.Module) -> None:
    expected = whole(made)
    first = made(X[:4])
    rest = made(X[4:].double())
    assert rest.dtype == torch.float64
    assert torch.equal(torch.cat((first, rest.float())), expected)


@pytest.mark.quick
def test_a_freed_graph_raises_and_detaching_helps(made: nn.Module) -> None:
    made(X).sum().backward()
    # With kernels our sentence, which names the cure; where the reference runs, torch's own.
    with pytest.raises(
        RuntimeError, match=r"earlier backward has freed.*detach.*reset|through the graph a second time"
    ):
        made(X).sum().backward()
    nord_snn.reset(made)
    made(X).sum().backward()
    if isinstance(made, Steps):
        made.lif.detach_hidden()
    else:
        functional.detach_net(made)
    made(X).sum().backward()


def test_backward_twice_works_with_a_retained_graph(made: nn.Module) -> None:
    out = made(X).sum()
    out.backward(retain_graph=True)
    first = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    out.backward()
    second = [p.grad for p in made.parameters() if p.grad is not None]
    assert all(torch.allclose(2 * a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_a_copy_continues_from_the_same_state_without_its_graph(made: nn.Module, copied) -> None:
    """The state has an autograd graph, as during training."""
    made(X[:4])
    assert state_of(made)[0].requires_grad
    other = copied(made)
    assert not state_of(other)[0].requires_grad
    assert state_of(made)[0].requires_grad
    assert torch.equal(other(X[4:]), made(X[4:]))


def test_stored_membrane_potentials_are_copied() -> None:
    node = make_node()
    node.store_v_seq = True
    multi = sut.MultiStep(snntorch.Leaky(beta=0.9, learn_beta=True))
    multi.store_v_seq = True
    for kept in (node, multi):
        kept(X)
        assert kept.v_seq.requires_grad
        assert torch.equal(copy.deepcopy(kept).v_seq, kept.v_seq)


def test_step_modes_can_change_while_a_neuron_has_state() -> None:
    node = make_node()
    expected = whole(node)
    first = node(X[:4])
    functional.set_step_mode(node, "s")
    second = torch.stack([node(x) for x in X[4:6]])
    functional.set_step_mode(node, "m")
    assert torch.equal(torch.cat((first, second, node(X[6:]))), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_process_whole_sequences_in_either_step_mode(name: str) -> None:
    """set_step_mode on a network also changes the neurons of its layers."""
    make, shape = LAYERS[name]
    part, x = make(), 2 * torch.rand(shape)
    expected = part(x)
    functional.set_step_mode(part, "s")
    assert torch.equal(part(x), expected)
    modes = {module.step_mode for module in part.modules() if hasattr(module, "step_mode")}
    assert modes <= {"s"}  # as it was set


def test_other_neurons_in_a_layer_process_whole_sequences() -> None:
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
def test_an_error_during_a_call_does_not_change_the_state(made: nn.Module) -> None:
    expected = whole(made)
    first = made(X[:4])
    with pytest.raises(ValueError, match=r"\*, D\] with D = 12"):
        made(X[4:, :, :7])
    assert torch.equal(torch.cat((first, made(X[4:]))), expected)


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
def test_layers_in_other_precisions(name: str, dtype: torch.dtype) -> None:
    """Output and gradients have the layer's precision, are finite, and are close to those of float32."""
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    part, x = make(), 2 * torch.rand(shape)
    expected = part(x)
    other = copy.deepcopy(part).to(dtype)
    out = other(x.to(dtype))
    assert out.dtype == dtype
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in other.parameters())
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
        MembraneReadout(D, neuron=lambda n: sut.MultiStep(sut.AssociativeSynaptic(n, n_clusters=4))),
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
@pytest.mark.parametrize("way", ["state_dict", "safetensors", "whole module"])
def test_saving_and_loading(way: str, tmp_path) -> None:
    """Test the three usual ways; the state is not stored with the weights."""
    net, expected = trained()
    file = tmp_path / "net"
    if way == "whole module":
        nord_snn.reset(net)
        torch.save(net, file)
        back = torch.load(file, weights_only=False)
    else:
        back = mixed()
        if way == "safetensors":
            save_file(net.state_dict(), file)
            back.load_state_dict(load_file(file))
        else:
            torch.save(net.state_dict(), file)
            back.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(back(X), expected)


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


@pytest.mark.skipif(not SPIKINGJELLY_2, reason="release 2 has it")
def test_spikingjellys_functions_extract_and_load_states() -> None:
    net = nn.Sequential(make_node(), neuron.LIFNode(step_mode="m"))
    expected = whole(net)
    first = net(X[:4])
    held = base.extract_memories(net)
    functional.reset_net(net)
    net(X)
    base.load_memories(net, held)
    assert torch.equal(torch.cat((first, net(X[4:]))), expected)
