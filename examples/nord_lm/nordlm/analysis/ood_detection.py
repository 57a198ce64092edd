"""Out-of-distribution detection: measure how well firing rates, loss and entropy separate known text from other text.

The known text is of the kind that the model was trained on, but not in the training text. The score of a passage is a mean over
its tokens: of the firing rate (of one layer or of all neurons), the loss, or the entropy of the prediction. AUROC (area under the
ROC curve) is the probability that a passage of the other text has the higher score: 0.5 is chance, and below 0.5 the other text
has the lower scores.
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
from nordlm.analysis.token_activity import TokenMeasurements, measure_tokens
from nordlm.data.corpus import encode
from nordlm.data.sources import Documents, python_files, read_documents
from nordlm.errors import DataError

__all__ = [
    "BUILTIN_TEXTS",
    "LEARNED",
    "Passages",
    "ScoredPassages",
    "auroc",
    "cut_passages",
    "distinguish",
    "interval",
    "open_others",
    "other_texts",
    "passage_length",
    "scores",
]

#: Other texts that are generated here.
BUILTIN_TEXTS = ("shuffled", "code", "chinese")
PASSAGE = 32  # tokens in a passage: one or two sentences
MIN_DOCUMENTS, MAX_DOCUMENTS = 5, 400  # of each text
RESAMPLES = 1000  # of the bootstrap
FOLDS = 5  # of the cross-validation
#: Scores that are logistic regressions on these scores.
LEARNED = ("firing rates of all layers", "loss and entropy", "all of these")


class Passages(NamedTuple):
    """Passages of one length.

    Attributes:
        name: name of the text.
        tokens: token ids ``[n, L]``.
        documents: index of the document that contains each passage, ``[n]``.
        n_bytes: length of each passage in UTF-8, ``[n]``.
    """

    name: str
    tokens: Tensor
    documents: Tensor
    n_bytes: Tensor


def cut_passages(
    name: str, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, at_most: int = 400
) -> Passages:
    """Cut documents into passages of ``length`` tokens, and keep at most ``at_most``, evenly spaced.

    Raises:
        DataError: fewer than :data:`MIN_DOCUMENTS` documents have as many tokens.
    """
    passages: list[Tensor] = []
    documents: list[int] = []
    for number, text in enumerate(texts):
        (ids,) = encode([text], tokenizer)
        ids = ids[:-1]  # without the end-of-text token
        complete = ids[: len(ids) // length * length].view(-1, length)
        passages.extend(complete)
        documents.extend([number] * len(complete))
    if (n_documents := len(set(documents))) < MIN_DOCUMENTS:
        raise DataError(
            f"{name}: {n_documents} documents have passages of {length} tokens, expected at least {MIN_DOCUMENTS} to "
            "generalise to other documents"
        )
    kept = torch.linspace(0, len(passages) - 1, min(at_most, len(passages))).round().long()
    tokens = torch.stack([passages[i] for i in kept]).long()
    n_bytes = torch.tensor([len(text.encode()) for text in tokenizer.batch_decode(tokens)])
    return Passages(name, tokens, torch.tensor(documents)[kept], n_bytes)


def open_others(sources: Iterable[str]) -> dict[str, Documents | None]:
    """Open the other texts, by name; a text of :data:`BUILTIN_TEXTS` has None.

    Raises:
        DataError: a source does not exist, or is not text.
    """
    return {source: None if source in BUILTIN_TEXTS else read_documents(source) for source in sources}


def other_texts(source: str, documents: Documents | None, known: list[str]) -> list[str]:
    """Return the documents of one of :data:`BUILTIN_TEXTS`, or of an opened text.

    ``shuffled`` is the known text with the words of each document shuffled, ``code`` every fifth file of the standard
    library without comments and docstrings, ``chinese`` the Chinese lines of SpikingJelly's docstrings. Of an
    opened text, the first :data:`MAX_DOCUMENTS` documents are used.
    """
    makers: dict[str, Callable[[], Iterator[str]]] = {
        "shuffled": lambda: _shuffled(known),
        "code": _code,
        "chinese": _chinese,
    }
    return list(makers[source]() if documents is None else islice(documents.read(), MAX_DOCUMENTS))


def _shuffled(texts: Iterable[str]) -> Iterator[str]:
    generator = random.Random(0)
    for text in texts:
        words = re.split(r"(\s+)", text)  # words and the white space between them; only words are moved
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


class ScoredPassages(NamedTuple):
    """Passages with loss, entropy and firing rates at each token."""

    passages: Passages
    measured: TokenMeasurements


def scores(passages: Passages, measured: TokenMeasurements) -> dict[str, Tensor]:
    """Return all scores of the passages by name, ``[n]`` each. The first is a control that needs no model."""
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
) -> tuple[dict[str, Any], ScoredPassages, dict[str, ScoredPassages]]:
    """Compute the AUROC of every score for each other text, with 95 % confidence intervals.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        texts: documents of the known text; at most :data:`MAX_DOCUMENTS` are used, evenly spaced.
        others: result of :func:`open_others`.
        length: tokens in a passage. Default: 32, or the model's context if that is less.
        visible: whether to show progress. Default: False.

    Returns:
        The results for JSON, with the reason for each text that was left out; the measurements of the known text; the
        measurements of the other texts, by name.

    Raises:
        DataError: the known text is too short, or ``length`` is out of range.
    """
    length = passage_length(model, length)
    texts = texts[:: -(-len(texts) // MAX_DOCUMENTS)]
    passages = cut_passages("the known text", texts, tokenizer, length)
    known = ScoredPassages(passages, measure_tokens(model, passages.tokens, title="known text" if visible else None))
    results: dict[str, Any] = {
        "passage_tokens": length,
        "known": _size(passages),
        "others": {},
        "auroc": {},
        "left_out": [],
    }
    measured: dict[str, ScoredPassages] = {}
    for source, documents in others.items():
        try:
            passages = cut_passages(source, other_texts(source, documents, texts), tokenizer, length)
            other = ScoredPassages(passages, measure_tokens(model, passages.tokens, title=source if visible else None))
            results["auroc"][source] = _auroc_table(known, other, same=source == "shuffled")
        except DataError as error:
            results["left_out"].append(str(error))
            continue
        results["others"][source], measured[source] = _size(passages), other
        results["left_out"] += [] if documents is None else documents.notes()
    return results, known, measured


def passage_length(model: NordForCausalLM, length: int | None) -> int:
    """Return ``length``, or the default for this model.

    Raises:
        DataError: ``length`` is less than 2 or more than the model's context.
    """
    longest = model.config.max_position_embeddings
    length = min(PASSAGE, longest) if length is None else length
    if not 2 <= length <= longest:
        raise DataError(f"passages must have 2 to {longest} tokens, got {length}")
    return length


def _size(passages: Passages) -> dict[str, int]:
    return {"passages": len(passages.tokens), "documents": len(passages.documents.unique())}


def _auroc_table(known: ScoredPassages, other: ScoredPassages, same: bool) -> dict[str, dict[str, float]]:
    """Return AUROC and interval by score. If both texts have the same documents (``same``), the bootstrap draws them in pairs."""
    first, second = scores(*known), scores(*other)
    offset = 0 if same else int(known.passages.documents.max()) + 1
    documents = (known.passages.documents, other.passages.documents + offset)
    rates = [name for name in first if name.startswith("firing rate of")][1:]
    learned = {LEARNED[0]: rates, LEARNED[1]: ["loss", "entropy"], LEARNED[2]: [*rates, "loss", "entropy"]}
    for name, features in learned.items():
        first[name], second[name] = _regression_scores(first, second, features, documents)
    table = {}
    for name, values in first.items():
        low, high = interval(values, second[name], *documents, together=same)
        table[name] = {"auroc": auroc(values, second[name]), "low": low, "high": high}
    return table


def _regression_scores(
    first: dict[str, Tensor], second: dict[str, Tensor], names: list[str], documents: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return scores of a logistic regression; each document is scored by a regression that was fitted to other documents."""
    features = torch.cat([torch.stack([side[name] for name in names], 1) for side in (first, second)]).numpy()
    n = len(documents[0])
    is_other = [0] * n + [1] * len(documents[1])
    # Both texts have at least FOLDS documents, so every training part has passages of both.
    folds = StratifiedGroupKFold(FOLDS)
    # Balanced, because folds with different shares of the texts would have scores with different offsets.
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    decision = cross_val_predict(
        regression, features, is_other, groups=torch.cat(documents).numpy(), cv=folds, method="decision_function"
    )
    return torch.from_numpy(decision[:n]), torch.from_numpy(decision[n:])


def auroc(known: Tensor, other: Tensor) -> float:
    """Return the probability that a value of ``other`` is higher than one of ``known``; ties count half."""
    return _higher(known, other).mean().item()


def interval(
    known: Tensor,
    other: Tensor,
    known_documents: Tensor,
    other_documents: Tensor,
    together: bool = False,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return a confidence interval of the AUROC, by a bootstrap over documents.

    Documents are resampled instead of passages, because passages of one document are correlated.

    Args:
        known: scores ``[n]``.
        other: scores ``[m]``.
        known_documents: index of the document that contains each known passage ``[n]``.
        other_documents: index of the document that contains each other passage ``[m]``.
        together: whether documents with the same index in both texts are drawn together. Default: False.
        level: coverage of the interval. For a learned score it excludes the variance of the fit. Default: 0.95.
    """
    generator = torch.Generator().manual_seed(0)
    if together:
        both = _bootstrap_counts(torch.cat((known_documents, other_documents)), generator)
        first, second = both.split([len(known), len(other)], 1)
    else:
        first, second = (_bootstrap_counts(documents, generator) for documents in (known_documents, other_documents))
    values = ((first @ _higher(known, other)) * second).sum(1) / (first.sum(1) * second.sum(1))
    low, high = values.nanquantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def _bootstrap_counts(documents: Tensor, generator: torch.Generator) -> Tensor:
    """Return how often each resample, drawn from documents with replacement, contains each passage, ``[RESAMPLES, n]``."""
    unique, index = documents.unique(return_inverse=True)
    drawn = torch.randint(len(unique), (RESAMPLES, len(unique)), generator=generator)
    times = torch.zeros(RESAMPLES, len(unique), dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))[:, index]


def _higher(known: Tensor, other: Tensor) -> Tensor:
    """Return ``[n, m]``: 1 where ``other`` is higher, 0.5 where they are equal, else 0."""
    difference = other[None].double() - known[:, None].double()
    return (difference.sign() + 1) / 2
