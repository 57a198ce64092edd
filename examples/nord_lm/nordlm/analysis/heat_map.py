"""Prepare heat maps of firing rate, loss and entropy over the tokens of passages."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nordlm.analysis.ood_detection import ScoredPassages
from nordlm.analysis.token_activity import decodable_spans

__all__ = ["heat_map"]

SCORES = (
    "firing rate at each token",
    "loss of each token, nats",
    "entropy of the prediction of each token, nats",
)
TOKENS = 96  # number of tokens that are shown of each text


def heat_map(
    scored: dict[str, ScoredPassages], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, list[tuple[str, str, float]]]]:
    """Return text -> score -> cells. A cell is the string of a token, the value as text, and a shade from 0 to 1.

    Loss and entropy are those of the predicted token, the rate is that of the input token.
    """
    scales: list[tuple[float, float]] = []
    cells: dict[str, dict[str, list[tuple[str, str, float]]]] = {}
    for name, (passages, measured) in scored.items():
        shown = slice(0, max(1, TOKENS // passages.tokens.shape[1]))
        missing = measured.loss.new_full((len(measured.loss), 1), torch.nan)  # the first token is not predicted
        entropy = torch.cat((missing, measured.entropy[:, :-1]), 1)
        values = (measured.mean_rate(), torch.cat((missing, measured.loss), 1), entropy)
        scales = scales or [_scale(value) for value in values]  # scales of the first text, the known text
        cells[name] = {
            score: [
                cell
                for ids, row in zip(passages.tokens[shown], value[shown], strict=True)
                for cell in _cells(ids, row, scale, score, tokenizer)
            ]
            for score, scale, value in zip(SCORES, scales, values, strict=True)
        }
    return cells


def _scale(values: Tensor) -> tuple[float, float]:
    """Return the values with shades 0 and 1, the 2 % and 98 % quantiles."""
    low, high = values.flatten().nanquantile(torch.tensor([0.02, 0.98])).tolist()
    return low, max(high, low + 1e-9)


def _cells(
    ids: Tensor, row: Tensor, scale: tuple[float, float], score: str, tokenizer: PreTrainedTokenizerBase
) -> Iterable[tuple[str, str, float]]:
    low, high = scale
    for text, begin, end in decodable_spans(ids, tokenizer):
        value = row[begin:end].nanmean().item()
        if value != value:
            yield text, "not predicted", 0.0
            continue
        label = f"{value:.2%}" if score == SCORES[0] else f"{value:.2f}"
        yield text, label, min(max((value - low) / (high - low), 0.0), 1.0)
