"""Fixtures for all tests."""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

# Before any library reads them: no test may need a network, nor wait for one that is not there.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes share the cores: waiting threads must not occupy one
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

collect_ignore = ["data"]  # code in an earlier model folder has no tests


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Reset seed, precision and compiled code to their values at the start of a process."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # torch limits how often one piece of code is compiled in a process
        torch.compiler.reset()
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True, scope="session")
def _two_cores() -> None:
    torch.set_num_threads(2)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print every op, backend and mode of the conformance suite that ran, and the lanes without any test."""
    passed = _conformance(terminalreporter, "passed")
    if not passed and not _conformance(terminalreporter, "skipped"):
        return
    terminalreporter.section("conformance: what ran, by lane, op and backend")
    for lane in ("cpu", "interpreter", "cuda-as-c++", "gpu"):
        ran = {key[1:]: modes for key, modes in passed.items() if key[0] == lane}
        if not ran:
            terminalreporter.write_line(f"{lane}: RAN NOTHING")
        for (op, backend), modes in sorted(ran.items()):
            terminalreporter.write_line(f"{lane}: {op} on {backend}: {', '.join(modes)}")


def _conformance(terminalreporter: Any, outcome: str) -> dict[tuple[str, str, str], list[str]]:
    """Return the modes by lane, op and backend, parsed from the names of the tests."""
    found = defaultdict(list)
    for report in terminalreporter.stats.get(outcome, []):
        if "::test_it_conforms[" in report.nodeid:
            lane, op, backend, mode = report.nodeid.partition("[")[2].rstrip("]").split("/")
            found[lane, op, backend].append(mode)
    return found
