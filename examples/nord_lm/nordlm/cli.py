"""Types of command-line arguments."""

import argparse
from typing import Any

__all__ = [
    "as_text",
    "number",
    "temperature",
]


def number(low: float, high: float = float("inf"), kind: type = float) -> Any:
    """An argparse type: a number in ``[low, high]``."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def temperature(text: str) -> float:
    """An argparse type: 0, or no less than what softmax in float32 can bear."""
    value = float(text)
    if value != 0 and not 1e-3 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected 0, or a number of at least 0.001, got {text}")
    return value


def as_text(typed: str) -> str:
    """What was typed, with bytes that are no UTF-8 replaced: Python hides them in surrogates that no tokenizer takes."""
    return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
