"""Temporal co-firing resonance: independent values, ties, causality, recency, gradients."""

import pytest
import torch
from helpers import load_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from nord_snn.ops import resonance
from nord_snn.ops.resonance.reference import coincidences, keep_best, resonance_scores

CASES = load_reference("resonance")


@pytest.mark.parametrize("case", CASES)
def test_counts_kept_keys_and_context_are_the_expected_ones(case):
    q, k = case["q"].float(), case["k"].float()
    counts = coincidences(q, k, case["n_heads"])
    assert torch.equal(counts.int(), case["counts"])
    scores = resonance_scores(counts, case["temperature"], case["recency"], causal=True)
    assert torch.equal(keep_best(scores, case["top_k"]) & ~scores.isinf(), case["kept"])
    arguments = {name: case[name] for name in ("n_heads", "top_k", "temperature", "recency")}
    context = resonance(case["q"], case["k"], case["v"], **arguments)
    assert torch.allclose(context, case["context"], atol=1e-5, rtol=0)


def spikes(*shape, rate=0.3):
    return (torch.rand(*shape) < rate).float()


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 9), top_k=st.integers(1, 9), values=st.integers(1, 4), seed=st.integers(0, 999))
def test_among_equals_the_most_recent_wins(n, top_k, values, seed):
    """Against sorting by (score, position), for rows full of ties."""
    scores = torch.randint(values, (n,), generator=torch.Generator().manual_seed(seed)).float()
    best = sorted(range(n), key=lambda b: (scores[b].item(), b), reverse=True)[:top_k]
    assert keep_best(scores, top_k).nonzero().flatten().tolist() == sorted(best)


def test_silence_binds_to_the_most_recent_positions():
    """Nothing fires, every score is 0: the top_k keys are the last ones, each with the same weight."""
    v = torch.arange(5.0).reshape(1, 5, 1)
    context = resonance(torch.zeros(2, 1, 5, 1), torch.zeros(2, 1, 5, 1), v, n_heads=1, top_k=2, temperature=1.0)
    assert context.flatten().tolist() == [0.0, 0.5, 1.5, 2.5, 3.5]


def test_a_later_position_never_changes_an_earlier_one():
    q, k, v = spikes(4, 2, 7, 8), spikes(4, 2, 7, 8), torch.randn(2, 7, 8)
    arguments = {"n_heads": 2, "top_k": 3, "temperature": 0.4}
    before = resonance(q, k, v, **arguments)
    for changed in (q, k):
        changed[:, :, 5:] = 1 - changed[:, :, 5:]
    v[:, 5:] += 9
    after = resonance(q, k, v, **arguments)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])
    open_before = resonance(q, k, v, causal=False, **arguments)
    v[:, 5:] += 9
    assert not torch.equal(open_before[:, :5], resonance(q, k, v, causal=False, **arguments)[:, :5])


def test_a_negative_temperature_prefers_the_least_coincident():
    q = torch.ones(1, 1, 3, 2)
    k = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]).reshape(1, 1, 3, 2)  # position 1 coincides with nothing
    v = torch.eye(3)[None, :, :2]
    for temperature, best in ((1.0, 0), (-1.0, 1)):
        context = resonance(q, k, v, n_heads=1, top_k=1, temperature=temperature)
        assert context[0, 2].argmax().item() == best


def test_recency_prefers_what_is_near():
    q = k = torch.ones(1, 1, 4, 2)
    v = torch.eye(4)[None, :, :2].repeat(1, 1, 1)
    flat = resonance(q, k, v, n_heads=2, top_k=4, temperature=1.0)
    sloped = resonance(q, k, v, n_heads=2, top_k=4, temperature=1.0, recency=torch.tensor([0.0, 2.0]))
    assert torch.allclose(flat[..., 0], sloped[..., 0])  # head 0 has no slope
    assert (sloped[0, 2:, 1] < flat[0, 2:, 1]).all()  # head 1 hears less of position 1, the farther the less


def test_heads_do_not_mix():
    q, k, v = spikes(3, 1, 5, 6), spikes(3, 1, 5, 6), torch.randn(1, 5, 6)
    together = resonance(q, k, v, n_heads=2, top_k=3, temperature=0.5)
    alone = [
        resonance(q[..., c], k[..., c], v[..., c], n_heads=1, top_k=3, temperature=0.5) for c in (slice(3), slice(3, 6))
    ]
    assert torch.equal(together, torch.cat(alone, -1))


def test_gradients_of_what_is_smooth():
    """With the kept keys fixed (top_k = S), everything is smooth in q, k, v, temperature and recency."""
    q, k = spikes(3, 1, 4, 4).double().requires_grad_(), spikes(3, 1, 4, 4).double().requires_grad_()
    v = torch.randn(1, 4, 4, dtype=torch.float64).requires_grad_()
    temperature = torch.tensor([0.5], dtype=torch.float64).requires_grad_()
    recency = torch.tensor([0.3, 0.1], dtype=torch.float64).requires_grad_()

    def run(q, k, v, temperature, recency):
        return resonance(q, k, v, n_heads=2, top_k=4, temperature=temperature, recency=recency)

    assert torch.autograd.gradcheck(run, (q, k, v, temperature, recency))


def test_counts_are_exact_under_autocast():
    """More than 256 coincidences: bfloat16 could not count them."""
    q = k = torch.ones(40, 1, 2, 16)
    k = k.clone()
    k[0, 0, 0, 0] = 0  # 639 against 640
    v = torch.tensor([[[1.0] * 16, [2.0] * 16]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = resonance(q, k, v, n_heads=1, top_k=1, temperature=-1.0)
    assert (context[0, 1] == 1.0).all()


@pytest.mark.parametrize(
    ("shapes", "change", "message"),
    [
        (((2, 1, 3), (2, 1, 3), (1, 3)), {}, r"one shape \[T, B, S, D\]"),
        (((2, 1, 3, 4), (2, 1, 2, 4), (1, 3, 4)), {}, r"one shape \[T, B, S, D\]"),
        (((2, 1, 3, 4), (2, 1, 3, 4), (1, 3, 5)), {}, r"v of shape \[B, S, D\] = \[1, 3, 4\]"),
        (((2, 1, 3, 4), (2, 1, 3, 4), (1, 3, 4)), {"n_heads": 3}, "D = 4 and H = 3"),
        (((0, 1, 3, 4), (0, 1, 3, 4), (1, 3, 4)), {}, "at least one time step"),
        (((2, 1, 3, 4), (2, 1, 3, 4), (1, 3, 4)), {"temperature": torch.ones(3)}, "temperature must have one element"),
        (((2, 1, 3, 4), (2, 1, 3, 4), (1, 3, 4)), {"top_k": 0}, "top_k must be at least 1"),
        (((2, 1, 3, 4), (2, 1, 3, 4), (1, 3, 4)), {"recency": torch.ones(3)}, r"recency must have shape \[H\] = \[2\]"),
    ],
)
def test_bad_input_is_named(shapes, change, message):
    arguments = {"n_heads": 2, "top_k": 2, "temperature": 1.0} | change
    with pytest.raises(ValueError, match=message):
        resonance(*(torch.zeros(shape) for shape in shapes), **arguments)
