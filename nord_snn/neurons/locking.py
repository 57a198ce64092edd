"""One lock for what works with attributes of modules: it runs in one thread at a time."""

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["one_at_a_time"]

_lock = threading.RLock()


def _new_lock() -> None:
    """Replace the lock in a forked process: another thread of the parent may have had it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def one_at_a_time() -> AbstractContextManager[Any]:
    """Return a context for one thread at a time; compiled code cannot have one."""
    return nullcontext() if torch.compiler.is_compiling() else _lock
