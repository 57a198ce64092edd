"""Checkpoints of a run and their digests; ``nordlm/files.py`` writes them atomically.

A run folder contains ``settings.yaml``, ``run.json``, ``tokenizer/``, the newest ``checkpoint-*`` folders, ``tensorboard/``
and, after the last step, ``model/`` and ``results.json``. Reading never executes code: weights are safetensors, the
rest is JSON or loaded with ``weights_only``.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from nordlm import reading
from nordlm.errors import CheckpointError
from nordlm.files import remove_folder, write_bytes, write_folder, write_json, write_text

__all__ = [
    "check_digests",
    "check_seal",
    "checkpoint_step",
    "damaged",
    "differing_files",
    "digests",
    "latest_checkpoint",
    "read_json",
    "remove_old_checkpoints",
    "seal",
    "write_bytes",
    "write_folder",
    "write_json",
    "write_text",
]

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
KEPT = 2  # number of checkpoints of a run, the newest ones


def read_json(path: Path) -> Any:
    """Read JSON; raise CheckpointError if it is not valid."""
    return reading.read_json(path, CheckpointError)


def latest_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None if it has none yet."""
    existing = _checkpoints(run)
    return existing[-1] if existing else None


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON file with its digest, under the key ``seal``."""
    return content | {"seal": _digest(content)}


def check_seal(path: Path, content: Any, unsealed: set[str]) -> dict[str, Any]:
    """Check the digest that :func:`seal` has added, and return the content without it.

    Args:
        path: the file, for the message.
        content: what :func:`read_json` returned.
        unsealed: keys of the files of earlier releases, which have no digest and are not checked.

    Raises:
        CheckpointError: the content has changed since the digest was computed, or has no digest and other keys.
    """
    if isinstance(content, dict):
        rest = {name: value for name, value in content.items() if name != "seal"}
        if content.keys() == unsealed or content.get("seal") == _digest(rest):
            return rest
    raise CheckpointError(f"{path}: not written by train.py, or damaged")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file in a folder, by file name."""
    by_name = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as file:
            by_name[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return by_name


def differing_files(folder: Path, expected: Any) -> list[str]:
    """Return the names of files that are missing or differ from their digests."""
    actual = digests(folder) if folder.is_dir() else {}
    if not isinstance(expected, dict):
        return ["all"]
    return [name for name, digest in expected.items() if actual.get(name) != digest]


def check_digests(checkpoint: Path, expected: Any) -> None:
    """Raise CheckpointError if a file differs from its digest."""
    if differing := differing_files(checkpoint, expected):
        raise damaged(checkpoint, ", ".join(differing))


def damaged(checkpoint: Path, what: str) -> CheckpointError:
    """Return the error to raise for a damaged checkpoint; the message names the previous checkpoint if there is one."""
    earlier = [c.name for c in _checkpoints(checkpoint.parent) if checkpoint_step(c) < checkpoint_step(checkpoint)]
    advice = f"; remove the folder to resume from {earlier[-1]}" if earlier else ""
    return CheckpointError(f"{checkpoint}: damaged or incomplete ({what}){advice}")


def checkpoint_step(checkpoint: Path) -> int:
    """Return the training step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_old_checkpoints(run: Path) -> None:
    """Remove all but the newest :data:`KEPT` checkpoints."""
    for old in _checkpoints(run)[:-KEPT]:
        remove_folder(old)


def _checkpoints(run: Path) -> list[Path]:
    return sorted((p for p in run.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name)), key=checkpoint_step)
