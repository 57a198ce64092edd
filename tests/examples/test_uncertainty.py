"""Tests of the comparison of texts by AUROC: the statistic, the texts, and the measures of each token."""

import ast
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import fire_easily, make_text
from hypothesis import given, settings
from hypothesis import strategies as st
from nordlm.analysis.ood_detection import (
    BUILTIN_TEXTS,
    LEARNED,
    auroc,
    cut_passages,
    distinguish,
    interval,
    open_others,
    other_texts,
)
from nordlm.analysis.token_activity import (
    TOKEN_KINDS,
    decodable_spans,
    kinds_of,
    measure_tokens,
    rates_by_kind,
    zone,
    zone_means,
)
from nordlm.data.tokenizer import train_tokenizer
from nordlm.errors import DataError
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from nord_snn.models.nord import NordConfig, NordForCausalLM
from nord_snn.monitor import SpikeMonitor

TEXTS = [make_text(400, seed) for seed in range(8)]
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 24, "n_clusters": 4, "recency": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS, "数 is 12.5, (naïve)\n\n  x"], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = NordForCausalLM(NordConfig(vocab_size=len(tokenizer), **SMALL)).eval()
    fire_easily(model)
    return model


# --- AUROC


@given(
    known=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    other=st.lists(st.integers(0, 5), min_size=1, max_size=20),
)
def test_auroc_equals_scikit_learns_with_ties(known, other):
    expected = roc_auc_score([0] * len(known) + [1] * len(other), known + other)
    assert auroc(torch.tensor(known), torch.tensor(other)) == pytest.approx(expected)


@settings(deadline=None, max_examples=20)
@given(
    known=st.lists(st.floats(-1, 1), min_size=4, max_size=30), other=st.lists(st.floats(-1, 1), min_size=4, max_size=30)
)
def test_the_interval_of_the_negated_score_is_mirrored_at_one_half(known, other):
    known, other = torch.tensor(known), torch.tensor(other)
    documents = torch.arange(len(known)), torch.arange(len(other))
    low, high = interval(known, other, *documents)
    assert 0 <= low <= high <= 1
    mirrored = interval(-known, -other, *documents)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-6)


def test_intervals_have_the_nominal_coverage_with_correlated_passages():
    """The true AUROC is 0.5. Intervals that treat passages as independent are too narrow."""
    torch.manual_seed(0)
    documents = torch.arange(20).repeat_interleave(8)
    covered = covered_if_independent = 0
    for _ in range(60):
        known, other = (torch.randn(20)[documents] + 0.3 * torch.randn(160) for _ in range(2))
        low, high = interval(known, other, documents, documents + 20)
        covered += low <= 0.5 <= high
        low, high = interval(known, other, torch.arange(160), torch.arange(160) + 160)
        covered_if_independent += low <= 0.5 <= high
    assert covered >= 52  # of 60: the nominal 95 % would be 57
    assert covered_if_independent <= 45


# --- texts


def test_shuffled_text_has_the_same_words_and_whitespace():
    text = "one two\n\n  three four.\tfive six"
    (shuffled,) = other_texts("shuffled", None, [text])
    assert shuffled != text
    assert sorted(shuffled.split()) == sorted(text.split())
    assert [c for c in shuffled if c.isspace()] == [c for c in text if c.isspace()]
    assert other_texts("shuffled", None, [text]) == [shuffled]


def test_code_has_no_comments_or_docstrings():
    texts = other_texts("code", None, [])
    assert len(texts) > 50
    for text in texts[:20]:
        assert ast.unparse(ast.parse(text)) == text  # no comments
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        assert not any(ast.get_docstring(n) for n in ast.walk(ast.parse(text)) if isinstance(n, documented))


def test_chinese_is_mostly_chinese():
    texts = other_texts("chinese", None, [])
    assert sum(map(len, texts)) > 10_000
    han = sum("\u4e00" <= c <= "\u9fff" for text in texts for c in text)
    assert han > 0.5 * sum(len("".join(text.split())) for text in texts)


def test_passages_are_spread_evenly_over_documents(tokenizer):
    passages = cut_passages("known", TEXTS, tokenizer, 16, at_most=20)
    assert passages.tokens.shape == (20, 16)
    assert set(passages.documents.tolist()) == set(range(8))
    assert tokenizer.decode(passages.tokens[0]) == TEXTS[0][: int(passages.n_bytes[0])]
    with pytest.raises(DataError, match="known: 4 documents have passages of 16 tokens, expected at least 5"):
        cut_passages("known", TEXTS[:4], tokenizer, 16)
    with pytest.raises(DataError, match="0 documents have passages"):
        cut_passages("known", ["short"], tokenizer, 16)


def test_files_and_folders_can_be_compared_texts(tokenizer, model, tmp_path):
    other, short = str(tmp_path / "known"), str(tmp_path / "short.txt")
    Path(other).mkdir()
    (tmp_path / "known" / "other.txt").write_text(make_text(6000, seed=99))
    (tmp_path / "short.txt").write_text("too short")
    result, _, measured = distinguish(model, tokenizer, TEXTS, open_others([other, short]), 16)
    assert list(measured) == list(result["auroc"]) == [other]
    assert result["left_out"] == [
        f"{short}: 0 documents have passages of 16 tokens, expected at least 5 to generalise to other documents"
    ]
    assert result["known"] == {"passages": 400, "documents": 8}
    for score in result["auroc"][other].values():
        assert score["low"] <= score["auroc"] <= score["high"]
    with pytest.raises(DataError, match="no such file"):
        open_others([str(tmp_path / "none.txt")])
    with pytest.raises(DataError, match="passages must have 2 to 24 tokens, got 25"):
        distinguish(model, tokenizer, TEXTS, open_others(BUILTIN_TEXTS), 25)


def test_chinese_text_is_distinguished_and_the_same_text_is_not(tokenizer, model, tmp_path):
    """For the same text the AUROC of all scores is near 0.5; for Chinese text it is far from 0.5, also without a model."""
    (tmp_path / "same.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    result, *_ = distinguish(model, tokenizer, TEXTS, open_others(["chinese", str(tmp_path / "same.jsonl")]), 16)
    assert result["auroc"]["chinese"]["bytes per token (no model)"]["high"] < 0.05
    same = result["auroc"][str(tmp_path / "same.jsonl")]
    assert same["loss"]["auroc"] == same["firing rate of all neurons"]["auroc"] == 0.5
    for score in LEARNED:
        assert 0.2 < same[score]["auroc"] < 0.75
        assert result["auroc"]["chinese"][score]["auroc"] > 0.9


# --- measures of each token


def test_loss_entropy_and_rates_equal_those_of_the_model(tokenizer, model):
    ids = cut_passages("known", TEXTS, tokenizer, 16, at_most=5).tokens
    measured = measure_tokens(model, ids, batch_size=2)
    logits = model(input_ids=ids, use_cache=False).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert torch.allclose(measured.loss.flatten(), expected, atol=1e-5)
    distribution = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(measured.entropy, distribution.entropy(), atol=1e-5)
    with SpikeMonitor(model, {"all": [""]}) as monitor:
        model(input_ids=ids, use_cache=False)
    assert {name: rate.mean().item() for name, rate in measured.rates.items()} == pytest.approx(
        monitor.rates(), rel=1e-5
    )
    assert measured.mean_rate().mean().item() == pytest.approx(monitor.zone_rates()["all"], rel=1e-5)


def test_zones_weight_layers_by_their_neurons():
    rates = {
        "input_lif": torch.tensor(0.1),
        "blocks.3.ffn.lif1": torch.tensor(0.3),
        "blocks.3.ffn.lif2": torch.tensor(0.0),
    }
    neurons = {"input_lif": 4, "blocks.3.ffn.lif1": 8, "blocks.3.ffn.lif2": 4}
    means = {name: value.item() for name, value in zone_means(rates, neurons).items()}
    assert means == pytest.approx({"input": 0.1, "block 3": 0.2})
    assert zone("readout.lif") == "readout"


def test_whether_a_token_begins_a_word_depends_on_the_previous_token(tokenizer):
    def kinds(text):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        return [
            (tokenizer.decode([i]), TOKEN_KINDS[k])
            for i, k in zip(ids[0].tolist(), kinds_of(ids, tokenizer)[0], strict=True)
        ]

    tokens = kinds("x(y) xy's\nthe")
    assert tokens[0] == ("x", "begins a word")  # the previous token is unknown
    token_texts = [text for text, _ in tokens]
    assert dict(tokens)["y"] in ("begins a word", "inside a word")
    assert tokens[token_texts.index("(") + 1] == ("y", "begins a word")
    apostrophe = next(i for i, text in enumerate(token_texts) if text.startswith("'"))
    assert tokens[apostrophe][1] in ("inside a word", "punctuation")
    after_break = next(i for i, text in enumerate(token_texts) if "\n" in text) + 1
    assert tokens[after_break][1] in ("function word", "begins a word")


def test_kinds_of_tokens(tokenizer):
    kinds = {
        "<|endoftext|>": "end of text", "\n": "line break", "1": "number", ",": "punctuation", " (": "punctuation",
        " the": "function word", " neuron": "begins a word", " ": "blanks",
    }  # fmt: skip
    n_tested = 0
    for text, kind in kinds.items():
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:1]])
        if tokenizer.decode(ids[0]) == text:
            assert TOKEN_KINDS[kinds_of(ids, tokenizer)[0, 0]] == kind, text
            n_tested += 1
    assert n_tested >= 4  # so small a vocabulary has no token for some of them
    first_byte = tokenizer("语", add_special_tokens=False)["input_ids"][:1]
    assert TOKEN_KINDS[kinds_of(torch.tensor([first_byte]), tokenizer)[0, 0]] == "part of a character"


def test_rates_by_kind_are_means_over_its_tokens():
    kinds = torch.tensor([[0, 4, 4], [5, 4, 0]])
    rates = rates_by_kind({"lif": torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.1, 0.3]])}, kinds)
    assert list(rates["lif"]) == [TOKEN_KINDS[0], TOKEN_KINDS[4], TOKEN_KINDS[5]]
    assert list(rates["lif"].values()) == pytest.approx([0.2, 0.2, 0.4])


@settings(deadline=None, max_examples=50)
@given(text=st.text(alphabet="ab 1\n语é😀", max_size=20), skipped=st.integers(0, 3))
def test_decodable_spans_have_every_token_once_and_whole_characters(tokenizer, text, skipped):
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][skipped:], dtype=torch.long)
    spans = list(decodable_spans(ids, tokenizer))
    assert [place for _, begin, end in spans for place in range(begin, end)] == list(range(len(ids)))
    if not skipped:
        assert "".join(word for word, _, _ in spans) == text


def test_entropy_of_a_uniform_model_is_the_log_of_the_vocabulary(tokenizer, model):
    ids = cut_passages("known", TEXTS, tokenizer, 16, at_most=2).tokens
    with torch.no_grad():
        weight = model.lm_head.weight.clone()
        model.lm_head.weight.zero_()
        measured = measure_tokens(model, ids)
        model.lm_head.weight.copy_(weight)
    assert measured.entropy.mean().item() == pytest.approx(math.log(len(tokenizer)), rel=1e-5)
