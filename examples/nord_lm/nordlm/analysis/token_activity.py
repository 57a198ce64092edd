"""What fires at which token: rates by layer, block and kind of token, beside what the model expects there."""

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

__all__ = ["KINDS", "Measured", "kinds_of", "measure", "pieces", "rates_by_kind", "zone", "zone_means"]

#: Kinds of tokens, see ``kinds_of``.
KINDS = (
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


class Measured(NamedTuple):
    """Of passages ``[n, L]``, token by token.

    Attributes:
        loss: nats for each token but the first, ``[n, L - 1]``.
        entropy: of what the model expects next, in nats, ``[n, L]``.
        rates: firing rate of the neurons that stand for a token, of each layer, ``[n, L]``.
        neurons: how many these are, of each layer.
    """

    loss: Tensor
    entropy: Tensor
    rates: dict[str, Tensor]
    neurons: dict[str, int]

    def mean_rate(self) -> Tensor:
        """Firing rate over all neurons, ``[n, L]``."""
        return zone_means(self.rates, self.neurons, lambda _: "all")["all"]


@torch.no_grad()
def measure(model: NordForCausalLM, passages: Tensor, batch_size: int = 32, what: str | None = None) -> Measured:
    """Loss, entropy and firing rates at each token.

    Args:
        model: in eval mode.
        passages: token ids ``[n, L]``, L at least 2 and at most the model's context.
        batch_size: passages computed together.
        what: what the progress bar says; None: no bar.
    """
    losses: list[Tensor] = []
    entropies: list[Tensor] = []
    rates: dict[str, list[Tensor]] = {}
    with RowRates(model) as rows:
        for ids in track(passages.split(batch_size), what or "", transient=True, disable=what is None):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
            expected = logits.log_softmax(-1)
            losses.append(F.nll_loss(expected[:, :-1].mT, ids[:, 1:].to(model.device), reduction="none").cpu())
            entropies.append(-(expected.exp() * expected).sum(-1).cpu())
            for name, rate in rows.take().items():
                rates.setdefault(name, []).append(rate.cpu())
        whole = {name: torch.cat(parts) for name, parts in rates.items()}
        return Measured(torch.cat(losses), torch.cat(entropies), whole, rows.neurons())


def zone(layer: str) -> str:
    """The part of the model that a layer of neurons belongs to: ``"input"``, ``"block 3"``, ``"readout"``."""
    parts = layer.split(".")
    return f"block {parts[1]}" if parts[0] == "blocks" else "input" if parts[0] == "input_lif" else parts[0]


def zone_means(
    rates: Mapping[str, Tensor], neurons: Mapping[str, int], zone_of: Callable[[str], str] = zone
) -> dict[str, Tensor]:
    """Rates of zones from those of layers, every neuron counting the same."""
    members: dict[str, list[str]] = {}
    for name in rates:
        members.setdefault(zone_of(name), []).append(name)
    return {
        at: sum((rates[name] * neurons[name] for name in names), torch.zeros(())) / sum(neurons[name] for name in names)
        for at, names in members.items()
    }


def kinds_of(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Which of :data:`KINDS` each token of ``ids [n, L]`` is, an index.

    A token is inside a word if it begins with a letter and the one before it ends with one; the first of a row is taken to
    begin one.
    """
    found, places = ids.cpu().unique(return_inverse=True)
    words = [_Word.of(int(i), tokenizer) for i in found]
    kinds = torch.tensor([KINDS.index(word.kind) for word in words])[places]
    ends, goes_on = (torch.tensor([getattr(word, name) for word in words])[places] for name in ("ends", "goes_on"))
    inside = goes_on.clone()
    inside[:, 0] = False
    inside[:, 1:] &= ends[:, :-1]
    return kinds.masked_fill(inside, KINDS.index("inside a word"))


class _Word(NamedTuple):
    """What a token is by itself, whether it ends with a letter, and whether it goes on with a word that was begun."""

    kind: str
    ends: bool
    goes_on: bool

    @classmethod
    def of(cls, token: int, tokenizer: PreTrainedTokenizerBase) -> "_Word":
        text = tokenizer.decode([token])
        begins = str(tokenizer.convert_ids_to_tokens(token)).startswith(("Ġ", "▁")) or not text[:1].strip()
        letters = any(c.isalpha() for c in text)
        goes_on = letters and not begins and (text[0].isalpha() or text[0] in "'’")
        return cls(_kind(token, text, tokenizer), text[-1:].isalpha(), goes_on)


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
    """Mean rate of each layer at each kind of token that there is: layer -> kind -> rate."""
    there = [(k, kinds == k) for k in kinds.unique().tolist()]
    return {name: {KINDS[k]: rate[at].mean().item() for k, at in there} for name, rate in rates.items()}


def pieces(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int, int]]:
    """Text of the tokens ``[begin, end)``: one token each, or as many as make whole characters."""
    begin = 0
    while begin < len(ids):
        for end in range(begin + 1, min(begin + 4, len(ids)) + 1):  # a character has four bytes at most
            text = tokenizer.decode(ids[begin:end])
            if "\N{REPLACEMENT CHARACTER}" not in text:
                break
        else:  # what is left of a character that was cut through
            text, end = "\N{REPLACEMENT CHARACTER}", begin + 1
        yield text, begin, end
        begin = end
