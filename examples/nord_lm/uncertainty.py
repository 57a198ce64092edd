"""Does firing tell text of a known kind from other text, and does it tell more than loss and entropy do?

A passage is scored by a mean over its tokens: of the firing rate (of each layer, of all neurons), of the loss, of the entropy
of what the model expects. AUROC is the probability that a passage of the other text has the higher score: 0.5 tells nothing,
below it the other text has the lower one.
"""

import ast
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import spikingjelly
import torch
from activity import Measured, measure
from data import DataError, encode, python_files, read_documents
from modeling_nord import NordForCausalLM
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["MADE", "Passages", "auroc", "cut", "distinguish", "interval", "other_texts", "scores"]

#: Other texts that need no file.
MADE = ("shuffled", "code", "chinese")
PASSAGE = 32  # tokens: a sentence or two
MOST_DOCUMENTS = 1000
RESAMPLES = 1000
FOLDS = 5


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
        DataError: no document is so long, or there are passages from fewer than two of them.
    """
    found: list[Tensor] = []
    documents: list[int] = []
    for number, text in enumerate(texts):
        ids = torch.cat([torch.empty(0, dtype=torch.int32), *encode([text], tokenizer)])[:-1]  # without the end of text
        whole = ids[: len(ids) // length * length].view(-1, length)
        found.extend(whole)
        documents.extend([number] * len(whole))
    if len(set(documents)) < 2:
        raise DataError(
            f"{name}: passages of {length} tokens from {len(set(documents))} documents; expected them from two at least"
        )
    taken = torch.linspace(0, len(found) - 1, min(at_most, len(found))).round().long()
    tokens = torch.stack([found[i] for i in taken]).long()
    n_bytes = torch.tensor([len(text.encode()) for text in tokenizer.batch_decode(tokens)])
    return Passages(name, tokens, torch.tensor(documents)[taken], n_bytes)


def other_texts(source: str, known: list[str]) -> list[str]:
    """The documents of one of :data:`MADE`, or of anything that ``read_documents`` opens.

    ``shuffled`` is the known text with the words of each document in another order, ``code`` every fifth file of the standard
    library without comments and docstrings, ``chinese`` the Chinese lines of SpikingJelly's docstrings. Of anything else, up
    to 1,000 documents are read.
    """
    makers: dict[str, Callable[[], Iterator[str]]] = {
        "shuffled": lambda: _shuffled(known),
        "code": _code,
        "chinese": _chinese,
    }
    return list(makers[source]() if source in makers else islice(read_documents(source).read(), MOST_DOCUMENTS))


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
    others: Iterable[str],
    length: int | None = None,
    visible: bool = False,
) -> tuple[dict[str, Any], dict[str, tuple[Passages, Measured]]]:
    """AUROC of every score for each other text, with 95 % confidence intervals.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        texts: documents of the known kind, which the model has not seen.
        others: see :func:`other_texts`.
        length: tokens in a passage; None: 32, or the model's window if that is less.
        visible: whether to show progress.

    Returns:
        What goes into JSON, and what was measured at each token: of ``"known"`` and every other text.
    """
    longest = model.config.max_position_embeddings
    length = min(PASSAGE, longest) if length is None else length
    if not 2 <= length <= longest:
        raise DataError(f"passages must be of 2 to {longest} tokens, got {length}")
    known = cut("the known text", texts, tokenizer, length)
    measured = {"known": (known, measure(model, known.tokens, what="known text" if visible else None))}
    results: dict[str, Any] = {"passage_tokens": length, "passages": len(known.tokens), "auroc": {}}
    for source in others:
        other = cut(source, other_texts(source, texts), tokenizer, length)
        measured[source] = (other, measure(model, other.tokens, what=source if visible else None))
        results["auroc"][source] = _auroc_of_all(measured["known"], measured[source], same=source == "shuffled")
    return results, measured


def _auroc_of_all(
    known: tuple[Passages, Measured], other: tuple[Passages, Measured], same: bool
) -> dict[str, dict[str, float]]:
    """By score. ``same``: both are made of the same documents, which are drawn together."""
    first, second = scores(*known), scores(*other)
    offset = 0 if same else int(known[0].documents.max()) + 1
    documents = (known[0].documents, other[0].documents + offset)
    rates = [name for name in first if name.startswith("firing rate of")][1:]
    for name, of in (
        ("firing rates of all layers", rates),
        ("the same, loss and entropy", [*rates, "loss", "entropy"]),
    ):
        first[name], second[name] = _combined(first, second, of, documents)
    found = {}
    for name, values in first.items():
        low, high = interval(values, second[name], *documents)
        found[name] = {"auroc": auroc(values, second[name]), "low": low, "high": high}
    return found


def _combined(
    first: dict[str, Tensor], second: dict[str, Tensor], names: list[str], documents: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Logistic regression on several scores, each document judged by what was learned from others."""
    features = torch.cat([torch.stack([side[name] for name in names], 1) for side in (first, second)]).numpy()
    n = len(documents[0])
    is_other = [0] * n + [1] * len(documents[1])
    groups = torch.cat(documents)
    folds = GroupKFold(min(FOLDS, len(groups.unique())))
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    judged = cross_val_predict(
        regression, features, is_other, groups=groups.numpy(), cv=folds, method="decision_function"
    )
    return torch.from_numpy(judged[:n]), torch.from_numpy(judged[n:])


def auroc(known: Tensor, other: Tensor) -> float:
    """Probability that one of ``other`` is higher than one of ``known``, ties counting half."""
    return _higher(known, other).mean().item()


def interval(
    known: Tensor, other: Tensor, known_documents: Tensor, other_documents: Tensor, level: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of the AUROC by the bootstrap over documents, since passages of one document are alike.

    Documents with the same number on both sides are drawn together.
    """
    generator = torch.Generator().manual_seed(0)
    numbers, places = torch.cat((known_documents, other_documents)).unique(return_inverse=True)
    drawn = torch.randint(len(numbers), (RESAMPLES, len(numbers)), generator=generator)
    times = torch.zeros(RESAMPLES, len(numbers), dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )
    first, second = times[:, places].split([len(known), len(other)], 1)
    values = ((first @ _higher(known, other)) * second).sum(1) / (first.sum(1) * second.sum(1))
    low, high = values.nanquantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def _higher(known: Tensor, other: Tensor) -> Tensor:
    """1 where ``other`` is higher, 0.5 where they are equal, ``[n, m]``."""
    difference = other[None].double() - known[:, None].double()
    return (difference.sign() + 1) / 2
