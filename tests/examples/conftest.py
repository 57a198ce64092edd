"""Fixtures for several files: a small training run of the language model, and a server that starts scripts quickly."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import train as train_script
from helpers import make_text, write_config
from killing import Server


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """Train a small model for 12 training steps and return the folder of the run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(make_text())
    config = write_config(folder)
    arguments = ["--config", str(config), "--data", str(folder / "text.txt"), "--out", str(folder / "runs")]
    assert train_script.main(arguments) == 0
    return folder / "runs" / "test-0001"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Return a server that runs scripts in forked processes, which can be killed."""
    with Server() as started:
        yield started
