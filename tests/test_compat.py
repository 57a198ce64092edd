"""Private names of other libraries are used only in ``nord_snn/_compat``, and its functions work as documented."""

import ast
import copy
import importlib
import inspect
import pickle
import pkgutil
import types
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import base, functional, layer, neuron
from torch import nn

import nord_snn
from nord_snn._compat import spikingjelly as compat_spikingjelly
from nord_snn._compat import torch as compat

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("nord_snn", "examples", "benchmarks", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "build" not in path.parts
]
#: Names with an underscore that are documented as public.
PUBLIC_DESPITE_UNDERSCORE = {"_fields", "_asdict", "_replace", "_make"}  # of named tuples
#: Attributes that Python, torch or transformers set on derived classes.
SET_BY_LIBRARIES = {"_abc_impl", "_is_protocol", "_is_internal", "_backward_cls", "_auto_class", "_tied_weights_keys"}


def is_private(name: str) -> bool:
    return (
        name.startswith("_")
        and not (name.startswith("__") and name.endswith("__"))
        and name not in PUBLIC_DESPITE_UNDERSCORE
    )


def names_defined(trees: list[ast.Module]) -> set[str]:
    """Return the names of all functions, classes, variables, arguments and attributes of ``self`` that the code defines."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                names.add(node.attr)
    return names


def foreign_names(tree: ast.Module, known: set[str]) -> list[str]:
    """Return the private names that a file uses and that are not among the known names."""
    private_names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("nord_snn"):
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            private_names += [f"from {node.module}" for part in parts if is_private(part)]
        elif isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
            private_names += [f"import {part}" for part in parts if is_private(part)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in known:
            private_names.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            named = [x.value for x in node.args[1:2] if isinstance(x, ast.Constant)]
            private_names += [name for name in named if is_private(name) and name not in known]
    return private_names


@pytest.mark.quick
def test_private_names_of_other_libraries_are_used_only_in_compat():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    outside = {path: tree for path, tree in trees.items() if path.parent.name != "_compat"}
    known = names_defined(list(outside.values()))
    private_names = {
        str(path.relative_to(ROOT)): names for path, tree in outside.items() if (names := foreign_names(tree, known))
    }
    assert private_names == {}


def test_the_search_for_private_names_finds_them():
    code = "from torch._inductor import config\nimport torch._dynamo\nx._version\ngetattr(y, '_hidden')\nself._own = 1\nself._own"
    tree = ast.parse(code)
    assert len(foreign_names(tree, names_defined([tree]))) == 4


@pytest.mark.quick
def test_no_class_overrides_private_methods_of_other_libraries():
    """Such methods can change without notice, so only ``_compat`` overrides them."""
    names = [module.name for module in pkgutil.walk_packages(nord_snn.__path__, "nord_snn.")]
    names += [path.stem for path in sorted((ROOT / "examples" / "nord_lm").glob("*.py"))]
    for name in names:
        if name.endswith("__main__") or "._compat" in name:
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # a kernel whose library is not installed
            continue
        for kind in vars(module).values():
            if not inspect.isclass(kind) or kind.__module__ != name:
                continue
            for attribute in vars(kind):
                owners = [
                    owner
                    for owner in kind.__mro__[1:]
                    if attribute in vars(owner) and owner.__module__.partition(".")[0] != "nord_snn"
                ]
                if is_private(attribute) and attribute not in SET_BY_LIBRARIES:
                    assert not owners, f"{name}.{kind.__name__}.{attribute} overrides that of {owners}"


# --- torch


def test_a_function_that_is_constant_when_compiled_is_called_during_compilation_only():
    calls = []

    @compat.constant_when_compiled
    def choose(name: str) -> str:
        calls.append(name)
        return {"a": "abs"}[name]

    run = torch.compile(lambda x: getattr(x, choose("a"))() + 1, backend="eager", fullgraph=True)
    for _ in range(3):
        assert run(-torch.ones(2)).tolist() == [2.0, 2.0]
    assert calls == ["a"]


def test_dispatch_modes_are_detected_and_can_be_left():
    class RaisingMode(compat.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            raise AssertionError("the mode is still active")

    assert not compat.dispatch_mode_is_active()
    with RaisingMode():
        assert compat.dispatch_mode_is_active()
        with compat.without_dispatch_modes():
            assert torch.ones(2).sum() == 2


@pytest.mark.quick
def test_version_counters_increase_and_views_are_recognised():
    x = torch.zeros(3)
    before = compat.version_counter(x)
    x.add_(1)
    assert compat.version_counter(x) > before
    assert compat.is_view(x[1:])
    assert not compat.is_view(x)


@pytest.mark.quick
@pytest.mark.parametrize("padding", ["same", "valid", (2, 1)])
def test_padding_equals_that_of_the_convolution(padding):
    conv = nn.Conv2d(1, 1, (4, 3), padding=padding, bias=False)
    (top, bottom), (left, right) = compat.padding_on_both_sides(conv)
    x = torch.randn(1, 1, 9, 8)
    padded = nn.functional.pad(x, (left, right, top, bottom))
    assert torch.allclose(conv(x), nn.functional.conv2d(padded, conv.weight), atol=1e-6)


def test_operators_by_private_name_are_those_that_dispatch_modes_receive():
    received = set()

    class RecordingMode(compat.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            received.add(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    with RecordingMode():
        torch.rand(2, 3).softmax(-1).log_softmax(-1)
    assert compat.operators_by_private_name("_softmax", "_log_softmax") <= received


class Stateful(compat.StatePrecisionMixin, nn.Module):
    """Module with a parameter and a state."""

    def __init__(self):
        super().__init__()
        self.weight, self.state = nn.Parameter(torch.ones(2)), torch.full((2,), 1 / 3)

    def get_state(self):
        """Return the state."""
        return {"state": self.state}

    def set_state(self, state):
        """Set the state."""
        self.state = state["state"]


def test_the_state_moves_to_other_devices_but_is_never_rounded():
    module = Stateful()
    half = module.half()
    assert (half.weight.dtype, half.state.dtype) == (torch.float16, torch.float32)
    assert torch.equal(half.state, torch.full((2,), 1 / 3))
    assert module.double().state.dtype == torch.float64
    module.to_empty(device="cpu")
    assert module.state.tolist() == pytest.approx([1 / 3] * 2)
    assert module.to("meta").state.is_meta


class Observer:
    """Observer that records its arguments."""

    def __init__(self):
        self.seen = []

    def before(self, module):
        """Record a call before the forward."""
        self.seen.append(("before", module))

    def after(self, module, output):
        """Record a call after the forward."""
        self.seen.append(("after", module))


@pytest.mark.quick
def test_observers_are_called_in_every_forward_until_removed():
    net, first, second = nn.Sequential(nn.Linear(2, 2)), Observer(), Observer()
    linear = net[0]
    compat.observe_forward(linear, first)
    compat.observe_forward(linear, second)
    net(torch.ones(1, 2))
    assert first.seen == second.seen == [("before", linear), ("after", linear)]
    duplicate = copy.deepcopy(net)
    duplicate[0].weight.data.zero_()
    assert torch.equal(duplicate(torch.ones(1, 2))[0], linear.bias)  # the copy runs its own forward
    assert len(first.seen) == 2  # the copy has no observer
    compat.stop_observing_forward(linear, first)
    compat.stop_observing_forward(linear, first)
    first.seen.clear()
    net(torch.ones(1, 2))
    assert first.seen == []
    compat.stop_observing_forward(linear, second)
    assert linear.__dict__.keys() == nn.Linear(2, 2).__dict__.keys()


def test_an_observed_module_is_pickled_with_the_forward_of_its_class():
    module, observer = nn.Linear(2, 2), Observer()
    compat.observe_forward(module, observer)
    loaded = pickle.loads(pickle.dumps(module))
    assert torch.equal(loaded(torch.ones(1, 2)), module(torch.ones(1, 2)))
    assert loaded.forward.__func__ is nn.Linear.forward
    compat.observe_forward(loaded, observer)
    observer.seen.clear()
    loaded(torch.ones(1, 2))
    assert len(observer.seen) == 2


def test_a_later_patch_is_not_removed():
    module, observer = nn.Linear(2, 2), Observer()
    compat.observe_forward(module, observer)
    observed_forward = module.forward
    module.forward = types.MethodType(lambda self, x: observed_forward(x) + 1, module)
    compat.stop_observing_forward(module, observer)
    x = torch.ones(1, 2)
    assert torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias) + 1)
    assert observer.seen == []


@pytest.mark.quick
def test_patches_of_other_libraries_can_be_added_and_removed_in_any_order():
    """Such patches, for example the hooks of accelerate, call the forward that they replaced, and restore it."""
    module, x, observer = nn.Linear(2, 2), torch.ones(1, 2), Observer()
    compat.observe_forward(module, observer)
    replaced_forward = module.forward
    module.forward = lambda *args: replaced_forward(*args) + 1
    second = Observer()
    compat.observe_forward(module, second)  # the patch calls the observed forward
    expected = nn.functional.linear(x, module.weight, module.bias) + 1
    assert torch.equal(module(x), expected)
    assert len(observer.seen) == len(second.seen) == 2
    for one in (observer, second):
        compat.stop_observing_forward(module, one)
    third = Observer()
    compat.observe_forward(module, third)
    assert torch.equal(module(x), expected)
    assert len(third.seen) == 2
    module.forward = types.MethodType(nn.Linear.forward, module)  # other code restores the forward of the class
    compat.stop_observing_forward(module, third)
    compat.observe_forward(module, third)
    module(x)
    assert len(third.seen) == 4
    compat.stop_observing_forward(module, third)
    assert not any("nord_snn" in name for name in module.__dict__)


def test_a_replica_runs_its_own_forward():
    module, observer = nn.Linear(2, 2), Observer()
    compat.observe_forward(module, observer)
    replica = module._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.zeros(2, 2), torch.ones(2)
    assert torch.equal(replica(torch.ones(1, 2)), torch.ones(1, 2))
    assert observer.seen == []
    compat.stop_observing_forward(module, observer)
    assert module.__dict__.keys() == nn.Linear(2, 2).__dict__.keys()


# --- SpikingJelly


def test_reset_value_returns_the_value_after_a_reset():
    node = neuron.LIFNode(v_reset=None)
    assert compat_spikingjelly.reset_value(node, "v") == 0.0
    node(torch.ones(2))
    assert isinstance(node.v, torch.Tensor)
    assert compat_spikingjelly.reset_value(node, "v") == 0.0


def test_clear_module_cache_makes_reset_net_find_new_modules():
    net = nn.Sequential(layer.Linear(2, 2), neuron.IFNode())
    functional.reset_net(net)
    net[0] = neuron.IFNode()
    net(torch.full((2,), 9.0))
    compat_spikingjelly.clear_module_cache(net)
    functional.reset_net(net)
    assert net[0].v == 0.0


def test_a_stateful_node_is_a_spikingjelly_node():
    assert issubclass(compat_spikingjelly.StatefulNode, neuron.BaseNode)
    assert issubclass(compat_spikingjelly.StatefulNode, base.MemoryModule)
    assert compat_spikingjelly.is_release_2 == hasattr(functional, "invalidate_reset_cache")


# --- snnTorch, Numba, transformers, accelerate


def test_snntorchs_reset_includes_our_neuron_unless_construction_failed():
    snntorch = pytest.importorskip("snntorch")
    from snntorch import utils

    from nord_snn.integrations.snntorch import AssociativeSynaptic

    lif = AssociativeSynaptic(8, n_clusters=4)
    assert isinstance(lif, snntorch.Synaptic)
    with pytest.raises(ValueError, match="multiple"):
        AssociativeSynaptic(9, n_clusters=4)
    lif(2 * torch.rand(3, 8))
    utils.reset(nn.Sequential(lif))
    assert not lif.mem.any()


def test_a_kernel_with_numbas_private_names_gives_the_right_numbers():
    pytest.importorskip("numba")
    import numba
    import numpy as np

    from nord_snn.ops._numba.simd import WIDTH, fused, load, masked_load, pointer, prefetch, store

    @numba.njit
    def kernel(a, b):
        x, out = pointer(a), pointer(b)
        prefetch(x, 0)
        store(out, 0, fused(load(x, 0), load(x, 0), masked_load(x, 0, 3)))

    a, b = np.arange(WIDTH, dtype=np.float32), np.empty(WIDTH, dtype=np.float32)
    kernel(a, b)
    assert np.array_equal(b, a * a + np.where(np.arange(WIDTH) < 3, a, 0))


def test_cache_is_the_name_of_the_cache_argument_in_the_installed_transformers():
    transformers = pytest.importorskip("transformers")
    from nord_snn._compat.transformers import CACHE, cache_from, cache_of, causal_lm_output

    llama_parameters = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    assert CACHE in llama_parameters
    assert ("cache" in llama_parameters) == (CACHE == "cache")
    cache = transformers.DynamicCache()
    assert cache_of(causal_lm_output(None, torch.zeros(1), cache)) is cache
    assert cache_of(causal_lm_output(None, torch.zeros(1), None)) is None
    assert cache_from(cache, None) is cache_from(None, cache) is cache


def test_reset_accumulation_and_set_log_folder_of_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from nord_snn._compat.accelerate import reset_accumulation, set_log_folder

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(nn.Linear(2, 2))
    synced = []
    for restart in (False, True):
        with accelerator.accumulate(model):
            synced.append(accelerator.sync_gradients)
        if restart:
            break
        reset_accumulation(accelerator)
    assert synced == [False, False]  # without the reset the second would be True
    set_log_folder(accelerator, tmp_path)
    assert accelerator.logging_dir == str(tmp_path)


def test_a_kernel_is_recompiled_when_its_sources_change(tmp_path, monkeypatch):
    """Numba's cache does not detect changes of functions in other files, so ``cached_njit`` has a stamp."""
    pytest.importorskip("numba")
    from nord_snn._compat.numba import cached_njit

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def function(x):
        return x + 1

    hits = []
    for stamp in ("one", "one", "two"):
        kernel = cached_njit(function, stamp)
        assert kernel(1) == 2
        hits.append(sum(kernel.stats.cache_hits.values()))
    assert hits == [0, 1, 0]
