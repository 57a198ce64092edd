"""The cost of each op (operations and bytes of one call) equals counts by hand."""

import pytest
import torch

from nord_snn.ops import ConvGeometry, pack_spikes
from nord_snn.ops.cached_resonance.cost import resonance_cached_cost
from nord_snn.ops.clamp.cost import leaky_clamp_cost
from nord_snn.ops.costs import COSTS, OpCost
from nord_snn.ops.lif.cost import associative_lif_cost, associative_update_cost, lif_update_cost
from nord_snn.ops.plasticity.cost import stdp_cost
from nord_snn.ops.topk_resonance.cost import resonance_cost


def test_the_cost_of_updates_of_neurons():
    spikes = torch.zeros(5, 2, 4)
    spikes[0, 0, 1] = spikes[3, 1, 2] = 1.0
    assert lif_update_cost(spikes) == OpCost(multiplications=80, additions=120, state_bytes=320, neuron_outputs=40)
    plain = OpCost(multiplications=120, additions=200, state_bytes=960, neuron_outputs=40)
    assert associative_update_cost(spikes, None) == plain
    # Cascade of 2 clusters in 10 rows. Multiplications: matrix, gain; additions: 2 spikes, matrix, current to 4 neurons.
    cascade = plain._replace(multiplications=120 + 10 * (4 + 2), additions=200 + 2 + 10 * (4 + 4))
    assert associative_update_cost(spikes, 2) == cascade
    decay, rest = torch.full((1,), 0.5), (None, None, None)
    arguments = (spikes, *rest, torch.ones(4), decay, decay)
    assert associative_lif_cost(*arguments, None, None, -0.1, 2, out=(spikes,)) == plain
    assert associative_lif_cost(*arguments, torch.ones(2, 2), torch.ones(2), v_reset=0.0, out=(spikes,)) == cascade


def test_the_cost_of_the_clamp():
    assert leaky_clamp_cost(torch.zeros(3, 4), None, None, torch.ones(4), torch.ones(4)) == OpCost(elementwise=12)


def resonance_call(**changes):
    """Return the arguments of a call with 2 positions, 1 head, 2 neurons and 3 time steps; the positions have 1 and 2 spikes."""
    q = torch.zeros(3, 1, 2, 2)
    q[0, 0, 0, 0] = q[1, 0, 1, 1] = q[2, 0, 1, 0] = 1.0
    call = {"q": q, "k": q, "v": torch.full((1, 2, 2), 0.5), "temperature": 1.0, "recency": None}
    return call | {"n_heads": 1, "top_k": 2, "causal": True} | changes


def test_the_cost_of_a_resonance():
    coincidences, values = resonance_cost(**resonance_call()).products
    assert coincidences[:4] == ("coincidences", 3 * 6, 0, 1 * 1 + 2 * 2)
    assert (coincidences.activation_bytes, coincidences.dense_activation_bytes) == (2 + 2, 2 * 12 * 4)
    assert coincidences.time_steps == 3
    assert values[:4] == ("values", 3 * 2, 3 * 2, 0)
    assert values.activation_bytes == values.dense_activation_bytes == 3 * 2 * 4 + 2 * 2 * 4
    assert values.time_steps == 1
    assert resonance_cost(**resonance_call()).elementwise_once == 3 + 3
    assert resonance_cost(**resonance_call(recency=torch.ones(1))).elementwise_once == 3 + 3 + 3
    assert resonance_cost(**resonance_call(causal=False, top_k=1)).elementwise_once == 4 + 2


def test_the_cost_of_a_resonance_with_spiking_values():
    values_of_3_steps = torch.zeros(1, 2, 6)  # position 0 has two spikes, position 1 has three
    values_of_3_steps[0, 0, :2] = values_of_3_steps[0, 1, 3:] = 1.0
    values = resonance_cost(**resonance_call(v=values_of_3_steps)).products[1]
    assert values[:4] == ("values", 3 * 6, 0, 2 * 2 + 1 * 3)
    assert values.activation_bytes == 3 + 2 * 6 * 4
    assert values.time_steps == 3


def test_the_cost_of_a_resonance_of_real_numbers():
    real = torch.full((3, 1, 2, 2), 0.3)
    coincidences = resonance_cost(**resonance_call(q=real, k=real)).products[0]
    assert coincidences[:4] == ("coincidences", 18, 18, 0)
    assert coincidences.activation_bytes == 2 * 12 * 4


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_the_cost_of_a_resonance_is_the_same_in_other_dtypes(dtype):
    call = resonance_call()
    other = resonance_call(q=call["q"].to(dtype), k=call["k"].to(dtype))
    assert resonance_cost(**other).products[0].acs == 5


def cached_call(**changes):
    """Return the arguments of a call for the last of 4 positions: 1 head, 2 neurons, 3 time steps; the query has 2 spikes."""
    q = torch.zeros(3, 1, 4, 2)
    q[0, 0, :, 0] = q[2, 0, :, 1] = 1.0
    call = {"q": q[:, :, 3:], "keys": pack_spikes(q, 1), "values": torch.full((1, 1, 4, 2), 0.5), "top_k": 2}
    return call | {"temperature": 1.0, "recency": None, "lengths": None, "window": 4} | changes


@pytest.mark.parametrize(
    ("changes", "visible"),
    [({}, 4), ({"window": 3}, 3), ({"lengths": torch.tensor([2])}, 2), ({"lengths": torch.tensor([0])}, 0)],
)
def test_the_cost_of_a_resonance_with_cached_keys(changes, visible):
    cost = resonance_cached_cost(**cached_call(**changes))
    selected = min(2, visible)
    coincidences, values = cost.products
    assert coincidences[:4] == ("coincidences", visible * 6, 0, visible * 2)
    assert coincidences.activation_bytes == 1 + 3  # 6 query spikes and 24 key spikes as bits
    assert values[:4] == ("values", selected * 2, selected * 2, 0)
    assert cost.elementwise_once == visible + selected


def test_the_cost_with_cached_keys_that_are_not_spikes():
    keys = torch.full((1, 1, 4, 6), 0.3)
    coincidences = resonance_cached_cost(**cached_call(keys=keys)).products[0]
    assert coincidences[:4] == ("coincidences", 24, 24, 0)


def test_the_cost_of_a_weight_change_of_stdp():
    pre, post = torch.zeros(6, 2, 4), torch.zeros(6, 2, 3)
    pre[0, 0, 1] = pre[2, 1, 1] = post[3, 0, 2] = 1.0
    cost = stdp_cost(pre, post)
    potentiation, depression = cost.products
    assert potentiation[:4] == ("potentiation", 6 * 2 * 12, 0, 4)
    assert depression[:4] == ("depression", 6 * 2 * 12, 0, 2 * 3)
    assert (potentiation.weight_bytes, depression.weight_bytes) == (4 * 4, 3 * 4)
    assert potentiation.activation_bytes == 6 + 5
    traces = 6 * 2 * 7
    assert (cost.multiplications, cost.additions) == (traces + 2 * 12, traces + 12)
    assert cost.state_bytes == 8 * traces
    assert stdp_cost(pre, post, triplets=True).state_bytes == 16 * traces
    assert stdp_cost(pre / 2, post).products[1][:4] == ("depression", 144, 144, 0)


def test_the_cost_of_a_weight_change_of_a_convolution():
    """At the edge an output connects to two inputs instead of three."""
    geometry = ConvGeometry((3,), (1,), ((1, 1),), (1,))
    pre, post = torch.zeros(1, 1, 1, 5), torch.zeros(1, 1, 2, 5)
    post[0, 0, 0, 0] = post[0, 0, 1, 2] = pre[0, 0, 0, 4] = 1.0
    potentiation, depression = stdp_cost(pre, post, geometry).products
    assert potentiation.acs == 2 + 3
    assert depression.acs == 2 * 2
    assert potentiation.dense == 2 * (2 + 3 + 3 + 3 + 2)


def test_every_op_of_the_library_has_a_cost():
    names = {"associative_lif", "leaky_clamp", "resonance", "resonance_cached"}
    assert COSTS.keys() == {f"nord_snn::{name}" for name in names}
    assert all(getattr(torch.ops.nord_snn, name).default.name() in COSTS for name in names)
