"""Checksums of the files of a model folder, in ``checksums.json``: damaged weights may still be valid numbers.

CRC-32 finds any damage of up to 32 neighbouring bits, and other damage except in one of 2^32 cases. It does not protect from
deliberate changes, which can include ``checksums.json``.
"""

import json
import warnings
import zlib
from fnmatch import fnmatchcase
from pathlib import Path

__all__ = ["FILE", "MODEL_FILES", "check_checksums", "write_checksums"]

FILE = "checksums.json"
#: Files that ``from_pretrained`` of a model reads.
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.bin")
#: Files that users change by hand, so that a change gives a warning instead of an error.
EDITABLE = {"generation_config.json"}
FORMAT = "crc32"
CHUNK = 1 << 20  # bytes of a file that are read at once
MAX_BYTES = 1 << 20  # of checksums.json


def write_checksums(folder: Path, patterns: tuple[str, ...] = MODEL_FILES) -> None:
    """Write the checksums of the files in a folder whose names match one of ``patterns``, in place of earlier ones."""
    (folder / FILE).unlink(missing_ok=True)
    files = {path.name: _checksum(path) for path in _matching(folder, patterns)}
    content = {"format": FORMAT, "files": files, "of_this_file": _own_checksum(files)}
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_checksums(folder: Path, patterns: tuple[str, ...] = MODEL_FILES) -> None:
    """Compare the files in a folder with their checksums.

    Files without a checksum are not compared, nor is a folder without ``checksums.json``, as earlier releases wrote it.

    Args:
        folder: the folder.
        patterns: only files whose names match one of these are compared.

    Raises:
        ValueError: a file or ``checksums.json`` itself has changed. A change of ``generation_config.json`` gives a warning.
    """
    path = folder / FILE
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_bytes()[:MAX_BYTES])
        files = dict(content["files"])
        intact = content == {"format": FORMAT, "files": files, "of_this_file": _own_checksum(files)}
    except (ValueError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged: remove it to load the folder without a comparison")
    for file in _matching(folder, patterns):
        if file.name in files and files[file.name] != _checksum(file):
            message = (
                f"{file} is damaged, or was changed after the model was saved: if that was on purpose, save the model again "
                f"with save_pretrained, or remove {FILE}"
            )
            if file.name not in EDITABLE:
                raise ValueError(message)
            warnings.warn(message, stacklevel=3)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    names = (path for path in sorted(folder.iterdir()) if path.name != FILE and path.is_file())
    return [path for path in names if any(fnmatchcase(path.name, pattern) for pattern in patterns)]


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _own_checksum(files: dict[str, str]) -> str:
    """Return the checksum of the list of files and checksums."""
    return f"{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}"
