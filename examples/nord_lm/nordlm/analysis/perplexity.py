"""Compute the loss of a model on a text, with a sliding window of its context."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from nord_snn.models.nord import NordForCausalLM

__all__ = [
    "Window",
    "score",
    "windows",
]


class Window(NamedTuple):
    """Input positions ``[begin, end)`` of a text; the last ``scored`` predict tokens that no earlier window predicts."""

    begin: int
    end: int
    scored: int


def windows(n_predicted: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows that predict each of ``n_predicted`` tokens once."""
    done = 0
    while done < n_predicted:
        end = min(n_predicted, done + (stride if done else context))
        yield Window(max(0, end - context), end, end - done)
        done = end


@torch.no_grad()
def score(
    model: NordForCausalLM, tokens: Tensor, context: int, stride: int, batch_size: int = 8, visible: bool = False
) -> float:
    """Return the sum of the losses of all tokens but the first, in nats.

    Args:
        model: in eval mode.
        tokens: ``[n]``, n at least 2.
        context: tokens in a window, at most the model's context.
        stride: tokens between the starts of two windows, at most ``context``.
        batch_size: windows in a batch. Default: 8.
        visible: whether to show progress. Default: False.
    """
    groups: list[list[Window]] = []
    for window in windows(len(tokens) - 1, context, stride):
        batch = groups[-1] if groups else []
        fits = batch and (batch[0].end - batch[0].begin, batch[0].scored) == (window.end - window.begin, window.scored)
        if fits and len(batch) < batch_size:
            batch.append(window)
        else:
            groups.append([window])
    total = 0.0
    for group in track(groups, "evaluating", disable=not visible, transient=True):
        ids = torch.stack([tokens[w.begin : w.end] for w in group]).to(model.device)
        targets = torch.stack([tokens[w.end - w.scored + 1 : w.end + 1] for w in group]).to(model.device)
        logits = model(input_ids=ids, logits_to_keep=group[0].scored, use_cache=False).logits
        total += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").double().item()
    return total
