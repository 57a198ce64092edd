"""``profile_energy(..., time_steps=T)``: batches of T rows, several sequences, neurons in step mode "s"."""

from itertools import pairwise

import pytest
import torch
from parts import LAYERS, PARTS, node
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from nord_snn.layers import CoFiringResonance, NordBlock, SpikeFedBlock
from nord_snn.monitor import EnergyProfiler, profile_energy
from nord_snn.neurons import AssociativeLIFNode


@pytest.mark.parametrize("name", sorted(PARTS.keys() - {"clamp", "cascade", "encoder"}))
def test_inferred_and_stated_time_steps_give_the_same_profile(name):
    make, shape = PARTS[name]
    part, x = make(), 2 * torch.rand(shape)
    inferred = profile_energy(part, x)
    functional.reset_net(part)
    assert profile_energy(part, x, time_steps=6) == inferred
    assert inferred.time_steps == 6


class TimeMean(nn.Module):
    """Neurons, a linear map at each time step, and a linear map of the mean over time."""

    def __init__(self):
        super().__init__()
        self.neurons, self.per_step, self.of_mean = neuron.LIFNode(step_mode="m"), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.of_mean(self.per_step(self.neurons(x)).mean(0))


class Transposed(TimeMean):
    """The second linear map is over positions."""

    def forward(self, x):
        return self.of_mean(self.per_step(self.neurons(x)).mean(0).mT[..., :5])


class Flattened(nn.Module):
    """Time steps in the batch, as in SpikingJelly's layers."""

    def __init__(self):
        super().__init__()
        self.neurons, self.per_step = neuron.LIFNode(step_mode="m"), layer.Linear(8, 5, step_mode="m")

    def forward(self, x):
        return self.per_step(self.neurons(x))


NETS = {
    "published": (lambda: NordBlock(16, 2, 32, neuron=node), (7, 16)),
    "published, as many positions": (lambda: NordBlock(16, 2, 32, neuron=node), (6, 16)),
    "spike-fed": (lambda: SpikeFedBlock(16, 2, 32, neuron=node, spiking_values=True), (7, 16)),
    "spike-fed, as many positions": (lambda: SpikeFedBlock(16, 2, 32, neuron=node), (6, 16)),
    "mean": (TimeMean, (8,)),
    "mean, as many positions": (TimeMean, (6, 8)),
    "transposed": (Transposed, (7, 8)),
    "flattened": (Flattened, (8,)),
}


@pytest.mark.parametrize("name", NETS)
def test_the_twin_costs_the_same_per_row_in_a_batch_of_t_rows(name):
    make, more = NETS[name]
    net, profiles = make(), []
    for batch in (4, 5, 6, 7):
        functional.reset_net(net)
        profiles.append(profile_energy(net, torch.rand(6, batch, *more), time_steps=6))
    for figure in ("dense", "elementwise", "twin_elementwise"):
        values = [getattr(profile, figure) for profile in profiles]
        rises = [b - a for a, b in pairwise(values)]
        assert max(rises) - min(rises) <= 1, (figure, values)  # twin_elementwise is rounded down
    macs = [profile.twin_macs() for profile in profiles]
    assert [value * 4 for value in macs] == [macs[0] * batch for batch in (4, 5, 6, 7)]
    x = torch.rand(6, 6, *more)
    functional.reset_net(net)
    inferred = profile_energy(net, x)
    functional.reset_net(net)
    assert inferred == profile_energy(net, x, time_steps=6)  # T is also inferred in a batch of T rows


def test_time_steps_of_sequences_without_a_row_dimension_are_counted():
    net = nn.Sequential(neuron.LIFNode(step_mode="m"), nn.Linear(8, 5))
    profile = profile_energy(net, torch.rand(6, 8), time_steps=6)
    assert (profile.dense, profile.twin_macs()) == (6 * 8 * 5, 8 * 5)


def test_time_steps_separate_two_sequences_that_run_in_single_time_steps():
    """Without the argument T would be 12, the number of calls."""
    net = nn.Sequential(neuron.LIFNode(), nn.Linear(8, 5, bias=False), neuron.LIFNode())
    head = nn.Linear(5, 2, bias=False)
    both = nn.ModuleList([net, head])
    with torch.no_grad(), EnergyProfiler(both, time_steps=6) as profiler:
        for _ in range(2):
            head(sum(net(x) for x in torch.rand(6, 3, 8)))
            functional.reset_net(net)
    profile = profiler.profile
    steps = {product.name: (product.steps, product.dense_weight_bytes) for product in profile.products}
    assert steps == {"0.1": (6, 2 * 8 * 5 * 4), "1": (1, 2 * 5 * 2 * 4)}
    assert profile.twin_macs() == 2 * 3 * (8 * 5 + 5 * 2)
    assert profile.time_steps == 6


def test_a_layer_with_neurons_of_snntorch_has_the_twin_of_one_with_our_neurons():
    pytest.importorskip("snntorch")
    import snntorch

    from nord_snn.integrations.snntorch import MultiStep

    def layer_with(make):
        return CoFiringResonance(16, 2, neuron=make)

    with_leaky, with_our_node = layer_with(lambda n: MultiStep(snntorch.Leaky(beta=0.9))), layer_with(node)
    x = torch.randn(6, 6, 5, 16)
    profile = profile_energy(with_leaky, x, time_steps=6)
    assert profile.twin_macs() == profile_energy(with_our_node, x, time_steps=6).twin_macs()
    assert {product.steps for product in profile.products if product.name in ("q_proj", "k_proj")} == {6}


def test_the_twin_of_a_network_without_known_neurons_has_the_given_time_steps():
    net = nn.Sequential(nn.Linear(8, 5), nn.ReLU())
    profile = profile_energy(net, torch.rand(6, 3, 8), time_steps=6)
    assert (profile.time_steps, profile.twin_macs(), profile.twin_elementwise) == (6, 3 * 8 * 5, 3 * 5)


@pytest.mark.parametrize("time_steps", [0, -3, 2.0, "6", True])
def test_an_invalid_number_of_time_steps_raises_before_the_run(time_steps):
    with pytest.raises(ValueError, match=r"time_steps must be a positive integer, or None to infer it, got"):
        profile_energy(nn.Linear(4, 3), torch.rand(2, 4), time_steps=time_steps)


def in_single_steps(node, time_steps):
    """Run a node in six single time steps under a profiler with ``time_steps``."""
    with EnergyProfiler(node, time_steps):
        for x in torch.rand(6, 3, 8):
            node(x)


def test_time_steps_that_contradict_the_neurons_raise():
    sequence = AssociativeLIFNode(8, None, step_mode="m")
    for time_steps in (3, 12):
        with pytest.raises(ValueError, match=f"time_steps is {time_steps}, but .* sequences of 6 time steps"):
            profile_energy(sequence, torch.rand(6, 3, 8), time_steps=time_steps)
    single = AssociativeLIFNode(8, None)
    with pytest.raises(ValueError, match=r"time_steps is 4, but .* called for 6 single time steps"):
        in_single_steps(single, 4)
    assert not sequence._forward_hooks
    assert not single._forward_hooks


class WithKeyword(nn.Module):
    """Network whose forward has the keyword ``time_steps``."""

    def forward(self, x, time_steps=2):
        return x.expand(time_steps, *x.shape) * 1


def test_a_keyword_time_steps_of_the_network_is_passed_by_position_or_inside_a_profiler():
    net, x = WithKeyword(), torch.rand(3, 4)
    assert profile_energy(net, x, time_steps=5).elementwise == 2 * 12
    assert profile_energy(net, x, 5).elementwise == 5 * 12
    with EnergyProfiler(net, time_steps=5) as profiler:
        net(x, time_steps=5)
    assert profiler.profile.elementwise == 5 * 12


def test_every_layer_can_be_profiled_with_a_batch_of_t_rows():
    for name, (make, shape) in LAYERS.items():
        x = torch.rand((6, 6, *shape[2:]) if len(shape) > 2 else (6, *shape[1:]))
        assert profile_energy(make(), x, time_steps=10 if name == "encoder" else 6).joules > 0, name
