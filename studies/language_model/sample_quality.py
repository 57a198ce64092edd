"""How a model writes, by two measures that nobody chooses samples for: does it repeat itself, and does it stay with its topic?"""

from typing import NamedTuple

import torch
from nordlm.errors import DataError
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

__all__ = ["Prompts", "coherence", "cut_prompts", "repetition", "write"]

PROMPTS = 64
NGRAM = 4
TOP_P = 0.9


class Prompts(NamedTuple):
    """Beginnings of documents, ``ids [n, P]``; how they go on, ``written [n, C]``; and what follows after that."""

    ids: Tensor
    written: Tensor
    rests: list[str]


def cut_prompts(texts: list[str], tokenizer: PreTrainedTokenizerBase, window: int) -> Prompts:
    """A quarter of the window to go on from and half of it to write, from documents that are longer than that by a window.

    Raises:
        DataError: fewer than two documents are.
    """
    prompt, continuation = max(1, window // 4), max(NGRAM, window // 2)
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) >= prompt + continuation + window:
            found.append(ids)
        if len(found) == PROMPTS:
            break
    if len(found) < 2:
        raise DataError(
            f"{len(found)} of {len(texts)} documents have {prompt + continuation + window} tokens, two are needed: "
            "give longer documents, or a config with a shorter window (max_position_embeddings)"
        )
    whole = torch.tensor([ids[: prompt + continuation] for ids in found])
    rests = [tokenizer.decode(ids[prompt + continuation :]) for ids in found]
    return Prompts(whole[:, :prompt], whole[:, prompt:], rests)


@torch.no_grad()
def write(model: PreTrainedModel, prompts: Prompts, eos_token_id: int, seed: int) -> Tensor:
    """What the model writes after each prompt, as long as what stands there, ``[n, C]``: sampled from the best 90 %."""
    set_seed(seed)
    length = prompts.written.shape[1]
    ids = model.generate(
        prompts.ids.to(model.device), attention_mask=torch.ones_like(prompts.ids).to(model.device), do_sample=True, top_k=0,
        top_p=TOP_P, min_new_tokens=length, max_new_tokens=length, pad_token_id=eos_token_id, eos_token_id=eos_token_id,
    )  # fmt: skip
    return ids[:, prompts.ids.shape[1] :].cpu()


def repetition(written: Tensor, n: int = NGRAM) -> float:
    """Share of n-grams in ``written [m, C]`` that stood in the same row before: seq-rep-n of Welleck et al. 2020.

    ``1 - different n-grams / n-grams``, mean over rows.
    """
    grams = written.unfold(1, n, 1)
    return sum(1 - len(row.unique(dim=0)) / len(row) for row in grams) / len(grams)


def coherence(written: list[str], rests: list[str]) -> float:
    """Probability that a text is nearer to the document that its prompt was cut from than to another one.

    Near is the cosine of TF-IDF vectors without stop words, which are fitted on the documents; ties count half, so that 0.5 is
    what a text by chance has.

    Args:
        written: what was written after the beginning of each document.
        rests: what each document has after the part that was to be written: nothing of the prompt, so that repeating the
            prompt is no merit by itself.

    Raises:
        DataError: there are no words in ``rests``.
    """
    try:
        vectorizer = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit(rests)
    except ValueError as error:
        raise DataError("topics cannot be told: the held-out documents have no words but stop words") from error
    nearness = torch.from_numpy((vectorizer.transform(written) @ vectorizer.transform(rests).T).toarray())
    wins = ((nearness.diagonal()[:, None] - nearness).sign() + 1) / 2
    n = len(rests)
    return ((wins.sum() - wins.diagonal().sum()) / (n * (n - 1))).item()
