"""Tokens of passages, coloured by firing rate, loss and entropy."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nordlm.analysis.ood_detection import Read
from nordlm.analysis.token_activity import pieces

__all__ = ["heat_map"]

SCORES = (
    "firing rate while a token is read",
    "loss: how unexpected a token was, nats",
    "entropy: how unsure the model was before a token, nats",
)
TOKENS = 96  # of each text


def heat_map(
    read: dict[str, Read], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, list[tuple[str, str, float]]]]:
    """Text -> score -> pieces of a passage, what to say of each, and how dark it is, from 0 to 1.

    Loss and entropy stand at the token that was to be predicted, the rate at the one that is read.
    """
    scales: list[tuple[float, float]] = []
    found: dict[str, dict[str, list[tuple[str, str, float]]]] = {}
    for name, (passages, of) in read.items():
        some = slice(0, max(1, TOKENS // passages.tokens.shape[1]))
        unknown = of.loss.new_full((len(of.loss), 1), torch.nan)  # the first token of a passage was not predicted
        values = (of.mean_rate(), torch.cat((unknown, of.loss), 1), torch.cat((unknown, of.entropy[:, :-1]), 1))
        scales = scales or [_scale(value) for value in values]  # of the known text, which comes first
        found[name] = {
            score: [
                cell
                for ids, row in zip(passages.tokens[some], value[some], strict=True)
                for cell in _cells(ids, row, scale, score, tokenizer)
            ]
            for score, scale, value in zip(SCORES, scales, values, strict=True)
        }
    return found


def _scale(values: Tensor) -> tuple[float, float]:
    """What is palest and what is darkest: 2 % of the known text lie beyond each."""
    low, high = values.flatten().nanquantile(torch.tensor([0.02, 0.98])).tolist()
    return low, max(high, low + 1e-9)


def _cells(
    ids: Tensor, row: Tensor, scale: tuple[float, float], score: str, tokenizer: PreTrainedTokenizerBase
) -> Iterable[tuple[str, str, float]]:
    low, high = scale
    for text, begin, end in pieces(ids, tokenizer):
        value = row[begin:end].nanmean().item()
        if value != value:
            yield text, "not predicted", 0.0
            continue
        said = f"{value:.2%}" if score == SCORES[0] else f"{value:.2f}"
        yield text, said, min(max((value - low) / (high - low), 0.0), 1.0)
