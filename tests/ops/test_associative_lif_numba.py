"""Tests of the Numba kernels against the reference: outputs, last state and every gradient."""

import contextlib
import logging

import pytest
import torch
from helpers import relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nord_snn.layers import NordBlock
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import SURROGATES, AssociativeLIFState, associative_lif, dispatch

pytest.importorskip("numba", reason="the CPU kernels need Numba: pip install 'nord-snn[cpu]'")

EPSILON = 1e-5  # spikes must agree wherever |u - threshold| is larger


def leaves_for(T, N, D, clusters, with_state, dtype=torch.float32, seed=0):
    """Return the inputs of a call as leaves with gradients, and the initial refractory counter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    leaves = {
        "x": normal(T, N, D),
        "threshold": 0.3 + 0.3 * torch.rand(D, generator=generator),
        "beta_mem": torch.tensor([0.8]),
        "beta_syn": torch.tensor([0.6]),
    }
    if clusters:
        leaves |= {
            "cascade_weight": torch.rand(clusters, clusters, generator=generator),
            "cascade_gain": normal(clusters),
        }
    if with_state:
        leaves |= {"v": normal(N, D) / 2, "i_syn": normal(N, D)}
    leaves = {name: leaf.to(dtype if name == "x" else torch.float32).requires_grad_() for name, leaf in leaves.items()}
    return leaves, torch.randint(0, 3, (N, D), generator=generator, dtype=torch.int32)


def run(leaves, refractory, backend, **more):
    """Run the op on these leaves."""
    leaves = dict(leaves)
    state = AssociativeLIFState(leaves.pop("v"), leaves.pop("i_syn"), refractory) if "v" in leaves else None
    return associative_lif(leaves.pop("x"), state, **leaves, backend=backend, **{"return_v_seq": True, **more})


def rows_away_from_threshold(leaves, refractory, **more):
    """Return the rows whose membrane potentials are never near the threshold, where rounding decides about a spike."""
    with torch.no_grad():
        spikes, v_seq, _ = run(leaves, refractory, "torch", **more)
        u = v_seq + spikes * leaves["threshold"]  # the membrane, with the threshold put back where it fired
        far = ((u - leaves["threshold"]).abs() > EPSILON).all(-1).all(0)
    rows = {"x": lambda x: x[:, far], "v": lambda x: x[far], "i_syn": lambda x: x[far]}
    kept = {name: rows.get(name, lambda x: x)(leaf.detach()).requires_grad_() for name, leaf in leaves.items()}
    assume(len(far) > 4 or far.any())  # of a few rows all may come near it, of many not most
    assert len(far) <= 4 or far.sum() >= 0.4 * len(far)
    return kept, refractory[far]


def assert_equal(leaves, refractory, **more):
    """Assert that outputs, last state and gradients of the kernel equal those of the reference."""
    torch.manual_seed(1)
    leaves, refractory = rows_away_from_threshold(leaves, refractory, **more)
    results, grads = {}, {}
    for backend in ("torch", "numba"):
        spikes, v_seq, state = run(leaves, refractory, backend, **more)
        results[backend] = (spikes, v_seq, *state)
    weights = [torch.randn(part.shape) for part in results["torch"][:4]]
    for name, got, expected in zip(
        ("spikes", "v_seq", "v", "i_syn", "refractory"), results["numba"], results["torch"], strict=True
    ):
        assert got.dtype == expected.dtype, name
        assert got.shape == expected.shape, name
        if name in ("spikes", "refractory"):
            assert torch.equal(got, expected), name
        else:
            assert torch.allclose(got, expected, atol=1e-5, rtol=1e-5), name
    for backend, parts in results.items():
        loss = sum((w * part).sum() for w, part in zip(weights, parts[:4], strict=True))
        grads[backend] = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for name, got, expected in zip(leaves, grads["numba"], grads["torch"], strict=True):
        expected = torch.zeros_like(got) if expected is None else expected
        assert got.dtype == expected.dtype, name
        # The gradient of a decay is one sum over everything, and may nearly cancel: it is as exact as its terms, which are
        # of the size of the gradient of x.
        scale = grads["torch"][0].norm() if name.startswith("beta") else torch.zeros(())
        assert (got - expected).norm() <= 1e-4 * torch.maximum(expected.norm(), scale), name


@pytest.mark.quick
@settings(deadline=None, max_examples=60)
@given(
    T=st.integers(1, 7),
    N=st.sampled_from([0, 1, 2, 5, 130]),
    width=st.sampled_from([(1, 1), (6, 3), (7, 7), (15, 5), (24, 2), (11, 0), (130, 13), (600, 8), (1100, 0)]),
    with_state=st.booleans(),
    refractory_steps=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_outputs_state_and_gradients_equal_the_reference(T, N, width, with_state, refractory_steps, seed):
    D, clusters = width
    leaves, refractory = leaves_for(T, N, D, clusters, with_state, seed=seed)
    assert_equal(leaves, refractory, refractory_steps=refractory_steps)


@pytest.mark.quick
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_surrogate_of_the_table(surrogate, dtype):
    leaves, refractory = leaves_for(5, 3, 12, 4, True, dtype)
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    assert_equal(leaves, refractory, surrogate=surrogate, alpha=2.5)


@pytest.mark.quick
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_padding_of_the_last_vector_has_no_effect(surrogate):
    """Use six neurons in a vector of sixteen; at a distance of exactly -1 an error in the padding would divide by zero."""
    leaves, refractory = leaves_for(5, 1, 6, 0, False)
    leaves["threshold"] = torch.ones(6).requires_grad_()
    assert_equal(leaves, refractory, surrogate=surrogate, v_reset=-1.0)
    leaves, refractory = leaves_for(5, 1, 600, 0, False)
    assert_equal(leaves, refractory, surrogate=surrogate, v_reset=-1.0)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    leaves, refractory = leaves_for(6, 9, 24, 4, True, dtype)
    wide = {name: leaf.detach().float().requires_grad_() for name, leaf in leaves.items()}
    spikes, v_seq, state = run(leaves, refractory, "numba")
    assert spikes.dtype == v_seq.dtype == dtype
    assert state.v.dtype == torch.float32
    expected, v_expected, _ = run(wide, refractory, "numba")
    assert torch.equal(spikes.float(), expected)  # the very spikes of the same values in float32
    assert torch.equal(v_seq, v_expected.to(dtype))
    spikes.float().sum().backward()
    expected.sum().backward()
    assert torch.equal(leaves["x"].grad, wide["x"].grad.to(dtype))
    assert torch.equal(leaves["threshold"].grad, wide["threshold"].grad)


def test_a_threshold_below_v_reset_fires_while_refractory():
    leaves, refractory = leaves_for(8, 3, 6, 3, True)
    leaves["threshold"] = torch.full((6,), -0.5).requires_grad_()
    assert_equal(leaves, refractory)


@pytest.mark.quick
@pytest.mark.parametrize("part", ["spikes", "v_seq", "v", "i_syn"])
def test_gradients_through_a_single_output(part):
    leaves, refractory = leaves_for(5, 4, 12, 3, True)
    index = ["spikes", "v_seq", "v", "i_syn"].index(part)
    grads = []
    for backend in ("torch", "numba"):
        spikes, v_seq, state = run(leaves, refractory, backend)
        out = (spikes, v_seq, *state)[index]
        grads.append(torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True))
    for name, expected, got in zip(leaves, *grads, strict=True):
        expected = torch.zeros_like(got) if expected is None else expected
        assert relative_error(got, expected) < 1e-4, name


def test_non_contiguous_input_and_gradient():
    leaves, refractory = leaves_for(4, 5, 12, 3, True)
    leaves["x"] = torch.randn(12, 5, 4).permute(2, 1, 0).requires_grad_()  # [4, 5, 12], strides the other way round
    assert_equal(leaves, refractory)
    spikes, _, _ = run(leaves, refractory, "numba")
    weight = torch.randn(12, 5, 4).permute(2, 1, 0)
    (got,) = torch.autograd.grad(spikes, leaves["x"], weight)
    spikes, _, _ = run(leaves, refractory, "torch")
    (expected,) = torch.autograd.grad(spikes, leaves["x"], weight)
    assert relative_error(got, expected) < 1e-4


def test_dispatch_modes_see_the_op_and_results_do_not_change():
    """Normally the kernel is called without the dispatcher, but a counter of operations must still see the op."""

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    leaves, refractory = leaves_for(4, 5, 12, 3, True)
    results = []
    for watch in (Names(), contextlib.nullcontext()):
        with watch:
            spikes, v_seq, _ = run(leaves, refractory, "numba")
            results.append(torch.autograd.grad((spikes + v_seq).sum(), list(leaves.values())))
        if isinstance(watch, Names):
            assert "nord_snn.associative_lif.default" in watch.seen
            assert "nord_snn.associative_lif_backward.default" in watch.seen
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_fewer_threads_change_only_the_order_of_sums():
    leaves, refractory = leaves_for(5, 200, 24, 4, False)
    x = leaves["x"]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            spikes, _, state = run(leaves, refractory, "numba")
            results.append((spikes, state.v, torch.autograd.grad(spikes.sum(), x)[0]))
        finally:
            torch.set_num_threads(2)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_a_block_compiles_without_a_graph_break_with_the_same_results():
    block = NordBlock(
        24, n_heads=2, hidden_features=48, top_k=3, recency=True, neuron=lambda n: AssociativeLIFNode(n, 4)
    )
    x = torch.randn(5, 2, 6, 24)
    expected = block(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    out = torch.compile(block, fullgraph=True)(x)
    assert torch.allclose(out, expected, atol=1e-5)
    out.square().sum().backward()
    for name, parameter in block.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < 1e-4, name


def test_a_user_surrogate_runs_on_the_reference_and_the_reason_is_logged(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch, "_choice_cache", {})
    x = torch.randn(3, 2, 6)
    own = SURROGATES["atan"].primitive
    with caplog.at_level(logging.INFO, logger="nord_snn"):
        for _ in range(2):
            associative_lif(x, threshold=torch.ones(6), beta_mem=0.9, beta_syn=0.5, surrogate=lambda u: own(u, 2.0))
    (record,) = caplog.records  # once, not at every call
    assert "runs on 'torch'" in record.message
    assert "numba: it supports the surrogates" in record.message
    assert "got 'callable'" in record.message
    with pytest.raises(RuntimeError, match=r"backend 'numba' cannot run .* supports the surrogates .* got 'callable'"):
        associative_lif(x, threshold=torch.ones(6), beta_mem=0.9, beta_syn=0.5, surrogate=own, backend="numba")
