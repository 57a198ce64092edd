"""Tests of every op on every backend through its public function, in every mode in which PyTorch can call it.

The eager call goes around torch's dispatcher, so an op that is right there may still be wrong under torch.compile, for a
dispatch mode or a tensor subclass. A lane is a place where kernels run: the CPU, Triton's interpreter, CUDA source compiled
as C++, and a GPU. What was run, and which lane ran nothing, stands in the summary at the end of the test run.
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
        inputs: tensors by name; those that are floating are differentiated.
        call: the public op on ``(inputs, backend)``.
        reference: the same from ``reference.py``.
    """

    inputs: Callable[[], Tensors]
    call: Callable[[Tensors, str], Outputs]
    reference: Callable[[Tensors], Outputs]


# --- the cases: odd sizes, with and without state, strides of every kind


def lif(
    T: int, N: int, D: int, C: int | None, *, state: bool, membranes: bool = True, layout: str = "contiguous"
) -> Case:
    """Return a case of the neuron; ``layout`` is that of x."""

    def inputs() -> Tensors:
        x = {
            "contiguous": lambda: 2 * torch.randn(T, N, D),
            "transposed": lambda: 2 * torch.randn(D, N, T).permute(2, 1, 0),
            "strided": lambda: 2 * torch.randn(T, N, 2 * D)[..., ::2],
        }[layout]()
        made = {
            "x": x,
            "threshold": torch.rand(D) + 0.1,
            "beta_mem": torch.tensor([0.8]),
            "beta_syn": torch.tensor([0.5]),
        }
        if C is not None:
            made |= {"weight": torch.rand(C, C), "gain": torch.rand(C) + 0.5}
        if state:
            refractory = torch.randint(0, 3, (N, D), dtype=torch.int32)
            made |= {"v": torch.randn(N, D) / 2, "i_syn": torch.randn(N, D), "refractory": refractory}
        return made

    def before(given: Tensors) -> AssociativeLIFState | None:
        return AssociativeLIFState(given["v"], given["i_syn"], given["refractory"]) if state else None

    def call(given: Tensors, backend: str) -> Outputs:
        spikes, v_seq, last = associative_lif(
            given["x"],
            before(given),
            threshold=given["threshold"],
            beta_mem=given["beta_mem"],
            beta_syn=given["beta_syn"],
            cascade_weight=given.get("weight"),
            cascade_gain=given.get("gain"),
            return_v_seq=membranes,
            backend=backend,
        )
        assert (v_seq is not None) == membranes
        return (spikes, *([] if v_seq is None else [v_seq]), last.v, last.i_syn, last.refractory)

    def reference(given: Tensors) -> Outputs:
        zero = torch.zeros_like(given["x"][0])
        spikes, v_seq, last = lif_reference(
            given["x"],
            before(given) or AssociativeLIFState(zero, zero, zero.int()),
            given["threshold"],
            given["beta_mem"],
            given["beta_syn"],
            given.get("weight"),
            given.get("gain"),
            -0.1,
            2,
            resolve_surrogate("nord_atan", 4.0),
        )
        return (spikes, *([v_seq] if membranes else []), *last)

    return Case(inputs, call, reference)


def clamp(*shape: int, adds: bool, layout: str = "contiguous") -> Case:
    """Return a case of the leaky clamp, alone or with the residual sum."""
    D = shape[-1]

    def inputs() -> Tensors:
        x = torch.randn(shape) if layout == "contiguous" else torch.randn(*shape[:-1], 2 * D)[..., ::2]
        made = {"x": x, "leak": torch.rand(D), "floor": -torch.rand(D)}
        return made | ({"branch": torch.randn(shape), "gain": torch.rand(D)} if adds else {})

    def call(given: Tensors, backend: str) -> Outputs:
        added = (given.get("branch"), given.get("gain"))
        return (leaky_clamp(given["x"], *added, leak=given["leak"], floor=given["floor"], backend=backend),)

    def reference(given: Tensors) -> Outputs:
        added = (given.get("branch"), given.get("gain"))
        return (clamp_reference(given["x"], *added, given["leak"], given["floor"]),)

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
        made = {"q": q, "k": k, "v": torch.randn(B, S, V), "temperature": torch.tensor([0.7])}
        return made | ({"recency": torch.rand(H) / 4} if recency else {})

    def call(given: Tensors, backend: str) -> Outputs:
        slope = given.get("recency")
        sizes = {"n_heads": H, "top_k": top_k, "causal": causal, "backend": backend}
        return (
            resonance(given["q"], given["k"], given["v"], temperature=given["temperature"], recency=slope, **sizes),
        )

    def reference(given: Tensors) -> Outputs:
        q, k, v, temperature = (given[name] for name in ("q", "k", "v", "temperature"))
        return (resonance_reference(q, k, v, H, top_k, temperature, given.get("recency"), causal),)

    return Case(inputs, call, reference)


def cached(T: int, B: int, S: int, D: int, V: int, H: int, *, new: int, top_k: int) -> Case:
    """Return a case of the resonance of the last ``new`` positions."""

    def inputs() -> Tensors:
        q, k = ((torch.rand(T, B, S, D) < 0.4).float() for _ in range(2))
        return {"q": q, "k": k, "v": torch.randn(B, S, V), "recency": torch.rand(H) / 4}

    def call(given: Tensors, backend: str) -> Outputs:
        with torch.no_grad():
            keys = pack_spikes(given["k"], H, trusted=True)
            values = given["v"].unflatten(-1, (H, -1)).transpose(1, 2)
            sizes = {"top_k": top_k, "temperature": 0.7, "recency": given["recency"], "trusted": True}
            return (resonance_cached(given["q"][:, :, S - new :], keys, values, **sizes, backend=backend),)

    def reference(given: Tensors) -> Outputs:
        whole = resonance_reference(given["q"], given["k"], given["v"], H, top_k, 0.7, given["recency"], True)
        return (whole[:, S - new :].detach(),)

    return Case(inputs, call, reference)


def plasticity(T: int, N: int, n_in: int, n_out: int) -> Case:
    """Return a case of STDP, which has no gradient."""

    def inputs() -> Tensors:
        return {"pre": (torch.rand(T, N, n_in) < 0.4).float(), "post": (torch.rand(T, N, n_out) < 0.4).float()}

    def call(given: Tensors, backend: str) -> Outputs:
        with torch.no_grad():
            delta, last = stdp(given["pre"], given["post"], tau_plus=10.0, tau_minus=5.0)
        return (delta, last.pre, last.post)

    def reference(given: Tensors) -> Outputs:
        pre, post = given["pre"].detach(), given["post"].detach()
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

#: Lane -> the kernels that run there. The GPU is to run all of them.
LANES = {
    "cpu": [(op, "torch") for op in CASES]
    + [(op, "numba") for op in ("associative_lif", "leaky_clamp", "resonance", "resonance_cached")],
    "interpreter": [("associative_lif", "triton")],
    "cuda-as-c++": [("associative_lif", "cupy")],
    "gpu": [(op, "torch") for op in CASES] + [("associative_lif", "triton"), ("associative_lif", "cupy")],
}
WITHOUT_GRADIENT = ("resonance_cached", "stdp")
#: Those that are plain PyTorch, and so need no registration and have a second derivative.
PLAIN = [("associative_lif", "torch"), ("leaky_clamp", "torch"), ("stdp", "torch")]
MODES = ("eager", "opcheck", "compiled", "autocast", "subclass", "second-derivative", "nan-memory", "default-device")


# --- the lanes


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, lane: str, backend: str) -> str:
    """Prepare a lane and return the device of its tensors."""
    if backend == "numba":
        pytest.importorskip("numba", reason="Numba is not installed")
    if lane == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if backend == "cupy":
            pytest.importorskip("cupy", reason="CuPy is not installed")
        return "cuda"
    if lane == "interpreter":
        _stand_in(monkeypatch, "triton", request.getfixturevalue("interpreter"))
    if lane == "cuda-as-c++":
        kernels = importlib.import_module("nord_snn.ops.lif.cupy")
        monkeypatch.setattr(kernels, "_launch", request.getfixturevalue("emulate"))
        monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 1)
        _stand_in(monkeypatch, "cupy", kernels)
    return "cpu"


def _stand_in(monkeypatch: pytest.MonkeyPatch, backend: str, module: Any) -> None:
    """Make a GPU backend accept tensors on the CPU."""
    runs = Support(True, "stands in for a GPU")
    monkeypatch.setitem(
        OPS["associative_lif"], backend, Backend("cpu", lambda: runs, lambda call: runs, lambda: module)
    )
    monkeypatch.setattr(importlib.import_module("nord_snn.ops.dispatch"), "_choice_cache", {})


# --- the modes


def on(device: str, case: Case, *, gradient: bool) -> Tensors:
    """Return the same inputs in every call."""
    torch.manual_seed(1)
    return {name: x.to(device).requires_grad_(gradient and x.is_floating_point()) for name, x in case.inputs().items()}


def run(function: Callable[[Tensors], Outputs], given: Tensors) -> tuple[Outputs, Tensors]:
    """Return the outputs, and the gradients of a weighted sum of them."""
    outputs = function(given)
    generator = torch.Generator().manual_seed(2)
    smooth = [x for x in outputs if x.requires_grad]
    leaves = {name: x for name, x in given.items() if x.requires_grad}
    if not smooth or not leaves:
        return outputs, {}
    weights = [torch.randn(x.shape, generator=generator, device="cpu").to(x.device) for x in smooth]
    loss = sum((x * weight).sum() for x, weight in zip(smooth, weights, strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return outputs, dict(zip(leaves, gradients, strict=True))


def check(got: tuple[Outputs, Tensors], expected: tuple[Outputs, Tensors]) -> None:
    """Check that outputs and gradients agree, spikes exactly."""
    for mine, theirs in zip(got[0], expected[0], strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        if theirs.is_floating_point() and not _is_spikes(theirs):
            assert torch.allclose(mine, theirs, atol=1e-5)
        else:
            assert torch.equal(mine, theirs)
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
        check(run(lambda given, case=case: case.call(given, backend), on(device, case, gradient=gradient)), expected)


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
                lambda given, case=case: case.call(given, backend),
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
    """Compile forward and backward to one graph; Inductor's code is tested with whole blocks."""
    for case in CASES[op].values():
        torch._dynamo.reset()
        gradient = op not in WITHOUT_GRADIENT
        expected = run(case.reference, on(device, case, gradient=gradient))
        call = torch.compile(lambda given, case=case: case.call(given, backend), fullgraph=True, backend="aot_eager")
        check(run(call, on(device, case, gradient=gradient)), expected)


def autocast(op: str, backend: str, device: str) -> None:
    """Check that states and sums are float32 under autocast."""
    case = CASES[op][FIRST[op]]
    expected = run(case.reference, on(device, case, gradient=op not in WITHOUT_GRADIENT))

    def call(given: Tensors) -> Outputs:
        with torch.autocast(device, dtype=torch.bfloat16):
            return case.call(given, backend)

    check(run(call, on(device, case, gradient=op not in WITHOUT_GRADIENT)), expected)


def default_device(op: str, backend: str, device: str) -> None:
    """Check that tensors are made on the device of the input, whatever the default device is."""
    for case in CASES[op].values():
        gradient = op not in WITHOUT_GRADIENT
        given, expected = on(device, case, gradient=gradient), run(case.reference, on(device, case, gradient=gradient))
        with torch.device("meta"):
            got = run(lambda given, case=case: case.call(given, backend), given)
        check(got, expected)


class Wrapped(Tensor):
    """Tensor subclass that wraps a tensor, as in quantisation and distributed training."""

    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        """Create a subclass with the properties of the inner tensor."""
        strides = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device, **strides)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Run the function on the inner tensors."""
        cls.seen.append(str(function))
        unwrap = lambda x: x.inner if isinstance(x, Wrapped) else x  # noqa: E731
        out = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda x: Wrapped(x) if isinstance(x, Tensor) else x, out)


def subclass(op: str, backend: str, device: str) -> None:
    """Check that a subclass in any input receives the op and gives the same results."""
    case = CASES[op][FIRST[op]]
    plain = on(device, case, gradient=False)
    expected = case.reference(plain)
    smooth = [name for name, x in plain.items() if x.is_floating_point()]
    for some in (plain.keys(), smooth[-1:]):
        Wrapped.seen.clear()
        outputs = case.call({name: Wrapped(x) if name in some else x for name, x in plain.items()}, backend)
        if (op, backend) not in PLAIN:
            assert f"nord_snn.{op}.default" in Wrapped.seen
        for mine, theirs in zip(outputs, expected, strict=True):
            inner = mine.inner if isinstance(mine, Wrapped) else mine
            assert torch.allclose(inner, theirs, atol=1e-5)


def second_derivative(op: str, backend: str, device: str) -> None:
    """Check that a second derivative is correct or raises an error that names an alternative."""
    case = CASES[op][FIRST[op]]

    def twice(function: Callable[[Tensors], Outputs]) -> Outputs:
        given = on(device, case, gradient=True)
        leaves = [x for x in given.values() if x.requires_grad]
        outputs = [x for x in function(given) if x.requires_grad]
        loss = sum(x.square().sum() for x in outputs)
        first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True, allow_unused=True)
        penalty = sum(x.square().sum() for x in first if x.requires_grad)
        return torch.autograd.grad(penalty, leaves, materialize_grads=True, allow_unused=True)

    if (op, backend) in PLAIN or op in ("resonance", "leaky_clamp"):
        for mine, theirs in zip(twice(lambda given: case.call(given, backend)), twice(case.reference), strict=True):
            assert relative_error(mine, theirs) < 1e-4
        return
    with pytest.raises(RuntimeError, match=f"the kernels of {op} have no second derivative: .* has one"):
        twice(lambda given: case.call(given, backend))


def applies(op: str, backend: str, mode: str) -> bool:
    """Return whether a mode applies: plain PyTorch is not registered, and ops without gradient have no second derivative."""
    if mode == "opcheck":
        return (op, backend) not in PLAIN
    return mode != "second-derivative" or op not in WITHOUT_GRADIENT


def marks(lane: str, mode: str) -> list[pytest.MarkDecorator]:
    """A GPU is needed, or it is quick: everything on a CPU that does not have to be traced or compiled first."""
    if lane == "gpu":
        return [pytest.mark.gpu]
    return [pytest.mark.quick] if lane == "cpu" and mode not in ("opcheck", "compiled") else []


EVERYTHING = [
    pytest.param(lane, op, backend, mode, id=f"{lane}/{op}/{backend}/{mode}", marks=marks(lane, mode))
    for lane, pairs in LANES.items()
    for op, backend in pairs
    for mode in MODES
    if applies(op, backend, mode)
]


@pytest.mark.parametrize(("lane", "op", "backend", "mode"), EVERYTHING)
def test_it_conforms(request: pytest.FixtureRequest, device: str, lane: str, op: str, backend: str, mode: str) -> None:
    if mode == "nan-memory":
        request.getfixturevalue("memory_full_of_nan")
    modes = {"opcheck": opcheck, "compiled": compiled, "autocast": autocast, "subclass": subclass}
    modes |= {"second-derivative": second_derivative, "eager": eager, "nan-memory": eager}
    modes["default-device"] = default_device
    modes[mode](op, backend, device)


def _geometry() -> ConvGeometry:
    return ConvGeometry(kernel_size=(3,), stride=(1,), padding=((1, 1),), dilation=(1,))


#: Functions that no op of the table calls.
OTHERS: dict[str, Callable[[Tensor], Any]] = {
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
@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_make_tensors_on_the_device_of_the_input(name: str) -> None:
    x = (torch.rand(3, 2, 4, 8, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    x = x if "conv" in name or "pack" in name else x.flatten(2)
    expected = OTHERS[name](x)
    with torch.device("meta"):
        got = OTHERS[name](x)
    for mine, theirs in zip(tree_flatten(got)[0], tree_flatten(expected)[0], strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


def test_every_op_and_backend_is_in_the_table() -> None:
    """A new op or kernel has to be added to the table above."""
    known = {(op, backend) for pairs in LANES.values() for op, backend in pairs}
    for op, made in OPS.items():
        assert {(op, backend) for backend in made} <= known
    for name in dir(torch.ops.nord_snn):  # at least the ops called so far
        assert name.removesuffix("_backward") in {*CASES, "name"} or name.startswith("_")


@pytest.mark.parametrize("mode", ["opcheck", "compiled"])
def test_outputs_that_share_memory_are_detected(interpreter: Any, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Two views of one tensor, as from unpacking ``grads.sum(0)``, work in an eager call but not in the other modes."""
    backward = interpreter.backward

    def aliased(*arguments: Any) -> tuple[Tensor, ...]:
        *others, mem, syn, coupling = backward(*arguments)
        both = torch.cat((mem, syn))
        return (*others, both[:1], both[1:], coupling)

    monkeypatch.setattr(interpreter, "backward", aliased)
    _stand_in(monkeypatch, "triton", interpreter)
    eager("associative_lif", "triton", "cpu")
    with pytest.raises(Exception, match="may not alias"):
        {"opcheck": opcheck, "compiled": compiled}[mode]("associative_lif", "triton", "cpu")


def test_first_derivatives_with_a_graph_pass_through_activation_checkpointing() -> None:
    """Activation checkpointing returns saved tensors only once."""
    x, leak, floor = torch.randn(4, 8, requires_grad=True), torch.rand(8), -torch.rand(8)

    def loss(checkpointed: bool) -> Tensor:
        run = lambda x: leaky_clamp(x, leak=leak, floor=floor)  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
        return y.square().sum()

    expected, got = (torch.autograd.grad(loss(c), x, create_graph=True)[0] for c in (False, True))
    assert torch.equal(expected, got)
