"""Shared code of the study commands: arguments, error handling and tables."""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nordlm.cli import file_name, number
from nordlm.errors import DataError
from nordlm.training.checkpoints import CheckpointError, write_text
from nordlm.training.runtime import keep_freed_memory
from nordlm.training.settings import Settings, SettingsError, absolute_paths, read_config
from transformers.utils import logging

__all__ = [
    "command_line",
    "common_arguments",
    "markdown_table",
    "run_trials",
    "settings_for",
    "spread",
    "steps_argument",
    "unique",
    "write_results",
]


def run_trials(work: Callable[[], None]) -> int:
    """Run the function ``work`` of a command; return the exit status. Errors are printed in one sentence on standard error."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    keep_freed_memory()
    try:
        work()
    except (SettingsError, DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues with the missing runs", file=sys.stderr)
        return 130
    return 0


def command_line(arguments: list[str] | None, script: str) -> str:
    """Return the command line as text."""
    return shlex.join(["python", *(sys.argv if arguments is None else [script, *arguments])])


def common_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options of all studies."""
    parser.add_argument("--config", default="tiny", help="a name from configs/, or a YAML file (default: tiny)")
    parser.add_argument("--data", help="text file, folder or dataset name (default: the config's)")
    parser.add_argument("--validation-data", help="separate text to validate on (default: part of the data)")
    parser.add_argument("--seeds", nargs="+", type=number(0, 2**32 - 1, int), default=[0, 1, 2])
    parser.add_argument(
        "--out", type=file_name, default=Path(out), help=f"folder for the runs and tables (default: {out})"
    )


def steps_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option for the number of training steps, for studies whose runs all have the same number."""
    parser.add_argument("--steps", type=number(1, kind=int), help="training steps (default: the config's)")


def settings_for(options: argparse.Namespace, fields: tuple[str, ...] = ("data", "validation_data")) -> Settings:
    """Return the settings of the config, with ``fields`` of the training from the command line."""
    settings = read_config(options.config)
    changes = {name: getattr(options, name) for name in fields if getattr(options, name) is not None}
    return replace(settings, training=replace(settings.training, **changes | absolute_paths(changes)))


def unique(values: Iterable[Any]) -> list[Any]:
    """Return the values without duplicates, in order."""
    return list(dict.fromkeys(values))


def spread(values: list[float], to_text: Callable[[float], str]) -> str:
    """Return mean and range as text, or a single number if both ends of the range have the same text."""
    if not values:
        return ""
    low, high = to_text(min(values)), to_text(max(values))
    return low if low == high else f"{to_text(statistics.mean(values))} ({low} to {high})"


def markdown_table(lines: list[list[str]]) -> str:
    """Return lines of cells as a Markdown table; the first line is the header."""
    head, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def write_results(out: Path, parts: list[str], runs: Iterable[dict[str, Any]]) -> None:
    """Write ``table.md`` from its parts, and ``runs.jsonl`` with the results of each run in a line."""
    write_text(out / "runs.jsonl", "".join(json.dumps(run) + "\n" for run in runs))
    write_text(out / "table.md", "\n\n".join(parts) + "\n")
