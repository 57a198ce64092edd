"""SpikingJelly's tools (reset, monitors, counters, memory optimisation, containers) on our neurons and layers."""

import copy
import pickle

import pytest
import torch
from helpers import SPIKINGJELLY_2, needs_spikingjelly_2, two_processes
from parts import PARTS, node
from spikingjelly.activation_based import base, functional, layer, monitor, neuron
from torch import nn

import nord_snn
from nord_snn.layers import (
    CoFiringResonance,
    LeakyClamp,
    MembraneReadout,
    NordBlock,
    SpikingFeedForward,
)
from nord_snn.neurons import AssociativeLIFNode

if SPIKINGJELLY_2:
    from spikingjelly.activation_based import memopt, op_counter


def network():
    """Return a network of our and SpikingJelly's neurons, with weights for which all of them fire."""
    net = nn.Sequential(
        layer.Linear(16, 16, step_mode="m"),
        neuron.LIFNode(step_mode="m"),
        layer.Linear(16, 16, step_mode="m"),
        node(),
        SpikingFeedForward(16, 32, neuron=node),
    )
    with torch.no_grad():
        for linear in (net[0], net[2]):
            linear.weight.abs_()
    return net


X = 3 * torch.rand(6, 3, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.quick
@pytest.mark.parametrize(("make", "shape"), PARTS.values(), ids=PARTS)
def test_every_part_can_be_reset_detached_copied_pickled_and_loaded(make, shape):
    part, x = make(), 2 * torch.rand(shape)
    first = part(x)
    functional.detach_net(part)
    functional.reset_net(part)
    assert torch.equal(part(x), first)
    nord_snn.reset(part)
    functional.set_step_mode(part, "m")
    for duplicate in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert torch.equal(duplicate(x), first)
    loaded = make()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.3)
    loaded.load_state_dict(part.state_dict())
    assert torch.equal(loaded(x), first)
    assert not any("v_seq" in name or name.endswith(("i_syn", "refractory")) for name in part.state_dict())


@pytest.mark.quick
def test_a_network_gives_the_same_spikes_in_either_step_mode():
    net = network()[:4]
    whole = net(X)
    functional.reset_net(net)
    functional.set_step_mode(net, "s")
    assert torch.equal(torch.stack([net(x) for x in X]), whole)
    assert whole.any()


def test_detaching_cuts_the_graph_of_the_state():
    net = network()
    net(X).sum()
    assert net[3].v.grad_fn is not None
    functional.detach_net(net)
    assert net[3].v.grad_fn is net[3].i_syn.grad_fn is None
    net(X).sum().backward()  # needs no graph of the first call


def memories(net):
    """Return the states of all modules in the order of SpikingJelly's functional forward."""
    modules = [module for module in net.modules() if isinstance(module, base.MemoryModule)]
    return [value for module in modules for _, value in module.named_memories()]


@needs_spikingjelly_2
def test_functional_forward_of_a_network_gives_the_same_output_and_state():
    net = network()[:4]
    forward = base.to_functional_forward(net)
    (out,), after = forward((X,), tuple(memories(net)))
    assert net[3].v == 0.0
    assert torch.equal(net(X), out)
    assert all(torch.equal(a, b) for a, b in zip(after, memories(net), strict=True))


@pytest.mark.quick
@needs_spikingjelly_2
@pytest.mark.parametrize(("make", "shape"), PARTS.values(), ids=PARTS)
def test_functional_forward_of_every_part_gives_the_same_output_and_state(make, shape):
    part, x = make(), 2 * torch.rand(shape)
    (out,), after = base.to_functional_forward(part)((x,), tuple(memories(part)))
    assert torch.equal(out, part(x))
    for a, b in zip(after, memories(part), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@needs_spikingjelly_2
@pytest.mark.parametrize(("make", "shape"), PARTS.values(), ids=PARTS)
def test_counters_count_every_part_and_memory_optimisation_keeps_its_gradients(make, shape):
    part, x = nn.Sequential(make()), 2 * torch.rand(shape)
    counters = op_counter.MACCounter(), op_counter.ACCounter()
    with torch.no_grad(), op_counter.DispatchCounterMode(list(counters)):
        part(x)
    counted = {name for counter in counters for name in counter.get_counts()}
    maps = [module for module in part.modules() if isinstance(module, nn.Linear)]
    assert bool(counted) or not maps
    functional.reset_net(part)
    # Checkpoint the readout as a whole: v_seq of its neurons is lost if they are checkpointed separately.
    kind = MembraneReadout if isinstance(part[0], MembraneReadout) else AssociativeLIFNode
    checkpointed_modules = [module for module in part.modules() if isinstance(module, kind)]
    optimized = memopt.optimize_memory(copy.deepcopy(part), (kind,), lambda net: net(x), level=1)
    assert sum("Checkpoint" in type(module).__name__ for module in optimized.modules()) == len(checkpointed_modules)
    gradients = []
    for net in (part, optimized):
        functional.reset_net(net)
        out = net(x)
        out.sum().backward()
        gradients.append((out, [parameter.grad for parameter in net.parameters()]))
    (expected, expected_gradients), (output, output_gradients) = gradients
    assert torch.equal(output, expected)
    for a, b in zip(output_gradients, expected_gradients, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-5)


@needs_spikingjelly_2
def test_membrane_potentials_lost_by_checkpointing_raise():
    readout = MembraneReadout(16, neuron=node)
    readout.lif = memopt.checkpoint_module(readout.lif)
    with pytest.raises(RuntimeError, match=r"stored no membrane potentials.*checkpoint the whole MembraneReadout"):
        readout(X)


@pytest.mark.quick
def test_monitors_record_spikes_and_membrane_potentials():
    net = network()
    net[3].store_v_seq = True
    spikes = monitor.OutputMonitor(net, AssociativeLIFNode)
    v = monitor.AttributeMonitor("v_seq", False, net, AssociativeLIFNode)
    net(X)
    assert spikes.monitored_layers == ["3", "4.lif1", "4.lif2"]
    assert torch.equal(spikes["3"][0].unique(), torch.tensor([0.0, 1.0]))
    assert v["3"][0].shape == (6, 3, 16)


@needs_spikingjelly_2
def test_energy_counters_count_additions_after_our_neurons():
    net = nn.Sequential(node(), layer.Linear(16, 8, bias=False, step_mode="m"))
    counters = op_counter.MACCounter(), op_counter.ACCounter()
    with torch.no_grad(), op_counter.DispatchCounterMode(list(counters)):
        net(X)
    functional.reset_net(net)
    spikes = net[0](X)
    macs, additions = (counter.get_total() for counter in counters)
    assert macs == 0  # the input of the linear map is spikes
    assert additions >= spikes.sum() * 8
    functional.reset_net(net)
    assert op_counter.estimate_simple_energy(net.eval(), X) is not None
    functional.reset_net(net)
    with pytest.raises(ValueError, match="do not support AssociativeLIFNode"):  # otherwise their cost would be zero
        op_counter.estimate_lemaire_energy(net, X)


@pytest.mark.quick
@needs_spikingjelly_2
@pytest.mark.parametrize("level", [0, 1])
def test_memory_optimisation_gives_the_same_gradients(level):
    plain = network()
    optimized = memopt.optimize_memory(copy.deepcopy(plain), (AssociativeLIFNode,), lambda net: net(X), level=level)
    gradients = []
    for net in (plain, optimized):
        functional.reset_net(net)
        net(X).sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert plain.state_dict().keys() == optimized.state_dict().keys()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@needs_spikingjelly_2
def test_checkpointed_node_keeps_its_state():
    plain = node()
    optimized = memopt.checkpoint_module(copy.deepcopy(plain))
    for x in (X, X.flip(0)):
        assert torch.equal(plain(x), optimized(x))
    assert torch.equal(plain.v, next(m for m in optimized.modules() if isinstance(m, AssociativeLIFNode)).v)


@pytest.mark.quick
def test_our_modules_run_in_spikingjellys_containers():
    x = torch.randn(6, 3, 16)
    assert torch.equal(layer.SeqToANNContainer(LeakyClamp(16))(x), LeakyClamp(16)(x))
    net = layer.MultiStepContainer(node(step_mode="s"))
    assert torch.equal(net(X), node()(X))


@pytest.mark.quick
@pytest.mark.skipif(SPIKINGJELLY_2, reason="SpikingJelly 2 has no set_backend")
def test_set_backend_switches_our_and_spikingjellys_nodes(monkeypatch):
    monkeypatch.setattr(base, "check_backend_library", lambda backend: None)  # as if CuPy was installed
    net = nn.Sequential(network(), NordBlock(16, 2, 32, neuron=node))
    functional.set_backend(net, "cupy")
    assert {m.backend for m in net.modules() if isinstance(m, neuron.BaseNode)} == {"cupy"}
    layers = [m for m in net.modules() if isinstance(m, LeakyClamp | CoFiringResonance)]
    assert {m.backend for m in layers} == {"auto"}  # they have no CuPy kernels
    functional.set_backend(net, "torch")
    assert {m.backend for m in net.modules() if isinstance(m, neuron.BaseNode)} == {"torch"}
    assert {m.backend for m in layers} == {"torch"}


@pytest.mark.parametrize(
    "layer_of_ours", [LeakyClamp(16), CoFiringResonance(16, 2, neuron=node)], ids=["clamp", "resonance"]
)
def test_layers_support_their_listed_backends(layer_of_ours):
    x = torch.rand(6, 2, 5, 16)
    for backend in layer_of_ours.supported_backends:
        layer_of_ours.backend = backend
        layer_of_ours(x)
    layer_of_ours.backend = "triton"
    with pytest.raises(RuntimeError, match="triton"):
        layer_of_ours(x)


SCRIPT = """
import sys, torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from spikingjelly.activation_based import functional
from nord_snn.layers import SpikingFeedForward
from nord_snn.neurons import AssociativeLIFNode
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
make = lambda n: AssociativeLIFNode(n, n_clusters=4)
first = AssociativeLIFNode(16, n_clusters=4, step_mode="m")
net = DistributedDataParallel(nn.Sequential(first, SpikingFeedForward(16, 32, neuron=make)))
x = 3 * torch.rand(6, 4, 16)
for _ in range(2):
    functional.reset_net(net)
    net(x[:, rank::2]).sum().div(4).backward()
torch.save([p.grad for p in net.parameters()], f"{folder}/{rank}.pt")
distributed.barrier()
import os; os._exit(0)
"""


def test_two_processes_under_ddp_have_the_gradient_of_the_whole_batch(tmp_path):
    two_processes(SCRIPT, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.manual_seed(0)
    net = nn.Sequential(node(), SpikingFeedForward(16, 32, neuron=lambda n: node(n, "s")))
    x = 3 * torch.rand(6, 4, 16)
    for _ in range(2):
        functional.reset_net(net)
        net(x).sum().div(8).backward()
    for a, b, parameter in zip(first, second, net.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, parameter.grad, atol=1e-5)
