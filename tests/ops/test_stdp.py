"""Pair-based STDP: independent values, brute force over all pairs, direction in time."""

import math

import pytest
import torch
from helpers import load_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from nord_snn.ops import STDPState, reward_from_loss, stdp

CASES = load_reference("stdp")


@pytest.mark.parametrize("case", CASES)
def test_weight_change_and_rewards_are_the_expected_ones(case):
    constants = {name: case[name] for name in ("tau_plus", "tau_minus", "a_plus", "a_minus")}
    delta, _ = stdp(case["pre"][:, None], case["post"][:, None], **constants)
    assert torch.allclose(delta, case["delta_w"], atol=1e-6, rtol=0)
    for row in case["rewards"]:
        assert reward_from_loss(row["loss"], row["baseline"]) == pytest.approx(row["reward"], abs=1e-9)


def brute_force(pre, post, tau_plus, tau_minus, a_plus, a_minus):
    """Every pair of spikes by itself."""
    delta = torch.zeros(post.shape[-1], pre.shape[-1], dtype=torch.float64)
    for row in range(pre.shape[1]):
        for t_pre, j in pre[:, row].nonzero().tolist():
            for t_post, i in post[:, row].nonzero().tolist():
                if t_post >= t_pre:
                    delta[i, j] += a_plus * math.exp(-(t_post - t_pre) / tau_plus)
                if t_post <= t_pre:
                    delta[i, j] -= a_minus * math.exp(-(t_pre - t_post) / tau_minus)
    return delta


@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(1, 8),
    N=st.integers(1, 3),
    tau_plus=st.floats(0.5, 40),
    tau_minus=st.floats(0.5, 40),
    cut=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_against_all_pairs_and_cut_anywhere(T, N, tau_plus, tau_minus, cut, seed):
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


def test_pre_before_post_strengthens_and_the_reverse_weakens():
    early, late = torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1), torch.tensor([0.0, 0.0, 1.0]).reshape(3, 1, 1)
    assert stdp(early, late)[0].item() == pytest.approx(0.005 * math.exp(-2 / 20))
    assert stdp(late, early)[0].item() == pytest.approx(-0.005 * math.exp(-2 / 20))


def test_the_reward_is_positive_below_the_baseline():
    assert reward_from_loss(2.0, 3.0) > 0 > reward_from_loss(4.0, 3.0)
    assert reward_from_loss(3.0, 3.0) == 0
    assert -1 <= reward_from_loss(1e9, 0.0) < reward_from_loss(-1e9, 0.0) <= 1


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
def test_bad_input_is_named(pre, post, change, message):
    with pytest.raises(ValueError, match=message):
        stdp(torch.zeros(pre), torch.zeros(post), **change)
