"""Run folders and checkpoints: written so that a kill at any moment leaves the last one whole.

A run folder holds ``settings.yaml``, ``run.json``, ``tokenizer/``, the newest ``checkpoint-*`` folders, ``tensorboard/``
and, once it is done, ``model/`` and ``results.json``. Nothing that is read back executes anything: weights are safetensors,
the rest is JSON or loaded with ``weights_only``.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nordlm.errors import CheckpointError

__all__ = [
    "check_digests",
    "checkpoint_step",
    "digests",
    "latest_checkpoint",
    "new_run_folder",
    "read_json",
    "remove_old_checkpoints",
    "unfinished",
    "write_folder",
    "write_json",
    "write_text",
]

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
KEPT = 2


def new_run_folder(parent: Path, name: str) -> Path:
    """Make ``parent/name-0001``, or the first higher number that is free."""
    for number in range(1, 10_000):
        folder = parent / f"{name}-{number:04d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be made ({error.strerror})") from error
        return folder
    raise CheckpointError(f"{parent}: all numbers for runs named {name} are taken")


def unfinished(folder: Path) -> Path:
    """Where a folder is filled before it is put in place."""
    return folder.with_name(f".{folder.name}.unfinished")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a folder beside ``folder``, then put it in place in one move.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    beside, old = unfinished(folder), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(beside, ignore_errors=True)
    if folder.exists():  # what a kill left of the one before; without the folder itself it is all that there is
        shutil.rmtree(old, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        write(beside)
        if folder.exists():
            os.replace(folder, old)
        os.replace(beside, folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # a full disk surfaces as OSError, RuntimeError or SafetensorError, by who writes
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        if shutil.disk_usage(folder.parent).free < 1 << 20:
            reason = f"the disk is full: {reason}"
        raise CheckpointError(
            f"{folder} could not be written ({reason}); what was written before it is whole"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one move."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file in one move."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one move; of several processes that write the same one the last wins."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read JSON; a CheckpointError if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error


def latest_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    found = _checkpoints(run)
    if not found:
        raise CheckpointError(f"{run}: no checkpoint to resume from")
    return found[-1]


def digests(folder: Path) -> dict[str, str]:
    """A digest of every file in a folder, by name."""
    found = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found


def check_digests(checkpoint: Path, expected: Any) -> None:
    """Raise a CheckpointError unless every file is the one that was written; it names the checkpoint before, if there is one."""
    there = digests(checkpoint)
    damaged = (
        [name for name, digest in expected.items() if there.get(name) != digest]
        if isinstance(expected, dict)
        else ["all"]
    )
    if damaged:
        earlier = [c.name for c in _checkpoints(checkpoint.parent) if checkpoint_step(c) < checkpoint_step(checkpoint)]
        advice = f"; remove the folder to go on from {earlier[-1]}" if earlier else ""
        raise CheckpointError(f"{checkpoint}: damaged or incomplete ({', '.join(damaged)}){advice}")


def checkpoint_step(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_old_checkpoints(run: Path) -> None:
    """Keep the newest :data:`KEPT`."""
    for old in _checkpoints(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _checkpoints(run: Path) -> list[Path]:
    return sorted((p for p in run.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name)), key=checkpoint_step)
