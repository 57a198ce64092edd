"""The leaky clamp op: the kernel against the reference, odd shapes, ties, and bad input."""

import pytest
import torch
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from nord_snn.ops import leaky_clamp


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from([(1,), (5,), (0, 3), (1, 7), (6, 1, 17), (3, 41, 130)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    coarse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_kernel_is_the_reference(shape, dtype, coarse, seed):
    """Also where leak * x meets the floor: there torch shares the gradient between the two."""
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
    weight = torch.randn(shape, generator=generator).to(dtype)
    results = []
    for backend in ("torch", "numba"):
        y = leaky_clamp(leaves[0], leak=leaves[1], floor=leaves[2], backend=backend)
        results.append((y, *torch.autograd.grad(y, leaves, weight)))
    for name, expected, got in zip(("y", "x", "leak", "floor"), *results, strict=True):
        assert got.dtype == expected.dtype, name
        assert got.shape == expected.shape, name
        if name in ("y", "x"):
            assert torch.equal(got, expected), name
        else:
            assert relative_error(got, expected) < 1e-5, name


def test_non_contiguous_input_and_fresh_memory_full_of_nan(monkeypatch):
    pytest.importorskip("numba", reason="the CPU kernels need Numba")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    x = torch.randn(6, 5, 4).transpose(0, 2).requires_grad_()
    arguments = {"leak": torch.full((6,), 0.1), "floor": torch.full((6,), -0.1)}
    results = [leaky_clamp(x, **arguments, backend=backend) for backend in ("torch", "numba")]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in results))


def test_torch_can_trust_the_op():
    pytest.importorskip("numba", reason="the CPU kernels need Numba")
    leaves = [torch.randn(3, 4), torch.rand(4), -torch.rand(4)]
    torch.library.opcheck(
        torch.ops.nord_snn.leaky_clamp.default, (*(leaf.requires_grad_() for leaf in leaves), "numba")
    )


@pytest.mark.parametrize(
    ("x", "leak", "floor", "message"),
    [
        (torch.zeros(2, 3), torch.ones(4), torch.ones(4), r"\[\*, D\] with D = 4, got \[2, 3\]"),
        (torch.zeros(2, 3), torch.ones(3), torch.ones(1), r"of one shape \[D\], got \[3\] and \[1\]"),
    ],
)
def test_bad_input_is_named(x, leak, floor, message):
    with pytest.raises(ValueError, match=message):
        leaky_clamp(x, leak=leak, floor=floor)
    with pytest.raises(RuntimeError, match="nord-snn has no triton kernel for leaky_clamp"):
        leaky_clamp(torch.zeros(2, 3), leak=torch.ones(3), floor=torch.ones(3), backend="triton")
