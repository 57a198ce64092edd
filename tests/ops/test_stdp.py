"""Pair-based STDP equals independently computed values and sums over all spike pairs; sign of the change; rewards."""

import math

import pytest
import torch
from helpers import load_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from nord_snn.ops import STDPState, reward_from_loss, stdp
from nord_snn.ops.plasticity import chunked_torch as chunked
from nord_snn.ops.plasticity.correlation import dense
from nord_snn.ops.plasticity.reference import Pairing, Traces, reference

CASES = load_reference("stdp")


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_weight_change_and_rewards_equal_the_expected_values(case):
    constants = {name: case[name] for name in ("tau_plus", "tau_minus", "a_plus", "a_minus")}
    delta, _ = stdp(case["pre"][:, None], case["post"][:, None], **constants)
    assert torch.allclose(delta, case["delta_w"], atol=1e-6, rtol=0)
    for row in case["rewards"]:
        assert reward_from_loss(row["loss"], row["baseline"]) == pytest.approx(row["reward"], abs=1e-9)


def brute_force(pre, post, tau_plus, tau_minus, a_plus, a_minus):
    """Return the weight change summed over every pair of spikes."""
    delta = torch.zeros(post.shape[-1], pre.shape[-1], dtype=torch.float64)
    for row in range(pre.shape[1]):
        for t_pre, j in pre[:, row].nonzero().tolist():
            for t_post, i in post[:, row].nonzero().tolist():
                if t_post >= t_pre:
                    delta[i, j] += a_plus * math.exp(-(t_post - t_pre) / tau_plus)
                if t_post <= t_pre:
                    delta[i, j] -= a_minus * math.exp(-(t_pre - t_post) / tau_minus)
    return delta


@pytest.mark.quick
@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(1, 8),
    N=st.integers(1, 3),
    tau_plus=st.floats(0.5, 40),
    tau_minus=st.floats(0.5, 40),
    cut=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_the_change_is_the_sum_over_all_spike_pairs_also_for_split_sequences(T, N, tau_plus, tau_minus, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    pre, post = ((torch.rand(T, N, n, generator=generator) < 0.4).double() for n in (5, 3))
    constants = {"tau_plus": tau_plus, "tau_minus": tau_minus, "a_plus": 0.005, "a_minus": 0.007}
    expected = brute_force(pre, post, **constants)
    delta, _ = stdp(pre, post, **constants)
    assert torch.allclose(delta, expected, atol=1e-12)
    if cut < T:
        first, state = stdp(pre[:cut], post[:cut], **constants)
        second, _ = stdp(pre[cut:], post[cut:], state, **constants)
        assert torch.allclose(first + second, expected, atol=1e-12)


def step_by_step(pre, post, state, tau_plus, tau_minus, a_plus, a_minus):
    """Return the weight change and the traces of the reference, which computes one time step after the other."""
    pairing = Pairing(math.exp(-1 / tau_plus), math.exp(-1 / tau_minus), a_plus, a_minus)
    potentiation, depression, last = reference(pre, post, Traces(*state), pairing, dense)
    return potentiation - depression, last


TINY = 1e-37  # smaller numbers of float32 are subnormal, with less precision


def close(actual, expected, tolerance):
    """Return whether the norm of the difference is within a tolerance relative to the expected value."""
    return (actual - expected).norm() <= tolerance * expected.norm() + TINY


@settings(deadline=None, max_examples=60)
@given(
    T=st.integers(1, 40),
    N=st.integers(0, 7),
    n_in=st.integers(1, 6),
    n_out=st.integers(1, 6),
    chunk=st.integers(1, 9),
    summands=st.integers(9, 30),
    tau_plus=st.floats(0.001, 1000),
    tau_minus=st.floats(0.001, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_computation_in_chunks_of_time_steps_and_rows_equals_the_reference(
    T, N, n_in, n_out, chunk, summands, tau_plus, tau_minus, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    pre, post = ((torch.rand(T, N, n, generator=generator) < 0.3).to(dtype) for n in (n_in, n_out))
    state = STDPState(*(torch.rand(N, n, generator=generator, dtype=dtype) for n in (n_in, n_out)))
    before = [x.clone() for x in (pre, post, *state)]
    constants = {"tau_plus": tau_plus, "tau_minus": tau_minus, "a_plus": 0.005, "a_minus": 0.003}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", chunk)
        patch.setattr(chunked, "SUMMANDS", summands)
        delta, last = stdp(pre, post, state, **constants)
    in_float64 = pre.double(), post.double(), STDPState(*(x.double() for x in state))
    exact = step_by_step(*in_float64, **constants)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert delta.dtype == last.pre.dtype == last.post.dtype == dtype
    # Potentiation and depression can nearly cancel: the error is relative to each of them.
    parts = [step_by_step(*in_float64, **{**constants, name: 0.0})[0].norm() for name in ("a_plus", "a_minus")]
    assert (delta - exact[0]).norm() <= tolerance * sum(parts) + TINY
    assert close(last.pre, exact[1].pre, tolerance)
    assert close(last.post, exact[1].post, tolerance)
    assert all(torch.equal(x, y) for x, y in zip(before, (pre, post, *state), strict=True))  # inputs are unchanged


@pytest.mark.parametrize("tau", [0.001, 20.0, 5000.0])
def test_long_sequences_do_not_overflow_or_lose_precision(tau):
    pre, post = ((torch.rand(1000, 2, n) < 0.2).float() for n in (5, 3))
    constants = {"tau_plus": tau, "tau_minus": tau, "a_plus": 0.005, "a_minus": 0.003}
    rest = STDPState(torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))
    exact, exact_last = step_by_step(pre.double(), post.double(), rest, **constants)
    delta, last = stdp(pre, post, **constants)
    assert close(delta, exact, 1e-6)
    assert close(last.pre, exact_last.pre, 1e-6)
    for cut in (1, 63, 64, 65, 999):
        first, state = stdp(pre[:cut], post[:cut], **constants)
        second, end = stdp(pre[cut:], post[cut:], state, **constants)
        assert close(first + second, exact, 1e-6)
        assert close(end.post, last.post, 1e-6)


def test_low_precision_and_bool_spikes_are_summed_in_float32():
    pre, post = torch.rand(300, 4, 5) < 0.4, torch.rand(300, 4, 3) < 0.4
    expected, _ = stdp(pre.float(), post.float())
    for dtype in (torch.bool, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            delta, state = stdp(pre.to(dtype), post.to(dtype))
        assert torch.equal(delta, expected)
        assert state.pre.dtype == torch.float32


@pytest.mark.quick
def test_pre_before_post_strengthens_and_the_reverse_weakens():
    early, late = torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1), torch.tensor([0.0, 0.0, 1.0]).reshape(3, 1, 1)
    assert stdp(early, late)[0].item() == pytest.approx(0.005 * math.exp(-2 / 20))
    assert stdp(late, early)[0].item() == pytest.approx(-0.005 * math.exp(-2 / 20))


@pytest.mark.quick
def test_the_reward_is_positive_below_the_baseline():
    assert reward_from_loss(2.0, 3.0) > 0 > reward_from_loss(4.0, 3.0)
    assert reward_from_loss(3.0, 3.0) == 0
    assert -1 <= reward_from_loss(1e9, 0.0) < reward_from_loss(-1e9, 0.0) <= 1


@pytest.mark.quick
@pytest.mark.parametrize(
    ("pre", "post", "change", "message"),
    [
        ((3, 4), (3, 2), {}, r"pre \[T, N, n_in\] and post \[T, N, n_out\]"),
        ((3, 1, 4), (2, 1, 2), {}, "the same T and N"),
        ((0, 1, 4), (0, 1, 2), {}, "at least one time step"),
        ((3, 1, 4), (3, 1, 2), {"tau_plus": 0.0}, "time constants must be positive"),
        ((3, 1, 4), (3, 1, 2), {"state": STDPState(torch.zeros(2, 4), torch.zeros(2, 2))}, "reset them"),
    ],
)
def test_bad_input_raises(pre, post, change, message):
    with pytest.raises(ValueError, match=message):
        stdp(torch.zeros(pre), torch.zeros(post), **change)
