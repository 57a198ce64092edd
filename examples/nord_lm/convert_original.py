"""Turn a published Nord checkpoint into a folder that ``AutoModelForCausalLM.from_pretrained`` opens, or back.

    python examples/nord_lm/convert_original.py nord_final.pt converted/
    python examples/nord_lm/convert_original.py --to-original runs/mine-0001/model nord_mine.pt

The model opens with ``nord_snn.models.nord.NordForCausalLM.from_pretrained``, or with the auto classes once
``nord_snn.models.nord`` has been imported (else with ``trust_remote_code=True``). Nothing in a checkpoint is executed.
The folder holds safetensors and a ``config.json``; the tokenizer (``meta-
llama/Llama-3.2-1B`` for the published weights) is not part of a checkpoint.
"""

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from nordlm.inference.loading import load_model
from nordlm.training.checkpoints import unfinished
from nordlm.training.model_card import model_card
from transformers.utils import logging

from nord_snn.models.nord.original import PUBLISHED_TOKENIZER, load_original, to_original


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="published .pt file; with --to-original, a model's folder")
    parser.add_argument(
        "out", type=Path, help="folder to write, which must not exist or be empty; with --to-original, a new .pt file"
    )
    parser.add_argument("--to-original", action="store_true", help="the way back")
    parser.add_argument(
        "--tokenizer",
        help="with --to-original: name or folder of the tokenizer to write into the checkpoint; default: the model's "
        f"folder where it has one, else {PUBLISHED_TOKENIZER}",
    )
    options = parser.parse_args(arguments)
    if options.tokenizer is not None and not options.to_original:
        parser.error("--tokenizer goes with --to-original")
    logging.disable_progress_bar()  # of transformers
    try:
        print(_back(options) if options.to_original else _convert(options))
    except ValueError as error:
        sys.exit(f"error: {error}")


def _convert(options: argparse.Namespace) -> str:
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"{options.out} exists and is not an empty folder")
    model = load_original(options.source)
    try:
        model.save_pretrained(options.out)
        card = model_card(model, f"Converted from {options.source.name}, a checkpoint of the published code, with")
        (options.out / "README.md").write_text(card, encoding="utf-8")
    except Exception as error:  # a full or read-only disk, by whoever writes
        raise ValueError(f"{options.out} could not be written ({' '.join(str(error).split())[:200]})") from error
    return f"{options.out}: {model.num_parameters():,} parameters"


def _back(options: argparse.Namespace) -> str:
    if not options.out.parent.is_dir() or os.path.lexists(options.out):
        raise ValueError(f"{options.out}: expected a new file in a folder that exists")
    model = load_model(options.source)
    own = str(options.source.resolve()) if (options.source / "tokenizer.json").is_file() else PUBLISHED_TOKENIZER
    checkpoint, beside = to_original(model, options.tokenizer or own), unfinished(options.out)
    try:
        torch.save(checkpoint, beside)
        os.replace(beside, options.out)
    except (OSError, RuntimeError) as error:  # a full or read-only disk; torch has RuntimeErrors for it
        raise ValueError(f"{options.out} could not be written ({' '.join(str(error).split())[:200]})") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return f"{options.out}: {model.num_parameters():,} parameters, tokenizer {options.tokenizer or own}"


if __name__ == "__main__":
    main()
