"""Every STDP rule, also for convolutions, equals the sum over all pairs and triplets of spikes, in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nord_snn.learning_rules.learner import _geometry
from nord_snn.ops import ConvGeometry, RewardSTDPState, reward_modulated_stdp, stdp, triplet_stdp
from nord_snn.ops.plasticity import chunked_torch as chunked

PAIR = {"tau_plus": 7.0, "tau_minus": 11.0, "a_plus": 0.005, "a_minus": 0.007}
TRIPLET = {
    "tau_plus": 7.0,
    "tau_minus": 11.0,
    "tau_x": 23.0,
    "tau_y": 31.0,
    "a2_plus": 0.005,
    "a2_minus": 0.007,
    "a3_plus": 0.003,
    "a3_minus": 0.002,
}


def change_of_synapse(pre, post, factor_at=None):
    """Return potentiation and depression of one synapse from all pairs and triplets of its spike times.

    ``factor_at(t)`` multiplies the change at time step t, that of the later spike of a pair.
    """
    factor_at = factor_at or (lambda t: 1.0)
    constants = {"a3_plus": 0.0, "a3_minus": 0.0, "tau_x": 1.0, "tau_y": 1.0, **change_of_synapse.constants}
    a2_plus = constants.get("a2_plus", constants.get("a_plus"))
    a2_minus = constants.get("a2_minus", constants.get("a_minus"))
    potentiation = depression = 0.0
    for t_pre, t_post in itertools.product(pre, post):
        if t_pre <= t_post:
            pair = math.exp(-(t_post - t_pre) / constants["tau_plus"])
            before = sum(math.exp(-(t_post - t) / constants["tau_y"]) for t in post if t < t_post)
            potentiation += factor_at(t_post) * pair * (a2_plus + constants["a3_plus"] * before)
        if t_post <= t_pre:
            pair = math.exp(-(t_pre - t_post) / constants["tau_minus"])
            before = sum(math.exp(-(t_pre - t) / constants["tau_x"]) for t in pre if t < t_pre)
            depression += factor_at(t_pre) * pair * (a2_minus + constants["a3_minus"] * before)
    return potentiation, depression


def brute_force(pre, post, constants, geometry=None, factor=None, factor_at=None):
    """Return potentiation and depression in the shape of the weight, times ``factor [N, n_out]`` of each row and neuron."""
    change_of_synapse.constants = constants
    trains = {}

    def times(spikes):
        key = tuple(spikes.tolist())
        return trains.setdefault(key, tuple(t for t, fired in enumerate(key) if fired))

    n_rows, n_out = pre.shape[1], post.shape[2]
    if geometry is None:
        shape = (n_out, pre.shape[2])
        taps = [(o, i, o, i, (), ()) for o, i in itertools.product(*map(range, shape))]
    else:
        sides = [side for pair in reversed(geometry.padding) for side in pair]
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        pre = F.pad(pre.flatten(0, 1), sides, mode=mode).unflatten(0, pre.shape[:2])
        n_in = pre.shape[2] // geometry.groups
        shape = (n_out, n_in, *geometry.kernel_size)
        taps = []
        for o, i in itertools.product(range(n_out), range(n_in)):
            channel = o // (n_out // geometry.groups) * n_in + i
            for tap in itertools.product(*map(range, geometry.kernel_size)):
                for place in itertools.product(*map(range, post.shape[3:])):
                    steps = zip(place, geometry.stride, tap, geometry.dilation, strict=True)
                    input_place = tuple(p * stride + k * dilation for p, stride, k, dilation in steps)
                    taps.append((o, (i, *tap), o, channel, place, input_place))
    sums = torch.zeros(2, *shape, dtype=torch.float64)
    for row in range(n_rows):
        for o, i, out, channel, place, input_place in taps:
            late = times(post[(slice(None), row, out, *place)])
            early = times(pre[(slice(None), row, channel, *input_place)])
            index = (o, *i) if isinstance(i, tuple) else (o, i)
            for k, part in enumerate(change_of_synapse(early, late, factor_at)):
                sums[(k, *index)] += part * (1.0 if factor is None else factor[row, out].item())
    return sums[0], sums[1]


def random_spikes(shape, seed, rate=0.4):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < rate).double()


@pytest.mark.quick
@settings(deadline=None, max_examples=30)
@given(
    T=st.integers(1, 7), N=st.integers(1, 3), cut=st.integers(1, 7), chunk=st.integers(1, 5), seed=st.integers(0, 999)
)
def test_the_change_is_the_sum_over_all_spike_triplets_also_for_split_sequences(T, N, cut, chunk, seed):
    pre, post = random_spikes((T, N, 3), seed, 0.6), random_spikes((T, N, 2), seed + 1, 0.6)
    potentiation, depression = brute_force(pre, post, TRIPLET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", chunk)
        delta, _ = triplet_stdp(pre, post, **TRIPLET)
        assert torch.allclose(delta, potentiation - depression, atol=1e-12)
        if cut < T:
            first, state = triplet_stdp(pre[:cut], post[:cut], **TRIPLET)
            second, _ = triplet_stdp(pre[cut:], post[cut:], state, **TRIPLET)
            assert torch.allclose(first + second, potentiation - depression, atol=1e-12)


@pytest.mark.quick
def test_without_triplet_terms_the_triplet_rule_equals_the_pair_rule():
    pre, post = random_spikes((9, 4, 5), 0), random_spikes((9, 4, 3), 1)
    pairs = {**TRIPLET, "a3_plus": 0.0, "a3_minus": 0.0}
    assert torch.equal(triplet_stdp(pre, post, **pairs)[0], stdp(pre, post, **PAIR)[0])


def change_by_60_pairs(rate, lag, n_pairs=60):
    """Return the weight change by spike pairs at a rate in Hz, ``post`` ``lag`` ms after ``pre``, with time steps of 1 ms."""
    period = round(1000 / rate)
    T = period * n_pairs + 40
    pre, post = torch.zeros(T, 1, 1, dtype=torch.float64), torch.zeros(T, 1, 1, dtype=torch.float64)
    pre[20 : 20 + period * n_pairs : period] = 1
    post[20 + lag : 20 + lag + period * n_pairs : period] = 1
    return triplet_stdp(pre, post)[0].item()


def test_the_triplet_rule_depresses_at_low_rates_and_potentiates_at_high_rates():
    """Sjostrom et al. (2001) measured this; the pair rule cannot reproduce it (Pfister and Gerstner, 2006, figure 2)."""
    after = [change_by_60_pairs(rate, 10) for rate in (0.5, 10, 20, 40, 50)]
    before = [change_by_60_pairs(rate, -10) for rate in (0.5, 10, 20, 40, 50)]
    assert after == pytest.approx([0.0, 0.13, 0.25, 0.53, 0.74], abs=0.02)
    assert before == pytest.approx([-0.31, -0.33, -0.35, 0.16, 0.73], abs=0.02)


@st.composite
def convolutions(draw):
    """Draw a convolution of one or two dimensions and a valid input size."""
    n_spatial = draw(st.integers(1, 2))
    groups = draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "circular", "reflect"]))

    def numbers(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(n_spatial))

    kernel, stride, dilation = numbers(1, 2), numbers(1, 2), numbers(1, 2)
    padding = draw(st.just("same")) if draw(st.booleans()) and set(stride) == {1} else numbers(0, 1)
    conv = (nn.Conv1d if n_spatial == 1 else nn.Conv2d)(
        groups * draw(st.integers(1, 2)), groups, kernel, stride, padding, dilation, groups, padding_mode=mode
    )
    return conv, numbers(3, 4)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(deadline=None, max_examples=40)
@given(case=convolutions(), T=st.integers(1, 4), N=st.integers(1, 2), triplets=st.booleans(), seed=st.integers(0, 999))
def test_the_change_of_a_convolution_is_the_sum_over_pairs_of_connected_inputs_and_outputs(case, T, N, triplets, seed):
    conv, size = case
    geometry = _geometry(conv)
    pre = random_spikes((T, N, conv.in_channels, *size), seed)
    post_shape = conv(pre.flatten(0, 1).float()).unflatten(0, (T, N)).shape
    assert tuple(post_shape[3:]) == geometry.output_size(size)
    post = random_spikes(post_shape, seed + 1)
    rule, constants = (triplet_stdp, TRIPLET) if triplets else (stdp, PAIR)
    potentiation, depression = brute_force(pre, post, constants, geometry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", 2)
        patch.setattr(chunked, "NUMBERS", 1)  # one row at a time
        delta, _ = rule(pre, post, geometry=geometry, **constants)
    assert delta.shape == conv.weight.shape
    assert torch.allclose(delta, potentiation - depression, atol=1e-12)
    single, _ = rule(pre.float(), post.float(), geometry=geometry, **constants)
    assert torch.allclose(single.double(), potentiation - depression, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(
    mu=st.sampled_from([0.0, 0.4, 1.0]),
    conv=st.booleans(),
    reward_kind=st.sampled_from(["one", "rows", "neurons"]),
    seed=st.integers(0, 999),
)
def test_rewards_of_rows_or_neurons_and_the_weight_multiply_each_contribution(mu, conv, reward_kind, seed):
    geometry = ConvGeometry((2,), (1,), ((1, 0),), (1,)) if conv else None
    pre = random_spikes((5, 3, 2, 4) if conv else (5, 3, 4), seed)
    post = random_spikes((5, 3, 3, 4) if conv else (5, 3, 3), seed + 1)
    generator = torch.Generator().manual_seed(seed)
    shape = {"one": (), "rows": (3,), "neurons": (3, 3)}[reward_kind]
    reward = torch.randn(shape, generator=generator, dtype=torch.float64)
    factor = reward.reshape(*reward.shape, *[1] * (2 - reward.ndim)).expand(3, 3)
    potentiation, depression = brute_force(pre, post, PAIR, geometry, factor)
    weight = torch.empty(potentiation.shape, dtype=torch.float64).uniform_(-1, 2, generator=generator)
    position_in_bounds = (weight + 0.3) / 1.3
    to_upper, to_lower = (1 - position_in_bounds).clamp(min=0), position_in_bounds.clamp(min=0)
    expected = to_upper**mu * potentiation - to_lower**mu * depression
    delta, state = reward_modulated_stdp(pre, post, reward, weight=weight, mu=mu, geometry=geometry, **PAIR)
    assert torch.allclose(delta, expected, atol=1e-12)
    assert state.eligibility is None


@settings(deadline=None, max_examples=25)
@given(T=st.integers(2, 8), tau=st.floats(0.5, 50), data=st.data(), seed=st.integers(0, 999))
def test_the_eligibility_decays_and_sequences_can_be_split(T, tau, data, seed):
    cut = data.draw(st.integers(1, T - 1))
    pre, post = random_spikes((T, 2, 3), seed), random_spikes((T, 2, 2), seed + 1)
    potentiation, depression = brute_force(pre, post, PAIR, factor_at=lambda t: math.exp(-(T - 1 - t) / tau))
    whole, state = reward_modulated_stdp(pre, post, -0.7, tau_eligibility=tau, **PAIR)
    assert torch.allclose(whole, -0.7 * (potentiation - depression), atol=1e-12)
    assert torch.allclose(state.eligibility, potentiation - depression, atol=1e-12)
    _, first_state = reward_modulated_stdp(pre[:cut], post[:cut], 3.0, tau_eligibility=tau, **PAIR)
    later, last = reward_modulated_stdp(pre[cut:], post[cut:], -0.7, first_state, tau_eligibility=tau, **PAIR)
    assert torch.allclose(later, whole, atol=1e-12)
    assert torch.allclose(last.eligibility, state.eligibility, atol=1e-12)


@pytest.mark.parametrize(("rule", "depression_name"), [(stdp, "a_minus"), (triplet_stdp, "a2_minus")])
def test_a_batch_is_the_sum_of_its_samples(rule, depression_name):
    pre, post = random_spikes((6, 300, 5), 0), random_spikes((6, 300, 4), 1)  # more than one chunk of rows
    alone = sum(rule(pre[:, n : n + 1], post[:, n : n + 1])[0] for n in range(300))
    assert torch.allclose(rule(pre, post)[0], alone, atol=1e-12)
    # Potentiation and depression can nearly cancel: the error is relative to the potentiation.
    error = (rule(pre.float(), post.float())[0] - alone).norm()
    assert error < 1e-6 * rule(pre, post, **{depression_name: 0.0})[0].norm()


@pytest.mark.quick
def test_multiplicative_changes_vanish_at_the_bounds_and_do_not_change_sign():
    pre, post = torch.ones(3, 1, 3), torch.ones(3, 1, 1)
    weight = torch.tensor([[1.0, 1.7, 0.35]])
    up, _ = stdp(pre, post, weight=weight, mu=1.0, a_minus=0.0)
    assert up[0, :2].tolist() == [0.0, 0.0]
    assert up[0, 2] == pytest.approx(0.5 * stdp(pre, post, a_minus=0.0)[0][0, 2].item())
    down, _ = stdp(pre, post, weight=torch.tensor([[-0.3, -1.0, 0.35]]), mu=1.0, a_plus=0.0)
    assert down[0, :2].tolist() == [0.0, 0.0]


def test_no_tensor_has_a_weight_change_for_each_row(monkeypatch):
    """One change for each of 4,096 rows would need 64 MB; no tensor is larger than the input of 2 MB."""
    pre, post = torch.ones(2, 4096, 64), torch.ones(2, 4096, 64)
    largest = 0

    class StorageSizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with StorageSizes():
        reward_modulated_stdp(pre, post, torch.randn(4096))
    assert largest <= pre.numel() * 4


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: stdp(x, y, mu=1.0), "weight must be passed if mu is above 0"),
        (lambda x, y: stdp(x, y, mu=-1.0), "mu must be at least 0"),
        (lambda x, y: stdp(x, y, mu=1.0, weight=torch.ones(4, 2)), r"weight must have shape \[2, 4\], got \[4, 2\]"),
        (lambda x, y: stdp(x, y, bounds=(1.0, 0.0)), "lower < upper"),
        (lambda x, y: triplet_stdp(x, y, tau_y=0.0), "time constants must be positive, got tau_y = 0.0"),
        (lambda x, y: reward_modulated_stdp(x, y, torch.ones(3)), r"have shape \[5\] \(rows\)"),
        (lambda x, y: reward_modulated_stdp(x, y, torch.ones(5), tau_eligibility=9.0), "must be one number"),
        (lambda x, y: reward_modulated_stdp(x, y, 1.0, tau_eligibility=-1.0), "time constants must be positive"),
        (
            lambda x, y: reward_modulated_stdp(
                x, y, 1.0, RewardSTDPState(x[0], y[0], torch.ones(4, 2)), tau_eligibility=9.0
            ),
            r"the shape of the weight, \[2, 4\]",
        ),
        (
            lambda x, y: stdp(x, y, geometry=ConvGeometry((2,), (1,), ((0, 0),), (1,))),
            r"pre \[T, N, C_in, \*\] and post \[T, N, C_out, \*\]",
        ),
        (
            lambda x, y: stdp(x[..., None], y[..., None], geometry=ConvGeometry((2,), (1,), ((1, 1),), (1,))),
            r"spatial size \[2\] of this convolution.*, got \[3, 5, 2, 1\]",
        ),
    ],
)
def test_bad_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 5, 4), torch.zeros(3, 5, 2))
