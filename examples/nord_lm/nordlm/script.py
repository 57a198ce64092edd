"""Run a script; handle Ctrl-C at any moment, and standard output that can no longer be written.

Standard output can no longer be written if the reader of a pipe exits (``| head -1``, or ``| tee log`` at Ctrl-C), the disk is
full, or the terminal is closed. A script then ends with a non-zero exit status; training continues without output. This module
imports no large library, so that Ctrl-C is also handled while libraries are imported.
"""

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["INTERRUPTED", "exit_on_interrupt", "run_script"]

INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C, the convention of shells
READER_LEFT = 128 + signal.SIGPIPE  # exit status if the reader of a pipe has exited, the convention of shells


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Exit at once on Ctrl-C inside the block, which imports libraries: there is nothing to save yet."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is not signal.default_int_handler:
        yield  # ignored (as in a background job), or handled by the caller
        return
    signal.signal(signal.SIGINT, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _exit(*_: Any) -> None:
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted\n")
    os._exit(INTERRUPTED)


def run_script(main: Callable[[], int | None], keep_running: bool = False) -> int:
    """Run a script and return its exit status.

    Args:
        main: the script; returns its exit status, or None for 0.
        keep_running: whether the script continues if standard output can no longer be written. Default: it exits with status
            141 if the reader of a pipe has exited, else with 1.
    """
    _open_closed_streams()
    output = _Output(keep_running)
    try:
        status = main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except OSError as error:  # for example a full disk, or a folder in place of a file
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except MemoryError:
        print("error: out of memory", file=sys.stderr)
        status = 1
    finally:
        sys.stdout.flush()  # while a write error can still change the exit status
    return output.status or status


def _open_closed_streams() -> None:
    """Open the null device for each standard stream that the caller has closed.

    Python sets such a stream to None, and the next file that is opened would have its descriptor. ``input`` cannot end then.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # has the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


class _Output:
    """Standard output and standard error, each replaced by the null device after its first write error."""

    def __init__(self, keep_running: bool) -> None:
        self.keep_running, self.status = keep_running, 0
        for name, on_error in (("stdout", self._handle_error), ("stderr", lambda error: None)):
            stream = getattr(sys, name)
            buffer = io.BufferedWriter(_GuardedFile(stream.fileno(), on_error))
            # An encoding such as ASCII has no table lines, and names of files can have bytes that are not UTF-8.
            errors = "backslashreplace" if stream.errors == "strict" else stream.errors
            guarded = io.TextIOWrapper(
                buffer, stream.encoding, errors, "\n", stream.line_buffering, stream.write_through
            )
            setattr(sys, name, guarded)

    def _handle_error(self, error: OSError) -> None:
        if self.keep_running:
            print(
                f"warning: standard output can no longer be written ({error.strerror}); the script continues",
                file=sys.stderr,
            )
            return
        self.status = READER_LEFT if isinstance(error, BrokenPipeError) else 1
        if not isinstance(error, BrokenPipeError):  # a reader such as ``head`` exits on purpose
            print(f"error: standard output cannot be written ({error.strerror})", file=sys.stderr)
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(self.status)


class _GuardedFile(io.FileIO):
    """An open file descriptor for writing; after the first error it is the null device.

    Args:
        descriptor: the file descriptor.
        on_error: called with the error.
    """

    def __init__(self, descriptor: int, on_error: Callable[[OSError], None]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._on_error = on_error

    def write(self, data: Any) -> int:
        """Write the data, or discard it after an error."""
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])  # a full pipe in non-blocking mode
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            self._on_error(error)
            return len(data)
        return written
