"""Parse command-line arguments: numbers, names of files, and text that is not UTF-8."""

import argparse
import errno
import os
import sys
from pathlib import Path
from typing import Any

__all__ = [
    "file_name",
    "number",
    "replace_invalid_utf8",
    "shorten",
    "temperature",
]


def number(low: float, high: float | None = None, kind: type = float) -> Any:
    """Return an argparse type for numbers of type ``kind`` from ``low`` to ``high`` (default: the largest int32 or float)."""
    limit = high if high is not None else (2**31 - 1 if kind is int else sys.float_info.max)

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= limit:
            at_least = f"of at least {low}" if high is None and value < low else f"from {low} to {limit}"
            raise argparse.ArgumentTypeError(f"expected a number {at_least}, got {shorten(text)}")
        return value

    parse.__name__ = kind.__name__
    return parse


def temperature(text: str) -> float:
    """Parse a sampling temperature: 0, or at least 0.001, the limit for softmax in float32."""
    value = float(text)
    if value != 0 and not 1e-3 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected 0, or a number of at least 0.001, got {text}")
    return value


def file_name(text: str) -> Path:
    """Parse the name of a file or folder, which need not exist."""
    try:
        os.stat(text or ".")
    except ValueError as error:
        raise argparse.ArgumentTypeError("expected a name without NUL bytes") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise argparse.ArgumentTypeError(f"expected a shorter name, got {len(text)} characters") from error
        if error.errno == errno.ELOOP:
            raise argparse.ArgumentTypeError(
                f"expected a file or folder, but {text} is a link that leads to itself"
            ) from error
    return Path(text)


def shorten(text: str, limit: int = 300) -> str:
    """Return ``text`` as one line of at most ``limit`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def replace_invalid_utf8(text: str) -> str:
    """Replace bytes that are not UTF-8 by U+FFFD.

    Python reads such bytes from the command line and from ``input`` as Unicode surrogates, which tokenizers reject.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
