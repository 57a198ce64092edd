"""Open the held-out text of a run, or another text to evaluate on."""

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
    "EvaluationText",
    "held_out_text",
    "read_text",
    "verified_held_out_text",
]

STREAMED_WINDOWS = 1024  # default number of sequences of a stream that are evaluated, here and in train.py


class EvaluationText(NamedTuple):
    """Documents and their tokens.

    Attributes:
        documents: the texts.
        tokens: token ids ``[n]``, with an end-of-text token before the first document and after each.
        n_bytes: length of all documents in UTF-8.
    """

    documents: list[str]
    tokens: Tensor
    n_bytes: int


def held_out_text(training: TrainingSettings) -> Documents:
    """Return the held-out documents of a run with these settings.

    Raises:
        DataError: the text no longer exists.
    """
    if training.validation_data is not None:
        return read_documents(training.validation_data)
    whole = read_documents(training.data)
    return replace(whole, name=f"{whole.name}, held out", read=split(whole, training.held_out)[1])


def verified_held_out_text(run: Path, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """Return the held-out documents of a finished run, after a check of the text's fingerprint.

    The held-out documents depend on the whole text: after a change they could include documents that were trained on. A
    stream is not checked, because it is too long.

    Raises:
        SettingsError: the folder has no settings of a run, or they are damaged.
        DataError: the text has changed or no longer exists.
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
            f"{corpus.name} has changed since the run in {run}, so its held-out documents are not known: give a TEXT to "
            "evaluate on"
        )
    return documents


def read_text(documents: Documents, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> EvaluationText:
    """Read whole documents of a source until there are at least ``max_tokens`` tokens, or all documents if it is None."""
    texts: list[str] = []
    parts, n_tokens = [torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)], 0
    for text in documents.read():
        texts.append(text)
        parts.extend(encode([text], tokenizer))
        n_tokens += len(parts[-1])
        if max_tokens is not None and n_tokens >= max_tokens:
            break
    return EvaluationText(texts, torch.cat(parts).long(), sum(len(text.encode()) for text in texts))
