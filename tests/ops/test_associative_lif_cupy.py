"""The CUDA kernels of the associative LIF op compile for GPUs and equal the reference, on a GPU or as C++ on the CPU.

Without a GPU, ``cuda_on_cpu.h`` and a C++ compiler run the source of the kernels thread by thread. The memory and the
compiler of a GPU are tested only by the tests marked ``gpu``.
"""

import ctypes
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import relative_error

from nord_snn.ops.lif.reference import AssociativeLIFState, reference
from nord_snn.ops.lif.support import Arguments, OutputGradients
from nord_snn.ops.surrogate import SURROGATES, resolve_surrogate

kernels = importlib.import_module("nord_snn.ops.lif.cupy")

FORWARD, BACKWARD = "associative_lif_forward", "associative_lif_backward"
EPSILON = 1e-5  # spikes must be equal wherever |u - threshold| is larger
CPU = torch.device("cpu")


# ---- compiled for GPUs


@pytest.fixture(scope="session")
def nvrtc():
    """Load NVRTC, NVIDIA's run-time compiler, which CuPy uses and which needs no GPU."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None or spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    for library in sorted(path for folder in folders for path in Path(folder).rglob("libnvrtc.so.*")):
        builtins = sorted(path for path in library.parent.glob("libnvrtc-builtins.so.*") if ".alt." not in path.name)
        if builtins:
            ctypes.CDLL(str(builtins[0]), mode=ctypes.RTLD_GLOBAL)  # NVRTC searches the loaded libraries for it
            return ctypes.CDLL(str(library))
    return pytest.skip("NVRTC is not installed: it comes with torch's CUDA builds (package nvidia-cuda-nvrtc)")


def compile_ptx(nvrtc: ctypes.CDLL, source: str, options: tuple[str, ...]) -> tuple[str | None, str]:
    """Return PTX, or None if the compilation fails, and the log of the compiler."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), encoded)

    def text(kind: str) -> str:
        assert getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer) == 0
        return buffer.value.decode()

    ptx, log = None if failed else text("PTX"), text("ProgramLog")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx, log


@pytest.mark.parametrize("architecture", ["compute_75", "compute_80", "compute_90"])
@pytest.mark.parametrize(
    ("dtype", "D", "C"),
    [
        (torch.float32, 512, 64),
        (torch.float32, 512, 0),
        (torch.float16, 512, 64),
        (torch.bfloat16, 1024, 64),  # two threads share a cluster
        (torch.bfloat16, 130, 130),  # the matrix of the cascade does not fit into shared memory
        (torch.float32, 15, 5),
        (torch.float32, 20000, 0),  # more neurons a thread than registers
    ],
)
def test_the_source_compiles_for_gpus(nvrtc, architecture, dtype, D, C):
    for kernel in (FORWARD, BACKWARD):
        options = kernels._FLAGS + kernels._options(kernel, dtype, D, C, surrogate=2) + (f"-arch={architecture}",)
        ptx, log = compile_ptx(nvrtc, kernels._SOURCES[kernel], options)
        assert ptx is not None, log
        assert log.strip() == ""
        assert f".entry {kernel}" in ptx
        if kernel == FORWARD and C == 0:  # sums over clusters and the surrogate derivative may use fused multiply-adds
            assert "fma" not in ptx


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_compiles_for_gpus(nvrtc, surrogate):
    options = kernels._options(BACKWARD, torch.float32, 96, 8, kernels.SURROGATE_IDS[surrogate])
    ptx, log = compile_ptx(nvrtc, kernels._SOURCES[BACKWARD], (*kernels._FLAGS, *options, "-arch=compute_80"))
    assert ptx is not None, log


def test_a_broken_source_does_not_compile(nvrtc):
    source = kernels._SOURCES[FORWARD].replace("neuron.v = u - spike * threshold;", "neuron.v = u - spike threshold;")
    assert source != kernels._SOURCES[FORWARD]
    options = kernels._FLAGS + kernels._options(FORWARD, torch.float32, 8, 0)
    ptx, log = compile_ptx(nvrtc, source, options)
    assert ptx is None
    assert "error" in log


# ---- run, on the CPU or on a GPU


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch, memory_full_of_nan):
    """Return the device of the kernels."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        pytest.importorskip("cupy", reason="CuPy is not installed")
    else:
        monkeypatch.setattr(kernels, "_launch", request.getfixturevalue("emulate"))
    # With one multiprocessor a thread block processes several groups of rows.
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 1)
    return torch.device("cuda" if request.param == "gpu" else "cpu")


class Case(NamedTuple):
    """Sizes and options of a call of the kernels; C = 0 for no cascade."""

    T: int
    N: int
    D: int
    C: int
    state: bool = True
    refractory_steps: int = 2
    surrogate: str = "nord_atan"
    keep_v: bool = True
    grad_last: bool = True
    dtype: torch.dtype = torch.float32


class Call:
    """Random inputs of a case on a device; runs the kernels and the reference."""

    def __init__(self, case: Case, device: torch.device, v_reset: float = -0.1) -> None:
        self.case, self.v_reset = case, v_reset
        T, N, D, C = case[:4]
        random = lambda *shape: torch.randn(*shape).to(device)  # noqa: E731
        self.x = random(T, N, D).to(case.dtype)
        self.v, self.i_syn = (random(N, D) / 2, random(N, D)) if case.state else (None, None)
        self.refractory = torch.randint(0, 3, (N, D), dtype=torch.int32).to(device) if case.state else None
        self.threshold = torch.rand(D).to(device) * 0.4 + 0.05
        self.beta_mem, self.beta_syn = torch.tensor([0.8], device=device), torch.tensor([0.6], device=device)
        self.weight = (0.2 + torch.rand(C, C)).to(device) if C else None
        self.grad_spikes, self.grad_v_seq = random(T, N, D).to(case.dtype), random(T, N, D).to(case.dtype)
        self.grad_v_last, self.grad_i_last = random(N, D), random(N, D)

    def arguments(self) -> Arguments:
        """Return the arguments of the kernels; the matrix of the cascade is divided by the neurons of a cluster."""
        coupling = None if self.weight is None else self.weight * self.case.C / self.case.D
        return Arguments(
            *(self.x, self.v, self.i_syn, self.refractory, self.threshold, self.beta_mem, self.beta_syn),
            *(coupling, self.v_reset, self.case.refractory_steps),
        )

    def forward(self) -> tuple[torch.Tensor, ...]:
        return kernels.forward(self.arguments(), self.case.keep_v)

    def backward(self) -> tuple[torch.Tensor, ...]:
        grad_v_seq = self.grad_v_seq if self.case.keep_v else None
        last = (self.grad_v_last, self.grad_i_last) if self.case.grad_last else (None, None)
        grads = OutputGradients(self.grad_spikes, grad_v_seq, *last)
        return kernels.backward(grads, self.arguments(), self.case.surrogate, 3.0)

    def expected(self) -> tuple[tuple[Any, ...], dict[str, torch.Tensor], torch.Tensor]:
        """Return outputs and gradients of the reference, and the distance of each membrane potential from its threshold."""
        case = self.case
        x = self.x.detach().float().requires_grad_()
        rest = torch.zeros_like(x[0]).detach()
        v = (rest if self.v is None else self.v).clone().requires_grad_()
        i_syn = (rest if self.i_syn is None else self.i_syn).clone().requires_grad_()
        refractory = rest.int() if self.refractory is None else self.refractory
        leaves = {"x": x, "v": v, "i_syn": i_syn}
        for name in ("threshold", "beta_mem", "beta_syn"):
            leaves[name] = getattr(self, name).clone().requires_grad_()
        if self.weight is not None:
            leaves["coupling"] = self.weight.clone().requires_grad_()
        spikes, v_seq, last = reference(
            x,
            AssociativeLIFState(v, i_syn, refractory),
            *(leaves["threshold"], leaves["beta_mem"], leaves["beta_syn"]),
            leaves.get("coupling"),
            None if self.weight is None else torch.ones_like(self.weight[0]),
            self.v_reset,
            case.refractory_steps,
            resolve_surrogate(case.surrogate, 3.0),
        )
        loss = (spikes * self.grad_spikes.float()).sum()
        if case.keep_v:
            loss = loss + (v_seq * self.grad_v_seq.float()).sum()
        if case.grad_last:
            loss = loss + (last.v * self.grad_v_last).sum() + (last.i_syn * self.grad_i_last).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), grads, strict=True)
        }
        if self.weight is not None:  # the kernel's matrix is the weight divided by the neurons of a cluster
            gradients["coupling"] = gradients["coupling"] * (case.D / case.C)
        margin = (v_seq + spikes * self.threshold - self.threshold).abs()
        return (spikes, v_seq, *last), gradients, margin.detach()

    def check(self) -> None:
        """Compare all outputs and gradients."""
        case = self.case
        rounding = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[case.dtype]
        (spikes, v_seq, *last), gradients, margin = self.expected()
        got_spikes, got_v_seq, *got_last = self.forward()
        assert got_spikes.dtype == got_v_seq.dtype == case.dtype
        clear = margin > EPSILON
        assert torch.equal(got_spikes.float()[clear], spikes[clear])
        assert spikes.numel() < 50 or 0.02 < spikes.mean() < 0.98
        if case.keep_v:
            assert torch.allclose(got_v_seq.float(), v_seq, atol=EPSILON, rtol=rounding)
        else:
            assert got_v_seq.shape == (0, *self.x.shape[1:])
        assert torch.allclose(got_last[0], last[0], atol=EPSILON)
        assert torch.allclose(got_last[1], last[1], atol=EPSILON)
        assert torch.equal(got_last[2], last[2])
        assert got_last[2].dtype == torch.int32

        names = ("x", "v", "i_syn", "threshold", "beta_mem", "beta_syn", "coupling")
        for name, got in zip(names, self.backward(), strict=True):
            if name == "coupling" and not case.C:
                assert got.shape == (0, 0)
            elif name in ("v", "i_syn") and not case.state:
                assert got.shape == (0, case.D)
            else:
                assert got.shape == gradients[name].shape, name
                assert got.isfinite().all(), name
                tolerance = 1e-4 if name != "x" else max(1e-4, rounding)
                assert relative_error(got.float(), gradients[name]) < tolerance, name
                assert got.dtype == (case.dtype if name == "x" else torch.float32)


CASES = [
    Case(6, 5, 6, 3),
    Case(6, 5, 6, 3, state=False),
    Case(6, 5, 6, 0, state=False, refractory_steps=0),
    Case(7, 3, 7, 7, refractory_steps=3),
    Case(5, 9, 15, 5, refractory_steps=1),
    Case(5, 9, 15, 0, refractory_steps=1),
    Case(4, 3, 12, 1),  # one cluster
    Case(1, 1, 6, 3),
    Case(1, 3, 6, 0, state=False),
    Case(3, 4, 130, 130),  # the matrix of the cascade is in device memory
    Case(4, 9, 512, 64),  # a thread for each cluster
    Case(3, 7, 512, 16),  # two blocks of rows, several threads a cluster
    Case(3, 9, 512, 1),
    Case(4, 9, 512, 0),
    Case(2, 2, 9000, 0, refractory_steps=0),  # more neurons a thread than registers
    Case(2, 2, 1030, 1030),  # more clusters than threads
    Case(6, 5, 6, 3, keep_v=False, grad_last=False),
    Case(6, 5, 6, 3, keep_v=False),
    Case(6, 5, 6, 3, grad_last=False),
    Case(40, 2, 6, 3),
    *(Case(6, 5, 6, 3, surrogate=name) for name in SURROGATES if name != "nord_atan"),
    Case(6, 9, 24, 4, dtype=torch.float16),
    Case(6, 9, 24, 4, dtype=torch.bfloat16),
    Case(6, 9, 24, 0, dtype=torch.bfloat16, keep_v=False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).split(".")[-1] for part in case))
def test_outputs_and_gradients_equal_the_reference(device, case):
    Call(case, device).check()


@pytest.mark.parametrize("C", [0, 1, 3, 15, 30])
def test_thread_blocks_process_several_groups_of_rows_and_threads_several_neurons(device, monkeypatch, C):
    """Thread blocks of few threads, so that every loop has several iterations and the last group of rows is not full."""
    monkeypatch.setattr(kernels, "_BLOCK_THREADS", 8)
    monkeypatch.setattr(kernels, "_MAX_ROW_THREADS", 4)
    monkeypatch.setattr(kernels, "_NEURONS_PER_THREAD", 2)
    monkeypatch.setattr(kernels, "_RESIDENT_THREADS", {FORWARD: 16, BACKWARD: 16})
    for T, N in ((3, 11), (4, 6)):
        case = Case(T, N, 30, C)
        plan = kernels._plan(30, C)
        assert plan.per_thread > 1
        assert 2 * plan.rows < N  # two blocks
        Call(case, device).check()


def test_a_missing_barrier_is_detected(emulate, monkeypatch):
    """Without a barrier the threads of a block would race; the emulation gives a wrong result or an error."""
    monkeypatch.setattr(kernels, "_launch", emulate)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 1)
    for kernel in (FORWARD, BACKWARD):
        source = kernels._SOURCES[kernel]
        broken = source.replace("    __syncthreads();\n    return totals;", "    return totals;")
        assert broken != source
        monkeypatch.setitem(kernels._SOURCES, kernel, broken)
    with pytest.raises(AssertionError):
        Call(Case(6, 5, 6, 3), CPU).check()


@pytest.mark.parametrize("C", [0, 3])
def test_no_rows_give_empty_outputs_and_zero_gradients_without_a_launch(device, monkeypatch, C):
    monkeypatch.setattr(kernels, "_launch", lambda *call: pytest.fail("nothing to launch"))
    call = Call(Case(4, 0, 6, C), device)
    spikes, v_seq, *last = call.forward()
    assert spikes.shape == v_seq.shape == (4, 0, 6)
    assert all(part.shape == (0, 6) for part in last)
    grad_x, grad_v, grad_i, *shared = call.backward()
    assert grad_x.shape == (4, 0, 6)
    assert grad_v.shape == grad_i.shape == (0, 6)
    assert [part.shape for part in shared] == [(6,), (1,), (1,), (C, C)]
    assert all((part == 0).all() for part in shared)


def test_inputs_can_be_non_contiguous_and_betas_scalars(device):
    call = Call(Case(6, 5, 6, 3), device)
    contiguous_results = (*call.forward(), *call.backward())
    for name in ("x", "grad_spikes", "grad_v_seq"):
        tensor = getattr(call, name).permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert not tensor.is_contiguous()
        setattr(call, name, tensor)
    call.v, call.grad_v_last = call.v.t().contiguous().t(), call.grad_v_last.t().contiguous().t()
    call.weight = call.weight.t().contiguous().t()
    call.beta_mem, call.beta_syn = call.beta_mem[0], call.beta_syn[0]
    strided_results = (*call.forward(), *call.backward())
    assert all(torch.equal(a, b.view_as(a)) for a, b in zip(contiguous_results, strided_results, strict=True))
    assert strided_results[-3].shape == strided_results[-2].shape == ()


def test_the_same_call_is_bitwise_reproducible(device):
    call = Call(Case(5, 20, 30, 15), device)
    first, second = ((*call.forward(), *call.backward()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_threshold_below_v_reset_fires_while_refractory(device):
    call = Call(Case(5, 4, 6, 3), device)
    call.threshold[::2] = -0.2
    call.check()
    assert call.forward()[0][1:, :, ::2].float().mean() > 0.6


def test_a_neuron_at_v_reset_is_refractory_only_after_a_spike(device):
    """With v_reset = 0 a neuron at rest has the membrane potential of a refractory neuron, but not its gradient."""
    call = Call(Case(5, 4, 6, 3, state=False), device, v_reset=0.0)
    call.x[:, :2] = 0
    call.check()


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_far_from_the_threshold_the_surrogates_do_not_overflow(device, surrogate):
    call = Call(Case(3, 2, 6, 0, surrogate=surrogate), device)
    call.x = call.x * 1e6
    assert all(part.isfinite().all() for part in call.backward())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_types_round_as_torch_does(device, dtype):
    """Without leak and spikes the output is the membrane potential v, rounded once, also if v is tiny or not finite."""
    v = torch.cat(
        (torch.randn(500) * 10.0 ** torch.randint(-9, 6, (500,)), torch.tensor([65519.0, 65520.0, 1e-8, 0.0]))
    )
    v = torch.cat((v, torch.tensor([float("nan"), float("inf"), 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-12]))).to(device)
    N, D = 1, v.numel()
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    zeros = torch.zeros(N, D, device=device)
    threshold = torch.full((D,), 1e38, device=device)
    arguments = Arguments(zeros.to(dtype)[None], v[None], zeros, zeros.int(), threshold, one, zero, None, 0.0, 0)
    v_seq = kernels.forward(arguments, True)[1].flatten()
    number = ~v.isnan()
    assert torch.equal(v_seq[number], v.to(dtype)[number])
    assert v_seq[~number].isnan().all()


# ---- the code around the kernels


def test_the_launch_uses_torchs_device_and_stream(monkeypatch):
    """CuPy, here a replacement, uses its own device and stream by default."""
    calls: list[Any] = []

    class Guard:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __enter__(self):
            calls.append(self.arguments)

        def __exit__(self, *error):
            calls.append("end")

    class RawModule:
        def __init__(self, code, options):
            calls.append(options)

        def get_function(self, name):
            return lambda grid, block, args: calls.append((name, grid, block, args))

    cuda = types.SimpleNamespace(
        Device=lambda index: Guard("device", index), ExternalStream=lambda *stream: Guard("stream", *stream)
    )
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(RawModule=RawModule, cuda=cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(multi_processor_count=132)
    )
    tensor = torch.ones(3)
    kernels._compile.cache_clear()
    for index in (0, None):
        kernels._launch(FORWARD, ("-DA=1",), torch.device("cuda", index), 5, 64, [tensor, None, 1.5, 7])
    kernels._compile.cache_clear()
    launch = (FORWARD, (5,), (64,), (tensor.data_ptr(), 0, 1.5, 7))
    for index in (0, 1):
        assert calls[:6] == [
            *(("device", index), ("stream", 77, index), (*kernels._FLAGS, "-DA=1"), launch),
            *("end", "end"),
        ]
        del calls[:6]
    assert "-fmad=false" in kernels._FLAGS
    assert kernels._multiprocessors(torch.device("cuda", 0)) == 132


def test_every_plan_of_threads_fits_the_device_and_covers_every_neuron():
    for D in (1, 2, 6, 7, 31, 64, 96, 130, 512, 768, 1000, 4096, 20000):
        for C in (C for C in (0, 1, 2, 3, 7, 16, 64, 130, 512, 1000, 4096) if C == 0 or D % C == 0):
            plan = kernels._plan(D, C)
            assert 1 <= plan.threads <= kernels._MAX_ROW_THREADS
            assert plan.groups == 1 or plan.lanes == plan.clusters
            shares = -(-plan.clusters // plan.lanes)
            assert plan.per_thread == shares * -(-(D // plan.clusters) // plan.groups)
            padded = -(-C // 4) * 4
            coupling = 4 * C * (C | 1) if kernels._coupling_is_shared(C) else 4
            assert 4 * (2 * plan.rows * padded + plan.threads) + coupling <= 48 * 1024
            assert kernels.fits(D, C) == (True, "runs")


def test_too_many_clusters_raise_with_a_reason():
    runs, reason = kernels.fits(5000, 5000)
    assert not runs
    assert "at most 4096 clusters, got 5000" in reason
