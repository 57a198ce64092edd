"""Run folders and checkpoints: written so that a kill at any moment leaves the last one whole.

A run folder holds ``settings.yaml``, ``tokenizer/``, the newest ``checkpoint-*`` folders, ``tensorboard/`` and, once it is
done, ``model/`` and ``results.json``. Nothing that is read back executes anything: weights are safetensors, the rest is
JSON or loaded with ``weights_only``.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CheckpointError", "latest_checkpoint", "new_run_folder", "write_folder", "write_json"]

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or is not one; the message says why and what is still whole."""


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


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a folder beside ``folder``, then put it in place in one move.

    A folder that is there already is whole, and of the same step of the same run: it stays.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        write(unfinished)
        os.replace(unfinished, folder)
    except Exception as error:  # a full disk surfaces as OSError, RuntimeError or SafetensorError, by who writes
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder} could not be written ({reason}); what was written before it is whole"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one move."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


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


def remove_old_checkpoints(run: Path) -> None:
    """Keep the newest :data:`KEPT`."""
    for old in _checkpoints(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _checkpoints(run: Path) -> list[Path]:
    return sorted((p for p in run.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name)), key=lambda p: int(p.name[11:]))
