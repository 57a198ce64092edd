"""The associative LIF op equals independently computed values and its equations, on PyTorch and Numba; bad input raises."""

import pytest
import torch
from helpers import load_reference, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from nord_snn.ops import SURROGATES, AssociativeLIFState, associative_lif, dispatch, which_backend
from nord_snn.ops.__main__ import table as backend_table

pytestmark = pytest.mark.quick

CASES = load_reference("neuron")
EPSILON = 1e-5  # spikes must be equal wherever |u - threshold| is larger


@pytest.fixture(params=["torch", "numba"])
def backend(request):
    """Run a test with the PyTorch reference and with the Numba kernel."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="the CPU kernels need Numba")
    return request.param


def run_case(case, backend, dtype=torch.float32):
    """Run the op on a case of ``tests/data/neuron.pt``; return the inputs that have gradients, and the outputs."""
    leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in case["params"].items()}
    leaves["x"] = case["x"].to(dtype, copy=True).requires_grad_()
    state = None
    if "initial_v" in case:
        leaves["initial_v"] = case["initial_v"].to(dtype, copy=True).requires_grad_()
        leaves["initial_i_syn"] = case["initial_i_syn"].to(dtype, copy=True).requires_grad_()
        state = AssociativeLIFState(leaves["initial_v"], leaves["initial_i_syn"], case["initial_refractory"])
    cascade = {}
    if case["hyper"]["n_clusters"] is not None:
        cascade = {
            "cascade_weight": leaves["neighbor_weights"].sigmoid(),
            "cascade_gain": leaves["cluster_gain"],
        }
    out = associative_lif(
        leaves["x"],
        state,
        threshold=leaves["threshold"],
        beta_mem=leaves["beta_mem_raw"].sigmoid(),
        beta_syn=leaves["beta_syn_raw"].sigmoid(),
        v_reset=case["hyper"]["v_reset"],
        refractory_steps=case["hyper"]["refractory_steps"],
        alpha=case["hyper"]["surrogate_alpha"],
        return_v_seq=True,
        backend=backend,
        **cascade,
    )
    return leaves, out


@pytest.mark.parametrize("case", CASES)
def test_spikes_membrane_potentials_and_states_equal_the_expected_values(case, backend):
    assert case["margin"] > EPSILON
    _, (spikes, v_seq, state) = run_case(case, backend)
    assert torch.equal(spikes, case["spikes"])
    assert torch.allclose(v_seq, case["v"], atol=1e-5, rtol=0)
    assert torch.allclose(state.v, case["final_v"], atol=1e-5, rtol=0)
    assert torch.allclose(state.i_syn, case["final_i_syn"], atol=1e-5, rtol=1e-6)
    assert torch.equal(state.refractory, case["final_refractory"])


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_expected_values(case, backend):
    leaves, (spikes, v_seq, _) = run_case(case, backend)
    ((spikes * case["grad_spikes"]).sum() + (v_seq * case["grad_v"]).sum()).backward()
    expected = dict(case["grads"], x=case["grad_x"])
    if "initial_v" in case:
        expected |= {"initial_v": case["grad_initial_v"], "initial_i_syn": case["grad_initial_i_syn"]}
    for name, gradient in expected.items():
        got = leaves[name].grad  # None if the output does not depend on it, as on the cascade with one time step
        assert relative_error(torch.zeros_like(gradient) if got is None else got, gradient) < 1e-4, name


def test_the_smooth_part_passes_gradcheck():
    """Below the threshold the function is smooth."""
    threshold = torch.full((4,), 50.0, dtype=torch.float64)
    state = AssociativeLIFState(*(torch.randn(3, 4, dtype=torch.float64) for _ in range(2)), torch.zeros(3, 4).int())

    def membranes(x, beta_mem, beta_syn, v, i_syn):
        out = associative_lif(
            x,
            AssociativeLIFState(v, i_syn, state.refractory),
            threshold=threshold,
            beta_mem=beta_mem,
            beta_syn=beta_syn,
            surrogate="sigmoid",
            alpha=0.0,  # no surrogate gradient
            return_v_seq=True,
        )
        return out[1], out[2].v, out[2].i_syn

    leaves = [torch.randn(5, 3, 4), torch.tensor([0.8]), torch.tensor([0.4]), state.v, state.i_syn]
    assert torch.autograd.gradcheck(membranes, [leaf.double().requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("name", SURROGATES)
def test_the_spiking_part_passes_gradcheck_with_the_surrogates_primitive(name):
    """With the primitive of the surrogate derivative as spike function, the backward pass is the exact gradient."""
    primitive = SURROGATES[name].primitive
    weight = torch.rand(2, 2, dtype=torch.float64).requires_grad_()
    gain = torch.rand(2, dtype=torch.float64).requires_grad_()
    x = torch.randn(4, 2, 4, dtype=torch.float64).requires_grad_()

    def run(x, weight, gain, fire, alpha):
        return associative_lif(
            x,
            threshold=torch.full((4,), 0.3, dtype=torch.float64),
            beta_mem=0.7,
            beta_syn=0.5,
            cascade_weight=weight,
            cascade_gain=gain,
            refractory_steps=0,
            surrogate=fire,
            alpha=alpha,
            return_v_seq=True,
        )[:2]

    smooth = lambda u: primitive(u, 4.0)  # noqa: E731
    assert torch.autograd.gradcheck(lambda *leaves: run(*leaves, smooth, 4.0), (x, weight, gain), atol=1e-4)
    if name == "nord_atan":  # with the step function the derivative of spikes is that of the primitive
        spikes, _ = run(x, weight, gain, name, 4.0)
        (grad,) = torch.autograd.grad(spikes[0].sum(), x)
        u = 0.3 * x[0].detach()
        assert torch.allclose(grad[0], SURROGATES[name].derivative(u - 0.3, 4.0) * 0.3)


def test_the_threshold_gradient_is_the_negative_membrane_gradient():
    x, threshold = torch.randn(1, 1, 3).requires_grad_(), torch.full((3,), 0.25).requires_grad_()
    spikes, _, _ = associative_lif(x, threshold=threshold, beta_mem=0.9, beta_syn=0.5)
    spikes.sum().backward()
    assert torch.allclose(threshold.grad, -x.grad[0, 0] / 0.1)  # du/dx = 1 - beta_mem


@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(1, 6),
    N=st.integers(0, 3),
    clusters=st.sampled_from([None, 1, 3]),
    refractory_steps=st.integers(0, 3),
    seed=st.integers(0, 999),
    cut=st.integers(0, 6),
)
def test_a_sequence_can_be_split_at_any_time_step(T, N, clusters, refractory_steps, seed, cut):
    """A call that continues from the returned state equals one call for the whole sequence; rows are independent."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(T, N, 6, generator=generator)
    arguments = {
        "threshold": torch.rand(6, generator=generator),
        "beta_mem": 0.8,
        "beta_syn": 0.5,
        "return_v_seq": True,
    }
    if clusters is not None:
        arguments |= {
            "cascade_weight": torch.rand(clusters, clusters, generator=generator),
            "cascade_gain": torch.ones(clusters),
        }
    whole = associative_lif(x, refractory_steps=refractory_steps, **arguments)
    cut = min(max(cut, 1), T)
    first = associative_lif(x[:cut], refractory_steps=refractory_steps, **arguments)
    if cut < T:
        second = associative_lif(x[cut:], first[2], refractory_steps=refractory_steps, **arguments)
        assert torch.equal(torch.cat((first[0], second[0])), whole[0])
        assert all(torch.equal(a, b) for a, b in zip(second[2], whole[2], strict=True))
    for row in range(N):
        alone = associative_lif(x[:, row : row + 1], refractory_steps=refractory_steps, **arguments)
        assert torch.allclose(alone[1], whole[1][:, row : row + 1], atol=1e-5)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_the_refractory_period_has_the_given_length(steps):
    x = torch.full((9, 1, 1), 100.0)
    spikes, v_seq, _ = associative_lif(
        x, threshold=torch.tensor([0.25]), beta_mem=0.9, beta_syn=0.5, refractory_steps=steps, return_v_seq=True
    )
    assert spikes.flatten().nonzero().flatten().tolist() == list(range(0, 9, steps + 1))
    assert (v_seq.flatten()[spikes.flatten() == 0] == -0.1).all()


def test_a_threshold_below_v_reset_fires_while_refractory():
    spikes, _, _ = associative_lif(
        torch.full((4, 1, 1), 9.0), threshold=torch.tensor([-0.2]), beta_mem=0.9, beta_syn=0.5
    )
    assert spikes.flatten().tolist() == [1, 1, 1, 1]


def test_the_cascade_acts_one_time_step_later_on_clusters_with_a_weight():
    """Only cluster 0 has input, and only cluster 1 receives its current: it fires one time step later, cluster 2 never."""
    x = torch.zeros(3, 1, 6)
    x[0, 0, [0, 3]] = 50.0
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    arguments = {"threshold": torch.full((6,), 0.25), "beta_mem": 0.9, "beta_syn": 0.5, "cascade_weight": weight}
    spikes, _, _ = associative_lif(x, cascade_gain=torch.full((3,), 9.0), **arguments)
    assert spikes[0, 0].tolist() == [1, 0, 0, 1, 0, 0]
    assert spikes[1, 0].tolist() == [0, 1, 0, 0, 1, 0]
    without_cascade, _, _ = associative_lif(x, cascade_gain=torch.zeros(3), **arguments)
    assert without_cascade[1:].sum() == 0


def test_the_cascade_has_a_gradient_without_spikes():
    gain = torch.ones(2).requires_grad_()
    x = torch.zeros(2, 1, 4).requires_grad_()
    spikes, _, state = associative_lif(
        x, threshold=torch.ones(4), beta_mem=0.9, beta_syn=0.5, cascade_weight=torch.ones(2, 2), cascade_gain=gain
    )
    assert spikes.sum() == 0
    state.i_syn.sum().backward()
    assert (x.grad[0] > 1.0 * 0.5).all()  # through the current, and through the surrogate derivative of the spike


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    x = torch.randn(6, 3, 8).to(dtype)
    arguments = {"threshold": torch.rand(8), "beta_mem": 0.9, "beta_syn": 0.5, "return_v_seq": True}
    spikes, v_seq, state = associative_lif(x, **arguments)
    spikes32, v_seq32, state32 = associative_lif(x.float(), **arguments)
    assert spikes.dtype == v_seq.dtype == dtype
    assert state.v.dtype == torch.float32
    assert torch.equal(spikes.float(), spikes32)
    assert torch.equal(v_seq, v_seq32.to(dtype))
    assert torch.equal(state.v, state32.v)


def test_autocast_has_no_effect():
    x = torch.randn(6, 3, 8)
    arguments = {
        "threshold": torch.rand(8),
        "beta_mem": 0.9,
        "beta_syn": 0.5,
        "cascade_weight": torch.rand(4, 4),
        "cascade_gain": torch.rand(4),
        "return_v_seq": True,
    }
    plain = associative_lif(x, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = associative_lif(x, **arguments)
    assert torch.equal(plain[1], cast[1])


def test_non_contiguous_input():
    x = torch.randn(3, 8, 6).transpose(0, 2)  # [6, 8, 3]
    arguments = {"threshold": torch.rand(3), "beta_mem": 0.9, "beta_syn": 0.5}
    assert torch.equal(associative_lif(x, **arguments)[0], associative_lif(x.contiguous(), **arguments)[0])


def test_which_backend_returns_the_backend_and_the_reasons_against_others():
    choice = which_backend(torch.zeros(1, 1, 1), backend="torch")
    assert choice.name == "torch"
    assert set(choice.others) == {"numba", "triton", "cupy"}
    assert "torch: runs" in str(choice)


def test_a_backend_that_cannot_run_raises_with_the_remedy(monkeypatch):
    x, arguments = torch.zeros(1, 1, 1), {"threshold": torch.ones(1), "beta_mem": 0.9, "beta_syn": 0.5}
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="it needs a CUDA GPU"):
            associative_lif(x, **arguments, backend="cupy")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        associative_lif(x, **arguments, backend="cuda")
    with monkeypatch.context() as patch:
        patch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
        patch.setattr(dispatch, "_choice_cache", {})
        dispatch._numba_available.cache_clear()
        assert which_backend(x).name == "torch"
        with pytest.raises(RuntimeError, match=r"Numba is not installed: pip install 'nord-snn\[cpu\]'"):
            associative_lif(x, **arguments, backend="numba")
    dispatch._numba_available.cache_clear()


def test_the_environment_variable_replaces_auto(monkeypatch):
    x = torch.zeros(1, 1, 1)
    monkeypatch.setenv("NORD_SNN_BACKEND", "torch")  # after the import: it is read when a backend is selected
    assert which_backend(x).name == "torch"
    monkeypatch.setenv("NORD_SNN_BACKEND", "fast")
    with pytest.raises(ValueError, match="unknown NORD_SNN_BACKEND=fast"):
        which_backend(x)


def test_the_table_of_python_m_nord_snn_ops_has_every_op_and_backend():
    ops, _, backends = backend_table().partition("\n\n")
    lines = {line.split()[0]: line.split()[1:] for line in ops.splitlines()}
    assert lines["op"] == ["torch", "numba", "cupy", "triton"]
    assert lines["associative_lif"] == ["yes"] * 4
    assert lines["stdp"] == ["yes", "-", "-", "-"]
    assert set(lines) == {"op", "associative_lif", "leaky_clamp", "resonance", "resonance_cached", "stdp"}
    lines = {line.split()[0]: line for line in backends.splitlines()}
    assert set(lines) == {"backend", "torch", "numba", "cupy", "triton"}
    assert "plain PyTorch" in lines["torch"]


def test_which_backend_works_for_every_op():
    x = torch.zeros(2, 3, 8)
    for op in ("associative_lif", "leaky_clamp", "resonance", "resonance_cached", "stdp"):
        assert which_backend(x, "torch", op=op).name == "torch"
    with pytest.raises(RuntimeError, match="nord-snn has no numba kernel for stdp"):
        which_backend(x, "numba", op="stdp")
    with pytest.raises(ValueError, match="unknown op 'lif': expected one of"):
        which_backend(x, op="lif")


VALID = {"threshold": torch.ones(6), "beta_mem": 0.9, "beta_syn": 0.5}


@pytest.mark.parametrize(
    ("x", "change", "message"),
    [
        (torch.zeros(2, 6), {}, r"\[T, N, D\] with D = 6, got \[2, 6\]"),
        (torch.zeros(2, 3, 5), {}, r"\[T, N, D\] with D = 6, got \[2, 3, 5\]"),
        (torch.zeros(0, 3, 6), {}, "at least one time step"),
        (torch.zeros(2, 3, 6), {"threshold": torch.ones(1, 6)}, r"threshold of shape \[D\]"),
        (torch.zeros(2, 3, 6), {"beta_mem": 1.0}, r"beta_mem must lie in \(0, 1\), got 1.0"),
        (torch.zeros(2, 3, 6), {"beta_syn": torch.ones(2)}, "beta_syn must have one element"),
        (torch.zeros(2, 3, 6), {"refractory_steps": -1}, "refractory_steps must be a whole number"),
        (torch.zeros(2, 3, 6), {"cascade_gain": torch.ones(3)}, "pass both cascade_weight and cascade_gain"),
        (
            torch.zeros(2, 3, 6),
            {"cascade_gain": torch.ones(4), "cascade_weight": torch.ones(4, 4)},
            "D must be a multiple of the number of clusters C, got D = 6 and C = 4",
        ),
        (
            torch.zeros(2, 3, 6),
            {"cascade_gain": torch.ones(3), "cascade_weight": torch.ones(2, 2)},
            r"cascade_weight must be \[C, C\] and cascade_gain \[C\] with one C",
        ),
        (
            torch.zeros(2, 3, 6),
            {"state": AssociativeLIFState(torch.zeros(3, 6), torch.zeros(2, 6), torch.zeros(3, 6))},
            r"state.i_syn must be \[N, D\] = \[3, 6\]",
        ),
        (torch.zeros(2, 3, 6), {"backend": "cuda"}, "unknown backend 'cuda'"),
        (torch.zeros(2, 3, 6), {"surrogate": "relu"}, "unknown surrogate 'relu'"),
    ],
)
def test_bad_input_raises(x, change, message):
    with pytest.raises(ValueError, match=message):
        associative_lif(x, **{**VALID, **change})


def test_integers_raise():
    with pytest.raises(TypeError, match="floating-point"):
        associative_lif(torch.zeros(2, 3, 6, dtype=torch.int64), **VALID)
    with pytest.raises(TypeError, match=r"expects x_seq, a floating-point tensor of shape"):
        associative_lif([[1.0]], **VALID)


def test_triton_on_a_cpu_tensor_raises_with_the_reason():
    """The reason is the device of the tensor, or the missing GPU."""
    reason = "these are on cpu" if torch.cuda.is_available() else "PyTorch finds none|without CUDA|is not installed"
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run associative_lif.*({reason})"):
        associative_lif(torch.zeros(2, 3, 6), backend="triton", **VALID)
