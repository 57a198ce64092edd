"""Private names of TensorBoard and ``threading``. Written for TensorBoard 2.15 and newer."""

from typing import Any

__all__ = ["leave_write_errors_to_the_caller"]


def leave_write_errors_to_the_caller(writer: Any) -> None:
    """Let a ``SummaryWriter`` report an error of the disk by raising it, and not also by a traceback of its thread.

    The thread keeps the error, and the next call of the writer raises it. To keep the traceback of that thread alone away takes
    the thread itself; ``threading.excepthook`` belongs to the application.
    """
    worker = writer.file_writer.event_writer._async_writer._worker
    report = worker._invoke_excepthook
    worker._invoke_excepthook = lambda thread: None if isinstance(worker.exception, OSError) else report(thread)
