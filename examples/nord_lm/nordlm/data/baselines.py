"""Compute the losses of predictions from token counts: uniform, unigram and interpolated bigram, in nats per token."""

import math

import torch
from torch import Tensor

__all__ = ["bigram_loss", "uniform_loss", "unigram_loss"]


def uniform_loss(vocab_size: int) -> float:
    """Return the loss of a uniform prediction, ``ln V``."""
    return math.log(vocab_size)


def unigram_loss(train: Tensor, validation: Tensor, vocab_size: int) -> float:
    """Return the mean of ``-ln p(token)``, with ``p`` from the training counts by add-one (Laplace) smoothing.

    Args:
        train: training tokens ``[n]``.
        validation: held-out sequences ``[m, S]``. The first token of a sequence is not counted: the language model does not
            predict it.
        vocab_size: V.
    """
    return -_unigram(train, vocab_size).log()[validation[:, 1:].long()].mean().item()


def bigram_loss(train: Tensor, validation: Tensor, vocab_size: int) -> float:
    """Return the mean of ``-ln p(token | previous token)``, interpolated with the unigram (Witten and Bell, 1991).

    ``p(b)`` is the unigram probability of :func:`unigram_loss`;
    ``p(b | a) = (count(a, b) + types(a) * p(b)) / (count(a) + types(a))`` where ``types(a)`` is the number of different
    tokens after ``a`` in the training text.

    Args:
        train: training tokens ``[n]`` in the order of the text.
        validation: held-out sequences ``[m, S]``. The first token of a sequence is not counted.
        vocab_size: V.
    """
    previous, following = train[:-1].long(), train[1:].long()
    pairs, counts = torch.unique(previous * vocab_size + following, return_counts=True)
    occurrences = torch.bincount(previous, minlength=vocab_size).double()
    types = torch.bincount(pairs // vocab_size, minlength=vocab_size).double()
    context, target = validation[:, :-1].long().flatten(), validation[:, 1:].long().flatten()
    validation_pairs = context * vocab_size + target
    position = torch.searchsorted(pairs, validation_pairs).clamp(max=len(pairs) - 1)
    training_counts = torch.where(pairs[position] == validation_pairs, counts[position], 0).double()
    unigram = _unigram(train, vocab_size)[target]
    # For a context that is not in the training text, weight 1 gives the unigram probability.
    weight = torch.where(types[context] > 0, types[context], 1.0)
    probability = (training_counts + weight * unigram) / (occurrences[context] + weight)
    return -probability.log().mean().item()


def _unigram(train: Tensor, vocab_size: int) -> Tensor:
    counts = torch.bincount(train.long(), minlength=vocab_size).double() + 1
    return counts / counts.sum()
