"""What a model must beat: uniform, unigram and interpolated bigram predictions of the same text, in nats per token."""

import math

import torch
from torch import Tensor

__all__ = ["bigram_loss", "uniform_loss", "unigram_loss"]


def uniform_loss(vocab_size: int) -> float:
    """Every token equally likely: ``ln V``."""
    return math.log(vocab_size)


def unigram_loss(train: Tensor, validation: Tensor, vocab_size: int) -> float:
    """Mean ``-ln p(token)`` with ``p`` from the training counts, one added to each.

    Args:
        train: training tokens ``[n]``.
        validation: blocks ``[m, block]``; as for the model, the first token of each is given and not predicted.
        vocab_size: V.
    """
    return -_unigram(train, vocab_size).log()[validation[:, 1:].long()].mean().item()


def bigram_loss(train: Tensor, validation: Tensor, vocab_size: int) -> float:
    """Mean ``-ln p(token | token before)``, the bigram interpolated with the unigram after Witten and Bell (1991).

    ``p(b | a) = (count(a, b) + types(a) * p(b)) / (count(a) + types(a))`` where ``types(a)`` is the number of different
    tokens that were seen after ``a``: the more, the less its counts are trusted.

    Args:
        train: training tokens ``[n]`` in their order.
        validation: blocks ``[m, block]``.
        vocab_size: V.
    """
    before, after = train[:-1].long(), train[1:].long()
    pairs, counts = torch.unique(before * vocab_size + after, return_counts=True)
    occurrences = torch.bincount(before, minlength=vocab_size).double()
    types = torch.bincount(pairs // vocab_size, minlength=vocab_size).double()
    given, target = validation[:, :-1].long().flatten(), validation[:, 1:].long().flatten()
    wanted = given * vocab_size + target
    position = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[position] == wanted, counts[position], 0).double()
    unigram = _unigram(train, vocab_size)[target]
    backed_off = torch.where(
        types[given] > 0, types[given], 1.0
    )  # a token never seen before another: the unigram alone
    probability = (seen + backed_off * unigram) / (occurrences[given] + backed_off)
    return -probability.log().mean().item()


def _unigram(train: Tensor, vocab_size: int) -> Tensor:
    counts = torch.bincount(train.long(), minlength=vocab_size).double() + 1
    return counts / counts.sum()
