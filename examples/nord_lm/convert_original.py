"""Convert a published Nord checkpoint to a folder for ``AutoModelForCausalLM.from_pretrained``, or back.

    python examples/nord_lm/convert_original.py nord_final.pt converted/
    python examples/nord_lm/convert_original.py --to-original runs/mine-0001/model nord_mine.pt

The folder has safetensors and a ``config.json``. Load the model with ``nord_snn.models.nord.NordForCausalLM.from_pretrained``,
or with the auto classes after an import of ``nord_snn.models.nord`` (without this import: ``trust_remote_code=True``). Nothing in
a checkpoint is executed. A checkpoint has no tokenizer; the published weights use that of ``meta-llama/Llama-3.2-1B``.
"""

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from nordlm.script import exit_on_interrupt, run_script

with exit_on_interrupt():
    import torch
    from nordlm.cli import file_name
    from nordlm.errors import RecipeError
    from nordlm.files import temporary_path, write_folder
    from nordlm.inference.loading import load_model
    from nordlm.training.model_card import model_card
    from transformers.utils import logging

    from nord_snn.models.nord.original import PUBLISHED_TOKENIZER, load_original, to_original


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "source",
        type=file_name,
        help="checkpoint (.pt) of the published code; with --to-original, the folder of a model",
    )
    parser.add_argument(
        "out", type=file_name, help="new or empty folder to write to; with --to-original, a new .pt file"
    )
    parser.add_argument(
        "--to-original",
        action="store_true",
        help="convert the folder of a model to a checkpoint (.pt) of the published code",
    )
    parser.add_argument(
        "--tokenizer",
        help="with --to-original: name or folder of the tokenizer to write into the checkpoint (default: the model's "
        f"folder if it has one, else {PUBLISHED_TOKENIZER})",
    )
    options = parser.parse_args(arguments)
    if options.tokenizer is not None and not options.to_original:
        parser.error("--tokenizer needs --to-original")
    logging.disable_progress_bar()  # of transformers
    try:
        print(_to_original(options) if options.to_original else _from_original(options))
    except (ValueError, RecipeError) as error:
        sys.exit(f"error: {error}")


def _from_original(options: argparse.Namespace) -> str:
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"{options.out} exists and is not an empty folder")
    model = load_original(options.source)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        card = model_card(model, f"Converted from {options.source.name}, a checkpoint of the published code, with")
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(options.out, write)
    return f"{options.out}: {model.num_parameters():,} parameters"


def _to_original(options: argparse.Namespace) -> str:
    if not options.out.parent.is_dir() or os.path.lexists(options.out):
        raise ValueError(f"{options.out}: expected a new file in a folder that exists")
    model = load_model(options.source)
    default = _default_tokenizer(options.source)
    checkpoint, temporary = to_original(model, options.tokenizer or default), temporary_path(options.out)
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, options.out)
    except (OSError, RuntimeError) as error:  # a full or read-only disk; torch raises RuntimeError for it
        raise ValueError(f"{options.out} could not be written ({' '.join(str(error).split())[:200]})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return f"{options.out}: {model.num_parameters():,} parameters, tokenizer {options.tokenizer or default}"


def _default_tokenizer(folder: Path) -> str:
    return str(folder.resolve()) if (folder / "tokenizer.json").is_file() else PUBLISHED_TOKENIZER


if __name__ == "__main__":
    sys.exit(run_script(main))
