"""Configure memory and signals of the training process, and write its log."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from nord_snn._compat.accelerate import set_log_folder
from nord_snn._compat.tensorboard import raise_write_errors_only
from nordlm.training.progress import TrainingProgress
from nordlm.training.settings import TrainingSettings

__all__ = [
    "Log",
    "StopRequest",
    "keep_freed_memory",
]


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory in the next training step, and use huge pages on Linux.

    By default glibc returns large blocks of memory to the system and maps them again in every training step, page by page.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads this at its first allocation
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 32 * 2**20)  # the largest value that glibc accepts
        library.mallopt(trim_threshold, 2**31 - 1)


class Log:
    """TensorBoard log, through accelerate. After a write error (a full disk) logging stops and training continues."""

    def __init__(
        self, accelerator: Accelerator, run: Path, options: TrainingSettings, progress: TrainingProgress
    ) -> None:
        self.accelerator, self.progress, self.enabled = accelerator, progress, True
        set_log_folder(accelerator, run)
        config = {k: v for k, v in asdict(options).items() if v is not None}
        self._try(lambda: accelerator.init_trackers("tensorboard", config=config))
        if self.enabled and accelerator.is_main_process:
            raise_write_errors_only(accelerator.get_tracker("tensorboard", unwrap=True))

    def __call__(self, step: int, **values: float) -> None:
        """Log values of a training step."""
        self._try(lambda: self.accelerator.log(values, step=step))

    def close(self) -> None:
        """Flush and close the log, and leave the process group."""
        if self.accelerator.num_processes > 1:
            # torch joins the threads of gloo while holding the GIL; they need the GIL to release tensors of the last calls.
            self.accelerator.wait_for_everyone()
            time.sleep(0.2)
        self._try(self.accelerator.end_training)

    def _try(self, write: Callable[[], None]) -> None:
        if not self.enabled:
            return
        try:
            write()
        except OSError as error:
            self.enabled = False
            self.progress.say(
                f"warning: the TensorBoard log cannot be written ({error.strerror}); training continues without it"
            )


class StopRequest:
    """Request a stop after the current training step on Ctrl-C, SIGTERM or a closed terminal (SIGHUP, unless it is ignored).

    A second Ctrl-C ends the program at once. A second SIGTERM does not, because launchers send one after Ctrl-C, while the
    checkpoint is being saved.
    """

    def __init__(self) -> None:
        self.requested = False
        kinds = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
            kinds.append(signal.SIGHUP)
        self._previous = {kind: signal.signal(kind, self._request) for kind in kinds}

    def any_process_requested(self, accelerator: Accelerator) -> bool:
        """Return whether any process received a signal, so that all stop at the same training step."""
        if accelerator.num_processes == 1:
            return self.requested
        return accelerator.reduce(torch.tensor(float(self.requested), device=accelerator.device)).item() > 0

    def _request(self, kind: int, _: Any) -> None:
        self.requested = True
        if kind == signal.SIGINT:
            signal.signal(kind, self._previous[signal.SIGINT])

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers."""
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)
