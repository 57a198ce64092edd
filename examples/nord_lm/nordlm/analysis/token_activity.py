"""Measure firing rates, loss and entropy at each token; average the rates by layer, part of the model and kind of token."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from rich.progress import track
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from nord_snn.models.nord import NordForCausalLM
from nord_snn.monitor import RowRates

__all__ = [
    "TOKEN_KINDS",
    "TokenMeasurements",
    "decodable_spans",
    "kinds_of",
    "measure_tokens",
    "rates_by_kind",
    "zone",
    "zone_means",
]

#: Kinds of tokens, see ``kinds_of``.
TOKEN_KINDS = (
    "end of text",
    "part of a character",
    "line break",
    "blanks",
    "number",
    "punctuation",
    "function word",
    "begins a word",
    "inside a word",
)


class TokenMeasurements(NamedTuple):
    """Loss, entropy and firing rates at each token of passages ``[n, L]``.

    Attributes:
        loss: loss of each token but the first in nats, ``[n, L - 1]``.
        entropy: entropy of the next-token prediction in nats, ``[n, L]``.
        rates: firing rate of each layer at each token, ``[n, L]``.
        neurons: number of neurons of each layer.
    """

    loss: Tensor
    entropy: Tensor
    rates: dict[str, Tensor]
    neurons: dict[str, int]

    def mean_rate(self) -> Tensor:
        """Return the firing rate of all neurons, ``[n, L]``."""
        return zone_means(self.rates, self.neurons, lambda _: "all")["all"]


@torch.no_grad()
def measure_tokens(
    model: NordForCausalLM, passages: Tensor, batch_size: int = 32, title: str | None = None
) -> TokenMeasurements:
    """Measure loss, entropy and firing rates at each token.

    Args:
        model: in eval mode.
        passages: token ids ``[n, L]``, L at least 2 and at most the model's context.
        batch_size: passages in a batch. Default: 32.
        title: title of the progress bar. Default: no bar.
    """
    losses: list[Tensor] = []
    entropies: list[Tensor] = []
    rates: dict[str, list[Tensor]] = {}
    with RowRates(model) as rows:
        for ids in track(passages.split(batch_size), title or "", transient=True, disable=title is None):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
            log_probs = logits.log_softmax(-1)
            losses.append(F.nll_loss(log_probs[:, :-1].mT, ids[:, 1:].to(model.device), reduction="none").cpu())
            entropies.append(-(log_probs.exp() * log_probs).sum(-1).cpu())
            for name, rate in rows.take().items():
                rates.setdefault(name, []).append(rate.cpu())
        by_layer = {name: torch.cat(parts) for name, parts in rates.items()}
        return TokenMeasurements(torch.cat(losses), torch.cat(entropies), by_layer, rows.neurons())


def zone(layer: str) -> str:
    """Return the zone (part of the model) of a layer of neurons: ``"input"``, ``"block 3"``, ``"readout"``."""
    parts = layer.split(".")
    return f"block {parts[1]}" if parts[0] == "blocks" else "input" if parts[0] == "input_lif" else parts[0]


def zone_means(
    rates: Mapping[str, Tensor], neurons: Mapping[str, int], zone_of: Callable[[str], str] = zone
) -> dict[str, Tensor]:
    """Return the mean rate of each zone, weighted by the number of neurons in each layer."""
    members: dict[str, list[str]] = {}
    for name in rates:
        members.setdefault(zone_of(name), []).append(name)
    return {
        part: sum((rates[name] * neurons[name] for name in names), torch.zeros(()))
        / sum(neurons[name] for name in names)
        for part, names in members.items()
    }


def kinds_of(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the kind of each token of ``ids [n, L]``, as an index into :data:`TOKEN_KINDS`.

    A token is inside a word if it begins with a letter and the previous token ends with a letter. The first token of a sequence
    counts as the beginning of a word.
    """
    unique, index = ids.cpu().unique(return_inverse=True)
    tokens = [_Token.from_id(int(i), tokenizer) for i in unique]
    kinds = torch.tensor([TOKEN_KINDS.index(token.kind) for token in tokens])[index]
    ends = torch.tensor([token.ends_with_letter for token in tokens])[index]
    inside = torch.tensor([token.can_continue_word for token in tokens])[index]
    inside[:, 0] = False
    inside[:, 1:] &= ends[:, :-1]
    return kinds.masked_fill(inside, TOKEN_KINDS.index("inside a word"))


class _Token(NamedTuple):
    """Properties of a token that do not depend on its neighbours."""

    kind: str
    ends_with_letter: bool
    can_continue_word: bool

    @classmethod
    def from_id(cls, token: int, tokenizer: PreTrainedTokenizerBase) -> "_Token":
        text = tokenizer.decode([token])
        begins = str(tokenizer.convert_ids_to_tokens(token)).startswith(("Ġ", "▁")) or not text[:1].strip()
        has_letters = any(c.isalpha() for c in text)
        continues = has_letters and not begins and (text[0].isalpha() or text[0] in "'’")
        return cls(_kind(token, text, tokenizer), text[-1:].isalpha(), continues)


def _kind(token: int, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if token in tokenizer.all_special_ids:
        return "end of text"
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "part of a character"
    if "\n" in text:
        return "line break"
    if not text.strip():
        return "blanks"
    if not any(c.isalpha() for c in text):
        return "number" if any(c.isdigit() for c in text) else "punctuation"
    return "function word" if text.strip().lower() in ENGLISH_STOP_WORDS else "begins a word"


def rates_by_kind(rates: Mapping[str, Tensor], kinds: Tensor) -> dict[str, dict[str, float]]:
    """Return the mean rate of each layer at each kind of token in ``kinds``: layer -> kind -> rate."""
    masks = [(k, kinds == k) for k in kinds.unique().tolist()]
    return {name: {TOKEN_KINDS[k]: rate[mask].mean().item() for k, mask in masks} for name, rate in rates.items()}


def decodable_spans(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int, int]]:
    """Yield (text, begin, end) of consecutive spans ``[begin, end)``: one token, or several that form complete characters."""
    begin = 0
    while begin < len(ids):
        for end in range(begin + 1, min(begin + 4, len(ids)) + 1):  # a character has at most four bytes
            text = tokenizer.decode(ids[begin:end])
            if "\N{REPLACEMENT CHARACTER}" not in text:
                break
        else:  # an incomplete character
            text, end = "\N{REPLACEMENT CHARACTER}", begin + 1
        yield text, begin, end
        begin = end
