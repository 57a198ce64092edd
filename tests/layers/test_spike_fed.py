"""SpikeFedBlock: every linear map receives spikes; equations, firing rates before training, cached decoding."""

import pytest
import torch
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

from nord_snn.layers import NordBlock, SequenceCache, SpikeFedBlock, SpikeFedResonance
from nord_snn.monitor import EnergyProfiler, SpikeMonitor, profile_energy
from nord_snn.neurons import AssociativeLIFNode, DenseActivation, fire_from_rest
from nord_snn.ops.topk_resonance.reference import reference

pytestmark = pytest.mark.quick


def node(n):
    return AssociativeLIFNode(n, n_clusters=4)


def tiny_neuron(n):
    """Return the neuron of examples/nord_lm/nordlm/configs/tiny.yaml."""
    decays = {"threshold": 1.0, "beta_mem": 0.5, "beta_syn": 0.2}
    return AssociativeLIFNode(n, n_clusters=8, refractory_steps=0, surrogate="sigmoid", alpha=3.0, **decays)


def with_low_thresholds(layer):
    """Lower the thresholds so that every layer of neurons fires."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("v_threshold"):
                parameter.fill_(0.02)
    return layer


def block(**more):
    """Return a block of 16 features whose neurons fire."""
    torch.manual_seed(0)
    return with_low_thresholds(SpikeFedBlock(16, 2, 32, neuron=node, **{"recency": True} | more))


@pytest.mark.parametrize("spiking_values", [False, True])
def test_every_linear_map_has_only_spikes_as_input(spiking_values):
    layer, x = block(spiking_values=spiking_values), 4 * torch.randn(9, 2, 6, 16)
    profile = profile_energy(layer, x)
    linear_products = {product.name: product for product in profile.products if product.kind == "linear"}
    assert set(linear_products) == {"up", "down", *(f"resonance.{name}_proj" for name in "qkvo")}
    for product in profile.products:
        if product.kind != "values" or spiking_values:  # real values are multiplied
            assert product.macs == 0, product
            assert 0 < product.acs < product.dense, product
    with SpikeMonitor(layer) as monitor:
        layer(x)
    assert min(monitor.rates().values()) > 0
    published = profile_energy(NordBlock(16, 2, 32, neuron=node), x)
    with_macs = [product.name for product in published.products if product.kind == "linear" and product.macs]
    assert len(with_macs) == 5  # q, k, v, o and ffn.up; ffn.down receives spikes


def test_the_resonance_equals_its_equation():
    torch.manual_seed(0)
    layer = with_low_thresholds(SpikeFedResonance(16, 2, top_k=3, recency=True, neuron=node))
    spikes = (torch.rand(7, 2, 6, 16) < 0.3).float()
    q = fire_from_rest(layer.lif_q, layer.norm_q(layer.q_proj(spikes)))
    k = fire_from_rest(layer.lif_k, layer.norm_k(layer.k_proj(spikes)))
    v = layer.v_proj(spikes)
    context = torch.stack([reference(q, k, v[t], 2, 3, layer.temperature, layer.recency, True) for t in range(7)])
    expected = layer.o_proj(fire_from_rest(layer.lif_o, layer.norm_o(context)))
    assert torch.allclose(layer(spikes), expected, atol=1e-6)


def test_the_block_equals_its_equation():
    layer, x = block(), 4 * torch.randn(9, 2, 6, 16)
    y = x + layer.resonance_gain * layer.resonance(fire_from_rest(layer.lif1, layer.norm1(x)))
    hidden = fire_from_rest(layer.lif_h, layer.norm_h(layer.up(fire_from_rest(layer.lif2, layer.norm2(y)))))
    assert torch.equal(layer(x), y + layer.ffn_gain * layer.down(hidden))
    assert torch.equal(layer.resonance_gain, torch.full((16,), 0.5))


@pytest.mark.parametrize("width", [32, 256])
@pytest.mark.parametrize("spiking_values", [False, True])
@pytest.mark.parametrize(("neuron", "steps"), [(node, 10), (tiny_neuron, 4)])
def test_the_neurons_of_six_blocks_fire_before_training(width, spiking_values, neuron, steps):
    torch.manual_seed(0)
    sizes = (width, 2, 2 * width)
    blocks = nn.ModuleList(SpikeFedBlock(*sizes, spiking_values=spiking_values, neuron=neuron) for _ in range(6))
    x = torch.randn(1, 3, 9, width).repeat(steps, 1, 1, 1)  # the same current at each time step
    with SpikeMonitor(blocks) as monitor, torch.no_grad():
        for layer in blocks:
            x = layer(x)
    assert min(monitor.rates().values()) > 0.005
    assert max(monitor.rates().values()) < 0.25


def test_gradients_reach_every_parameter_through_the_spikes():
    layer = block(spiking_values=True)
    layer(4 * torch.randn(9, 2, 6, 16)).square().sum().backward()
    without_gradient = [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without_gradient == []


def test_without_resonance_positions_are_independent():
    layer, x = block(resonance=False), torch.randn(9, 2, 6, 16)
    assert torch.equal(layer(x)[:, :, 3:4], layer(x[:, :, 3:4]))
    assert not any("resonance" in name or "norm1" in name or "lif1" in name for name, _ in layer.named_parameters())


class GrowingCache:
    """Cache of keys and values."""

    def __init__(self):
        self.keys = self.values = None

    def __call__(self, keys, values):
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), 2)
        self.values = values if self.values is None else torch.cat((self.values, values), 2)
        return self.keys, self.values


@pytest.mark.parametrize("kind", ["currents", "spikes", "dense"])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_cached_calls_equal_one_call_in_output_and_cost(kind, backend):
    if backend == "numba":
        pytest.importorskip("numba")
    torch.manual_seed(0)
    neuron, T = (DenseActivation, 1) if kind == "dense" else (node, 9)
    layer = with_low_thresholds(
        SpikeFedBlock(16, 2, 32, top_k=4, recency=True, spiking_values=kind == "spikes", neuron=neuron)
    )
    layer.resonance.backend = backend
    x, key_cache = 4 * torch.randn(T, 2, 7, 16), GrowingCache()
    whole = layer(x)
    with torch.no_grad():
        parts = [layer(x[:, :, i : i + 2], cache=SequenceCache(update=key_cache, window=100)) for i in range(0, 7, 2)]
    assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-5)
    if kind == "spikes":
        assert key_cache.values.dtype == torch.uint8
    if kind == "dense":
        return
    profile = profile_energy(layer, x)
    key_cache = GrowingCache()
    with EnergyProfiler(layer) as profiler, torch.no_grad():
        for i in range(7):
            layer(x[:, :, i : i + 1], cache=SequenceCache(update=key_cache, window=100))
    for figure in ("dense", "macs", "acs"):
        assert getattr(profiler.profile, figure) == getattr(profile, figure), figure


def test_the_dense_twin_lacks_only_the_parameters_of_the_neurons():
    spiking, dense = block(), SpikeFedBlock(16, 2, 32, recency=True, neuron=DenseActivation)
    other_parameters = {name: p.shape for name, p in spiking.named_parameters() if "lif" not in name}
    assert other_parameters == {name: p.shape for name, p in dense.named_parameters()}
    assert dense(torch.randn(1, 2, 6, 16)).shape == (1, 2, 6, 16)


def test_spikingjellys_neurons_are_accepted():
    layer = SpikeFedBlock(16, 2, 32, neuron=lambda n: LIFNode(v_threshold=0.1))
    assert layer(4 * torch.randn(5, 2, 3, 16)).shape == (5, 2, 3, 16)
    assert isinstance(layer.lif1, LIFNode)
    assert isinstance(layer.up, nn.Linear)


def test_padding_in_front_does_not_change_the_output():
    layer, x = block(spiking_values=True), 4 * torch.randn(9, 2, 6, 16)
    padded = torch.cat((torch.randn(9, 2, 3, 16), x), 2)
    lengths = torch.tensor([6, 6])
    assert torch.allclose(layer(padded, cache=SequenceCache(lengths))[:, :, 3:], layer(x), atol=1e-6)
