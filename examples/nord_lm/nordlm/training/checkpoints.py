"""Run folders and checkpoints, written so that a kill at any moment leaves the last checkpoint complete.

A run folder contains ``settings.yaml``, ``run.json``, ``tokenizer/``, the newest ``checkpoint-*`` folders, ``tensorboard/``
and, after the last step, ``model/`` and ``results.json``. Reading never executes code: weights are safetensors, the
rest is JSON or loaded with ``weights_only``.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nordlm import reading
from nordlm.errors import CheckpointError

__all__ = [
    "check_digests",
    "checkpoint_step",
    "digests",
    "latest_checkpoint",
    "new_run_folder",
    "read_json",
    "remove_old_checkpoints",
    "temporary_path",
    "write_folder",
    "write_json",
    "write_text",
]

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
KEPT = 2  # number of newest checkpoints that are not removed


def new_run_folder(parent: Path, name: str) -> Path:
    """Create ``parent/name-0001``, or the folder with the next free number."""
    for number in range(1, 10_000):
        folder = parent / f"{name}-{number:04d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be created ({error.strerror})") from error
        return folder
    raise CheckpointError(f"{parent}: all numbers for runs named {name} are taken")


def temporary_path(folder: Path) -> Path:
    """Return the path at which a folder or file is written before it is moved into place."""
    return folder.with_name(f".{folder.name}.unfinished")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary folder beside ``folder``, then move it into place in one step.

    Raises:
        CheckpointError: the folder could not be written; an older folder is unchanged.
    """
    temporary, old = temporary_path(folder), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    if folder.exists():  # left by a kill; if folder is missing, old is the only copy
        shutil.rmtree(old, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # a full disk is an OSError, RuntimeError or SafetensorError, depending on the writer
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        if shutil.disk_usage(folder.parent).free < 1 << 20:
            reason = f"the disk is full: {reason}"
        raise CheckpointError(f"{folder} could not be written ({reason}); earlier files are complete") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. If several processes write the same file, the last one wins."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read JSON; raise CheckpointError if it is not valid."""
    return reading.read_json(path, CheckpointError)


def latest_checkpoint(run: Path) -> Path:
    """Return the newest checkpoint of a run.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    existing = _checkpoints(run)
    if not existing:
        raise CheckpointError(f"{run}: no checkpoint to resume from")
    return existing[-1]


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file in a folder, by name."""
    by_name = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as file:
            by_name[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return by_name


def check_digests(checkpoint: Path, expected: Any) -> None:
    """Raise CheckpointError if a file differs from its digest; the message names the previous checkpoint if there is one."""
    actual = digests(checkpoint)
    damaged = (
        [name for name, digest in expected.items() if actual.get(name) != digest]
        if isinstance(expected, dict)
        else ["all"]
    )
    if damaged:
        earlier = [c.name for c in _checkpoints(checkpoint.parent) if checkpoint_step(c) < checkpoint_step(checkpoint)]
        advice = f"; remove the folder to resume from {earlier[-1]}" if earlier else ""
        raise CheckpointError(f"{checkpoint}: damaged or incomplete ({', '.join(damaged)}){advice}")


def checkpoint_step(checkpoint: Path) -> int:
    """Return the training step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_old_checkpoints(run: Path) -> None:
    """Remove all but the newest :data:`KEPT` checkpoints."""
    for old in _checkpoints(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _checkpoints(run: Path) -> list[Path]:
    return sorted((p for p in run.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name)), key=checkpoint_step)
