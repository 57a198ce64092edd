"""The resonance op equals independently computed values and its reference; ties, causality, recency, gradients, memory."""

import weakref

import pytest
import torch
from helpers import load_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nord_snn.ops import resonance
from nord_snn.ops.topk_resonance import blockwise_torch as blockwise
from nord_snn.ops.topk_resonance.op import IMPLEMENTATIONS
from nord_snn.ops.topk_resonance.reference import coincidences, keep_best, reference, resonance_scores
from nord_snn.ops.topk_resonance.support import Arguments

CASES = load_reference("resonance")


@pytest.fixture(params=["torch", "numba"], autouse=True)
def backend(request, monkeypatch):
    """Run every test on each backend."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="the CPU kernels need Numba: pip install 'nord-snn[cpu]'")
    monkeypatch.setenv("NORD_SNN_BACKEND", request.param)
    return request.param


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_counts_selected_keys_and_context_equal_the_expected_values(case):
    q, k = case["q"].float(), case["k"].float()
    counts = coincidences(q, k, case["n_heads"])
    assert torch.equal(counts.int(), case["counts"])
    scores = resonance_scores(counts, case["temperature"], case["recency"], causal=True)
    assert torch.equal(keep_best(scores, case["top_k"]) & ~scores.isinf(), case["kept"])
    arguments = {name: case[name] for name in ("n_heads", "top_k", "temperature", "recency")}
    context = resonance(case["q"], case["k"], case["v"], **arguments)
    assert torch.allclose(context, case["context"], atol=1e-5, rtol=0)


def spikes(*shape, rate=0.3):
    """Return random spikes with a firing rate."""
    return (torch.rand(*shape) < rate).float()


@pytest.mark.quick
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 9), top_k=st.integers(1, 9), values=st.integers(1, 4), seed=st.integers(0, 999))
def test_of_equal_scores_the_most_recent_positions_are_selected(n, top_k, values, seed):
    """They are those of sorting by (score, position); many scores are equal."""
    scores = torch.randint(values, (n,), generator=torch.Generator().manual_seed(seed)).float()
    best = sorted(range(n), key=lambda b: (scores[b].item(), b), reverse=True)[:top_k]
    assert keep_best(scores, top_k).nonzero().flatten().tolist() == sorted(best)


def test_without_spikes_the_most_recent_positions_are_selected():
    """Every score is 0, so the last top_k keys have the same weight."""
    v = torch.arange(5.0).reshape(1, 5, 1)
    context = resonance(torch.zeros(2, 1, 5, 1), torch.zeros(2, 1, 5, 1), v, n_heads=1, top_k=2, temperature=1.0)
    assert context.flatten().tolist() == [0.0, 0.5, 1.5, 2.5, 3.5]


@pytest.mark.quick
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
    not_causal = resonance(q, k, v, causal=False, **arguments)
    v[:, 5:] += 9
    assert not torch.equal(not_causal[:, :5], resonance(q, k, v, causal=False, **arguments)[:, :5])


def test_a_negative_temperature_prefers_the_least_coincident():
    q = torch.ones(1, 1, 3, 2)
    k = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]).reshape(1, 1, 3, 2)  # position 1 has no coincidences
    v = torch.eye(3)[None, :, :2]
    for temperature, best in ((1.0, 0), (-1.0, 1)):
        context = resonance(q, k, v, n_heads=1, top_k=1, temperature=temperature)
        assert context[0, 2].argmax().item() == best


@pytest.mark.quick
def test_recency_prefers_near_positions():
    q = k = torch.ones(1, 1, 4, 2)
    v = torch.eye(4)[None, :, :2].repeat(1, 1, 1)
    flat = resonance(q, k, v, n_heads=2, top_k=4, temperature=1.0)
    sloped = resonance(q, k, v, n_heads=2, top_k=4, temperature=1.0, recency=torch.tensor([0.0, 2.0]))
    assert torch.allclose(flat[..., 0], sloped[..., 0])  # head 0 has no slope
    assert (sloped[0, 2:, 1] < flat[0, 2:, 1]).all()  # in head 1 the weight of position 1 falls with distance


@pytest.mark.quick
def test_two_heads_equal_two_calls_with_one_head():
    q, k, v = spikes(3, 1, 5, 6), spikes(3, 1, 5, 6), torch.randn(1, 5, 6)
    together = resonance(q, k, v, n_heads=2, top_k=3, temperature=0.5)
    alone = [
        resonance(q[..., c], k[..., c], v[..., c], n_heads=1, top_k=3, temperature=0.5) for c in (slice(3), slice(3, 6))
    ]
    assert torch.equal(together, torch.cat(alone, -1))


@pytest.mark.quick
def test_gradients_are_exact_if_all_keys_are_selected():
    """With all keys selected (top_k = S), the op is smooth in q, k, v, temperature and recency."""
    q, k = spikes(3, 1, 4, 4).double().requires_grad_(), spikes(3, 1, 4, 4).double().requires_grad_()
    v = torch.randn(1, 4, 4, dtype=torch.float64).requires_grad_()
    temperature = torch.tensor([0.5], dtype=torch.float64).requires_grad_()
    recency = torch.tensor([0.3, 0.1], dtype=torch.float64).requires_grad_()

    def run(q, k, v, temperature, recency):
        return resonance(q, k, v, n_heads=2, top_k=4, temperature=temperature, recency=recency)

    assert torch.autograd.gradcheck(run, (q, k, v, temperature, recency))


def test_gradients_are_exact_if_few_keys_are_selected(monkeypatch):
    """With real numbers in place of spikes no scores are equal, so that a small change does not change the selection."""
    monkeypatch.setattr(blockwise, "BLOCK", 2)
    shapes = ((2, 1, 5, 2), (2, 1, 5, 2), (1, 5, 2), (1,), (2,))
    inputs = [torch.rand(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    for causal in (True, False):

        def run(q, k, v, temperature, recency, causal=causal):
            return resonance(q, k, v, n_heads=2, top_k=2, temperature=temperature, recency=recency, causal=causal)

        assert torch.autograd.gradcheck(run, inputs)


def output_and_gradients(run, inputs, grad):
    """Return the output of ``run(*inputs)`` and the gradients of all inputs for the output gradient ``grad``."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    context = run(*inputs)
    context.backward(grad)
    return [context.detach(), *(x.grad for x in inputs if x is not None)]


def assert_close(results, expected, tolerance, largest_count=1):
    """Assert that contexts are close by element and gradients by norm; gradients are sums of terms of about 1, which can cancel.

    Terms of the gradient of the temperature, the fourth, have the size of the coincidence counts.
    """
    assert (results[0] - expected[0]).abs().max() <= tolerance
    for index, (result, reference_result) in enumerate(zip(results[1:], expected[1:], strict=True)):
        assert result.dtype == reference_result.dtype
        size = reference_result.norm() + (largest_count if index == 3 else 1)
        assert (result - reference_result).norm() <= 10 * tolerance * size


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.integers(1, 3),
    B=st.integers(1, 3),
    S=st.integers(1, 13),
    n_heads=st.integers(1, 3),
    width=st.sampled_from([1, 2, 3, 17, 32]),
    of_v=st.sampled_from([None, 1, 5, 33]),
    top_k=st.integers(1, 14),
    temperature=st.sampled_from([0.5, -0.25, 0.0]),
    recency=st.sampled_from([None, 0.0, 0.25, 0.3]),
    causal=st.booleans(),
    most=st.sampled_from([1, 3]),
    block=st.integers(1, 6),
    scores=st.sampled_from([1, 60, 2**16]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_every_backend_equals_the_reference(
    T, B, S, n_heads, width, of_v, top_k, temperature, recency, causal, most, block, scores, dtype, seed
):
    """Slopes of 1/4 and temperatures of 1/4 or 1/2 make many scores equal.

    With ``most=3`` queries and keys are integers up to 3, for which kernels sum products instead of counting bits.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(most + 1, (T, B, S, n_heads * width), generator=generator).to(dtype) for _ in range(2))
    v, grad = (torch.randn(B, S, n_heads * (of_v or width), generator=generator, dtype=dtype) for _ in range(2))
    slopes = None if recency is None else recency * torch.arange(n_heads, dtype=dtype)
    inputs = (q, k, v, torch.tensor([temperature], dtype=dtype), slopes)
    before = [None if x is None else x.clone() for x in inputs]

    def run_reference(q, k, v, temperature, recency):
        return reference(q, k, v, n_heads, top_k, temperature, recency, causal)

    def run_op(q, k, v, temperature, recency):
        return resonance(q, k, v, n_heads=n_heads, top_k=top_k, temperature=temperature, recency=recency, causal=causal)

    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", block)
        patch.setattr(blockwise, "SCORES", {"cpu": scores})
        results, expected = (output_and_gradients(run, inputs, grad) for run in (run_op, run_reference))
        assert_close(results, expected, tolerance, max(1, T * width * most**2 / 10))
        without_gradients = run_op(*inputs)
    assert (without_gradients - run_reference(*inputs)).abs().max() <= tolerance
    assert all(x is None or torch.equal(x, y) for x, y in zip(inputs, before, strict=True))  # inputs are unchanged


# With ten time steps the weights are saved for the backward pass, with one they are computed again.
@pytest.mark.parametrize(("T", "recency"), [(10, True), (10, False), (1, True), (1, False)])
def test_full_size_results_equal_the_reference(T, recency):
    q, k = spikes(T, 2, 200, 64, rate=0.1), spikes(T, 2, 200, 64, rate=0.1)
    slopes = torch.tensor([0.5, 0.125]) if recency else None
    inputs = (q, k, torch.randn(2, 200, 64), torch.tensor([32**-0.5]), slopes)
    grad = torch.randn(2, 200, 64)
    expected = output_and_gradients(lambda q, k, v, t, r: reference(q, k, v, 2, 64, t, r, True), inputs, grad)
    results = output_and_gradients(
        lambda q, k, v, t, r: resonance(q, k, v, n_heads=2, top_k=64, temperature=t, recency=r), inputs, grad
    )
    assert_close(results, expected, 1e-5)


def test_a_python_float_as_temperature_is_not_rounded_to_float32():
    q, k, v = spikes(3, 1, 6, 4).double(), spikes(3, 1, 6, 4).double(), torch.randn(1, 6, 4, dtype=torch.float64)
    expected = reference(q, k, v, 2, 3, 0.1, None, True)
    assert torch.allclose(resonance(q, k, v, n_heads=2, top_k=3, temperature=0.1), expected, rtol=0, atol=1e-14)


def test_spikes_of_any_dtype_and_layout_give_the_same_result():
    q, k, v = spikes(3, 2, 5, 4) > 0, spikes(3, 2, 5, 4) > 0, torch.randn(2, 5, 4).requires_grad_()
    arguments = {"n_heads": 2, "top_k": 2, "temperature": torch.tensor([0.5]).requires_grad_()}
    expected = output_and_gradients(lambda v: resonance(q.float(), k.float(), v, **arguments), [v], torch.ones(2, 5, 4))
    for dtype in (torch.bool, torch.uint8, torch.bfloat16):
        like = q.to(dtype), k.to(dtype)
        results = output_and_gradients(lambda v, like=like: resonance(*like, v, **arguments), [v], torch.ones(2, 5, 4))
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
    strided = [x.mT.contiguous().mT for x in (q.float(), k.float(), v)]
    assert torch.equal(resonance(*strided, **arguments), resonance(q, k, v, **arguments))
    low = [x.detach().to(torch.bfloat16).requires_grad_() for x in (q, k, v)]
    resonance(*low, **arguments).sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 for x in low)


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (2, 3, 0, 4)])
def test_empty_input_gives_empty_output(shape):
    q, k, v = (torch.zeros(s).requires_grad_() for s in (shape, shape, shape[1:]))
    context = resonance(q, k, v, n_heads=2, top_k=2, temperature=1.0, recency=torch.ones(2))
    context.sum().backward()
    assert context.shape == shape[1:]
    assert k.grad.shape == shape


class PeakMemory(TorchDispatchMode):
    """Mode that measures the peak memory of the tensors created under it."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.live:
                key, size = storage._cdata, storage.nbytes()
                self.live[key] = weakref.ref(storage, lambda _, key=key, size=size: self.forget(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)
        return result

    def forget(self, key, size):
        del self.live[key]
        self.now -= size


@pytest.mark.parametrize("top_k", [16, 10_000])
def test_memory_grows_linearly_with_the_length(top_k, backend):
    kernel = IMPLEMENTATIONS[backend].kernel()

    def run_reference(q, k, v, temperature, recency):
        reference(q, k, v, 2, top_k, temperature, recency, True).sum().backward()

    def run_op(q, k, v, temperature, recency):
        with torch.no_grad():  # call both passes as autograd does; a mode does not see the calls inside the op
            arguments = Arguments(q, k, v, temperature, recency, 2, top_k, True)
            context, *saved = kernel.forward(arguments, True)
            kernel.backward(context, arguments, saved, True)

    def peak(run, S):
        shapes = ((3, 1, S, 8), (3, 1, S, 8), (1, S, 8), (), (2,))
        inputs = [torch.rand(shape).requires_grad_() for shape in shapes]
        with PeakMemory() as mode:
            run(*inputs)
        return mode.peak

    assert peak(run_op, 1024) <= 2.1 * peak(run_op, 512)
    assert peak(run_reference, 1024) >= 3.5 * peak(run_reference, 512)


def test_saved_tensors_are_no_larger_than_the_queries(backend):
    """Per query and head at most T * D / H = 12 numbers are saved: 12 weights or 2 * 5 + 1 for five keys fit, 13 do not."""
    for fits, S, top_k in ((True, 12, 5), (False, 13, 6)):
        q = torch.zeros(3, 5, S, 8)
        keys, _, weights = (torch.Size(shape).numel() for shape in saved_shapes(backend, q, top_k))
        assert (keys + weights if backend == "numba" else weights) <= q.numel()
        assert (weights > 0) == fits


def saved_shapes(backend, q, top_k):
    """Return the shapes of the tensors that a backend saves for its backward pass."""
    return IMPLEMENTATIONS[backend].kernel().saved_shapes(q, 2, top_k, True)


def test_odd_sizes_over_several_tiles_equal_the_reference():
    """A tile has 64 queries, a word 64 bits, a group four words; sizes are just below and above multiples."""
    for T, S, width, top_k in ((1, 67, 5, 66), (7, 131, 17, 9), (5, 66, 33, 64)):
        q, k = spikes(T, 2, S, 3 * width), spikes(T, 2, S, 3 * width)
        inputs = (q, k, torch.randn(2, S, 3 * width), torch.tensor([0.3]), torch.tensor([0.25, 0.0, 0.5]))
        grad = torch.randn(2, S, 3 * width)
        for causal in (True, False):
            sizes = {"n_heads": 3, "top_k": top_k, "causal": causal}

            def run_reference(q, k, v, temperature, recency, sizes=sizes):
                return reference(q, k, v, temperature=temperature, recency=recency, **sizes)

            def run_op(q, k, v, temperature, recency, sizes=sizes):
                return resonance(q, k, v, temperature=temperature, recency=recency, **sizes)

            expected, results = (output_and_gradients(run, inputs, grad) for run in (run_reference, run_op))
            assert_close(results, expected, 1e-5)


def test_the_op_is_registered_and_compiles_without_a_graph_break(monkeypatch, backend):
    monkeypatch.setattr(blockwise, "BLOCK", 4)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.tensor([0.5]))
            self.recency = torch.nn.Parameter(torch.tensor([0.25, 0.1]))

        def forward(self, q, k, v):
            scale = {"temperature": self.temperature, "recency": self.recency}
            return resonance(q, k, v * 2, n_heads=2, top_k=3, **scale) + resonance(
                q, k, v, n_heads=2, top_k=9, temperature=0.7, causal=False
            )

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    saves_weights = []
    for S in (9, 5, 11):  # sequences of several lengths
        inputs, grad = (spikes(3, 2, S, 6), spikes(3, 2, S, 6), torch.randn(2, S, 6)), torch.randn(2, S, 6)
        saves_weights += [saved_shapes(backend, inputs[0], top_k)[2][0] > 0 for top_k in (3, 9)]
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            result = output_and_gradients(run, inputs, grad)
            results.append([*result, *(parameter.grad for parameter in layer.parameters())])
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(*results, strict=True))
        arguments = (*(x.requires_grad_() for x in inputs), layer.temperature.reshape(()).detach(), layer.recency)
        options = {"n_heads": 2, "top_k": 3, "causal": True, "save_weights": True, "backend": backend}
        torch.library.opcheck(torch.ops.nord_snn.resonance.default, arguments, options)
    assert len(set(saves_weights)) == 2


def test_every_element_of_every_buffer_is_written(memory_full_of_nan):
    with_saved_weights, without = ((5, 4, True), (5, 4, False)), ((1, 9, True), (1, 9, False))
    for T, top_k, causal in (*with_saved_weights, *without):
        inputs = (spikes(T, 2, 70, 6), spikes(T, 2, 70, 6), torch.randn(2, 70, 6), torch.tensor([0.5]), torch.rand(2))
        sizes = {"n_heads": 2, "top_k": top_k, "causal": causal}

        def run_reference(q, k, v, temperature, recency, sizes=sizes):
            return reference(q, k, v, temperature=temperature, recency=recency, **sizes)

        def run_op(q, k, v, temperature, recency, sizes=sizes):
            return resonance(q, k, v, temperature=temperature, recency=recency, **sizes)

        grad = torch.randn(2, 70, 6)
        assert_close(
            output_and_gradients(run_op, inputs, grad), output_and_gradients(run_reference, inputs, grad), 1e-5
        )


def test_nan_is_propagated():
    """0 * inf is NaN, on x86 with the sign bit set; the context of a query with such a score is NaN."""
    q, k, v = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), torch.ones(1, 3, 2)
    k[0, 0, 0, 0] = torch.inf
    context = resonance(q, k, v, n_heads=1, top_k=1, temperature=1.0)
    expected = reference(q, k, v, 1, 1, 1.0, None, True)
    assert torch.equal(context.isnan(), expected.isnan())
    assert context.isnan().all()


def test_counts_are_exact_under_autocast():
    """bfloat16 cannot represent all integers above 256."""
    q = k = torch.ones(40, 1, 2, 16)
    k = k.clone()
    k[0, 0, 0, 0] = 0  # scores of 639 and 640
    v = torch.tensor([[[1.0] * 16, [2.0] * 16]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = resonance(q, k, v, n_heads=1, top_k=1, temperature=-1.0)
    assert (context[0, 1] == 1.0).all()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("shapes", "change", "message"),
    [
        (((2, 1, 3), (2, 1, 3), (1, 3)), {}, r"one shape \[T, B, S, D\]"),
        (((2, 1, 3, 4), (2, 1, 2, 4), (1, 3, 4)), {}, r"one shape \[T, B, S, D\]"),
        (
            ((2, 1, 3, 4), (2, 1, 3, 4), (1, 3, 5)),
            {},
            r"v of shape \[B, S, V\] = \[1, 3, a multiple of 2\], got \[1, 3, 5\]",
        ),
        (((2, 1, 3, 4), (2, 1, 3, 4), (3, 4)), {}, r"v of shape \[B, S, V\].*got \[3, 4\]"),
        (((2, 1, 3, 4), (2, 1, 3, 4), (1, 2, 4)), {}, r"v of shape \[B, S, V\].*got \[1, 2, 4\]"),
        (((2, 1, 3, 4), (2, 1, 3, 4), (1, 3, 4)), {"n_heads": 3}, "D = 4 and H = 3"),
        (((0, 1, 3, 4), (0, 1, 3, 4), (1, 3, 4)), {}, "at least one time step"),
        (((2, 1, 3, 4), (2, 1, 3, 4), (1, 3, 4)), {"temperature": torch.ones(3)}, "temperature must have one element"),
        (((2, 1, 3, 4), (2, 1, 3, 4), (1, 3, 4)), {"top_k": 0}, "top_k must be at least 1"),
        (
            ((2, 1, 3, 4), (2, 1, 3, 4), (1, 3, 4)),
            {"recency": torch.ones(3)},
            r"recency must have the shape \[H\] = \[2\]",
        ),
    ],
)
def test_bad_input_raises(shapes, change, message):
    arguments = {"n_heads": 2, "top_k": 2, "temperature": 1.0} | change
    with pytest.raises(ValueError, match=message):
        resonance(*(torch.zeros(shape) for shape in shapes), **arguments)
