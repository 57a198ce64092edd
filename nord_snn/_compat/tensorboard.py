"""Private names of TensorBoard and ``threading``. Written for TensorBoard 2.15 and newer."""

from typing import Any

__all__ = ["raise_write_errors_only"]


def raise_write_errors_only(writer: Any) -> None:
    """Stop the thread of a ``SummaryWriter`` from printing a traceback of disk errors; the writer still raises them.

    The thread stores the error, and the writer's next call raises it. The exception hook of this thread is replaced;
    ``threading.excepthook`` is left to the application.
    """
    worker = writer.file_writer.event_writer._async_writer._worker
    report = worker._invoke_excepthook
    worker._invoke_excepthook = lambda thread: None if isinstance(worker.exception, OSError) else report(thread)
