"""Does firing tell text of a known kind from other text, and does it tell more than loss and entropy do?

A passage is scored by a mean over its tokens: of the firing rate (of each layer, of all neurons), of the loss, of the entropy
of what the model expects. AUROC is the probability that a passage of the other text has the higher score: 0.5 tells nothing,
below it the other text has the lower one.
"""

import ast
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import spikingjelly
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nord_snn.models.nord import NordForCausalLM
from nordlm.analysis.token_activity import Measured, measure
from nordlm.data.corpus import encode
from nordlm.data.sources import Documents, python_files, read_documents
from nordlm.errors import DataError

__all__ = [
    "LEARNED",
    "MADE",
    "Passages",
    "Read",
    "auroc",
    "cut",
    "distinguish",
    "interval",
    "open_others",
    "other_texts",
    "passage_length",
    "scores",
]

#: Other texts that need no file.
MADE = ("shuffled", "code", "chinese")
PASSAGE = 32  # tokens: a sentence or two
FEWEST_DOCUMENTS, MOST_DOCUMENTS = 5, 400
RESAMPLES = 1000
FOLDS = 5
#: Scores that are regressions on others.
LEARNED = ("firing rates of all layers", "loss and entropy", "all of these")


class Passages(NamedTuple):
    """Passages of one length, ``tokens [n, L]``, each from the document with the number in ``documents [n]``."""

    name: str
    tokens: Tensor
    documents: Tensor
    n_bytes: Tensor


def cut(
    name: str, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, at_most: int = 400
) -> Passages:
    """Passages of ``length`` tokens, taken evenly from all documents.

    Raises:
        DataError: fewer than :data:`FEWEST_DOCUMENTS` documents are so long.
    """
    found: list[Tensor] = []
    documents: list[int] = []
    for number, text in enumerate(texts):
        ids = torch.cat([torch.empty(0, dtype=torch.int32), *encode([text], tokenizer)])[:-1]  # without the end of text
        whole = ids[: len(ids) // length * length].view(-1, length)
        found.extend(whole)
        documents.extend([number] * len(whole))
    if (there := len(set(documents))) < FEWEST_DOCUMENTS:
        raise DataError(
            f"{name}: passages of {length} tokens from {there} documents; expected them from {FEWEST_DOCUMENTS} at least, "
            "since fewer say nothing about others"
        )
    taken = torch.linspace(0, len(found) - 1, min(at_most, len(found))).round().long()
    tokens = torch.stack([found[i] for i in taken]).long()
    n_bytes = torch.tensor([len(text.encode()) for text in tokenizer.batch_decode(tokens)])
    return Passages(name, tokens, torch.tensor(documents)[taken], n_bytes)


def open_others(sources: Iterable[str]) -> dict[str, Documents | None]:
    """The other texts by name, opened; None for those of :data:`MADE`.

    Raises:
        DataError: one is not there, or is no text.
    """
    return {source: None if source in MADE else read_documents(source) for source in sources}


def other_texts(source: str, documents: Documents | None, known: list[str]) -> list[str]:
    """Documents of one of :data:`MADE`, or of a text that was opened.

    ``shuffled`` is the known text with the words of each document in another order, ``code`` every fifth file of the standard
    library without comments and docstrings, ``chinese`` the Chinese lines of SpikingJelly's docstrings. Of anything else, the
    first :data:`MOST_DOCUMENTS` documents are taken.
    """
    makers: dict[str, Callable[[], Iterator[str]]] = {
        "shuffled": lambda: _shuffled(known),
        "code": _code,
        "chinese": _chinese,
    }
    return list(makers[source]() if documents is None else islice(documents.read(), MOST_DOCUMENTS))


def _shuffled(texts: Iterable[str]) -> Iterator[str]:
    generator = random.Random(0)
    for text in texts:
        words = re.split(r"(\s+)", text)  # words and, between them, blanks: which stay where they are
        order = words[::2]
        generator.shuffle(order)
        words[::2] = order
        yield "".join(words)


def _code() -> Iterator[str]:
    for path in islice(python_files(Path(sysconfig.get_path("stdlib"))), 0, None, 5):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                documented = ast.get_docstring(node, clean=False) is not None
                node.body = node.body[1:] or [ast.Pass()] if documented else node.body
        yield ast.unparse(tree)


def _chinese() -> Iterator[str]:
    han = re.compile(r"[\u4e00-\u9fff]")
    for path in python_files(Path(spikingjelly.__file__).parent):
        lines = path.read_text(encoding="utf-8").splitlines()
        text = "\n".join(line.strip() for line in lines if len(han.findall(line)) > len(line.strip()) / 3)
        if text:
            yield text


class Read(NamedTuple):
    """Passages, and what was measured at each of their tokens."""

    passages: Passages
    measured: Measured


def scores(passages: Passages, measured: Measured) -> dict[str, Tensor]:
    """What could tell passages apart, ``[n]`` each. The first needs no model: a control."""
    layers = {f"firing rate of {name}": rate.mean(1) for name, rate in measured.rates.items()}
    return {
        "bytes per token (no model)": passages.n_bytes / passages.tokens.shape[1],
        "loss": measured.loss.mean(1),
        "entropy": measured.entropy.mean(1),
        "firing rate of all neurons": measured.mean_rate().mean(1),
    } | layers


def distinguish(
    model: NordForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    others: Mapping[str, Documents | None],
    length: int | None = None,
    visible: bool = False,
) -> tuple[dict[str, Any], Read, dict[str, Read]]:
    """AUROC of every score for each other text, with 95 % confidence intervals.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        texts: documents of the known kind, which the model has not seen; at most :data:`MOST_DOCUMENTS` of them are used, taken
            evenly.
        others: see :func:`open_others`.
        length: tokens in a passage; None: 32, or the model's window if that is less.
        visible: whether to show progress.

    Returns:
        What goes into JSON; what was measured at each token of the known text; and of every other one. A text that cannot be
        used is in the JSON under ``left_out``, with the reason.

    Raises:
        DataError: the known text is too short, or ``length`` is not one of passages.
    """
    length = passage_length(model, length)
    texts = texts[:: -(-len(texts) // MOST_DOCUMENTS)]
    passages = cut("the known text", texts, tokenizer, length)
    known = Read(passages, measure(model, passages.tokens, what="known text" if visible else None))
    results: dict[str, Any] = {
        "passage_tokens": length,
        "known": _size(passages),
        "others": {},
        "auroc": {},
        "left_out": [],
    }
    measured: dict[str, Read] = {}
    for source, documents in others.items():
        try:
            passages = cut(source, other_texts(source, documents, texts), tokenizer, length)
            read = Read(passages, measure(model, passages.tokens, what=source if visible else None))
            results["auroc"][source] = _auroc_of_all(known, read, same=source == "shuffled")
        except DataError as error:
            results["left_out"].append(str(error))
            continue
        results["others"][source], measured[source] = _size(passages), read
        results["left_out"] += [] if documents is None else documents.notes()
    return results, known, measured


def passage_length(model: NordForCausalLM, length: int | None) -> int:
    """``length``, or the default for this model.

    Raises:
        DataError: the model cannot read passages so long.
    """
    longest = model.config.max_position_embeddings
    length = min(PASSAGE, longest) if length is None else length
    if not 2 <= length <= longest:
        raise DataError(f"passages must be of 2 to {longest} tokens, got {length}")
    return length


def _size(passages: Passages) -> dict[str, int]:
    return {"passages": len(passages.tokens), "documents": len(passages.documents.unique())}


def _auroc_of_all(known: Read, other: Read, same: bool) -> dict[str, dict[str, float]]:
    """By score. ``same``: both are made of the same documents, which are drawn together."""
    first, second = scores(*known), scores(*other)
    offset = 0 if same else int(known.passages.documents.max()) + 1
    documents = (known.passages.documents, other.passages.documents + offset)
    rates = [name for name in first if name.startswith("firing rate of")][1:]
    learned = {LEARNED[0]: rates, LEARNED[1]: ["loss", "entropy"], LEARNED[2]: [*rates, "loss", "entropy"]}
    for name, of in learned.items():
        first[name], second[name] = _combined(first, second, of, documents)
    found = {}
    for name, values in first.items():
        low, high = interval(values, second[name], *documents, together=same)
        found[name] = {"auroc": auroc(values, second[name]), "low": low, "high": high}
    return found


def _combined(
    first: dict[str, Tensor], second: dict[str, Tensor], names: list[str], documents: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Logistic regression on several scores, each document judged by what was learned from others."""
    features = torch.cat([torch.stack([side[name] for name in names], 1) for side in (first, second)]).numpy()
    n = len(documents[0])
    is_other = [0] * n + [1] * len(documents[1])
    # With as many documents as are asked for on each side, every part learned from holds both.
    folds = StratifiedGroupKFold(FOLDS)
    # Balanced, so that a fold with more of one text does not shift the scores of the others.
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    judged = cross_val_predict(
        regression, features, is_other, groups=torch.cat(documents).numpy(), cv=folds, method="decision_function"
    )
    return torch.from_numpy(judged[:n]), torch.from_numpy(judged[n:])


def auroc(known: Tensor, other: Tensor) -> float:
    """Probability that one of ``other`` is higher than one of ``known``, ties counting half."""
    return _higher(known, other).mean().item()


def interval(
    known: Tensor,
    other: Tensor,
    known_documents: Tensor,
    other_documents: Tensor,
    together: bool = False,
    level: float = 0.95,
) -> tuple[float, float]:
    """Confidence interval of the AUROC by the bootstrap over documents, since passages of one document are alike.

    Args:
        known: scores ``[n]``.
        other: scores ``[m]``.
        known_documents: which document each is from.
        other_documents: the same of the others.
        together: whether documents with the same number on both sides are drawn together.
        level: how often it holds the truth. Of a score that was learned, that of the regression as it was fitted.
    """
    generator = torch.Generator().manual_seed(0)
    if together:
        both = _times_drawn(torch.cat((known_documents, other_documents)), generator)
        first, second = both.split([len(known), len(other)], 1)
    else:
        first, second = (_times_drawn(documents, generator) for documents in (known_documents, other_documents))
    values = ((first @ _higher(known, other)) * second).sum(1) / (first.sum(1) * second.sum(1))
    low, high = values.nanquantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def _times_drawn(documents: Tensor, generator: torch.Generator) -> Tensor:
    """How often each passage is in each of the resamples, which draw as many documents as there are."""
    numbers, places = documents.unique(return_inverse=True)
    drawn = torch.randint(len(numbers), (RESAMPLES, len(numbers)), generator=generator)
    times = torch.zeros(RESAMPLES, len(numbers), dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))[:, places]


def _higher(known: Tensor, other: Tensor) -> Tensor:
    """1 where ``other`` is higher, 0.5 where they are equal, ``[n, m]``."""
    difference = other[None].double() - known[:, None].double()
    return (difference.sign() + 1) / 2
