"""The text that a run holds out, and any other to evaluate on."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nordlm.data.corpus import encode, load_corpus, split
from nordlm.data.sources import Documents, read_documents
from nordlm.errors import DataError
from nordlm.training.settings import Settings, TrainingSettings, read_run

__all__ = [
    "STREAMED_WINDOWS",
    "Text",
    "held_out_of",
    "held_out_text",
    "read_text",
]

STREAMED_WINDOWS = 1024  # of a text that is streamed, unless more is asked for: as many as train.py validates on


class Text(NamedTuple):
    """Documents; their tokens, an end-of-text token before the first and behind each; and their bytes in UTF-8."""

    documents: list[str]
    tokens: Tensor
    n_bytes: int


def held_out_text(training: TrainingSettings) -> Documents:
    """What a run with these settings is validated on.

    Raises:
        DataError: the text is not there any more.
    """
    if training.validation_data is not None:
        return read_documents(training.validation_data)
    whole = read_documents(training.data)
    return replace(whole, name=f"{whole.name}, held out", read=split(whole, training.held_out)[1])


def held_out_of(run: Path, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """What the run in a folder was validated on, after a look at whether its text still is what it was.

    Which documents are held out depends on the text: after a change some would be among them that were trained on. A
    stream is too long to be looked at.

    Raises:
        SettingsError: the folder has no settings of a run, or they are damaged.
        DataError: the text is another one, or not there any more.
    """
    settings = Settings.read(run / "settings.yaml")
    documents = held_out_text(settings.training)
    if documents.streamed or not (run / "run.json").is_file():
        return documents
    training = settings.training
    validation = None if training.validation_data is None else read_documents(training.validation_data)
    corpus = load_corpus(read_documents(training.data), tokenizer, settings.block_size, training.held_out, validation)
    if corpus.fingerprint != read_run(run)["fingerprint"]:
        raise DataError(
            f"{corpus.name} is no longer what the run in {run} was trained on, so that what it held out is not known: name a "
            "TEXT to evaluate on"
        )
    return documents


def read_text(documents: Documents, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> Text:
    """The whole documents of a source, up to about ``max_tokens``."""
    texts: list[str] = []
    parts, n_tokens = [torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)], 0
    for text in documents.read():
        texts.append(text)
        parts.extend(encode([text], tokenizer))
        n_tokens += len(parts[-1])
        if max_tokens is not None and n_tokens >= max_tokens:
            break
    return Text(texts, torch.cat(parts).long(), sum(len(text.encode()) for text in texts))
