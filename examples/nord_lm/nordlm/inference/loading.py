"""Load a trained model and its tokenizer."""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from nord_snn.models.nord import NordForCausalLM
from nordlm.data.tokenizer import check_vocabulary, open_tokenizer
from nordlm.errors import DataError, ModelError
from nordlm.reading import check_files, exists, read_json
from nordlm.training.building import check_backend

__all__ = [
    "load_model",
    "newest_model",
    "open_from_options",
    "open_model",
]


def newest_model(runs: Path = Path("runs")) -> Path:
    """Return the model folder of the run that finished last."""
    finished = [path for path in runs.glob("*/results.json") if path.is_file()]  # no broken link
    finished = [path for path in finished if (path.parent / "model").is_dir()]  # those of studies/ have none
    finished.sort(key=lambda path: path.stat().st_mtime)
    if not finished:
        raise ModelError(
            f"no finished run in {runs}/: train one with examples/nord_lm/train.py, or give --model FOLDER"
        )
    return finished[-1].parent / "model"


def load_model(folder: Path) -> NordForCausalLM:
    """Load a model from a folder that ``train.py`` wrote.

    Raises:
        ModelError: a file is missing, or the weights do not fit the configuration.
    """
    if not exists(folder / "config.json"):
        raise ModelError(f"{folder}: expected a folder with config.json, model.safetensors and a tokenizer")
    check_files(folder, ModelError)
    if not isinstance(read_json(folder / "config.json", ModelError), dict):
        raise ModelError(f"{folder / 'config.json'}: expected a JSON object, the configuration of a model")
    try:
        model, loading_info = NordForCausalLM.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    except Exception as error:  # a wrong or truncated file can raise any exception
        raise ModelError(f"{folder}: the model cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if problems := {kind: sorted(map(str, names)) for kind, names in loading_info.items() if names}:
        kind, names = next(iter(problems.items()))
        raise ModelError(
            f"{folder}: the weights do not fit the configuration ({kind.replace('_', ' ')}: {', '.join(names[:3])})"
        )
    if (beams := model.generation_config.num_beams) not in (None, 1):
        raise ModelError(f"{folder / 'generation_config.json'}: num_beams must be 1 for these scripts, got {beams!r}")
    model.config.return_dict = True  # the scripts read logits by name
    return model


def open_model(folder: Path) -> tuple[NordForCausalLM, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder that ``train.py`` wrote, on the GPU if there is one.

    Raises:
        ModelError: a file is missing, the weights do not fit the configuration, or its backend cannot run here.
        DataError: the tokenizer does not fit the model.
    """
    model = load_model(folder)
    try:
        tokenizer = open_tokenizer(str(folder))
    except DataError as error:
        raise ModelError(f"{folder}: no usable tokenizer beside the model ({error})") from error
    check_vocabulary(tokenizer, model.config.vocab_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check_backend(model.config, device)
    except RuntimeError as error:
        raise ModelError(f"{folder}: {error}") from error
    return model.to(device).eval(), tokenizer


def open_from_options(options: argparse.Namespace) -> tuple[NordForCausalLM, PreTrainedTokenizerBase]:
    """Load model and tokenizer for the command line; set the seed and silence transformers."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # no warning about text beyond the context: this model has a sliding window
    if options.seed is not None:
        set_seed(options.seed)
    return open_model(options.model or newest_model())
