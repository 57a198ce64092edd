"""Raise the error of one process in all processes of a run; otherwise the others would wait for it in a collective call."""

import os
from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from nordlm import errors
from nordlm.errors import RecipeError

__all__ = ["in_all_processes", "is_first_process", "on_main_process"]

Result = TypeVar("Result")


def in_all_processes(accelerator: Accelerator, compute: Callable[[], Result]) -> Result:
    """Return ``compute()``; if it raises in one process, raise in all of them. All processes must call this.

    Args:
        accelerator: the process group.
        compute: function without arguments and without collective calls.

    Raises:
        Exception: with one process, what ``compute`` raised.
        RecipeError: ``compute`` raised in a process; class and message are those of the first process that failed.
    """
    if accelerator.num_processes == 1:
        return compute()
    failure: Exception | None = None
    try:
        result = compute()
    except Exception as error:
        failure = error
    failures = [kind_and_message for kind_and_message in gather_object([_describe(failure)]) if kind_and_message]
    if failures:
        kind, message = failures[0]
        shared: RecipeError = getattr(errors, kind, RecipeError)(message)
        shared.shared = True
        raise shared from failure
    return result


def on_main_process(accelerator: Accelerator, compute: Callable[[], Result]) -> Result | None:
    """Return ``compute()`` on the main process and None on the others; see :func:`in_all_processes`."""
    return in_all_processes(accelerator, lambda: compute() if accelerator.is_main_process else None)


def is_first_process() -> bool:
    """Return whether this is the first process on this machine; works before torch is imported."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _describe(error: Exception | None) -> tuple[str, str] | None:
    if error is None:
        return None
    if isinstance(error, (RecipeError, OSError)):
        return type(error).__name__, str(error)
    return type(error).__name__, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
