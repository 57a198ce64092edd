"""What many tests share."""

from pathlib import Path
from typing import Any

import pytest
import torch

DATA = Path(__file__).parent / "data"


def load_reference(name: str) -> Any:
    """Expected values, computed in float64 by an independent implementation of the equations."""
    return torch.load(DATA / f"{name}.pt", weights_only=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _two_cores() -> None:
    torch.set_num_threads(2)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of what was expected."""
    return ((got - expected).norm() / expected.norm().clamp(min=1e-12)).item()
