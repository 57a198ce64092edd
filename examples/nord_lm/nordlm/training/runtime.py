"""What a training process does beside training: memory, signals, the log."""

import ctypes
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from nord_snn._compat.accelerate import log_into
from nord_snn._compat.tensorboard import leave_write_errors_to_the_caller
from nordlm.training.progress import Progress
from nordlm.training.settings import TrainingSettings

__all__ = [
    "Log",
    "StopRequest",
    "keep_freed_memory",
]


def keep_freed_memory() -> None:
    """Let the C library keep what a step has freed for the next one, where it is glibc, and take large pages, where it is Linux.

    By default it gives large blocks back and fetches them anew in every step, page by page.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when torch allocates for the first time
    trim_threshold, mmap_threshold = -1, -3  # the names of these in malloc.h
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 32 * 2**20)  # the most it takes
        library.mallopt(trim_threshold, 2**31 - 1)


class Log:
    """TensorBoard, through accelerate. A log that cannot be written (a full disk) is given up, and the training is not."""

    def __init__(self, accelerator: Accelerator, run: Path, options: TrainingSettings, progress: Progress) -> None:
        self.accelerator, self.progress, self.works = accelerator, progress, True
        log_into(accelerator, run)
        config = {k: v for k, v in asdict(options).items() if v is not None}
        self._try(lambda: accelerator.init_trackers("tensorboard", config=config))
        if self.works and accelerator.is_main_process:
            leave_write_errors_to_the_caller(accelerator.get_tracker("tensorboard", unwrap=True))

    def __call__(self, step: int, **values: float) -> None:
        """Log values of a step."""
        self._try(lambda: self.accelerator.log(values, step=step))

    def close(self) -> None:
        """Write what is left."""
        self._try(self.accelerator.end_training)

    def _try(self, write: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            write()
        except OSError as error:
            self.works = False
            self.progress.say(
                f"warning: the TensorBoard log cannot be written ({error.strerror}); training goes on without"
            )


class StopRequest:
    """Ctrl-C and SIGTERM ask for a stop after the step at hand; asked twice, they end the program at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before = {kind: signal.signal(kind, self._ask) for kind in (signal.SIGINT, signal.SIGTERM)}

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked: all of them stop at the same step."""
        if accelerator.num_processes == 1:
            return self.requested
        return accelerator.reduce(torch.tensor(float(self.requested), device=accelerator.device)).item() > 0

    def _ask(self, *_: Any) -> None:
        self.requested = True
        self.give_back()

    def give_back(self) -> None:
        """Let the signals do what they did before."""
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
