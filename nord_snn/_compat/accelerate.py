"""Undocumented attributes of accelerate. Written for 1.10 and newer, tested with 1.15."""

from pathlib import Path

from accelerate import Accelerator

__all__ = ["reset_accumulation", "set_log_folder"]


def reset_accumulation(accelerator: Accelerator) -> None:
    """Count micro-batches from zero again: a checkpoint may have been saved during an accumulation."""
    accelerator.step = 0


def set_log_folder(accelerator: Accelerator, folder: Path) -> None:
    """Set the folder of trackers that are started later; the accelerator is created before the folder is known."""
    accelerator.project_configuration.project_dir = accelerator.project_configuration.logging_dir = str(folder)
