"""``associative_lif`` with other ``Dynamics`` than the published neuron, a decay for each neuron, and channels first."""

import pytest
import torch
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from nord_snn.ops import AssociativeLIFState, Dynamics, associative_lif
from nord_snn.ops.lif.reference import CHARGES

pytest.importorskip("numba", reason="the CPU kernels need Numba")

DYNAMICS = st.builds(
    Dynamics,
    charge=st.sampled_from(CHARGES),
    tau=st.sampled_from([1.0, 1.7, 2.0, float("inf")]),
    v_rest=st.sampled_from([0.0, -0.3]),
    hard_reset=st.booleans(),
    reset_scale=st.sampled_from([1.0, 1.3]),
    detach_reset=st.booleans(),
)


def random(*shape, low=0.0, high=1.0):
    """Return uniform random numbers in float64."""
    return torch.rand(shape, dtype=torch.float64) * (high - low) + low


def make(shape, n_clusters, own_decays):
    """Return the inputs that have gradients, and refractory counters; in float64 no membrane potential is near its threshold."""
    D, size = shape[2], shape[2] if own_decays else 1
    leaves = {
        "x": torch.randn(shape, dtype=torch.float64),
        "v": random(*shape[1:], low=-0.2, high=0.2),
        "i_syn": random(*shape[1:], low=-0.2, high=0.2),
        "threshold": random(D, low=0.1, high=0.5),
        "beta_mem": random(size, low=0.3, high=0.8),
        "beta_syn": random(size, low=0.2, high=0.7),
    }
    if n_clusters:
        leaves |= {"cascade_weight": random(n_clusters, n_clusters), "cascade_gain": random(n_clusters)}
    return leaves, torch.randint(0, 3, shape[1:], dtype=torch.int32)


def run(leaves, refractory, dynamics, backend, **options):
    """Return outputs, and gradients of a sum of the outputs with fixed random weights."""
    inputs = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    arguments = dict(inputs)
    x, v, i_syn = (arguments.pop(name) for name in ("x", "v", "i_syn"))
    if dynamics.charge in ("relax", "leak"):
        del arguments["beta_mem"]
    spikes, v_seq, last = associative_lif(
        x,
        AssociativeLIFState(v, i_syn, refractory),
        **arguments,
        dynamics=dynamics,
        surrogate="sigmoid",
        return_v_seq=True,
        backend=backend,
        channels_first=x.ndim == 4,
        **options,
    )
    outputs = (spikes, v_seq, last.v, last.i_syn)
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.rand(y.shape, dtype=y.dtype, generator=generator)).sum() for y in outputs)
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return [y.detach() for y in (*outputs, last.refractory)], dict(zip(inputs, gradients, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(5, 3, 6), (4, 2, 5, 7), (3, 2, 3, 600), (4, 30, 700), (4, 3, 8, 1), (2, 2, 70, 33)]),
    dynamics=DYNAMICS,
    own_decays=st.booleans(),
    with_cascade=st.booleans(),
    refractory_steps=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_the_kernels_equal_the_reference(shape, dynamics, own_decays, with_cascade, refractory_steps, seed):
    torch.manual_seed(seed)
    n_clusters = next(c for c in (7, 5, 3, 2) if shape[2] % c == 0) if with_cascade else 0
    leaves, refractory = make(shape, n_clusters, own_decays)
    results = [
        run(leaves, refractory, dynamics, backend, refractory_steps=refractory_steps) for backend in ("torch", "numba")
    ]
    (expected, gradients), (got, got_gradients) = results
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[-1], expected[-1])
    for x, y in zip(got, expected, strict=True):
        assert torch.allclose(x, y, atol=1e-12)
    for name, gradient in gradients.items():
        assert got_gradients[name].shape == gradient.shape
        assert relative_error(got_gradients[name], gradient) < 1e-9 or gradient.norm() < 1e-9, name


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("n_clusters", [None, 2])
def test_channels_first_equals_channels_last_of_the_transposed_input(backend, n_clusters):
    torch.manual_seed(0)
    leaves, _ = make((5, 2, 4, 3), n_clusters, own_decays=True)
    x, parameters = leaves["x"], {name: y for name, y in leaves.items() if name not in ("x", "v", "i_syn")}
    channels_first, _, state = associative_lif(x, **parameters, channels_first=True, backend=backend)
    channels_last, _, expected = associative_lif(x.movedim(2, 3).flatten(1, 2), **parameters, backend=backend)
    assert torch.equal(channels_first, channels_last.unflatten(1, (2, 3)).movedim(3, 2))
    assert channels_first.is_contiguous()
    for got, part in zip(state, expected, strict=True):
        assert torch.equal(got, part.unflatten(0, (2, 3)).movedim(2, 1))


@pytest.mark.parametrize("charge", ["average", "sum"])
def test_charges_with_tau_equal_those_with_a_decay_up_to_rounding(charge):
    torch.manual_seed(0)
    x, threshold = torch.randn(20, 3, 5, dtype=torch.float64), random(5, low=0.2, high=0.6)
    common = {"threshold": threshold, "beta_syn": 0.4, "return_v_seq": True}
    dynamics = Dynamics({"average": "relax", "sum": "leak"}[charge], tau=4.0, v_rest=-0.2)
    _, with_tau, _ = associative_lif(x, dynamics=dynamics, **common)
    _, with_decay, _ = associative_lif(x, beta_mem=0.75, dynamics=Dynamics(charge, v_rest=-0.2), **common)
    assert torch.allclose(with_tau, with_decay, atol=1e-12)


def test_without_synaptic_decay_the_current_is_the_input():
    x = torch.randn(4, 2, 3)
    _, _, state = associative_lif(x, threshold=torch.full((3,), 9.0), beta_mem=0.5, beta_syn=0.0)
    assert torch.equal(state.i_syn, x[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamics": Dynamics("sums")}, "unknown charge 'sums': expected one of"),
        ({"dynamics": Dynamics("relax", tau=0.5), "beta_mem": None}, "'relax' needs tau >= 1 time steps, got 0.5"),
        ({"dynamics": Dynamics("leak", tau=2.0)}, "'leak' has tau instead of beta_mem: do not pass beta_mem"),
        ({"beta_mem": None}, "'average' needs beta_mem"),
        ({"beta_mem": 1.0}, r"beta_mem must lie in \(0, 1\), got 1.0"),
        ({"beta_syn": 1.0}, r"beta_syn must lie in \[0, 1\), got 1.0"),
        ({"beta_mem": torch.rand(2)}, r"beta_mem must have one element or shape \[D\] = \[4\], got \[2\]"),
        ({"channels_first": True}, r"expects x_seq of shape \[T, N, D, M\] with T >= 1 and D = 4, got \[2, 3, 4\]"),
    ],
)
def test_bad_input_raises(options, message):
    arguments = {"threshold": torch.ones(4), "beta_mem": 0.5, "beta_syn": 0.5} | options
    with pytest.raises(ValueError, match=message):
        associative_lif(torch.randn(2, 3, 4), **arguments)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("shape", [(5, 3, 20), (4, 2, 6, 9)], ids=["features last", "channels first"])
def test_membrane_only_gives_equal_results_for_neurons_without_other_state(backend, shape):
    torch.manual_seed(0)
    D = shape[2]
    x = torch.randn(shape, requires_grad=True)
    threshold, beta_mem = torch.rand(D, requires_grad=True), torch.tensor([0.7], requires_grad=True)
    v = torch.randn(shape[1:], requires_grad=True)

    def run(membrane_only):
        zeros = torch.zeros(shape[1:])
        other_states = (None, None) if membrane_only else (zeros, zeros.to(torch.int32))
        spikes, v_seq, last = associative_lif(
            x, AssociativeLIFState(v, *other_states), threshold=threshold, beta_mem=beta_mem, beta_syn=0.0, v_reset=0.0,
            refractory_steps=0, channels_first=len(shape) == 4, membrane_only=membrane_only, return_v_seq=True,
            backend=backend,
        )  # fmt: skip
        loss = (spikes * torch.randn(shape, generator=torch.Generator().manual_seed(1))).sum() + v_seq.sin().sum()
        gradients = torch.autograd.grad(loss + last.v.cos().sum(), [x, v, threshold, beta_mem])
        return [spikes, v_seq, last.v, *gradients], last

    (expected, full_state), (result, membrane_state) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert membrane_state.i_syn is None
    assert membrane_state.refractory is None
    assert full_state.i_syn is not None


@pytest.mark.parametrize("more", [{"beta_syn": 0.5}, {"refractory_steps": 1}])
def test_membrane_only_raises_for_neurons_with_other_state(more):
    constants = {"beta_syn": 0.0, "refractory_steps": 0} | more
    with pytest.raises(ValueError, match="membrane_only is for neurons whose state is the membrane potential"):
        associative_lif(torch.rand(2, 3, 4), threshold=torch.ones(4), beta_mem=0.5, membrane_only=True, **constants)
    with pytest.raises(ValueError, match=r"state.i_syn must be \[N, D\] = \[3, 4\] for this input, got None"):
        associative_lif(
            torch.rand(2, 3, 4), AssociativeLIFState(torch.zeros(3, 4), None, None), threshold=torch.ones(4),
            beta_mem=0.5, beta_syn=0.5,
        )  # fmt: skip


@pytest.mark.parametrize("membrane_only", [False, True])
@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 0, 5, 4), (3, 2, 5, 0)])
def test_without_rows_gradients_are_empty_or_zero(membrane_only, shape):
    x, threshold = torch.rand(shape, requires_grad=True), torch.ones(5, requires_grad=True)
    spikes, _, _ = associative_lif(
        x, threshold=threshold, beta_mem=0.5, beta_syn=0.0, refractory_steps=0, channels_first=len(shape) == 4,
        membrane_only=membrane_only, backend="numba",
    )  # fmt: skip
    spikes.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(threshold.grad, torch.zeros(5))


def test_kernels_run_on_the_cpu_also_under_another_default_device():
    x, threshold = torch.rand(2, 3, 4, requires_grad=True), torch.ones(4)
    with torch.device("meta"):
        spikes, _, _ = associative_lif(x, threshold=threshold, beta_mem=0.5, beta_syn=0.5, backend="numba")
        spikes.sum().backward()
    assert spikes.device.type == "cpu"
    assert x.grad.device.type == "cpu"


def test_membrane_only_raises_for_a_state_with_other_parts():
    zeros = torch.zeros(3, 4)
    state = AssociativeLIFState(zeros, zeros, torch.full((3, 4), 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"with membrane_only state\.i_syn must be None, got"):
        associative_lif(
            torch.rand(2, 3, 4), state, threshold=torch.ones(4), beta_mem=0.5, beta_syn=0.0, refractory_steps=0,
            membrane_only=True,
        )  # fmt: skip
