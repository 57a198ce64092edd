"""Rules of the repository: directions of imports, public names, requirements, files of an op, sizes of functions and files."""

import ast
import importlib
import inspect
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from parts import PARTS
from torch import nn

import nord_snn

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
#: Package of nord_snn -> packages of nord_snn that it may import.
ALLOWED = {
    "_compat": set(),
    "ops": {"_compat"},
    "neurons": {"_compat", "ops"},
    "layers": {"ops", "neurons"},
    "learning_rules": {"_compat", "ops"},
    "monitor": {"_compat", "ops", "neurons"},
    "convert": {"_compat", "ops", "neurons", "layers", "learning_rules", "monitor", "integrations"},
    "models": {"_compat", "ops", "neurons", "layers"},
    "integrations": {"_compat", "ops", "neurons", "layers", "learning_rules", "monitor"},
}
#: Module -> names that it must export.
PUBLIC = {
    "nord_snn": {"__version__", "AssociativeLIFNode", "NordBlock", "calibrate_thresholds", "replace_neurons", "reset"},
    "nord_snn.convert": {"calibrate_thresholds", "replace_neurons"},
    "nord_snn.ops": {"AssociativeLIFState", "associative_lif", "resonance", "stdp", "which_backend"},
    "nord_snn.neurons": {"AssociativeLIFNode", "AssociativeCascade"},
    "nord_snn.layers": {
        "AssociativeCascade",
        "CoFiringResonance",
        "LeakyClamp",
        "MembraneReadout",
        "MultiScaleTemporalEncoder",
        "NordBlock",
        "SequenceCache",
        "SpikeFedBlock",
        "SpikeFedResonance",
        "SpikingFeedForward",
    },
    "nord_snn.learning_rules": {
        "GivenReward",
        "LossBelowBaseline",
        "PlasticPart",
        "RewardModulatedSTDP",
        "RewardSource",
        "STDP",
        "TripletSTDP",
        "load_plastic",
        "save_plastic",
    },
    "nord_snn.models.nord": {"NordConfig", "NordForCausalLM"},
    "nord_snn.monitor": {"SpikeMonitor"},
    "nord_snn.integrations.clock_driven": {"install"},
    "nord_snn.integrations.snntorch": {"AssociativeLeaky", "AssociativeSynaptic", "MultiStep"},
    "nord_snn.integrations.nir": {"deviation", "export_to_nir", "import_from_nir", "simulate"},
}
#: File or folder of integrations -> libraries that it may import.
INTEGRATIONS = {
    "snntorch": {"snntorch"},
    "norse": {"norse"},
    "nir": {"nir", "numpy", "h5py"},
}
#: File of _compat -> libraries that it may import besides the core's.
COMPAT = {
    "torch.py": set(),
    "spikingjelly.py": set(),
    "snntorch.py": {"snntorch"},
    "numba.py": {"numba", "llvmlite"},
    "transformers.py": {"transformers"},
    "accelerate.py": {"accelerate"},
    "tensorboard.py": set(),
}
#: Kernel file -> libraries that it may import besides the core's.
KERNELS = {
    "tensors.py": {"numpy"},
    "threads.py": {"numba"},
    "workspace.py": {"numpy"},
    "simd.py": {"llvmlite", "numba"},
    "scores.py": {"numpy"},
    "numba.py": {"numba", "numpy"},
    "triton.py": {"triton"},
    "cupy.py": {"cupy"},
}
SOURCES = sorted((ROOT / "nord_snn").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, at any place in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    parts = path.relative_to(ROOT / "nord_snn").parts
    names = imported(path)
    assert not any(name.split(".")[0] == "examples" for name in names)
    if len(parts) == 1:
        return
    packages = {name.split(".")[1] for name in names if name.startswith("nord_snn.")}
    assert packages - {parts[0]} <= ALLOWED[parts[0]]


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_exist_and_are_documented(package):
    module = importlib.import_module(package)
    assert PUBLIC[package] <= set(module.__all__)
    for name in module.__all__:
        public_object = getattr(module, name)
        if inspect.isclass(public_object) or inspect.isfunction(public_object):
            assert public_object.__doc__, f"{package}.{name} has no docstring"


def test_the_core_imports_only_its_dependencies():
    """Kernel files, _compat, integrations and models may import more: they are loaded only if their library is installed."""
    allowed = {"nord_snn", "torch", "spikingjelly", "safetensors"} | sys.stdlib_module_names
    for path in SOURCES:
        by_name = COMPAT if path.parent.name == "_compat" else KERNELS
        if path.relative_to(ROOT / "nord_snn").parts[0] == "models":
            by_name = {
                name: {"transformers", "huggingface_hub"} for name in ("configuration_nord.py", "modeling_nord.py")
            }
        more = by_name.get(path.name, INTEGRATIONS.get(path.stem, INTEGRATIONS.get(path.parent.name, set())))
        assert {name.split(".")[0] for name in imported(path)} <= allowed | more, path


def test_no_file_imports_a_kernel_file_directly():
    ops = [path.parent.name for path in (ROOT / "nord_snn" / "ops").glob("*/op.py")]
    names = {f"nord_snn.ops.{op}.{backend}" for op in ops for backend in ("numba", "triton", "cupy")}
    for path in SOURCES:
        assert not imported(path) & names, path


def test_every_extra_with_transformers_limits_torch():
    """Older resolvers apply a limit of a referenced extra too late. The core has no limit, and `all` no CUDA."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert all("<" not in requirement for requirement in project["dependencies"])
    extras = project["optional-dependencies"]
    assert {"cpu", "cuda12", "cuda13", "snntorch", "train", "reports", "lm", "test", "dev", "all"} <= extras.keys()
    for name in ("train", "lm", "all", "test", "dev"):
        assert "torch>=2.11,<2.12" in extras[name], name
    assert not any("cupy" in requirement or "cuda" in requirement for requirement in extras["all"])


def test_the_citation_names_the_version_license_and_authors_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title"} <= citation.keys()
    assert citation["title"].startswith(project["name"])
    assert citation["version"] == nord_snn.__version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert citation.get("repository-code") == project.get("urls", {}).get("Repository")


def test_the_constraints_satisfy_the_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    fixed = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }
    requirements = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    checked = set()
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        if name in fixed:
            assert requirement.specifier.contains(fixed[name]), requirement
            checked.add(name)
    assert {"torch", "transformers", "numba", "spikingjelly"} <= checked


def test_the_sdist_has_every_page_and_the_files_that_tests_read():
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()]
    grafted = {name for line in lines if line[0] == "graft" for name in line[1:]}
    included = {"README.md", "pyproject.toml"} | {name for line in lines if line[0] == "include" for name in line[1:]}
    # By default the sdist has only the packages.
    assert {"benchmarks", "docs", "examples", "nord_snn", "studies", "tests"} <= grafted
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "SECURITY.md", "constraints.txt"} <= included


OP_FILES = {"__init__.py", "reference.py", "op.py", "cost.py"}


def test_every_folder_of_an_op_has_the_same_files():
    """``import nord_snn.ops.<folder>.reference`` works: no function of ``nord_snn.ops`` has the name of a folder."""
    folders = sorted(path.parent for path in (ROOT / "nord_snn" / "ops").glob("*/op.py"))
    assert len(folders) == 5
    for folder in folders:
        assert {path.name for path in folder.iterdir()} >= OP_FILES
        name = f"nord_snn.ops.{folder.name}.reference"
        scope = {}
        exec(f"import {name} as module", scope)
        assert scope["module"] is sys.modules[name]
        assert not hasattr(importlib.import_module("nord_snn.ops"), folder.name) or inspect.ismodule(
            getattr(importlib.import_module("nord_snn.ops"), folder.name)
        )


def attributes_of_layers() -> set[str]:
    """Return the names of all attributes that our layers and neurons add to ``nn.Module``."""
    names = set()
    for make, _ in PARTS.values():
        for module in make().modules():
            if type(module).__module__.startswith("nord_snn."):
                names |= vars(module).keys() | module._parameters.keys() | module._modules.keys()
                names |= {
                    name for kind in type(module).__mro__ if "nord_snn." in kind.__module__ for name in vars(kind)
                }
    return names - vars(nn.Module()).keys() - set(dir(nn.Module))


def test_the_energy_profile_uses_no_attribute_of_a_layer():
    """Costs are defined by ops and neurons, so that the profile works for any network."""
    names = attributes_of_layers() | {"remember", "AssociativeLIFNode"}
    assert {"lif_q", "temperature", "recency", "top_k", "n_heads", "cascade", "update_cost"} <= names
    files = sorted((ROOT / "nord_snn" / "monitor" / "energy").glob("*.py"))
    assert {file.name for file in files} >= {"conventions.py", "report.py", "counter.py"}
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "lif_" not in text
        nodes = list(ast.walk(ast.parse(text)))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        used |= imported(file)
        assert not used & (names - {"step_mode"}), file  # an attribute of every SpikingJelly node


def test_no_file_changes_sys_path():
    for path in (ROOT / folder for folder in ("nord_snn", "examples", "studies", "benchmarks", "docs")):
        for file in path.rglob("*.py"):
            assert "sys.path" not in file.read_text(encoding="utf-8"), file


def test_the_files_of_the_language_model_have_at_most_350_lines():
    for file in (ROOT / "examples" / "nord_lm").rglob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 350, file


def is_triton_kernel(function):
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


def test_no_function_has_more_than_twelve_parameters_by_position():
    """Triton kernels cannot have keyword-only parameters, so they must be launched with keywords only."""
    kernels = set()
    for folder in ("nord_snn", "examples", "studies"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
                count = len(function.args.posonlyargs) + len(function.args.args)
                if count > 12 and is_triton_kernel(function):
                    kernels.add((file, function.name))
                else:
                    assert count <= 12, f"{file}: {function.name}"
    assert kernels
    for file, name in kernels:
        calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        launches = [call for call in calls if ast.unparse(call.func).partition("[")[0] == name]
        assert launches, name
        assert all(isinstance(call.func, ast.Subscript) and not call.args for call in launches), name


def quick_tests(path: Path) -> int:
    """Return the number of tests of a file that are marked quick, one by one or by the mark of the file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    marks = [ast.unparse(node) for node in body if isinstance(node, ast.Assign)]
    if any(mark.startswith("pytestmark = ") and "pytest.mark.quick" in mark for mark in marks):
        return len(tests)
    return sum("pytest.mark.quick" in map(ast.unparse, test.decorator_list) for test in tests)


def test_every_folder_of_tests_has_at_least_three_quick_tests():
    """``pytest -m quick`` shall test every part of the library."""
    files = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        files[path.parent].append(path)
    too_few = {
        str(folder.relative_to(ROOT)): n_quick
        for folder, paths in files.items()
        if (n_quick := sum(map(quick_tests, paths))) < 3
    }
    assert not too_few, f"mark at least three tests as quick, by pytest.mark.quick, in {too_few}"
