"""Importing and using nord_snn changes nothing else in the process: no settings, no handlers, no compiled code."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from nord_snn.learning_rules import STDP, PlasticPart
from nord_snn.monitor import RowRates, SpikeMonitor
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import resonance, stdp, which_backend

ROOT = Path(__file__).parents[1]
IMPORTS = "import nord_snn, nord_snn.neurons, nord_snn.layers, nord_snn.learning_rules, nord_snn.monitor, nord_snn.ops"


def run(code: str, **environment: str) -> str:
    """Run code in a new process and return its output."""
    process = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.quick
def test_importing_loads_neither_a_compiler_nor_an_optional_library():
    """TorchDynamo alone takes longer than all of nord_snn; Numba and Triton are loaded with the first kernel."""
    loaded = run(
        f"import sys; {IMPORTS}; print([name for name in sys.modules if '.' not in name or '_dynamo' in name])"
    )
    assert not {"torch._dynamo", "numba", "llvmlite", "sympy", "matplotlib", "transformers"} & set(eval(loaded))


def test_importing_changes_no_setting():
    """The settings are signal handlers, exception hooks, random state, precision, threads and warnings."""
    code = """
import json, random, signal, sys, threading, warnings
import torch
from spikingjelly.activation_based import neuron
def settings():
    return [
        str(signal.getsignal(signal.SIGINT)), sys.excepthook is sys.__excepthook__,
        threading.excepthook is threading.__excepthook__, torch.initial_seed(), torch.rand(0).dtype.itemsize,
        random.getstate()[1][0], torch.get_float32_matmul_precision(), torch.get_num_threads(), len(warnings.filters),
        torch.is_grad_enabled(), str(torch.get_default_dtype()), sys.getrecursionlimit(),
    ]
before = settings()
"""
    assert json.loads(run(f"{code}{IMPORTS}\nprint(json.dumps(before == settings()))")) is True


def test_a_source_tree_imports_without_installation(tmp_path):
    """Without metadata of an installation the version is read from a file in the package."""
    shutil.copytree(ROOT / "nord_snn", tmp_path / "nord_snn", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import importlib.metadata as m\n"
        "def absent(name): raise m.PackageNotFoundError(name)\n"
        "m.version = absent\n"
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import nord_snn; print(nord_snn.__file__, nord_snn.__version__)"
    )
    file, version = run(code).split()
    assert Path(file).is_relative_to(tmp_path)
    assert version == (ROOT / "nord_snn" / "_version.py").read_text().rpartition("= ")[2].strip().strip('"')


# --- monitors and compiled networks


class GraphCounter:
    """Backend of torch.compile that counts its graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        """Return the graph unchanged."""
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("kind", [SpikeMonitor, RowRates])
def test_a_monitor_recompiles_only_code_with_observed_neurons(kind):
    """A network with a monitor is recompiled once, also if twelve monitors are added one after the other."""
    torch._dynamo.reset()  # torch limits the recompilations of all networks together
    not_observed, observed = GraphCounter(), GraphCounter()
    without_neurons = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend=not_observed)
    same_class = torch.compile(nn.Sequential(nn.Linear(8, 8), node()), backend=not_observed)
    net = nn.Sequential(nn.Linear(8, 8), node())
    compiled = torch.compile(net, backend=observed, fullgraph=True)
    x = torch.randn(5, 3, 8)
    with torch.no_grad():
        for _ in range(2):  # from rest, and with state
            for call in (without_neurons, same_class, compiled):
                call(x)
        graphs_not_observed, graphs_without_monitor = not_observed.graphs, observed.graphs
        for number in range(12):  # more than torch's limit of recompilations
            with kind(net) as monitor:
                for call in (without_neurons, same_class, compiled):
                    call(x)
                rate = monitor.rates()["1"] if kind is SpikeMonitor else monitor.take()["1"].mean()
                assert rate > 0
            compiled(x)
            if number == 0:
                graphs_with_monitor = observed.graphs
        assert not_observed.graphs == graphs_not_observed
        assert graphs_without_monitor < graphs_with_monitor <= graphs_without_monitor + 4
        assert observed.graphs == graphs_with_monitor  # later monitors reuse the code compiled for the first


def node() -> AssociativeLIFNode:
    """Return a neuron that fires often."""
    return AssociativeLIFNode(8, n_clusters=4, step_mode="m", threshold=0.01, backend="torch")


@pytest.mark.quick
def test_a_patched_forward_runs_and_is_restored():
    """A patch sets ``module.forward``, as the hooks of accelerate do."""
    net = node()
    calls = []

    def patched(*args, **kwargs):
        calls.append(args)
        return type(net).forward(net, *args, **kwargs)

    net.forward = patched
    with SpikeMonitor(net) as first, SpikeMonitor(net) as second:
        net(torch.rand(4, 2, 8))
        net.reset()
    assert len(calls) == 1
    assert first.rates() == second.rates() != {}
    assert net.forward is patched


# --- settings of the process


@pytest.mark.quick
def test_a_plastic_part_does_not_replace_signal_handlers(monkeypatch):
    def refuse(*_):
        raise AssertionError("signal handlers belong to the application")

    monkeypatch.setattr(signal, "signal", refuse)
    part = PlasticPart(nn.Linear(3, 2, bias=False))
    part.apply(torch.ones(2, 3))
    part.apply(torch.ones(1, 3), rows=torch.tensor([1]))
    part.replace(torch.ones(2, 3, dtype=torch.float64))
    part.revert()


@pytest.mark.quick
def test_no_module_stores_a_tensor():
    """After calls of ops, a neuron and a learning rule, globals and caches of all modules have no tensor."""
    import gc

    pre = (torch.rand(5, 3, 4) < 0.5).float()
    stdp(pre, pre)
    resonance(pre[..., None, :], pre[..., None, :], torch.rand(3, 1, 4), n_heads=2, top_k=2, temperature=1.0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), AssociativeLIFNode(4, n_clusters=2, step_mode="m"))
    rule = STDP(step_mode="m", synapse=net[0], sn=net[1])
    net(pre)
    rule.step(on_grad=False)
    del rule, net
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "nord_snn":
            continue
        for label, value in vars(module).items():
            values = [value, *(value.values() if isinstance(value, dict) else ())]
            assert not any(isinstance(x, torch.Tensor) for x in values), f"{name}.{label}"
            if hasattr(value, "cache_info"):
                cached = [x for x in gc.get_referents(value) for x in (x.values() if isinstance(x, dict) else [x])]
                assert not any(isinstance(x, torch.Tensor) for x in cached), f"{name}.{label}"


@pytest.mark.quick
def test_the_environment_variable_is_read_when_a_backend_is_selected(monkeypatch):
    x = torch.zeros(2, 1, 4)
    for name in ("torch", "auto"):
        monkeypatch.setenv("NORD_SNN_BACKEND", name)
        assert (which_backend(x).name == "torch") == (name == "torch" or "numba" in str(which_backend(x).others))


def test_an_error_of_writing_a_log_is_reported_only_to_the_caller(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    from nord_snn._compat.tensorboard import raise_write_errors_only

    reports = []
    hook = reports.append
    monkeypatch.setattr(threading, "excepthook", hook)
    for error, n_reports in ((OSError(28, "No space left on device"), 0), (RuntimeError("a bug"), 1)):
        writer = SummaryWriter(tmp_path)
        raise_write_errors_only(writer)
        asynchronous = writer.file_writer.event_writer._async_writer

        def fail(*_, error=error):
            raise error

        asynchronous._writer.write = fail
        writer.add_scalar("x", 1.0)
        with pytest.raises(type(error)):
            writer.flush()
        asynchronous._worker.join(10)
        assert len(reports) == n_reports
    assert threading.excepthook is hook
