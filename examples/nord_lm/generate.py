"""Continue a prompt with a trained model.

python examples/nord_lm/generate.py "The list type"
python examples/nord_lm/generate.py --model runs/tiny-0001/model --temperature 0.7 --top-p 0.9 "import os"
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from data import DataError, check_vocabulary
from modeling_nord import NordForCausalLM
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer, set_seed
from transformers.utils import logging

__all__ = [
    "ModelError",
    "as_text",
    "load_model",
    "newest_model",
    "number",
    "open_for",
    "open_model",
    "sampling",
    "sampling_arguments",
    "temperature",
]


class ModelError(ValueError):
    """There is no usable model; the message says what was expected."""


def newest_model(runs: Path = Path("runs")) -> Path:
    """The model of the run that finished last."""
    finished = [path for path in runs.glob("*/results.json") if (path.parent / "model").is_dir()]  # not of compare.py
    finished.sort(key=lambda path: path.stat().st_mtime)
    if not finished:
        raise ModelError(
            f"no finished run in {runs}/: train one with examples/nord_lm/train.py, or give --model FOLDER"
        )
    return finished[-1].parent / "model"


def load_model(folder: Path) -> NordForCausalLM:
    """The model of a folder that ``train.py`` wrote, whole.

    Raises:
        ModelError: something is missing or does not fit.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no model here; expected a folder with config.json, model.safetensors and a tokenizer"
        )
    try:
        model, loading = NordForCausalLM.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # a wrong, truncated or foreign file fails in many ways
        raise ModelError(f"{folder}: the model cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if wrong := {kind: sorted(map(str, names)) for kind, names in loading.items() if names}:
        kind, names = next(iter(wrong.items()))
        raise ModelError(
            f"{folder}: the weights do not fit the configuration ({kind.replace('_', ' ')}: {', '.join(names[:3])})"
        )
    return model


def open_model(folder: Path) -> tuple[NordForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder that ``train.py`` wrote.

    Raises:
        ModelError: something is missing or does not fit.
    """
    model = load_model(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ModelError(
            f"{folder}: no usable tokenizer beside the model ({' '.join(str(error).split())[:300]})"
        ) from error
    check_vocabulary(tokenizer, model.config.vocab_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


def open_for(options: argparse.Namespace) -> tuple[NordForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer for the command line, seeded and without transformers' own messages."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns where text grows past the context, over which this model slides
    if options.seed is not None:
        set_seed(options.seed)
    return open_model(options.model or newest_model())


def sampling(temperature: float, top_k: int, top_p: float, repetition_penalty: float) -> dict[str, Any]:
    """Arguments for ``generate``; temperature 0 takes the best token each time."""
    if temperature == 0:
        return {"do_sample": False, "repetition_penalty": repetition_penalty}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }


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


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that ``generate.py`` and ``chat.py`` share."""
    parser.add_argument(
        "--model", type=Path, help="folder with model and tokenizer (default: of the newest run in runs/)"
    )
    parser.add_argument("--max-new-tokens", type=number(1, kind=int), default=100)
    parser.add_argument("--temperature", type=temperature, default=0.8, help="0 takes the best token each time")
    parser.add_argument("--top-k", type=number(0, kind=int), default=50, help="sample from that many tokens; 0: all")
    parser.add_argument(
        "--top-p", type=number(0, 1), default=0.95, help="sample from the best tokens of this probability"
    )
    parser.add_argument("--repetition-penalty", type=number(0.01, 100), default=1.1, help="1: none")
    parser.add_argument("--seed", type=number(0, 2**32 - 1, int), help="for the same text again")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="", help="text to go on from; '-' reads it from standard input")
    sampling_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        model, tokenizer = open_for(options)
    except (ModelError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    prompt = sys.stdin.buffer.read().decode("utf-8", "replace") if options.prompt == "-" else as_text(options.prompt)
    ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"] or [
        tokenizer.eos_token_id
    ]
    if len(ids) > model.config.max_position_embeddings:
        print(
            f"note: only the last {model.config.max_position_embeddings} tokens of the prompt are seen", file=sys.stderr
        )
    try:
        model.generate(
            torch.tensor([ids], device=model.device),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling(options.temperature, options.top_k, options.top_p, options.repetition_penalty),
        )
    except KeyboardInterrupt:
        print()
        return 130
    except (ValueError, RuntimeError) as error:  # weights that give no probabilities, say
        print(f"error: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
