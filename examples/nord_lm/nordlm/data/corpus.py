"""From documents to blocks of token ids; :func:`load_corpus` is the way in.

What is small is held in memory and shuffled anew every epoch; what is large or comes from a hub is streamed.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nordlm.data.sources import Documents, first_line
from nordlm.errors import DataError

__all__ = [
    "BASELINE_TOKENS",
    "Blocks",
    "Corpus",
    "StreamedBlocks",
    "check_vocabulary",
    "encode",
    "load_corpus",
    "load_tokenizer",
    "split",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"

TOKENIZER_CHARACTERS = 50_000_000  # a tokenizer is trained on at most this much text

BASELINE_TOKENS = 2_000_000  # of a stream, the baselines see this much

HASH_BUCKETS = 10_000


class Blocks(Dataset[Tensor]):
    """Blocks ``[n, block]`` in memory."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> Tensor:
        """One block as int64."""
        return self.blocks[index].long()


class StreamedBlocks(IterableDataset[Tensor]):
    """Blocks of a stream, in its order; every iteration starts it anew."""

    def __init__(self, start: Callable[[], Iterator[Tensor]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Tensor]:
        """Blocks as int64."""
        return (block.long() for block in self.start())


@dataclass
class Corpus:
    """Blocks of token ids, ready to train on.

    Attributes:
        name: where the text came from.
        train: the training blocks.
        validation: held-out blocks ``[m, block]``.
        sample: training tokens in order, all of them or the first :data:`BASELINE_TOKENS` of a stream, for the baselines.
        bytes_per_token: UTF-8 bytes of the held-out text per token of it.
        fingerprint: changes when the text on either side or the tokenizer does (of a stream: its first part).
        sources: the documents behind it.
    """

    name: str
    train: Blocks | StreamedBlocks
    validation: Tensor
    sample: Tensor
    bytes_per_token: float
    fingerprint: str
    sources: tuple[Documents, ...]

    def notes(self) -> list[str]:
        """What has been left out so far and why; of a stream, more may follow."""
        return [note for source in self.sources for note in source.notes()]


def load_corpus(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    held_out: float = 0.05,
    validation: Documents | None = None,
    max_validation_blocks: int = 1024,
) -> Corpus:
    """Tokenize, split and pack.

    The split is decided by a hash of each document: a text that stands twice in a corpus is on one side only, and the
    order of the documents does not matter. Documents are joined with the tokenizer's end-of-text token and cut into
    blocks; a last part shorter than a block is left out.

    Args:
        documents: the text.
        tokenizer: as :func:`load_tokenizer` or :func:`train_tokenizer` gives it.
        block_size: tokens in a block.
        held_out: fraction of the documents that training never sees.
        validation: other documents to validate on; then nothing is held out.
        max_validation_blocks: at most so many blocks are validated on.

    Raises:
        DataError: there is less than one block of text on either side, or nothing to validate on.
    """
    if validation is None and held_out == 0:
        raise DataError("nothing is held out to validate on: give --validation-data, or --held-out above 0")
    train, held = split(documents, held_out if validation is None else 0.0)
    held_texts = held() if validation is None else validation.read()
    validation_tokens, n_bytes = _encode_up_to(held_texts, tokenizer, max_validation_blocks * block_size)
    blocks: Blocks | StreamedBlocks
    if documents.streamed:
        sample = _concatenate(_take_tokens(encode(train(), tokenizer), BASELINE_TOKENS))
        blocks = StreamedBlocks(lambda: pack(encode(train(), tokenizer), block_size))
    else:
        sample = _concatenate(encode(train(), tokenizer))
        blocks = Blocks(_whole_blocks(sample, block_size))
    for side, name, n_tokens in (
        ("training", documents.name, len(sample)),
        ("held-out", documents.name if validation is None else validation.name, len(validation_tokens)),
    ):
        if n_tokens < block_size:
            raise DataError(
                f"the {side} text of {name} has {n_tokens} tokens, less than one block of {block_size}: "
                "give more text or a smaller --block-size"
            )
    return Corpus(
        name=documents.name,
        train=blocks,
        validation=_whole_blocks(validation_tokens, block_size)[:max_validation_blocks].long(),
        sample=sample,
        bytes_per_token=n_bytes / len(validation_tokens),
        fingerprint=_fingerprint(sample, validation_tokens),
        sources=(documents,) if validation is None else (documents, validation),
    )


def split(documents: Documents, held_out: float) -> tuple[Callable[[], Iterator[str]], Callable[[], Iterator[str]]]:
    """Training and held-out documents, decided by a hash of each text.

    A stream is cut at a fixed hash value. A corpus in memory may have few documents: there those with the smallest hashes
    are held out, so that it is never none and the fraction is met; other documents can therefore move the border.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"--held-out must be at least 0 and less than 1, got {held_out}")
    limit = int(held_out * HASH_BUCKETS)
    if not documents.streamed:
        hashes = sorted({_hash(text) for text in documents.read()})
        if held_out and len(hashes) < 2:
            raise DataError(
                f"{documents.name} is a single document, of which none can be held out: give more text or --validation-data"
            )
        n_held = max(1, round(held_out * len(hashes))) if held_out else 0
        border = hashes[min(n_held, len(hashes) - 1)]
        return (
            lambda: (text for text in documents.read() if _hash(text) >= border),
            lambda: (text for text in documents.read() if _hash(text) < border),
        )
    return (
        lambda: (text for text in documents.read() if _hash(text) % HASH_BUCKETS >= limit),
        lambda: (text for text in documents.read() if _hash(text) % HASH_BUCKETS < limit),
    )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def load_tokenizer(name: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the hub, checked against the model's vocabulary.

    Raises:
        DataError: it cannot be loaded, has no end-of-text token, or has more tokens than the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # no network, no such name, no permission, a broken file: one sentence for each
        raise DataError(
            f"tokenizer {name!r} cannot be loaded ({type(error).__name__}: {first_line(error)}): "
            "expected a folder or the name of one on the hub"
        ) from error
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise a DataError unless every id of the tokenizer is one of the model, and documents can be told apart."""
    if len(tokenizer) > vocab_size:
        raise DataError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model only {vocab_size:,}: "
            "vocab_size must be at least as large"
        )
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token (eos_token), which must stand between documents")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on ``texts``: any text can be encoded, nothing is unknown.

    Raises:
        DataError: the vocabulary cannot even hold the 256 bytes and the end-of-text token.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise DataError(f"a byte-level vocabulary needs at least {len(alphabet) + 1} tokens, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(_up_to_characters(texts, TOKENIZER_CHARACTERS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _up_to_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text
        limit -= len(text)
        if limit <= 0:
            return


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Token ids of each text, closed by the end-of-text token."""
    end = tokenizer.eos_token_id
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, 256)):
        # Text that spells a special token is text. verbose=False: documents are longer than a context, they are cut.
        for ids in tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]:
            yield torch.tensor([*ids, end], dtype=torch.int32)


def pack(encoded: Iterable[Tensor], block_size: int) -> Iterator[Tensor]:
    """Blocks of a stream of documents, one after the other without gaps."""
    rest = torch.empty(0, dtype=torch.int32)
    for ids in encoded:
        rest = torch.cat((rest, ids))
        whole = len(rest) // block_size * block_size
        yield from rest[:whole].view(-1, block_size).unbind(0)
        rest = rest[whole:]


def _whole_blocks(tokens: Tensor, block_size: int) -> Tensor:
    return tokens[: len(tokens) // block_size * block_size].view(-1, block_size)


def _take_tokens(encoded: Iterable[Tensor], limit: int) -> Iterator[Tensor]:
    for ids in encoded:
        yield ids[:limit]
        limit -= len(ids)
        if limit <= 0:
            return


def _encode_up_to(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[Tensor, int]:
    """Tokens of whole documents until there are ``limit`` of them, and the bytes of those documents."""
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
