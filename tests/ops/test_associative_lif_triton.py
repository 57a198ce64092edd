"""The Triton kernels of the associative LIF op equal the reference, interpreted on the CPU and compiled on a GPU."""

import importlib
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from helpers import relative_error

from nord_snn.ops.lif.reference import AssociativeLIFState, reference
from nord_snn.ops.lif.support import Arguments, OutputGradients
from nord_snn.ops.surrogate import SURROGATES, resolve_surrogate

triton = pytest.importorskip("triton", reason="Triton is not installed")

NAME = "nord_snn.ops.lif.triton"
EPSILON = 1e-5  # spikes must be equal wherever |u - threshold| is larger
# Relative error of a stored value; the interpreter truncates to bfloat16, a GPU rounds to nearest.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


class Kernels(NamedTuple):
    """The module of the kernels, interpreted or compiled, and the device on which they run."""

    module: ModuleType
    device: str


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request, memory_full_of_nan):
    """Return the kernels and their device."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return Kernels(importlib.import_module(NAME), request.param)
    return Kernels(request.getfixturevalue("interpreter"), request.param)


@pytest.fixture
def small_tiles(kernels, monkeypatch):
    """Limit the kernels to two Triton programs and small tiles, so that all loops have several iterations."""
    monkeypatch.setattr(kernels.module, "_TILE", 8)
    monkeypatch.setattr(kernels.module, "_programs", lambda plan, device, warps: min(2, plan.blocks))


def make_call(T, N, D, C, state=True, dtype=torch.float32, device="cpu", seed=0):
    """Return arguments of ``forward`` (some thresholds are below v_reset) and gradients of its outputs, by name."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    call = {
        "x": (3 * normal(T, N, D)).to(dtype),
        "v": normal(N, D) if state else None,
        "i_syn": normal(N, D) if state else None,
        "refractory": torch.randint(0, 3, (N, D), generator=generator, dtype=torch.int32) if state else None,
        "threshold": uniform(D) - 0.2,
        "beta_mem": torch.tensor([0.8]),
        "beta_syn": torch.tensor([0.5]),
        "coupling": (0.5 + uniform(C, 1)) * uniform(C, C) / (D // C) if C else None,
    }
    grads = {
        "grad_spikes": normal(T, N, D).to(dtype),
        "grad_v_seq": normal(T, N, D).to(dtype),
        "grad_v_last": normal(N, D),
        "grad_i_last": normal(N, D),
    }
    to_device = lambda x: None if x is None else x.to(device)  # noqa: E731
    return tuple({name: to_device(x) for name, x in group.items()} for group in (call, grads))


def run_reference(call, grads, v_reset, refractory_steps, surrogate, alpha):
    """Return outputs, gradients and the least |u - threshold| of the reference in float32."""
    leaves = {name: None if x is None else x.float() for name, x in call.items() if name != "refractory"}
    rest = torch.zeros_like(leaves["x"][0])
    for name in ("v", "i_syn"):
        leaves[name] = rest.clone() if leaves[name] is None else leaves[name]
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items() if x is not None}
    coupling = leaves.get("coupling")
    members = None if coupling is None else torch.full_like(coupling[0], rest.shape[-1] / len(coupling))
    refractory = call["refractory"] if call["refractory"] is not None else rest.int()
    spikes, v_seq, last = reference(
        leaves["x"],
        AssociativeLIFState(leaves["v"], leaves["i_syn"], refractory),
        leaves["threshold"],
        leaves["beta_mem"],
        leaves["beta_syn"],
        coupling,
        members,
        v_reset,
        refractory_steps,
        resolve_surrogate(surrogate, alpha),
    )
    outputs = (spikes, v_seq, last.v, last.i_syn)
    loss = sum(
        (out * grad.float()).sum() for out, grad in zip(outputs, grads.values(), strict=True) if grad is not None
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    distance = (v_seq + spikes * leaves["threshold"] - leaves["threshold"]).abs()
    outputs = [out.detach() for out in (*outputs, last.refractory)]
    return outputs, dict(zip(leaves, gradients, strict=True)), distance.min().item()


def compare(
    kernels, call, grads, keep_v=True, v_reset=-0.1, refractory_steps=2, surrogate="nord_atan", alpha=4.0
):  # fmt: skip
    """Assert that outputs and gradients of the kernels equal those of the reference."""
    outputs, gradients, distance = run_reference(call, grads, v_reset, refractory_steps, surrogate, alpha)
    assert distance > EPSILON  # so every spike must be equal
    x, state = call["x"], call["v"] is not None
    precision = ROUNDING[x.dtype]

    spikes, v_seq, *last = kernels.module.forward(Arguments(*call.values(), v_reset, refractory_steps), keep_v)
    assert spikes.dtype == v_seq.dtype == x.dtype
    assert torch.equal(spikes.float(), outputs[0])
    assert v_seq.shape == (x.shape if keep_v else (0, *x.shape[1:]))
    if keep_v:
        assert torch.allclose(v_seq.float(), outputs[1], atol=1e-5, rtol=precision)
    for got, expected in zip(last, outputs[2:], strict=True):
        assert got.dtype == expected.dtype
        assert torch.allclose(got, expected, atol=1e-5, rtol=1e-6)

    arguments = Arguments(*call.values(), v_reset, refractory_steps)
    got = kernels.module.backward(OutputGradients(*grads.values()), arguments, surrogate, alpha)
    assert got[0].dtype == x.dtype
    for name, gradient in zip(("x", "v", "i_syn", "threshold", "beta_mem", "beta_syn", "coupling"), got, strict=True):
        if name in ("v", "i_syn") and not state:
            assert gradient.shape == (0, x.shape[-1])
        elif name == "coupling" and call["coupling"] is None:
            assert gradient.shape == (0, 0)
        else:
            assert gradient.shape == gradients[name].shape
            assert relative_error(gradient.float(), gradients[name]) < 1e-4 + precision * (name == "x"), name


@pytest.mark.parametrize(
    ("T", "N", "D", "C"),
    [
        (5, 4, 8, 4),
        (4, 3, 6, 0),
        (4, 3, 6, 1),
        (4, 3, 6, 3),
        (6, 2, 7, 7),
        (1, 3, 12, 4),
        (1, 1, 1, 1),
        (3, 1, 15, 5),
        (3, 2, 130, 130),
        (2, 2, 128, 16),
        (2, 2, 600, 0),
        (12, 2, 4, 2),
    ],
)
@pytest.mark.parametrize("state", [True, False])
def test_every_size_equals_the_reference(kernels, T, N, D, C, state):
    compare(kernels, *make_call(T, N, D, C, state, device=kernels.device))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("T", "N", "D", "C"),
    [(3, 7, 6, 3), (3, 5, 19, 0), (13, 3, 6, 3), (24, 2, 4, 2), (13, 2, 9, 0), (2, 3, 80, 80)],
)
def test_programs_share_tiles_and_long_sequences_are_split(kernels, T, N, D, C):
    """Programs have several tiles; sequences have two segments of equal or different length; the last case has a wide matrix."""
    compare(kernels, *make_call(T, N, D, C, device=kernels.device))


@pytest.mark.usefixtures("small_tiles")
def test_a_wide_cascade_matrix_in_a_long_sequence_equals_the_reference(kernels, monkeypatch):
    monkeypatch.setattr(kernels.module, "_WIDEST_MATRIX", 2)
    compare(kernels, *make_call(13, 3, 10, 5, device=kernels.device))


@pytest.mark.parametrize("refractory_steps", [0, 1, 2, 3])
@pytest.mark.parametrize("C", [0, 3])
def test_every_refractory_period_equals_the_reference(kernels, refractory_steps, C):
    compare(kernels, *make_call(7, 3, 6, C, device=kernels.device), refractory_steps=refractory_steps, v_reset=0.05)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_equals_the_reference(kernels, surrogate):
    assert set(kernels.module.SURROGATE_IDS) == set(SURROGATES)
    call, grads = make_call(5, 3, 6, 2, device=kernels.device)
    compare(kernels, call, grads, surrogate=surrogate, alpha=2.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("C", [0, 4])
def test_in_half_precision_only_stored_values_are_rounded(kernels, dtype, C):
    compare(kernels, *make_call(5, 3, 8, C, dtype=dtype, device=kernels.device))


@pytest.mark.parametrize(
    "with_gradient",
    [["grad_spikes"], ["grad_spikes", "grad_v_seq"], ["grad_spikes", "grad_v_last"], ["grad_spikes", "grad_i_last"]],
)
def test_some_outputs_may_have_no_gradient(kernels, with_gradient):
    call, grads = make_call(4, 3, 6, 3, device=kernels.device)
    grads = {name: grad if name in with_gradient else None for name, grad in grads.items()}
    compare(kernels, call, grads, keep_v=False)


def test_inputs_can_be_non_contiguous(kernels):
    call, grads = make_call(5, 3, 6, 3, device=kernels.device)
    strided = lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)  # noqa: E731
    call = {name: strided(x) if x is not None and x.ndim > 1 else x for name, x in call.items()}
    grads = {name: strided(x) for name, x in grads.items()}
    grads["grad_spikes"] = torch.ones((), device=kernels.device).expand(5, 3, 6)
    assert not call["x"].is_contiguous()
    compare(kernels, call, grads)


@pytest.mark.parametrize("C", [0, 3])
def test_no_rows_give_empty_outputs_and_zero_gradients(kernels, C):
    call, grads = make_call(3, 0, 6, C, device=kernels.device)
    spikes, v_seq, v, i_syn, refractory = kernels.module.forward(Arguments(*call.values(), -0.1, 2), True)
    assert spikes.shape == v_seq.shape == (3, 0, 6)
    assert v.shape == i_syn.shape == refractory.shape == (0, 6)
    got = kernels.module.backward(
        OutputGradients(*grads.values()), Arguments(*call.values(), -0.1, 2), "nord_atan", 4.0
    )
    assert [list(x.shape) for x in got] == [[3, 0, 6], [0, 6], [0, 6], [6], [1], [1], [C, C]]
    assert all(x.eq(0).all() for x in got)


@pytest.mark.parametrize("C", [0, 3])
def test_rows_are_independent(kernels, C):
    call, grads = make_call(5, 3, 6, C, device=kernels.device)

    def run(call):
        forward = kernels.module.forward(Arguments(*call.values(), -0.1, 2), True)
        backward = kernels.module.backward(
            OutputGradients(*grads.values()), Arguments(*call.values(), -0.1, 2), "nord_atan", 4.0
        )
        return [out[..., 1:, :] for out in (*forward, *backward[:3])]

    before = run(call)
    call["x"][:, 0] = float("nan")
    for got, expected in zip(run(call), before, strict=True):
        assert torch.equal(got, expected)


def test_the_same_call_is_bitwise_reproducible(kernels):
    call, grads = make_call(4, 9, 8, 4, device=kernels.device)
    first, second = (
        kernels.module.backward(OutputGradients(*grads.values()), Arguments(*call.values(), -0.1, 2), "nord_atan", 4.0)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_unsupported_sizes_are_rejected_with_a_reason(interpreted):
    assert interpreted.fits(512, 64)[0]
    assert interpreted.fits(100_000, 0)[0]  # without a cascade a row is split into tiles
    assert interpreted.fits(130, 130)[0]
    accepted, reason = interpreted.fits(65536, 64)
    assert not accepted
    assert "D = 65536 in C = 64 clusters gives 65536" in reason


class Compiler:
    """Replacement of a kernel whose launch compiles it for a GPU of compute capability 9.0."""

    TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}  # noqa: RUF012

    def __init__(self, kernel):
        self.kernel, self.ptx = kernel, ""

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *, num_warps, maxnreg, enable_fp_fusion, **arguments):
        signature, constants = {}, {}
        for parameter in self.kernel.params:
            name, arg = parameter.name, arguments.pop(parameter.name)
            if isinstance(arg, torch.Tensor):
                signature[name] = self.TYPES[arg.dtype]
            elif parameter.is_constexpr or arg is None or arg == 1:  # as the launcher does
                signature[name], constants[name] = "constexpr", arg
            else:
                signature[name] = "i32" if isinstance(arg, int) else "fp32"
        assert not arguments
        compiled = triton.compile(
            triton.compiler.ASTSource(self.kernel, signature, constants),
            target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
            options={"num_warps": num_warps, "maxnreg": maxnreg, "enable_fp_fusion": enable_fp_fusion},
        )
        self.ptx = compiled.asm["ptx"]


@pytest.mark.parametrize(("T", "C", "dtype"), [(2, 64, torch.bfloat16), (13, 0, torch.float32)])
def test_kernels_compile_for_a_gpu_without_fused_multiply_adds(monkeypatch, T, C, dtype):
    """A fused multiply-add rounds differently, which can change a spike at the threshold."""
    module = importlib.import_module(NAME)
    if not isinstance(module._forward, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set")
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(module, name, Compiler(getattr(module, name)))
    call, grads = make_call(T, 64, 512, C, dtype=dtype)
    module.forward(Arguments(*call.values(), -0.1, 2), True)
    module.backward(OutputGradients(*grads.values()), Arguments(*call.values(), -0.1, 2), "sigmoid", 4.0)
    for kernel in (module._forward, module._backward):
        assert "mul.f32" in kernel.ptx or "mul.rn.f32" in kernel.ptx
        assert "fma" not in kernel.ptx
