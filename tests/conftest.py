"""Fixtures for all tests."""

import os
from collections.abc import Iterator

# Before any library reads them: no test may need a network, nor wait for one that is not there.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seed and precision as they are at the start of a process: training sets both."""
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True, scope="session")
def _two_cores() -> None:
    torch.set_num_threads(2)
