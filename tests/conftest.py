"""Fixtures for all tests."""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

# Set before a library reads them, so that no test waits for a network.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes share the cores: waiting threads must not occupy one
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

collect_ignore = ["data"]  # has code, but no tests


@pytest.fixture(autouse=True)
def _reset_global_state() -> Iterator[None]:
    """Reset seed, precision and compiled code before and after each test, so that no test depends on an earlier one."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # torch limits the number of compilations of a function in a process
        torch.compiler.reset()
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(2)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the ops, backends and modes that ``tests/ops/test_conformance.py`` ran, and the platforms on which none ran."""
    passed = _modes_of_conformance_tests(terminalreporter, "passed")
    if not passed and not _modes_of_conformance_tests(terminalreporter, "skipped"):
        return
    terminalreporter.section("conformance tests that ran: platform, op on backend, modes")
    for platform in ("cpu", "interpreter", "cuda-as-c++", "gpu"):
        ran = {key[1:]: modes for key, modes in passed.items() if key[0] == platform}
        if not ran:
            terminalreporter.write_line(f"{platform}: RAN NOTHING")
        for (op, backend), modes in sorted(ran.items()):
            terminalreporter.write_line(f"{platform}: {op} on {backend}: {', '.join(modes)}")


def _modes_of_conformance_tests(terminalreporter: Any, outcome: str) -> dict[tuple[str, str, str], list[str]]:
    """Return the modes by platform, op and backend, parsed from the names of the tests with an outcome."""
    modes = defaultdict(list)
    for report in terminalreporter.stats.get(outcome, []):
        if "::test_it_conforms[" in report.nodeid:
            platform, op, backend, mode = report.nodeid.partition("[")[2].rstrip("]").split("/")
            modes[platform, op, backend].append(mode)
    return modes
