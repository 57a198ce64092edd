"""Options of sampling, on the command line and for ``generate``."""

import argparse
from typing import Any

from nordlm.cli import file_name, number, temperature

__all__ = [
    "GENERATION_ERRORS",
    "add_sampling_options",
    "generate_arguments",
]


#: Errors of ``generate`` for weights with NaN, and for values of the wrong type in a ``generation_config.json``.
GENERATION_ERRORS = (ValueError, RuntimeError, TypeError, LookupError, AttributeError, OverflowError)


def generate_arguments(temperature: float, top_k: int, top_p: float, repetition_penalty: float) -> dict[str, Any]:
    """Return keyword arguments for ``generate``; temperature 0 is greedy search."""
    if temperature == 0:
        return {"do_sample": False, "repetition_penalty": repetition_penalty}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``generate.py`` and ``chat.py`` share."""
    parser.add_argument(
        "--model",
        type=file_name,
        help="folder with model and tokenizer (default: from the newest finished run in runs/)",
    )
    parser.add_argument("--max-new-tokens", type=number(1, kind=int), default=100)
    parser.add_argument("--temperature", type=temperature, default=0.8, help="0 is greedy search")
    parser.add_argument(
        "--top-k", type=number(0, kind=int), default=50, help="sample from this number of most probable tokens; 0: all"
    )
    parser.add_argument(
        "--top-p",
        type=number(0, 1),
        default=0.95,
        help="sample from the most probable tokens with this total probability",
    )
    parser.add_argument("--repetition-penalty", type=number(0.01, 100), default=1.1, help="1 is no penalty")
    parser.add_argument("--seed", type=number(0, 2**32 - 1, int), help="random seed, for a reproducible text")
