"""Measure repetition and topic coherence of generated text, over all generated samples."""

from typing import NamedTuple

import torch
from nordlm.errors import DataError
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

__all__ = ["Prompts", "coherence", "cut_prompts", "generate_samples", "repetition"]

MAX_PROMPTS = 64
NGRAM = 4  # tokens
TOP_P = 0.9  # for nucleus sampling


class Prompts(NamedTuple):
    """Prompts from the beginnings of documents.

    Attributes:
        ids: token ids of n prompts of P tokens, ``[n, P]``.
        written: token ids of the documents that follow the prompts, C tokens each, ``[n, C]``.
        remainders: text of the documents that follows ``written``.
    """

    ids: Tensor
    written: Tensor
    remainders: list[str]


def cut_prompts(texts: list[str], tokenizer: PreTrainedTokenizerBase, window: int) -> Prompts:
    """Cut prompts of ``window / 4`` tokens and their continuations of ``window / 2`` tokens from the starts of documents.

    Documents with fewer than ``window`` tokens after these are left out.

    Raises:
        DataError: fewer than two documents are long enough.
    """
    prompt, continuation = max(1, window // 4), max(NGRAM, window // 2)
    long_enough = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) >= prompt + continuation + window:
            long_enough.append(ids)
        if len(long_enough) == MAX_PROMPTS:
            break
    if len(long_enough) < 2:
        raise DataError(
            f"{len(long_enough)} of {len(texts)} documents have {prompt + continuation + window} tokens, expected at least two: "
            "give longer documents, or a config with a shorter window (max_position_embeddings)"
        )
    beginnings = torch.tensor([ids[: prompt + continuation] for ids in long_enough])
    remainders = [tokenizer.decode(ids[prompt + continuation :]) for ids in long_enough]
    return Prompts(beginnings[:, :prompt], beginnings[:, prompt:], remainders)


@torch.no_grad()
def generate_samples(model: PreTrainedModel, prompts: Prompts, eos_token_id: int, seed: int) -> Tensor:
    """Sample a continuation of each prompt, ``[n, C]``, as long as ``prompts.written``."""
    set_seed(seed)
    length = prompts.written.shape[1]
    ids = model.generate(
        prompts.ids.to(model.device), attention_mask=torch.ones_like(prompts.ids).to(model.device), do_sample=True, top_k=0,
        top_p=TOP_P, min_new_tokens=length, max_new_tokens=length, pad_token_id=eos_token_id, eos_token_id=eos_token_id,
    )  # fmt: skip
    return ids[:, prompts.ids.shape[1] :].cpu()


def repetition(written: Tensor, n: int = NGRAM) -> float:
    """Return the share of n-grams in ``written [m, C]`` that occur earlier in the same row, mean over rows.

    It is ``1 - different n-grams / n-grams``, seq-rep-n of Welleck et al. 2020, "Neural text generation with unlikelihood
    training".
    """
    ngrams = written.unfold(1, n, 1)
    return sum(1 - len(row.unique(dim=0)) / len(row) for row in ngrams) / len(ngrams)


def coherence(written: list[str], remainders: list[str]) -> float:
    """Return the probability that a text is more similar to the document of its prompt than to another document.

    Similarity is the cosine of TF-IDF vectors without stop words, fitted on the documents. Ties count half, so that chance is
    0.5.

    Args:
        written: one continuation of the prompt of each document.
        remainders: each document after prompt and continuation. It excludes the prompt, so that a text that repeats its prompt
            does not get a higher score for that.

    Raises:
        DataError: ``remainders`` have no words.
    """
    try:
        vectorizer = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit(remainders)
    except ValueError as error:
        raise DataError("topic coherence expects words other than stop words in the held-out documents") from error
    similarity = torch.from_numpy((vectorizer.transform(written) @ vectorizer.transform(remainders).T).toarray())
    wins = ((similarity.diagonal()[:, None] - similarity).sign() + 1) / 2
    n = len(remainders)
    return ((wins.sum() - wins.diagonal().sum()) / (n * (n - 1))).item()
