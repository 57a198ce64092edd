"""Replace files and folders atomically: if the process is killed, the path has the complete old or the complete new content.

New content is written to ``.NAME.unfinished`` in the parent folder of ``NAME``, then ``.NAME.unfinished`` is renamed to ``NAME``.
If the folder ``NAME`` exists, one system call exchanges the two folders (``renameat2`` on Linux). Where the file system has no
such call, the old folder is first renamed to ``.NAME.old``; if the process is killed between the two renames, :func:`recover`
restores the old folder. Before the files of a folder are deleted, the folder is renamed to ``.NAME.removed``.

Nothing is flushed to the disk: a power failure can damage what was written last.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nordlm.errors import CheckpointError

__all__ = [
    "clean_up",
    "create_numbered",
    "locked",
    "move_into_place",
    "recover",
    "remove_folder",
    "temporary_path",
    "write_bytes",
    "write_error",
    "write_folder",
    "write_json",
    "write_text",
]

DAY = 86_400  # seconds
UNFINISHED, OLD, REMOVED = ".unfinished", ".old", ".removed"
NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # errors of systems without an exchange


def temporary_path(path: Path) -> Path:
    """Return the path to which a folder or file is written before it is moved to ``path``."""
    return _beside(path, UNFINISHED)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary folder beside ``folder``, then move it into place.

    Raises:
        CheckpointError: the folder could not be written; an older folder is unchanged.
    """
    temporary = temporary_path(folder)
    try:
        recover(folder)
        _delete(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        move_into_place(temporary, folder)
    except BaseException as error:  # also Ctrl-C
        _delete(temporary)
        if isinstance(error, Exception):
            raise write_error(folder, error) from error
        raise


def write_error(folder: Path, error: Exception) -> CheckpointError:
    """Return the error to raise if a folder could not be written."""
    return CheckpointError(
        f"{folder} could not be written ({_reason(error, folder.parent)}); earlier files are complete"
    )


def _reason(error: Exception, parent: Path) -> str:
    """Return why writing failed. On a full disk each library raises another type of exception."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    with suppress(OSError):
        if shutil.disk_usage(parent).free < 1 << 20:
            return f"the disk is full: {reason}"
    return reason


def move_into_place(temporary: Path, folder: Path) -> None:
    """Move a complete folder to the path ``folder``, and delete the folder that it replaces."""
    old = _beside(folder, OLD)
    if not os.path.lexists(folder):
        os.replace(temporary, folder)
    elif _exchange(temporary, folder):
        _delete(temporary)
    else:
        _delete(old)
        try:
            os.replace(folder, old)
            os.replace(temporary, folder)
        except BaseException:
            recover(folder)
            raise
    _delete(old)


def recover(folder: Path) -> None:
    """Restore a folder if the process that replaced it was killed between its two renames."""
    if not os.path.lexists(folder) and (old := _beside(folder, OLD)).is_dir():
        os.replace(old, folder)


def clean_up(parent: Path) -> None:
    """Restore folders in ``parent`` whose replacement was interrupted, and delete temporary files of killed processes.

    No other process may be writing to ``parent``, see :func:`locked`.
    """
    for old in parent.glob(f".*{OLD}"):
        recover(parent / old.name[1 : -len(OLD)])
    for ending in (UNFINISHED, OLD, REMOVED):
        for temporary in parent.glob(f".*{ending}"):
            _delete(temporary)


def remove_folder(folder: Path) -> None:
    """Delete a folder; if the process is killed, ``folder`` is complete or does not exist. Ignore errors."""
    removed = _beside(folder, REMOVED)
    _delete(removed)
    with suppress(OSError):
        os.replace(folder, removed)
        _delete(removed)


def create_numbered(parent: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Create ``parent/name-0001``, or the next free number, with the content that ``write`` writes to it.

    Temporary folders in ``parent`` that are more than a day old are deleted.

    Raises:
        CheckpointError: the folder could not be created.
    """
    temporary = parent / f".{name}.{os.getpid()}.{os.urandom(4).hex()}{UNFINISHED}"
    for other in parent.glob(f".{name}.*{UNFINISHED}"):
        with suppress(OSError):
            if other.stat().st_mtime < time.time() - DAY:  # a newer one may belong to a running process
                _delete(other)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for number in range(1, 10_000):
            folder = parent / f"{name}-{number:04d}"
            if not os.path.lexists(folder) and _rename_new(temporary, folder):
                return folder
    except Exception as error:
        raise CheckpointError(f"{parent / name}: cannot be created ({_reason(error, parent)})") from error
    finally:
        _delete(temporary)
    raise CheckpointError(f"{parent}: expected a free number for {name}, but 0001 to 9999 all exist")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot represent.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. If several processes write the same file, it has the content of the last one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, refusal: str, note: Callable[[str], None]) -> Iterator[None]:
    """Lock an existing file until the block or the process ends, also if the process is killed.

    Args:
        path: the file; its content is neither read nor changed.
        refusal: message of the error if another process has locked the file.
        note: called with a sentence if the file system has no locks; the block then runs without a lock.

    Raises:
        CheckpointError: another process has locked the file, or it cannot be opened.
    """
    try:
        file = os.open(path, (os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY) | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise CheckpointError(refusal) from error
    except OSError as error:  # some network file systems
        note(f"{path} cannot be locked ({error.strerror}): do not let two processes write to this folder")
    try:
        yield
    finally:
        os.close(file)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}{ending}")


def _delete(path: Path) -> None:
    """Delete a folder or file; ignore errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _rename_new(temporary: Path, folder: Path) -> bool:
    """Rename a folder to a free name; return False if another process has taken the name."""
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one system call; return False if the system or the file system has no such call."""
    current_folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(current_folder, os.fsencode(first), current_folder, os.fsencode(second), exchange) == 0:
        return True
    error_number = ctypes.get_errno()
    if error_number in NO_EXCHANGE:
        return False
    raise OSError(error_number, os.strerror(error_number), str(second))
