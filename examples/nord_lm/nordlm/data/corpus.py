"""Tokenize documents and pack them into sequences of token ids: :func:`load_corpus`.

Text up to 1 GB is kept in memory and reshuffled every epoch. Larger text and datasets of the Hugging Face hub are streamed.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from nordlm.data.sources import Documents
from nordlm.errors import DataError

__all__ = [
    "BASELINE_TOKENS",
    "Corpus",
    "SequenceDataset",
    "StreamedSequences",
    "encode",
    "load_corpus",
    "split",
]

BASELINE_TOKENS = 2_000_000  # maximum number of tokens of a stream from which the baselines are computed

HASH_BUCKETS = 10_000  # for a stream, --held-out is rounded down to a multiple of 1 / HASH_BUCKETS


class SequenceDataset(Dataset[Tensor]):
    """Sequences ``[n, S]`` in memory."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.sequences)

    def __getitem__(self, index: int) -> Tensor:
        """Return one sequence as int64."""
        return self.sequences[index].long()


class StreamedSequences(IterableDataset[Tensor]):
    """Sequences of a stream in order; every iteration restarts the stream.

    An error of the stream ends the iteration, at the same sequence in all processes; call :meth:`raise_error` afterwards.
    """

    def __init__(self, start: Callable[[], Iterator[Tensor]]) -> None:
        self.start = start
        self._error: DataError | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Yield sequences as int64."""
        self._error = None
        try:
            yield from (sequence.long() for sequence in self.start())
        except DataError as error:
            self._error = error

    def raise_error(self) -> None:
        """Raise the error that ended the last iteration, if there was one."""
        if self._error is not None:
            raise self._error


@dataclass
class Corpus:
    """Training and held-out sequences of token ids.

    Attributes:
        name: source of the text.
        train: the training sequences.
        validation: held-out sequences ``[m, S]``.
        sample: training tokens in order for the baselines: all, or the first :data:`BASELINE_TOKENS` of a stream.
        bytes_per_token: UTF-8 bytes per token of the held-out text.
        fingerprint: hash of ``sample`` and of the held-out tokens.
        sources: the documents, and the separate held-out documents if there are some.
    """

    name: str
    train: SequenceDataset | StreamedSequences
    validation: Tensor
    sample: Tensor
    bytes_per_token: float
    fingerprint: str
    sources: tuple[Documents, ...]

    def bits_per_byte(self, loss: float) -> float:
        """Convert nats per token to bits per byte of the held-out text."""
        return loss / self.bytes_per_token / math.log(2)

    def notes(self) -> list[str]:
        """Return a sentence for each reason why records were left out so far; reading more of a stream can add reasons."""
        return [note for source in self.sources for note in source.notes()]


def load_corpus(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    held_out: float = 0.05,
    validation: Documents | None = None,
    max_validation_blocks: int = 1024,
) -> Corpus:
    """Tokenize documents, split them into training and held-out text, and pack them into sequences.

    A hash of each document determines whether it is held out, so copies of a document stay together, and the order of the
    documents does not matter. Documents are joined with the tokenizer's end-of-text token and cut into sequences; tokens
    after the last complete sequence are left out.

    Args:
        documents: the text.
        tokenizer: result of :func:`load_tokenizer` or :func:`train_tokenizer`.
        block_size: tokens in a sequence, S.
        held_out: fraction of the documents to hold out. Default: 0.05.
        validation: separate held-out documents; if given, all of ``documents`` are for training. Default: None.
        max_validation_blocks: maximum number of held-out sequences. Default: 1024.

    Raises:
        DataError: training or held-out text is shorter than one sequence, or nothing is held out.
    """
    if validation is None and held_out == 0:
        raise DataError("expected held-out text to validate on: give --validation-data, or --held-out above 0")
    train, held_out_documents = split(documents, held_out if validation is None else 0.0)
    held_out_texts = held_out_documents() if validation is None else validation.read()
    validation_tokens, n_bytes = _encode_up_to(held_out_texts, tokenizer, max_validation_blocks * block_size)
    sequences: SequenceDataset | StreamedSequences
    if documents.streamed:
        sample = _concatenate(_take_tokens(encode(train(), tokenizer), BASELINE_TOKENS))
        sequences = StreamedSequences(lambda: pack(encode(train(), tokenizer), block_size))
    else:
        sample = _concatenate(encode(train(), tokenizer))
        sequences = SequenceDataset(_complete_sequences(sample, block_size))
    for part, name, n_tokens in (
        ("training", documents.name, len(sample)),
        ("held-out", documents.name if validation is None else validation.name, len(validation_tokens)),
    ):
        if n_tokens < block_size:
            raise DataError(
                f"the {part} text of {name} has {n_tokens} tokens, less than one sequence of {block_size}: "
                "give more text or a smaller --block-size"
            )
    return Corpus(
        name=documents.name,
        train=sequences,
        validation=_complete_sequences(validation_tokens, block_size)[:max_validation_blocks].long(),
        sample=sample,
        bytes_per_token=n_bytes / len(validation_tokens),
        fingerprint=_fingerprint(sample, validation_tokens),
        sources=(documents,) if validation is None else (documents, validation),
    )


def split(documents: Documents, held_out: float) -> tuple[Callable[[], Iterator[str]], Callable[[], Iterator[str]]]:
    """Split documents by a hash of each text; return two functions that yield the training and the held-out documents.

    For a stream the threshold of the hash is fixed. For text in memory it depends on all documents: those with the smallest
    hashes are held out, at least one, so that the fraction is exact.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"--held-out must be at least 0 and less than 1, got {held_out}")
    limit = int(held_out * HASH_BUCKETS)
    if not documents.streamed:
        hashes = sorted({_hash(text) for text in documents.read()})
        if held_out and len(hashes) < 2:
            raise DataError(
                f"{documents.name} has only one document, which cannot be held out: give more text or --validation-data"
            )
        n_held_out = max(1, round(held_out * len(hashes))) if held_out else 0
        threshold = hashes[min(n_held_out, len(hashes) - 1)]
        return (
            lambda: (text for text in documents.read() if _hash(text) >= threshold),
            lambda: (text for text in documents.read() if _hash(text) < threshold),
        )
    return (
        lambda: (text for text in documents.read() if _hash(text) % HASH_BUCKETS >= limit),
        lambda: (text for text in documents.read() if _hash(text) % HASH_BUCKETS < limit),
    )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Yield the token ids of each text, followed by the end-of-text token."""
    end = tokenizer.eos_token_id
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, 256)):
        # split_special_tokens: encode special tokens in the text as ordinary text. verbose: no warning about long documents.
        for ids in tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]:
            yield torch.tensor([*ids, end], dtype=torch.int32)


def pack(encoded: Iterable[Tensor], block_size: int) -> Iterator[Tensor]:
    """Yield sequences ``[block_size]`` of concatenated documents, without padding."""
    rest = torch.empty(0, dtype=torch.int32)
    for ids in encoded:
        rest = torch.cat((rest, ids))
        n_complete = len(rest) // block_size * block_size
        yield from rest[:n_complete].view(-1, block_size).unbind(0)
        rest = rest[n_complete:]


def _complete_sequences(tokens: Tensor, block_size: int) -> Tensor:
    return tokens[: len(tokens) // block_size * block_size].view(-1, block_size)


def _take_tokens(encoded: Iterable[Tensor], limit: int) -> Iterator[Tensor]:
    for ids in encoded:
        yield ids[:limit]
        limit -= len(ids)
        if limit <= 0:
            return


def _encode_up_to(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[Tensor, int]:
    """Return tokens of whole documents, up to at least ``limit`` tokens, and the bytes of these documents."""
    parts: list[Tensor] = []
    n_bytes = n_tokens = 0
    for text in texts:
        parts.extend(encode([text], tokenizer))
        n_bytes += len(text.encode())
        n_tokens += len(parts[-1])
        if n_tokens >= limit:
            break
    return _concatenate(parts), n_bytes


def _fingerprint(*tokens: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in tokens:
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def _concatenate(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int32), *parts])
