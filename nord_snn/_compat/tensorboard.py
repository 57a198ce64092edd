"""Private names of TensorBoard and ``threading``. Written for TensorBoard 2.15 and newer."""

from typing import Any

__all__ = ["raise_write_errors_only"]


def raise_write_errors_only(writer: Any) -> None:
    """Make a ``SummaryWriter`` report disk errors by raising them, without the traceback that its thread prints.

    The thread stores the error, and the next call of the writer raises it. This changes the exception hook of that thread only;
    ``threading.excepthook`` belongs to the application.
    """
    worker = writer.file_writer.event_writer._async_writer._worker
    report = worker._invoke_excepthook
    worker._invoke_excepthook = lambda thread: None if isinstance(worker.exception, OSError) else report(thread)
