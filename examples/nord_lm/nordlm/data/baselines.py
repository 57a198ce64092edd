"""Compute the losses of uniform, unigram and interpolated bigram predictions, in nats per token."""

import math

import torch
from torch import Tensor

__all__ = ["bigram_loss", "uniform_loss", "unigram_loss"]


def uniform_loss(vocab_size: int) -> float:
    """Return the loss of a uniform prediction, ``ln V``."""
    return math.log(vocab_size)


def unigram_loss(train: Tensor, validation: Tensor, vocab_size: int) -> float:
    """Return the mean of ``-ln p(token)``, with ``p`` from the training counts plus one.

    Args:
        train: training tokens ``[n]``.
        validation: sequences ``[m, S]``; the first token of each is not predicted, as for the model.
        vocab_size: V.
    """
    return -_unigram(train, vocab_size).log()[validation[:, 1:].long()].mean().item()


def bigram_loss(train: Tensor, validation: Tensor, vocab_size: int) -> float:
    """Return the mean of ``-ln p(token | previous token)``, interpolated with the unigram (Witten and Bell, 1991).

    ``p(b | a) = (count(a, b) + types(a) * p(b)) / (count(a) + types(a))`` where ``types(a)`` is the number of different
    tokens after ``a`` in the training text.

    Args:
        train: training tokens ``[n]`` in order.
        validation: sequences ``[m, S]``.
        vocab_size: V.
    """
    previous, following = train[:-1].long(), train[1:].long()
    pairs, counts = torch.unique(previous * vocab_size + following, return_counts=True)
    occurrences = torch.bincount(previous, minlength=vocab_size).double()
    types = torch.bincount(pairs // vocab_size, minlength=vocab_size).double()
    context, target = validation[:, :-1].long().flatten(), validation[:, 1:].long().flatten()
    queries = context * vocab_size + target
    position = torch.searchsorted(pairs, queries).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[position] == queries, counts[position], 0).double()
    unigram = _unigram(train, vocab_size)[target]
    # A context that is not in the training text has only the unigram.
    weight = torch.where(types[context] > 0, types[context], 1.0)
    probability = (seen + weight * unigram) / (occurrences[context] + weight)
    return -probability.log().mean().item()


def _unigram(train: Tensor, vocab_size: int) -> Tensor:
    counts = torch.bincount(train.long(), minlength=vocab_size).double() + 1
    return counts / counts.sum()
