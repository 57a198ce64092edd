"""Attributes of accelerate that its documentation does not have. Written for 1.10 and newer, tested with 1.15."""

from pathlib import Path

from accelerate import Accelerator

__all__ = ["begin_accumulation_anew", "log_into"]


def begin_accumulation_anew(accelerator: Accelerator) -> None:
    """Count micro-batches from zero: a checkpoint may be from the middle of an accumulation that broke off."""
    accelerator.step = 0


def log_into(accelerator: Accelerator, folder: Path) -> None:
    """Let trackers that are started from now on write into this folder, which is known after the accelerator is made."""
    accelerator.project_configuration.project_dir = accelerator.project_configuration.logging_dir = str(folder)
