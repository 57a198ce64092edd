"""Train, load and save tokenizers."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nord_snn.models.nord.checksums import check_checksums, write_checksums
from nordlm.cli import shorten
from nordlm.data.sources import first_line
from nordlm.errors import DataError
from nordlm.reading import check_files, exists

__all__ = [
    "TOKENIZER_FILES",
    "check_vocabulary",
    "load_tokenizer",
    "open_tokenizer",
    "save_tokenizer",
    "train_tokenizer",
]

#: Files of a tokenizer that have checksums.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)

END_OF_TEXT = "<|endoftext|>"

TOKENIZER_CHARACTERS = 50_000_000  # maximum length of the text that a tokenizer is trained on


def load_tokenizer(name: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hugging Face hub, and check that it fits the model's vocabulary.

    Raises:
        DataError: the tokenizer cannot be loaded, has no end-of-text token, or has more tokens than the model.
    """
    tokenizer = open_tokenizer(name)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hugging Face hub, without running Python code that comes with it.

    By default transformers asks on the terminal whether to run such code, and accepts any text on standard input as the answer.

    Raises:
        DataError: the tokenizer cannot be loaded, or needs such code.
    """
    if exists(name):
        check_files(Path(name), DataError)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        _try_out(tokenizer)
    except Exception as error:  # no network, no such name, no permission, a broken file
        if "trust_remote_code" in str(error):
            raise DataError(
                f"tokenizer {shorten(name)!r} needs Python code of its own, which is never run: expected a tokenizer "
                "class of transformers"
            ) from error
        raise DataError(
            f"tokenizer {shorten(name)!r} cannot be loaded ({type(error).__name__}: {shorten(first_line(error))}): "
            "expected a folder or the name of one on the hub"
        ) from error
    if exists(name):
        try:
            check_checksums(Path(name), TOKENIZER_FILES)
        except ValueError as error:
            raise DataError(str(error)) from error
    return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise an error if a tokenizer that could be loaded cannot be used, for example because a setting has the wrong type."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"expected a tokenizer of one vocabulary, got {type(tokenizer).__name__}")
    ids = tokenizer("a", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    tokenizer.decode(ids, skip_special_tokens=True)
    if not all(isinstance(number, int | None) for number in (len(tokenizer), tokenizer.eos_token_id)):
        raise TypeError(f"expected a number as eos_token_id, got {tokenizer.eos_token_id!r}")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer, and the checksums of its files."""
    tokenizer.save_pretrained(folder)
    write_checksums(folder, TOKENIZER_FILES)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise DataError if the tokenizer has more tokens than the model, or no end-of-text token."""
    if len(tokenizer) > vocab_size:
        raise DataError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model only {vocab_size:,}: "
            "vocab_size must be at least as large"
        )
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token (eos_token), which separates documents")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE (byte-pair encoding) on ``texts``. It can encode any text, without unknown tokens.

    Raises:
        DataError: ``vocab_size`` is less than 257 (256 bytes and the end-of-text token).
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
