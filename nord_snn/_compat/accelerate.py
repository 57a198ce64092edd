"""Undocumented attributes of accelerate. Written for 1.10 and newer, tested with 1.15."""

from pathlib import Path

from accelerate import Accelerator

__all__ = ["reset_accumulation", "set_log_folder"]


def reset_accumulation(accelerator: Accelerator) -> None:
    """Set the count of micro-batches to 0: a checkpoint stores the count, but not the gradients accumulated so far."""
    accelerator.step = 0


def set_log_folder(accelerator: Accelerator, folder: Path) -> None:
    """Set the log folder of trackers that start later: the accelerator is created before the folder is known."""
    accelerator.project_configuration.project_dir = accelerator.project_configuration.logging_dir = str(folder)
