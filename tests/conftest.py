"""Fixtures for all tests."""

import os

# Before any library reads them: no test may need a network, nor wait for one that is not there.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _two_cores() -> None:
    torch.set_num_threads(2)
