"""The leaky clamp op: the Numba kernel equals the reference, also with NaN and at equal arguments; bad input raises."""

import pytest
import torch
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from nord_snn.ops import leaky_clamp

pytestmark = pytest.mark.quick


@settings(deadline=None, max_examples=80)
@given(
    shape=st.sampled_from([(1,), (5,), (0, 3), (1, 7), (6, 1, 17), (3, 41, 130)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    coarse=st.booleans(),
    adds=st.booleans(),
    branch_dtype=st.sampled_from([None, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_kernel_equals_the_reference(shape, dtype, coarse, adds, branch_dtype, seed):
    """Coarse inputs make leak * x equal to the floor, where torch divides the gradient between both."""
    pytest.importorskip("numba", reason="the CPU kernels need Numba")
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, generator=generator)
    leaves = [
        (x.round() / 2 if coarse else x).to(dtype).requires_grad_(),
        torch.full(shape[-1:], 0.5).to(wide).requires_grad_(),
        (torch.full(shape[-1:], -0.25) if coarse else torch.randn(shape[-1:], generator=generator))
        .to(wide)
        .requires_grad_(),
    ]
    if adds:
        branch = torch.randn(shape, generator=generator)
        leaves += [
            (branch.round() / 2 if coarse else branch).to(branch_dtype or dtype).requires_grad_(),
            (torch.full(shape[-1:], -0.5) if coarse else torch.randn(shape[-1:], generator=generator))
            .to(wide)
            .requires_grad_(),
        ]
    weight = torch.randn(shape, generator=generator).to(dtype)
    results = []
    for backend in ("torch", "numba"):
        x_, leak, floor, *added = leaves
        y = leaky_clamp(x_, *added, leak=leak, floor=floor, backend=backend)
        results.append((y, *torch.autograd.grad(y, leaves, weight)))
    for name, expected, got in zip(("y", "x", "leak", "floor", "branch", "gain"), *results, strict=False):
        assert got.dtype == expected.dtype, name
        assert got.shape == expected.shape, name
        if name in ("y", "x", "branch"):
            assert torch.equal(got, expected), name
        else:
            assert relative_error(got, expected) < 1e-5, name


def test_non_contiguous_input_equals_the_reference_and_all_memory_is_written(memory_full_of_nan):
    pytest.importorskip("numba", reason="the CPU kernels need Numba")
    x, branch = (torch.randn(6, 5, 4).transpose(0, 2).requires_grad_() for _ in range(2))
    arguments = {"leak": torch.full((6,), 0.1), "floor": torch.full((6,), -0.1), "gain": torch.full((12,), 0.3)[::2]}
    results = [leaky_clamp(x, branch, **arguments, backend=backend) for backend in ("torch", "numba")]
    assert torch.equal(*results)
    grads = [torch.autograd.grad(y.square().sum(), (x, branch)) for y in results]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_equal_the_reference(value):
    pytest.importorskip("numba", reason="the CPU kernels need Numba")
    x = torch.full((3, 20), value)
    for arguments in ({}, {"branch": torch.full((3, 20), -value), "gain": torch.ones(20)}):
        results = [
            leaky_clamp(x, **arguments, leak=torch.full((20,), 0.1), floor=torch.full((20,), -0.1), backend=backend)
            for backend in ("torch", "numba")
        ]
        assert torch.equal(*(y.nan_to_num(99.0) for y in results))


def test_gradients_at_nan_equal_the_reference():
    pytest.importorskip("numba", reason="the CPU kernels need Numba")
    leaves = [
        torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -2.0]]).requires_grad_(),
        torch.full((6,), 0.5).requires_grad_(),
        torch.full((6,), -1.0).requires_grad_(),
    ]
    grads = []
    for backend in ("torch", "numba"):
        y = leaky_clamp(leaves[0], leak=leaves[1], floor=leaves[2], backend=backend)
        grads.append(torch.autograd.grad(y, (leaves[0], leaves[2]), torch.full((1, 6), -0.5)))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_a_tensor_on_another_device_raises():
    pytest.importorskip("numba", reason="the CPU kernels need Numba")
    x, p = torch.randn(3, 5), torch.rand(5)
    with pytest.raises(ValueError, match="gain must be on cpu, the device of the input, got meta"):
        leaky_clamp(x, x, torch.ones(5, device="meta"), leak=p, floor=p, backend="numba")


@pytest.mark.parametrize(
    ("x", "leak", "floor", "message"),
    [
        (torch.zeros(2, 3), torch.ones(4), torch.ones(4), r"\[\*, D\] with D = 4, got \[2, 3\]"),
        (torch.zeros(2, 3), torch.ones(3), torch.ones(1), r"of one shape \[D\], got \[3\] and \[1\]"),
    ],
)
def test_bad_input_raises(x, leak, floor, message):
    with pytest.raises(ValueError, match=message):
        leaky_clamp(x, leak=leak, floor=floor)
    with pytest.raises(RuntimeError, match="nord-snn has no triton kernel for leaky_clamp"):
        leaky_clamp(torch.zeros(2, 3), leak=torch.ones(3), floor=torch.ones(3), backend="triton")


@pytest.mark.parametrize(
    ("branch", "gain", "message"),
    [
        (torch.zeros(2, 3), None, "pass both branch and gain"),
        (None, torch.zeros(3), "pass both branch and gain"),
        (torch.zeros(1, 3), torch.zeros(3), r"branch must have the shape of x = \[2, 3\], got \[1, 3\]"),
        (torch.zeros(2, 3), torch.zeros(1), r"gain must have the shape \[D\] = \[3\], got \[1\]"),
    ],
)
def test_a_branch_of_another_shape_raises(branch, gain, message):
    with pytest.raises(ValueError, match=message):
        leaky_clamp(torch.zeros(2, 3), branch, gain, leak=torch.ones(3), floor=torch.ones(3))
