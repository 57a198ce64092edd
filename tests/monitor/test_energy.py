"""profile_energy equals counts by hand and those of SpikingJelly, and raises for operations that it cannot count."""

import copy
from math import ceil

import pytest
import torch
from helpers import needs_spikingjelly_2
from parts import PARTS
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from nord_snn.layers import CoFiringResonance, SequenceCache
from nord_snn.monitor import CONVENTIONS, EnergyProfiler, profile_energy
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import OpCost, associative_lif, resonance

pytestmark = pytest.mark.quick


def spikes(*shape, rate=0.3):
    """Return random spikes with a firing rate."""
    return (torch.rand(shape) < rate).float()


def only_product(profile, kind="linear"):
    """Return the only product of a kind."""
    (product,) = [product for product in profile.products if product.kind == kind]
    return product


@pytest.mark.parametrize("bias", [False, True])
def test_additions_are_active_inputs_times_fan_out_if_all_inputs_are_spikes(bias):
    net, x = nn.Linear(20, 7, bias=bias), spikes(6, 3, 20)
    profile = profile_energy(net, x)
    assert (profile.macs, profile.acs, profile.dense) == (0, int(x.sum()) * 7, 6 * 3 * 20 * 7)
    x[0, 0, 0] = 0.5  # a value other than 0 and 1: all counts are of multiplications
    profile = profile_energy(net, x)
    assert (profile.macs, profile.acs) == (6 * 3 * 20 * 7, 0)
    assert profile_energy(net, 2 * spikes(6, 3, 20)).acs == 0


def test_the_counts_of_a_convolution_equal_those_by_hand():
    """An active input causes one addition for each window that contains it; at the edges there are fewer."""
    net, x = nn.Conv2d(2, 5, 3, stride=2, padding=1, bias=False), spikes(1, 2, 6, 6)
    n_windows = 0
    for channel, row, column in x[0].nonzero().tolist():
        assert channel < 2
        for top in range(-1, 5, 2):
            for left in range(-1, 5, 2):
                n_windows += top <= row < top + 3 and left <= column < left + 3
    profile = profile_energy(net, x)
    assert profile.acs == n_windows * 5
    assert profile.dense == 3 * 3 * 5 * 2 * 9


@needs_spikingjelly_2
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("name", ["linear", "convolution", "groups", "network"])
def test_counts_equal_those_of_spikingjellys_counters(name, binary):
    from spikingjelly.activation_based import op_counter

    nets = {
        "linear": (nn.Linear(20, 7), (6, 3, 20)),
        "convolution": (nn.Conv2d(3, 5, 3, stride=2, padding=1), (4, 3, 9, 9)),
        "groups": (nn.Conv1d(4, 6, 3, groups=2, dilation=2, bias=False), (4, 4, 11)),
        "network": (nn.Sequential(nn.Linear(20, 9), nn.Linear(9, 4)), (6, 3, 20)),
    }
    net, shape = nets[name]
    x = spikes(*shape) if binary else torch.rand(shape)
    counters = op_counter.MACCounter(), op_counter.ACCounter()
    with torch.no_grad(), op_counter.DispatchCounterMode(list(counters)):
        net(x)
    profile = profile_energy(net, x)
    assert (profile.macs, profile.acs) == tuple(counter.get_total() for counter in counters)


@pytest.mark.parametrize("causal", [True, False])
def test_the_counts_of_a_resonance_equal_those_by_hand(causal):
    layer = CoFiringResonance(16, 2, top_k=3, causal=causal, neuron=lambda n: AssociativeLIFNode(n, n_clusters=4))
    fired = {}
    for name in ("lif_q", "lif_k"):
        getattr(layer, name).register_forward_hook(lambda m, i, out, name=name: fired.update({name: out}))
    x = 5 * torch.randn(6, 2, 5, 16)
    profile = profile_energy(layer, x)
    q = fired["lif_q"]
    assert q.any()
    n_keys = [position + 1 if causal else 5 for position in range(5)]
    coincidences, values = only_product(profile, "coincidences"), only_product(profile, "values")
    assert coincidences.acs == sum(int(q[:, :, position].sum()) * n_keys[position] for position in range(5))
    assert coincidences.dense == 2 * sum(n_keys) * 6 * 16
    assert (values.macs, values.acs) == (2 * sum(min(3, n) for n in n_keys) * 16, 0)
    names = {product.name: product for product in profile.products if product.kind == "linear"}
    assert names["q_proj"].macs == 6 * 2 * 5 * 16 * 16
    assert names["v_proj"].macs == 2 * 5 * 16 * 16  # once for all time steps
    twin = 4 * 2 * 5 * 16 * 16 + 2 * sum(n_keys) * 16 + values.macs
    assert profile.twin_macs() == twin


def test_the_counts_of_neurons_and_cascade_equal_those_by_hand():
    plain, x = AssociativeLIFNode(8, None, step_mode="m"), 5 * torch.rand(6, 3, 8)
    profile = profile_energy(plain, x)
    updates = 6 * 3 * 8
    assert (profile.multiplications, profile.additions, profile.state_bytes) == (3 * updates, 5 * updates, 24 * updates)
    assert profile.products == []
    assert profile.elementwise == 0
    node = AssociativeLIFNode(8, n_clusters=4, step_mode="m")
    out = node(x)
    functional.reset_net(node)
    for backend in ("auto", "torch"):  # the count does not depend on the backend
        node.backend = backend
        profile = profile_energy(node, x)
        functional.reset_net(node)
        assert profile.multiplications == 3 * updates + 18 * 4 * 5
        assert profile.additions == 5 * updates + int(out.sum()) + 18 * (16 + 8)
        assert profile.products == []


def test_single_time_steps_cost_the_same_as_a_sequence_but_read_weights_more_often():
    net = nn.Sequential(
        AssociativeLIFNode(8, n_clusters=4, step_mode="m"), nn.Linear(8, 5, bias=False), neuron.LIFNode(step_mode="m")
    )
    x = 5 * torch.rand(6, 3, 8)
    whole = profile_energy(net, x)
    functional.reset_net(net)
    functional.set_step_mode(net, "s")
    with torch.no_grad(), EnergyProfiler(net) as profiler:
        for step in x:
            net(step)
    single = profiler.profile
    for name in ("macs", "acs", "dense", "neuron_ops", "state_bytes", "time_steps"):
        assert getattr(single, name) == getattr(whole, name), name
    assert single.twin_macs() == whole.twin_macs() == 3 * 8 * 5
    assert single.twin_joules_under("45nm-fp32-sram") == pytest.approx(whole.twin_joules_under("45nm-fp32-sram"))
    assert only_product(single).weight_bytes >= only_product(whole).weight_bytes


def test_weights_without_input_spikes_are_not_read():
    net, x = nn.Linear(20, 7, bias=False), torch.zeros(6, 3, 20)
    x[2, 1, 4] = x[5, 0, 4] = x[0, 0, 9] = 1.0
    product = only_product(profile_energy(net, x))
    assert product.weight_bytes == 2 * 7 * 4
    assert product.activation_bytes == 6 * 3 * 20 // 8 + 6 * 3 * 7 * 4  # spikes are bits


def test_the_twin_reads_weights_and_inputs_once_and_activates_each_neuron_once():
    net = nn.Sequential(nn.LayerNorm(8), AssociativeLIFNode(8, None, step_mode="m"), nn.Linear(8, 5, bias=False))
    profile = profile_energy(net, torch.zeros(10, 3, 8))  # a silent network
    assert (profile.macs, profile.acs, profile.bytes - profile.state_bytes) == (
        0,
        0,
        10 * 3 * (8 / 8 + 4 * 0) + ceil(150 / 8),
    )
    assert profile.elementwise == 10 * 3 * 8  # the norm
    assert profile.twin_elementwise == 3 * 8 + 3 * 8  # the norm once, and an activation
    macs = 3 * 8 * 5
    assert profile.twin_macs() == macs
    assert profile.twin_joules == pytest.approx((macs + 48) * 4.6e-12)
    moved = 4 * 8 * 5 + 4 * 3 * 13
    assert profile.twin_joules_under("45nm-fp32-sram") == pytest.approx((macs + 48) * 4.6e-12 + moved * 2.5e-12)


def test_time_steps_flattened_into_the_batch_are_inferred():
    twin = 3 * 8 * 5
    nodes = neuron.LIFNode(step_mode="m")
    for net in (
        nn.Sequential(nodes, layer.SeqToANNContainer(nn.Linear(8, 5))),
        nn.Sequential(nodes, layer.Linear(8, 5, step_mode="m")),
        nn.Sequential(nodes, nn.Flatten(0, 1), nn.Linear(8, 5)),
    ):
        functional.reset_net(net)
        profile = profile_energy(net, 2 * torch.rand(6, 3, 8))
        assert (profile.dense, profile.twin_macs()) == (6 * twin, twin)


def test_the_counts_of_a_transposed_convolution_equal_those_by_hand():
    net = nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False)
    profile = profile_energy(net, torch.ones(1, 4, 8, 8))
    assert profile.dense == profile.acs == 64 * 4 * 2 * 4


def test_in_inference_mode_profile_energy_works_and_the_profiler_raises():
    net = nn.Linear(4, 3)
    with torch.inference_mode():
        assert profile_energy(net, torch.rand(2, 4)).dense == 24
        with pytest.raises(RuntimeError, match=r"use torch\.no_grad"), EnergyProfiler(net):
            net(torch.rand(2, 4))
    assert not net._forward_hooks


def test_copies_are_not_counted_and_a_profiler_counts_once_at_a_time():
    net = nn.Sequential(AssociativeLIFNode(8, None, step_mode="m"))
    with EnergyProfiler(net) as profiler:
        copied = copy.deepcopy(net)
        net(torch.rand(6, 3, 8))
        with pytest.raises(RuntimeError, match="is already counting"), profiler:
            pass
    before = profiler.profile.multiplications
    copied(torch.rand(6, 3, 8))
    assert profiler.profile.multiplications == before == 3 * 6 * 3 * 8


def test_products_with_vectors_are_counted():
    class Vectors(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(5, 8))

        def forward(self, x):
            return (self.weight @ x) @ torch.ones(5)

    profile = profile_energy(Vectors(), torch.rand(8))
    assert profile.dense == 5 * 8 + 5
    assert profile_energy(Vectors(), torch.ones(8)).acs == 5 * 8 + 5


def test_grouped_products_have_the_same_total_cost():
    net = nn.Sequential(*(nn.Sequential(AssociativeLIFNode(8, None, step_mode="m"), nn.Linear(8, 8)) for _ in range(3)))
    profile = profile_energy(net, 2 * torch.rand(5, 3, 8))
    grouped = profile.grouped()
    assert [product.name for product in grouped.products] == ["*.*"]
    assert grouped.products[0].calls == 3
    for figure in ("macs", "acs", "dense", "bytes", "neuron_ops"):
        assert getattr(grouped, figure) == getattr(profile, figure)
    assert grouped.joules == profile.joules
    assert grouped.twin_joules_under("45nm-fp32-sram") == pytest.approx(
        profile.twin_joules_under("45nm-fp32-sram"), rel=1e-6
    )
    assert [product.name for product in profile.products] == ["0.1", "1.1", "2.1"]


def test_joules_are_energies_times_counts():
    net = nn.Sequential(
        AssociativeLIFNode(8, None, step_mode="m"), nn.Linear(8, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 2)
    )
    profile = profile_energy(net, 5 * torch.rand(6, 3, 8))
    assert profile.acs > 0
    assert profile.macs == 6 * 3 * 5 * 2
    assert profile.elementwise == 6 * 3 * 5
    for name, price in CONVENTIONS.items():
        expected = profile.macs * price.mac + profile.acs * price.ac + profile.multiplications * price.mul
        expected += profile.additions * price.add + profile.elementwise * price.mac + profile.bytes * price.byte
        assert profile.joules_under(name) == pytest.approx(expected)
        assert name in str(profile)
    assert profile.twin_macs() == 3 * (8 * 5 + 5 * 2)
    n_bits = 3  # for the numbers 0 to 6 of spikes in 6 time steps
    assert profile.quantised_twin_joules == pytest.approx(profile.twin_macs() * (0.2e-12 * n_bits / 8 + 0.1e-12))
    with pytest.raises(ValueError, match=r"unknown convention 'joule'.*45nm-fp32"):
        profile.joules_under("joule")


@pytest.mark.parametrize(("make", "shape"), PARTS.values(), ids=PARTS)
def test_every_part_is_counted_and_not_changed(make, shape):
    part, x = make(), 2 * torch.rand(shape)
    expected = part(x)
    functional.reset_net(part)
    profile = profile_energy(part, x)
    functional.reset_net(part)
    assert torch.equal(part(x), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in part.modules())
    counted = {product.name for product in profile.products if product.kind == "linear"}
    assert counted == {name for name, module in part.named_modules() if isinstance(module, nn.Linear)}
    assert profile.joules > 0 or not list(part.parameters())


def test_hooks_are_removed_after_an_error():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
    with pytest.raises(RuntimeError):
        profile_energy(net, torch.rand(2, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Pointwise(nn.Module):
    """Module with pointwise operations, which are counted, and views, copies and integers, which are not."""

    def forward(self, x):
        y = nn.functional.leaky_relu((x.sin() + x).clamp(-1, 1).lerp(x, 0.5).log1p())
        return y.view(4, 3).transpose(0, 1).contiguous().flatten()[1:], y.mean(1), torch.arange(5) + 1


def test_pointwise_operations_count_by_their_outputs():
    assert profile_energy(Pointwise(), torch.rand(4, 3)).elementwise == 6 * 12 + 4


class Attention(nn.Module):
    """Module whose products are in one call of torch."""

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_operations_that_cannot_be_counted_raise():
    with pytest.raises(ValueError, match=r"cannot count aten.*scaled_dot_product"):
        profile_energy(Attention(), torch.rand(2, 1, 5, 16))
    with pytest.raises(ValueError, match=r"cannot count aten.*multi_head_attention"):
        profile_energy(nn.TransformerEncoderLayer(16, 2, batch_first=True).eval(), torch.rand(2, 5, 16))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_positions_with_a_cache_cost_the_same_as_the_whole_sequence(window, backend):
    """With a cache of key spikes each position is counted once."""
    layer = CoFiringResonance(
        16, 2, top_k=3, recency=True, neuron=lambda n: AssociativeLIFNode(n, n_clusters=4), backend=backend
    )
    x = 5 * torch.randn(6, 2, 7, 16)
    whole = profile_energy(layer, x)
    parts_so_far = []

    def append(keys, values):
        parts_so_far.append((keys, values))
        return tuple(torch.cat(parts, 2) for parts in zip(*parts_so_far, strict=True))

    with torch.no_grad(), EnergyProfiler(layer) as profiler:
        for begin, end in ((0, 3), (3, 4), (4, 5), (5, 7)):
            layer(x[:, :, begin:end], cache=SequenceCache(update=append, window=window))
    in_four_calls = profiler.profile
    assert only_product(in_four_calls, "values").macs == only_product(whole, "values").macs == 2 * (1 + 2 + 5 * 3) * 16
    for a, b in zip(
        only_product(in_four_calls, "coincidences").__dict__.items(),
        only_product(whole, "coincidences").__dict__.items(),
        strict=True,
    ):
        if a[0] in ("dense", "acs", "macs") and window is None:
            assert a == b
    if window is not None:
        assert only_product(in_four_calls, "coincidences").dense == 2 * (1 + 2 + 3 + 4 * 4) * 6 * 16
    assert in_four_calls.neuron_ops == whole.neuron_ops
    pairs = 2 * 2 * sum(min(position, window or 7) for position in range(1, 8))
    scores, weights, mean, slopes = 2 * pairs, 2 * 2 * (1 + 2 + 5 * 3), 2 * 7 * 16, 2
    assert in_four_calls.elementwise == scores + weights + mean + 4 * slopes  # each call computes the slopes
    if window is None:
        assert whole.elementwise == scores + weights + mean + slopes
        assert whole.twin_elementwise == scores + weights + (mean + slopes) // 6 + 2 * 2 * 7 * 16
        assert in_four_calls.twin_elementwise == scores + weights + (mean + 4 * slopes) // 6 + 2 * 2 * 7 * 16


class Cache:
    """Cache that concatenates the keys and values of all calls."""

    def __init__(self):
        self.parts = []

    def __call__(self, *new):
        self.parts.append(new)
        return tuple(torch.cat(part, 2) for part in zip(*self.parts, strict=True))


def in_three_calls(layer, x, keywords):
    """Return the profile of three calls; ``keywords(cache, end)`` returns the keywords of the call that ends before ``end``."""
    cache = Cache()
    with torch.no_grad(), EnergyProfiler(layer) as profiler:
        for begin, end in ((0, 3), (3, 4), (4, 7)):
            layer(x[:, :, begin:end], **keywords(cache, end))
    return profiler.profile


def small_node(n):
    return AssociativeLIFNode(n, n_clusters=4)


@pytest.mark.filterwarnings("ignore:lengths, remember and window are deprecated:FutureWarning")
@pytest.mark.parametrize("window", [None, 4])
def test_the_deprecated_cache_keywords_cost_the_same_as_the_cache(window):
    layer, x = CoFiringResonance(16, 2, top_k=3, neuron=small_node), 5 * torch.randn(6, 2, 7, 16)
    cached = in_three_calls(layer, x, keywords=lambda cache, end: {"cache": SequenceCache(None, cache, window)})
    deprecated = in_three_calls(layer, x, keywords=lambda cache, end: {"remember": cache, "window": window})
    assert only_product(cached, "coincidences").acs > 0
    assert deprecated == cached


def test_padding_is_not_counted_with_a_cache():
    """Sequence 1 has padding at its first two positions. In the first call, whose op has no argument for padding, it counts."""
    layer, x = CoFiringResonance(16, 2, top_k=3, neuron=small_node), 5 * torch.randn(6, 2, 7, 16)

    def lengths(cache, end):
        return {"cache": SequenceCache(torch.tensor([end, end - 2]), cache)}

    padded = in_three_calls(layer, x, keywords=lengths)
    first_call = 2 * (1 + 2 + 3)
    assert only_product(padded, "coincidences").dense == (first_call + (4 + 5 + 6 + 7) + (2 + 3 + 4 + 5)) * 6 * 16
    selected = first_call + 4 * 3 + (2 + 3 + 3 + 3)
    assert only_product(padded, "values").macs == selected * 16


def test_a_window_smaller_than_the_first_call_is_counted():
    layer, x = CoFiringResonance(16, 2, top_k=3, neuron=small_node), 5 * torch.randn(6, 2, 7, 16)
    with torch.no_grad():
        profile = profile_energy(layer, x, cache=SequenceCache(update=Cache(), window=2))
    assert only_product(profile, "coincidences").dense == 2 * (1 + 6 * 2) * 6 * 16


def test_autocast_does_not_round_the_scores():
    """Scores of more than 256 coincidences in bfloat16 would select other keys."""
    q = (torch.arange(40 * 6 * 64).reshape(40, 1, 6, 64) % 7 > 0).float()
    values = torch.rand(1, 6, 64)
    values[0, ::2] = (values[0, ::2] > 0.5).float()
    whole = profile_energy(Resonance(), q, values)
    with torch.autocast("cpu", torch.bfloat16):
        assert profile_energy(Resonance(), q, values) == whole


class Resonance(nn.Module):
    """Module that calls the op directly."""

    def forward(self, q, v):
        return resonance(q, q, v, n_heads=1, top_k=2, temperature=0.1, recency=torch.ones(1))


class Tripled(neuron.LIFNode):
    """Neurons that define update_cost."""

    def update_cost(self, spikes):
        return OpCost(multiplications=3 * spikes.numel(), state_bytes=spikes.numel(), neuron_outputs=spikes.numel())


class Inherited(AssociativeLIFNode):
    """Neurons that inherit update_cost."""


def test_update_cost_is_used_and_other_neurons_count_as_lif():
    x, n = 5 * torch.rand(6, 3, 8), 6 * 3 * 8
    costs = {
        neuron.LIFNode(step_mode="m"): (2 * n, 3 * n, 8 * n),
        neuron.ParametricLIFNode(step_mode="m"): (2 * n, 3 * n, 8 * n),
        Tripled(step_mode="m"): (3 * n, 0, n),
        Inherited(8, None, step_mode="m"): (3 * n, 5 * n, 24 * n),
    }
    for node, cost in costs.items():
        profile = profile_energy(node, x)
        assert (profile.multiplications, profile.additions, profile.state_bytes) == cost, node
        assert profile.twin_elementwise == n // 6


def test_associative_synaptic_costs_the_same_as_the_node():
    snntorch = pytest.importorskip("nord_snn.integrations.snntorch")
    lif, x = snntorch.AssociativeSynaptic(8, 4), torch.zeros(3, 8)
    profile = profile_energy(lif, x)
    assert (profile.multiplications, profile.additions) == (3 * 24 + 3 * 4 * 5, 5 * 24 + 3 * (16 + 8))


def test_the_op_alone_costs_the_same_as_the_neurons():
    pytest.importorskip("numba")

    class Op(nn.Module):
        def forward(self, x):
            return associative_lif(x, threshold=torch.full((8,), 0.25), beta_mem=0.9, beta_syn=0.5)[0]

    x = 5 * torch.rand(6, 3, 8)
    alone, node = profile_energy(Op(), x, time_steps=6), profile_energy(AssociativeLIFNode(8, None, step_mode="m"), x)
    for figure in ("multiplications", "additions", "state_bytes", "twin_elementwise", "joules"):
        assert getattr(alone, figure) == getattr(node, figure), figure


def test_nord_snn_monitor_exports_the_names_of_its_energy_package():
    import nord_snn.monitor
    import nord_snn.monitor.energy as energy

    for name in energy.__all__:
        assert getattr(energy, name) is getattr(nord_snn.monitor, name)
