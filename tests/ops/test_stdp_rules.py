"""Tests of every rule and geometry against brute force over all pairs and triplets of spikes, in float64."""

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


def two_trains(pre, post, at=None):
    """Return potentiation and depression of one synapse from all pairs and triplets of its spike times.

    ``at(t)`` is a factor for the changes at time step t, the time of the later spike of a pair.
    """
    at = at or (lambda t: 1.0)
    r = {"a3_plus": 0.0, "a3_minus": 0.0, "tau_x": 1.0, "tau_y": 1.0, **two_trains.constants}
    a2_plus, a2_minus = r.get("a2_plus", r.get("a_plus")), r.get("a2_minus", r.get("a_minus"))
    stronger = weaker = 0.0
    for t_pre, t_post in itertools.product(pre, post):
        if t_pre <= t_post:
            pair = math.exp(-(t_post - t_pre) / r["tau_plus"])
            before = sum(math.exp(-(t_post - t) / r["tau_y"]) for t in post if t < t_post)
            stronger += at(t_post) * pair * (a2_plus + r["a3_plus"] * before)
        if t_post <= t_pre:
            pair = math.exp(-(t_pre - t_post) / r["tau_minus"])
            before = sum(math.exp(-(t_pre - t) / r["tau_x"]) for t in pre if t < t_pre)
            weaker += at(t_pre) * pair * (a2_minus + r["a3_minus"] * before)
    return stronger, weaker


def brute_force(pre, post, constants, geometry=None, factor=None, at=None):
    """Return ``(stronger, weaker)`` in the shape of the weight. ``factor [N, n_out]`` scales each row and neuron."""
    two_trains.constants = constants
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
                    there = tuple(p * stride + k * dilation for p, stride, k, dilation in steps)
                    taps.append((o, (i, *tap), o, channel, place, there))
    sums = torch.zeros(2, *shape, dtype=torch.float64)
    for row in range(n_rows):
        for o, i, out, channel, place, there in taps:
            late = times(post[(slice(None), row, out, *place)])
            early = times(pre[(slice(None), row, channel, *there)])
            index = (o, *i) if isinstance(i, tuple) else (o, i)
            for k, part in enumerate(two_trains(early, late, at)):
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
def test_all_triplets_by_brute_force_also_for_split_sequences(T, N, cut, chunk, seed):
    pre, post = random_spikes((T, N, 3), seed, 0.6), random_spikes((T, N, 2), seed + 1, 0.6)
    stronger, weaker = brute_force(pre, post, TRIPLET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", chunk)
        delta, _ = triplet_stdp(pre, post, **TRIPLET)
        assert torch.allclose(delta, stronger - weaker, atol=1e-12)
        if cut < T:
            first, state = triplet_stdp(pre[:cut], post[:cut], **TRIPLET)
            second, _ = triplet_stdp(pre[cut:], post[cut:], state, **TRIPLET)
            assert torch.allclose(first + second, stronger - weaker, atol=1e-12)


@pytest.mark.quick
def test_without_triplet_terms_it_equals_the_pair_rule():
    pre, post = random_spikes((9, 4, 5), 0), random_spikes((9, 4, 3), 1)
    pairs = {**TRIPLET, "a3_plus": 0.0, "a3_minus": 0.0}
    assert torch.equal(triplet_stdp(pre, post, **pairs)[0], stdp(pre, post, **PAIR)[0])


def paired_at(rate, lag, n_pairs=60):
    """Return the change by 60 pairs at a rate in Hz, with post ``lag`` ms after pre, in time steps of 1 ms."""
    period = round(1000 / rate)
    T = period * n_pairs + 40
    pre, post = torch.zeros(T, 1, 1, dtype=torch.float64), torch.zeros(T, 1, 1, dtype=torch.float64)
    pre[20 : 20 + period * n_pairs : period] = 1
    post[20 + lag : 20 + lag + period * n_pairs : period] = 1
    return triplet_stdp(pre, post)[0].item()


def test_the_same_pairs_weaken_at_low_rates_and_strengthen_at_high_ones():
    """Sjostrom et al. 2001 measured this in visual cortex; the pair rule cannot reproduce it (figure 2 of the paper)."""
    after = [paired_at(rate, 10) for rate in (0.5, 10, 20, 40, 50)]
    before = [paired_at(rate, -10) for rate in (0.5, 10, 20, 40, 50)]
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
def test_convolutions_pair_connected_inputs_and_outputs(case, T, N, triplets, seed):
    conv, size = case
    geometry = _geometry(conv)
    pre = random_spikes((T, N, conv.in_channels, *size), seed)
    post_shape = conv(pre.flatten(0, 1).float()).unflatten(0, (T, N)).shape
    assert tuple(post_shape[3:]) == geometry.output_size(size)
    post = random_spikes(post_shape, seed + 1)
    rule, constants = (triplet_stdp, TRIPLET) if triplets else (stdp, PAIR)
    stronger, weaker = brute_force(pre, post, constants, geometry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", 2)
        patch.setattr(chunked, "NUMBERS", 1)  # one row at a time
        delta, _ = rule(pre, post, geometry=geometry, **constants)
    assert delta.shape == conv.weight.shape
    assert torch.allclose(delta, stronger - weaker, atol=1e-12)
    single, _ = rule(pre.float(), post.float(), geometry=geometry, **constants)
    assert torch.allclose(single.double(), stronger - weaker, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(
    mu=st.sampled_from([0.0, 0.4, 1.0]),
    conv=st.booleans(),
    kind=st.sampled_from(["one", "rows", "neurons"]),
    seed=st.integers(0, 999),
)
def test_rewards_of_rows_and_neurons_and_the_weight_scale_each_contribution(mu, conv, kind, seed):
    geometry = ConvGeometry((2,), (1,), ((1, 0),), (1,)) if conv else None
    pre = random_spikes((5, 3, 2, 4) if conv else (5, 3, 4), seed)
    post = random_spikes((5, 3, 3, 4) if conv else (5, 3, 3), seed + 1)
    generator = torch.Generator().manual_seed(seed)
    shape = {"one": (), "rows": (3,), "neurons": (3, 3)}[kind]
    reward = torch.randn(shape, generator=generator, dtype=torch.float64)
    factor = reward.reshape(*reward.shape, *[1] * (2 - reward.ndim)).expand(3, 3)
    stronger, weaker = brute_force(pre, post, PAIR, geometry, factor)
    weight = torch.empty(stronger.shape, dtype=torch.float64).uniform_(-1, 2, generator=generator)
    place = (weight + 0.3) / 1.3
    expected = (1 - place).clamp(min=0) ** mu * stronger - place.clamp(min=0) ** mu * weaker
    delta, state = reward_modulated_stdp(pre, post, reward, weight=weight, mu=mu, geometry=geometry, **PAIR)
    assert torch.allclose(delta, expected, atol=1e-12)
    assert state.eligibility is None


@settings(deadline=None, max_examples=25)
@given(T=st.integers(2, 8), tau=st.floats(0.5, 50), data=st.data(), seed=st.integers(0, 999))
def test_the_eligibility_decays_and_sequences_can_be_split(T, tau, data, seed):
    cut = data.draw(st.integers(1, T - 1))
    pre, post = random_spikes((T, 2, 3), seed), random_spikes((T, 2, 2), seed + 1)
    stronger, weaker = brute_force(pre, post, PAIR, at=lambda t: math.exp(-(T - 1 - t) / tau))
    whole, state = reward_modulated_stdp(pre, post, -0.7, tau_eligibility=tau, **PAIR)
    assert torch.allclose(whole, -0.7 * (stronger - weaker), atol=1e-12)
    assert torch.allclose(state.eligibility, stronger - weaker, atol=1e-12)
    _, held = reward_modulated_stdp(pre[:cut], post[:cut], 3.0, tau_eligibility=tau, **PAIR)
    later, last = reward_modulated_stdp(pre[cut:], post[cut:], -0.7, held, tau_eligibility=tau, **PAIR)
    assert torch.allclose(later, whole, atol=1e-12)
    assert torch.allclose(last.eligibility, state.eligibility, atol=1e-12)


@pytest.mark.parametrize(("rule", "weakens"), [(stdp, "a_minus"), (triplet_stdp, "a2_minus")])
def test_a_batch_is_the_sum_of_its_samples(rule, weakens):
    pre, post = random_spikes((6, 300, 5), 0), random_spikes((6, 300, 4), 1)  # more than one chunk of rows
    alone = sum(rule(pre[:, n : n + 1], post[:, n : n + 1])[0] for n in range(300))
    assert torch.allclose(rule(pre, post)[0], alone, atol=1e-12)
    # Potentiation and depression can nearly cancel; only each of them is exact in float32.
    error = (rule(pre.float(), post.float())[0] - alone).norm()
    assert error < 1e-6 * rule(pre, post, **{weakens: 0.0})[0].norm()


@pytest.mark.quick
def test_multiplicative_changes_vanish_at_the_bounds_and_do_not_change_sign():
    pre, post = torch.ones(3, 1, 3), torch.ones(3, 1, 1)
    weight = torch.tensor([[1.0, 1.7, 0.35]])
    up, _ = stdp(pre, post, weight=weight, mu=1.0, a_minus=0.0)
    assert up[0, :2].tolist() == [0.0, 0.0]
    assert up[0, 2] == pytest.approx(0.5 * stdp(pre, post, a_minus=0.0)[0][0, 2].item())
    down, _ = stdp(pre, post, weight=torch.tensor([[-0.3, -1.0, 0.35]]), mu=1.0, a_plus=0.0)
    assert down[0, :2].tolist() == [0.0, 0.0]


def test_memory_does_not_grow_by_one_change_per_row(monkeypatch):
    """One change per row of 4,096 rows of 64 x 64 would need 64 MB; the largest tensor created has the size of the input."""
    pre, post = torch.ones(2, 4096, 64), torch.ones(2, 4096, 64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
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
