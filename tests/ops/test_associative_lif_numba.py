"""The Numba kernels of the associative LIF op equal the reference: outputs, last state and every gradient."""

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

EPSILON = 1e-5  # spikes must be equal wherever |u - threshold| is larger


def leaves_for(T, N, D, clusters, with_state, dtype=torch.float32, seed=0):
    """Return the inputs of a call that have gradients, and the initial refractory counter."""
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
    """Run the op on these inputs."""
    leaves = dict(leaves)
    state = AssociativeLIFState(leaves.pop("v"), leaves.pop("i_syn"), refractory) if "v" in leaves else None
    return associative_lif(leaves.pop("x"), state, **leaves, backend=backend, **{"return_v_seq": True, **more})


def rows_away_from_threshold(leaves, refractory, **more):
    """Return the inputs of rows whose membrane potentials are never within EPSILON of the threshold, where rounding matters."""
    with torch.no_grad():
        spikes, v_seq, _ = run(leaves, refractory, "torch", **more)
        u = v_seq + spikes * leaves["threshold"]  # membrane potential before the reset
        far = ((u - leaves["threshold"]).abs() > EPSILON).all(-1).all(0)
    rows = {"x": lambda x: x[:, far], "v": lambda x: x[far], "i_syn": lambda x: x[far]}
    inputs = {name: rows.get(name, lambda x: x)(leaf.detach()).requires_grad_() for name, leaf in leaves.items()}
    assume(len(far) > 4 or far.any())  # of few rows all may be near the threshold, of many at most 60 %
    assert len(far) <= 4 or far.sum() >= 0.4 * len(far)
    return inputs, refractory[far]


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
        # The gradient of a decay is a sum over all rows and time steps whose terms can cancel: its error is relative to
        # the gradient of x.
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
def test_every_surrogate_equals_the_reference(surrogate, dtype):
    leaves, refractory = leaves_for(5, 3, 12, 4, True, dtype)
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    assert_equal(leaves, refractory, surrogate=surrogate, alpha=2.5)


@pytest.mark.quick
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_padding_of_the_last_vector_has_no_effect(surrogate):
    """Six neurons in a vector of sixteen; at u - threshold = -1 a surrogate derivative of the padding would divide by zero."""
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
    assert torch.equal(spikes.float(), expected)  # the spikes of the same values in float32
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
def test_gradients_of_each_single_output_equal_the_reference(part):
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


def test_non_contiguous_input_and_gradient_equal_the_reference():
    leaves, refractory = leaves_for(4, 5, 12, 3, True)
    leaves["x"] = torch.randn(12, 5, 4).permute(2, 1, 0).requires_grad_()  # [4, 5, 12] with ascending strides
    assert_equal(leaves, refractory)
    spikes, _, _ = run(leaves, refractory, "numba")
    weight = torch.randn(12, 5, 4).permute(2, 1, 0)
    (got,) = torch.autograd.grad(spikes, leaves["x"], weight)
    spikes, _, _ = run(leaves, refractory, "torch")
    (expected,) = torch.autograd.grad(spikes, leaves["x"], weight)
    assert relative_error(got, expected) < 1e-4


def test_under_a_dispatch_mode_the_op_is_called_through_the_dispatcher_with_equal_results():
    """Otherwise the kernel is called directly, which is faster; counters of operations need the dispatcher."""

    class NameRecorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    leaves, refractory = leaves_for(4, 5, 12, 3, True)
    results = []
    for mode in (NameRecorder(), contextlib.nullcontext()):
        with mode:
            spikes, v_seq, _ = run(leaves, refractory, "numba")
            results.append(torch.autograd.grad((spikes + v_seq).sum(), list(leaves.values())))
        if isinstance(mode, NameRecorder):
            assert "nord_snn.associative_lif.default" in mode.seen
            assert "nord_snn.associative_lif_backward.default" in mode.seen
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_one_and_two_threads_give_equal_spikes_states_and_gradients_of_the_input():
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
    primitive = SURROGATES["atan"].primitive
    with caplog.at_level(logging.INFO, logger="nord_snn"):
        for _ in range(2):
            associative_lif(
                x, threshold=torch.ones(6), beta_mem=0.9, beta_syn=0.5, surrogate=lambda u: primitive(u, 2.0)
            )
    (record,) = caplog.records  # the message is logged once
    assert "runs on 'torch'" in record.message
    assert "numba: it supports the surrogates" in record.message
    assert "got 'callable'" in record.message
    with pytest.raises(RuntimeError, match=r"backend 'numba' cannot run .* supports the surrogates .* got 'callable'"):
        associative_lif(x, threshold=torch.ones(6), beta_mem=0.9, beta_syn=0.5, surrogate=primitive, backend="numba")
