"""Every op on every backend equals its reference in every mode in which PyTorch can call its public function.

An eager call does not use torch's dispatcher, so an op that is correct there can be wrong under torch.compile, a dispatch
mode or with a tensor subclass. A platform is where kernels run: the CPU, Triton's interpreter, CUDA source compiled as C++,
or a GPU. The test run ends with a summary of what ran on each platform.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils.checkpoint
from helpers import relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from nord_snn.ops import (
    ConvGeometry,
    associative_cascade,
    associative_lif,
    leaky_clamp,
    pack_spikes,
    resonance,
    resonance_cached,
    reward_from_loss,
    reward_modulated_stdp,
    spike,
    stdp,
    triplet_stdp,
)
from nord_snn.ops.cached_resonance.packing import unpack_spikes
from nord_snn.ops.clamp.reference import reference as clamp_reference
from nord_snn.ops.dispatch import OPS, Backend, Support
from nord_snn.ops.lif.reference import AssociativeLIFState
from nord_snn.ops.lif.reference import reference as lif_reference
from nord_snn.ops.plasticity.correlation import dense
from nord_snn.ops.plasticity.reference import Pairing, rest
from nord_snn.ops.plasticity.reference import reference as stdp_reference
from nord_snn.ops.surrogate import resolve_surrogate
from nord_snn.ops.topk_resonance.reference import reference as resonance_reference

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]


class Case(NamedTuple):
    """One call of an op.

    Attributes:
        inputs: function that returns tensors by name; those that are floating are differentiated.
        call: the public op on ``(inputs, backend)``.
        reference: the op of ``reference.py`` on ``inputs``.
    """

    inputs: Callable[[], Tensors]
    call: Callable[[Tensors, str], Outputs]
    reference: Callable[[Tensors], Outputs]


# --- the cases: odd sizes, with and without state, several memory layouts


def lif(
    T: int, N: int, D: int, C: int | None, *, state: bool, membranes: bool = True, layout: str = "contiguous"
) -> Case:
    """Return a case of the neuron; ``membranes`` is ``return_v_seq``, ``layout`` is the memory layout of x."""

    def inputs() -> Tensors:
        x = {
            "contiguous": lambda: 2 * torch.randn(T, N, D),
            "transposed": lambda: 2 * torch.randn(D, N, T).permute(2, 1, 0),
            "strided": lambda: 2 * torch.randn(T, N, 2 * D)[..., ::2],
        }[layout]()
        tensors = {
            "x": x,
            "threshold": torch.rand(D) + 0.1,
            "beta_mem": torch.tensor([0.8]),
            "beta_syn": torch.tensor([0.5]),
        }
        if C is not None:
            tensors |= {"weight": torch.rand(C, C), "gain": torch.rand(C) + 0.5}
        if state:
            refractory = torch.randint(0, 3, (N, D), dtype=torch.int32)
            tensors |= {"v": torch.randn(N, D) / 2, "i_syn": torch.randn(N, D), "refractory": refractory}
        return tensors

    def initial_state(tensors: Tensors) -> AssociativeLIFState | None:
        return AssociativeLIFState(tensors["v"], tensors["i_syn"], tensors["refractory"]) if state else None

    def call(tensors: Tensors, backend: str) -> Outputs:
        spikes, v_seq, last = associative_lif(
            tensors["x"],
            initial_state(tensors),
            threshold=tensors["threshold"],
            beta_mem=tensors["beta_mem"],
            beta_syn=tensors["beta_syn"],
            cascade_weight=tensors.get("weight"),
            cascade_gain=tensors.get("gain"),
            return_v_seq=membranes,
            backend=backend,
        )
        assert (v_seq is not None) == membranes
        return (spikes, *([] if v_seq is None else [v_seq]), last.v, last.i_syn, last.refractory)

    def reference(tensors: Tensors) -> Outputs:
        zero = torch.zeros_like(tensors["x"][0])
        spikes, v_seq, last = lif_reference(
            tensors["x"],
            initial_state(tensors) or AssociativeLIFState(zero, zero, zero.int()),
            tensors["threshold"],
            tensors["beta_mem"],
            tensors["beta_syn"],
            tensors.get("weight"),
            tensors.get("gain"),
            -0.1,  # v_reset
            2,  # refractory_steps
            resolve_surrogate("nord_atan", 4.0),
        )
        return (spikes, *([v_seq] if membranes else []), *last)

    return Case(inputs, call, reference)


def clamp(*shape: int, adds: bool, layout: str = "contiguous") -> Case:
    """Return a case of the leaky clamp: of ``x + gain * branch`` if ``adds``, otherwise of ``x``."""
    D = shape[-1]

    def inputs() -> Tensors:
        x = torch.randn(shape) if layout == "contiguous" else torch.randn(*shape[:-1], 2 * D)[..., ::2]
        tensors = {"x": x, "leak": torch.rand(D), "floor": -torch.rand(D)}
        return tensors | ({"branch": torch.randn(shape), "gain": torch.rand(D)} if adds else {})

    def call(tensors: Tensors, backend: str) -> Outputs:
        added = (tensors.get("branch"), tensors.get("gain"))
        return (leaky_clamp(tensors["x"], *added, leak=tensors["leak"], floor=tensors["floor"], backend=backend),)

    def reference(tensors: Tensors) -> Outputs:
        added = (tensors.get("branch"), tensors.get("gain"))
        return (clamp_reference(tensors["x"], *added, tensors["leak"], tensors["floor"]),)

    return Case(inputs, call, reference)


def resonance_case(
    T: int,
    B: int,
    S: int,
    D: int,
    V: int,
    H: int,
    *,
    top_k: int,
    recency: bool,
    causal: bool,
    layout: str = "contiguous",
) -> Case:
    """Return a case of the resonance."""

    def inputs() -> Tensors:
        q, k = ((torch.rand(T, B, S, D) < 0.4).float() for _ in range(2))
        if layout == "transposed":
            q, k = (x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (q, k))
        tensors = {"q": q, "k": k, "v": torch.randn(B, S, V), "temperature": torch.tensor([0.7])}
        return tensors | ({"recency": torch.rand(H) / 4} if recency else {})

    def call(tensors: Tensors, backend: str) -> Outputs:
        slope = tensors.get("recency")
        sizes = {"n_heads": H, "top_k": top_k, "causal": causal, "backend": backend}
        return (
            resonance(
                tensors["q"], tensors["k"], tensors["v"], temperature=tensors["temperature"], recency=slope, **sizes
            ),
        )

    def reference(tensors: Tensors) -> Outputs:
        q, k, v, temperature = (tensors[name] for name in ("q", "k", "v", "temperature"))
        return (resonance_reference(q, k, v, H, top_k, temperature, tensors.get("recency"), causal),)

    return Case(inputs, call, reference)


def cached(T: int, B: int, S: int, D: int, V: int, H: int, *, new: int, top_k: int) -> Case:
    """Return a case of the resonance of the last ``new`` positions."""

    def inputs() -> Tensors:
        q, k = ((torch.rand(T, B, S, D) < 0.4).float() for _ in range(2))
        return {"q": q, "k": k, "v": torch.randn(B, S, V), "recency": torch.rand(H) / 4}

    def call(tensors: Tensors, backend: str) -> Outputs:
        with torch.no_grad():
            keys = pack_spikes(tensors["k"], H, trusted=True)
            values = tensors["v"].unflatten(-1, (H, -1)).transpose(1, 2)
            sizes = {"top_k": top_k, "temperature": 0.7, "recency": tensors["recency"], "trusted": True}
            return (resonance_cached(tensors["q"][:, :, S - new :], keys, values, **sizes, backend=backend),)

    def reference(tensors: Tensors) -> Outputs:
        whole = resonance_reference(tensors["q"], tensors["k"], tensors["v"], H, top_k, 0.7, tensors["recency"], True)
        return (whole[:, S - new :].detach(),)

    return Case(inputs, call, reference)


def plasticity(T: int, N: int, n_in: int, n_out: int) -> Case:
    """Return a case of STDP, which has no gradient."""

    def inputs() -> Tensors:
        return {"pre": (torch.rand(T, N, n_in) < 0.4).float(), "post": (torch.rand(T, N, n_out) < 0.4).float()}

    def call(tensors: Tensors, backend: str) -> Outputs:
        with torch.no_grad():
            delta, last = stdp(tensors["pre"], tensors["post"], tau_plus=10.0, tau_minus=5.0)
        return (delta, last.pre, last.post)

    def reference(tensors: Tensors) -> Outputs:
        pre, post = tensors["pre"].detach(), tensors["post"].detach()
        decays = [float(torch.tensor(-1 / tau, dtype=torch.float64).exp()) for tau in (10.0, 5.0)]
        pairing = Pairing(*decays, 0.005, 0.005)
        plus, minus, last = stdp_reference(pre, post, rest(pre, post, pre.dtype, False), pairing, dense)
        return (plus - minus, last.pre, last.post)

    return Case(inputs, call, reference)


CASES: dict[str, dict[str, Case]] = {
    "associative_lif": {
        "cascade, state": lif(3, 5, 6, 3, state=True),
        "rest, one neuron": lif(1, 1, 1, None, state=False, membranes=False),
        "no cascade, state, transposed": lif(4, 3, 13, None, state=True, layout="transposed"),
        "one cluster, strided": lif(7, 2, 10, 1, state=False, layout="strided"),
        "a cluster each": lif(2, 3, 7, 7, state=True, membranes=False),
    },
    "leaky_clamp": {
        "with a sum": clamp(3, 5, 7, adds=True),
        "alone, strided": clamp(4, 13, adds=False, layout="strided"),
        "one number": clamp(1, 1, adds=True),
    },
    "resonance": {
        "recency, wide values": resonance_case(3, 2, 9, 6, 10, 2, top_k=4, recency=True, causal=True),
        "both ways, transposed": resonance_case(
            2, 1, 7, 6, 6, 3, top_k=3, recency=False, causal=False, layout="transposed"
        ),
        "one position": resonance_case(1, 1, 1, 1, 1, 1, top_k=5, recency=True, causal=True),
    },
    "resonance_cached": {
        "three new": cached(3, 2, 9, 6, 10, 2, new=3, top_k=4),
        "one new": cached(1, 1, 5, 3, 3, 3, new=1, top_k=9),
    },
    "stdp": {"several steps": plasticity(5, 3, 4, 7), "one step": plasticity(1, 1, 1, 1)},
}
FIRST = {op: next(iter(cases)) for op, cases in CASES.items()}

#: Platform -> (op, backend) of the kernels that run there.
PLATFORMS = {
    "cpu": [(op, "torch") for op in CASES]
    + [(op, "numba") for op in ("associative_lif", "leaky_clamp", "resonance", "resonance_cached")],
    "interpreter": [("associative_lif", "triton")],
    "cuda-as-c++": [("associative_lif", "cupy")],
    "gpu": [(op, "torch") for op in CASES] + [("associative_lif", "triton"), ("associative_lif", "cupy")],
}
WITHOUT_GRADIENT = ("resonance_cached", "stdp")
#: (op, backend) whose calls are differentiated by autograd: they are not registered with torch.library and have a second
#: derivative. The resonances are registered on every backend, because blocks of queries write in place.
PLAIN = [("associative_lif", "torch"), ("leaky_clamp", "torch"), ("stdp", "torch")]
MODES = ("eager", "opcheck", "compiled", "autocast", "subclass", "second-derivative", "nan-memory", "default-device")


# --- the platforms


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, platform: str, backend: str) -> str:
    """Prepare a platform and return the device of its tensors."""
    if backend == "numba":
        pytest.importorskip("numba", reason="Numba is not installed")
    if platform == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if backend == "cupy":
            pytest.importorskip("cupy", reason="CuPy is not installed")
        return "cuda"
    if platform == "interpreter":
        _run_on_cpu(monkeypatch, "triton", request.getfixturevalue("interpreter"))
    if platform == "cuda-as-c++":
        kernels = importlib.import_module("nord_snn.ops.lif.cupy")
        monkeypatch.setattr(kernels, "_launch", request.getfixturevalue("emulate"))
        monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 1)
        _run_on_cpu(monkeypatch, "cupy", kernels)
    return "cpu"


def _run_on_cpu(monkeypatch: pytest.MonkeyPatch, backend: str, module: Any) -> None:
    """Make a GPU backend run the functions of a module on CPU tensors."""
    runs = Support(True, "runs on the CPU in this test")
    monkeypatch.setitem(
        OPS["associative_lif"], backend, Backend("cpu", lambda: runs, lambda call: runs, lambda: module)
    )
    monkeypatch.setattr(importlib.import_module("nord_snn.ops.dispatch"), "_choice_cache", {})


# --- the modes


def on(device: str, case: Case, *, gradient: bool) -> Tensors:
    """Return the inputs of a case on a device, the same in every call."""
    torch.manual_seed(1)
    return {name: x.to(device).requires_grad_(gradient and x.is_floating_point()) for name, x in case.inputs().items()}


def run(function: Callable[[Tensors], Outputs], tensors: Tensors) -> tuple[Outputs, Tensors]:
    """Return the outputs, and the gradients of a weighted sum of the outputs."""
    outputs = function(tensors)
    generator = torch.Generator().manual_seed(2)
    smooth = [x for x in outputs if x.requires_grad]
    leaves = {name: x for name, x in tensors.items() if x.requires_grad}
    if not smooth or not leaves:
        return outputs, {}
    weights = [torch.randn(x.shape, generator=generator, device="cpu").to(x.device) for x in smooth]
    loss = sum((x * weight).sum() for x, weight in zip(smooth, weights, strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return outputs, dict(zip(leaves, gradients, strict=True))


def check(got: tuple[Outputs, Tensors], expected: tuple[Outputs, Tensors]) -> None:
    """Check that outputs and gradients agree, spikes exactly."""
    for output, expected_output in zip(got[0], expected[0], strict=True):
        assert output.shape == expected_output.shape
        assert output.dtype == expected_output.dtype
        if expected_output.is_floating_point() and not _is_spikes(expected_output):
            assert torch.allclose(output, expected_output, atol=1e-5)
        else:
            assert torch.equal(output, expected_output)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert got[1][name].shape == gradient.shape
        assert relative_error(got[1][name], gradient) < 1e-4, name


def _is_spikes(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def eager(op: str, backend: str, device: str) -> None:
    """Compare all cases with the reference."""
    for case in CASES[op].values():
        gradient = op not in WITHOUT_GRADIENT
        expected = run(case.reference, on(device, case, gradient=gradient))
        check(
            run(lambda tensors, case=case: case.call(tensors, backend), on(device, case, gradient=gradient)), expected
        )


class Calls(TorchDispatchMode):
    """Mode that records the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Record the function and run it."""
        if function.namespace == "nord_snn":
            self.seen.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def opcheck(op: str, backend: str, device: str) -> None:
    """Check schema, fake implementation and gradients of the op and its backward pass with ``torch.library.opcheck``."""
    for case in CASES[op].values():
        with Calls() as calls:
            run(
                lambda tensors, case=case: case.call(tensors, backend),
                on(device, case, gradient=op not in WITHOUT_GRADIENT),
            )
        expected = [f"nord_snn.{op}.default"] + ([] if op in WITHOUT_GRADIENT else [f"nord_snn.{op}_backward.default"])
        assert [str(function) for function, *_ in calls.seen] == expected
        for function, arguments, options in calls.seen:
            backward = str(function).endswith("_backward.default")
            smooth = not backward and op not in WITHOUT_GRADIENT
            arguments = tree_map(
                lambda x, smooth=smooth: (
                    x.detach().clone().requires_grad_(smooth and x.is_floating_point()) if isinstance(x, Tensor) else x
                ),
                arguments,
            )
            tests = ("test_schema", "test_faketensor") if not smooth else None
            torch.library.opcheck(function, arguments, options, **({} if tests is None else {"test_utils": tests}))


def compiled(op: str, backend: str, device: str) -> None:
    """Compile forward and backward pass to one graph; other tests compile whole blocks with Inductor."""
    for case in CASES[op].values():
        torch._dynamo.reset()
        gradient = op not in WITHOUT_GRADIENT
        expected = run(case.reference, on(device, case, gradient=gradient))
        call = torch.compile(
            lambda tensors, case=case: case.call(tensors, backend), fullgraph=True, backend="aot_eager"
        )
        check(run(call, on(device, case, gradient=gradient)), expected)


def autocast(op: str, backend: str, device: str) -> None:
    """Check that results under autocast equal those of the reference in float32."""
    case = CASES[op][FIRST[op]]
    expected = run(case.reference, on(device, case, gradient=op not in WITHOUT_GRADIENT))

    def call(tensors: Tensors) -> Outputs:
        with torch.autocast(device, dtype=torch.bfloat16):
            return case.call(tensors, backend)

    check(run(call, on(device, case, gradient=op not in WITHOUT_GRADIENT)), expected)


def default_device(op: str, backend: str, device: str) -> None:
    """Check that tensors are created on the device of the input also under another default device."""
    for case in CASES[op].values():
        gradient = op not in WITHOUT_GRADIENT
        tensors = on(device, case, gradient=gradient)
        expected = run(case.reference, on(device, case, gradient=gradient))
        with torch.device("meta"):
            got = run(lambda tensors, case=case: case.call(tensors, backend), tensors)
        check(got, expected)


class WrappedTensor(Tensor):
    """Tensor subclass that wraps a tensor, as those of quantisation and distributed training do."""

    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner: Tensor) -> "WrappedTensor":
        """Create a subclass with the properties of the inner tensor."""
        strides = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device, **strides)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Run the function on the inner tensors."""
        cls.seen.append(str(function))
        unwrap = lambda x: x.inner if isinstance(x, WrappedTensor) else x  # noqa: E731
        out = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda x: WrappedTensor(x) if isinstance(x, Tensor) else x, out)


def subclass(op: str, backend: str, device: str) -> None:
    """Check that a subclass in any input receives the call of the op, and that results are equal."""
    case = CASES[op][FIRST[op]]
    plain = on(device, case, gradient=False)
    expected = case.reference(plain)
    smooth = [name for name, x in plain.items() if x.is_floating_point()]
    for wrapped_names in (plain.keys(), smooth[-1:]):  # all inputs, and a single one
        WrappedTensor.seen.clear()
        outputs = case.call(
            {name: WrappedTensor(x) if name in wrapped_names else x for name, x in plain.items()}, backend
        )
        if (op, backend) not in PLAIN:
            assert f"nord_snn.{op}.default" in WrappedTensor.seen
        for output, expected_output in zip(outputs, expected, strict=True):
            inner = output.inner if isinstance(output, WrappedTensor) else output
            assert torch.allclose(inner, expected_output, atol=1e-5)


def second_derivative(op: str, backend: str, device: str) -> None:
    """Check that a second derivative is correct or raises an error that names an alternative."""
    case = CASES[op][FIRST[op]]

    def twice(function: Callable[[Tensors], Outputs]) -> Outputs:
        tensors = on(device, case, gradient=True)
        leaves = [x for x in tensors.values() if x.requires_grad]
        outputs = [x for x in function(tensors) if x.requires_grad]
        loss = sum(x.square().sum() for x in outputs)
        first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True, allow_unused=True)
        penalty = sum(x.square().sum() for x in first if x.requires_grad)
        return torch.autograd.grad(penalty, leaves, materialize_grads=True, allow_unused=True)

    if (op, backend) in PLAIN or op in ("resonance", "leaky_clamp"):
        for got, expected in zip(
            twice(lambda tensors: case.call(tensors, backend)), twice(case.reference), strict=True
        ):
            assert relative_error(got, expected) < 1e-4
        return
    with pytest.raises(RuntimeError, match=f"the kernels of {op} have no second derivative: .* has one"):
        twice(lambda tensors: case.call(tensors, backend))


def applies(op: str, backend: str, mode: str) -> bool:
    """Return whether a mode applies: plain PyTorch is not registered, and ops without gradient have no second derivative."""
    if mode == "opcheck":
        return (op, backend) not in PLAIN
    return mode != "second-derivative" or op not in WITHOUT_GRADIENT


def marks(platform: str, mode: str) -> list[pytest.MarkDecorator]:
    """Return the mark ``gpu`` for a GPU, ``quick`` for modes on the CPU that need no tracing or compilation."""
    if platform == "gpu":
        return [pytest.mark.gpu]
    return [pytest.mark.quick] if platform == "cpu" and mode not in ("opcheck", "compiled") else []


ALL_CASES = [
    pytest.param(platform, op, backend, mode, id=f"{platform}/{op}/{backend}/{mode}", marks=marks(platform, mode))
    for platform, pairs in PLATFORMS.items()
    for op, backend in pairs
    for mode in MODES
    if applies(op, backend, mode)
]


@pytest.mark.parametrize(("platform", "op", "backend", "mode"), ALL_CASES)
def test_it_conforms(
    request: pytest.FixtureRequest, device: str, platform: str, op: str, backend: str, mode: str
) -> None:
    if mode == "nan-memory":
        request.getfixturevalue("memory_full_of_nan")
    modes = {"opcheck": opcheck, "compiled": compiled, "autocast": autocast, "subclass": subclass}
    modes |= {"second-derivative": second_derivative, "eager": eager, "nan-memory": eager}
    modes["default-device"] = default_device
    modes[mode](op, backend, device)


def _geometry() -> ConvGeometry:
    return ConvGeometry(kernel_size=(3,), stride=(1,), padding=((1, 1),), dilation=(1,))


#: Functions that are not called by the ops above.
OTHER_FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "associative_cascade": lambda x: associative_cascade(x, x[0, 0, :2, None].expand(2, 2), x[0, 0, :2]),
    "pack_spikes": lambda x: pack_spikes(x, 2),
    "unpack_spikes": lambda x: unpack_spikes((x * 255).byte(), 1, 4),
    "spike": spike,
    "stdp of a convolution": lambda x: stdp(x, x, geometry=_geometry()),
    "triplet_stdp": lambda x: triplet_stdp(x, x),
    "reward_modulated_stdp": lambda x: reward_modulated_stdp(x, x, x[0, :, 0]),
    "reward_modulated_stdp with eligibility": lambda x: reward_modulated_stdp(x, x, 0.5, tau_eligibility=5.0),
    "stdp_reference": lambda x: stdp_reference(x, x, rest(x, x, x.dtype), Pairing(0.5, 0.5, 1.0, 1.0), dense)[:2],
    "reward_from_loss": lambda x: reward_from_loss(x, 1.0),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_other_functions_make_tensors_on_the_device_of_the_input(name: str) -> None:
    x = (torch.rand(3, 2, 4, 8, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    x = x if "conv" in name or "pack" in name else x.flatten(2)
    expected = OTHER_FUNCTIONS[name](x)
    with torch.device("meta"):
        got = OTHER_FUNCTIONS[name](x)
    for output, expected_output in zip(tree_flatten(got)[0], tree_flatten(expected)[0], strict=True):
        assert output is expected_output is None or torch.equal(output, expected_output)


def test_every_op_and_backend_is_in_the_table() -> None:
    """Otherwise a new op or kernel would not be tested."""
    known = {(op, backend) for pairs in PLATFORMS.values() for op, backend in pairs}
    for op, backends in OPS.items():
        assert {(op, backend) for backend in backends} <= known
    for name in dir(torch.ops.nord_snn):  # at least the ops called so far, and the namespace's attribute "name"
        assert name.removesuffix("_backward") in {*CASES, "name"} or name.startswith("_")


@pytest.mark.parametrize("mode", ["opcheck", "compiled"])
def test_outputs_that_share_memory_are_detected(interpreter: Any, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Outputs that are views of one tensor work in an eager call but not under opcheck and torch.compile."""
    backward = interpreter.backward

    def aliased(*arguments: Any) -> tuple[Tensor, ...]:
        *others, of_beta_mem, of_beta_syn, of_cascade = backward(*arguments)  # gradients
        shared = torch.cat((of_beta_mem, of_beta_syn))
        return (*others, shared[:1], shared[1:], of_cascade)

    monkeypatch.setattr(interpreter, "backward", aliased)
    _run_on_cpu(monkeypatch, "triton", interpreter)
    eager("associative_lif", "triton", "cpu")
    with pytest.raises(Exception, match="may not alias"):
        {"opcheck": opcheck, "compiled": compiled}[mode]("associative_lif", "triton", "cpu")


def test_first_derivatives_with_a_graph_pass_through_activation_checkpointing() -> None:
    """Activation checkpointing returns saved tensors once; with ``create_graph=True`` they must not be read twice."""
    x, leak, floor = torch.randn(4, 8, requires_grad=True), torch.rand(8), -torch.rand(8)

    def loss(checkpointed: bool) -> Tensor:
        run = lambda x: leaky_clamp(x, leak=leak, floor=floor)  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
        return y.square().sum()

    expected, got = (torch.autograd.grad(loss(c), x, create_graph=True)[0] for c in (False, True))
    assert torch.equal(expected, got)
