"""Types and encoding of command-line arguments."""

import argparse
from typing import Any

__all__ = [
    "number",
    "replace_invalid_utf8",
    "temperature",
]


def number(low: float, high: float = float("inf"), kind: type = float) -> Any:
    """Return an argparse type: a number in ``[low, high]``."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def temperature(text: str) -> float:
    """Parse a sampling temperature: 0, or at least 0.001, the limit for softmax in float32."""
    value = float(text)
    if value != 0 and not 1e-3 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected 0, or a number of at least 0.001, got {text}")
    return value


def replace_invalid_utf8(text: str) -> str:
    """Replace bytes that are not UTF-8 by U+FFFD.

    Python reads such bytes from the command line and from ``input`` as Unicode surrogates, which tokenizers reject.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
