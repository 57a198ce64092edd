"""Tests of nordlm.data, which turns documents into sequences of tokens and reports all text that it leaves out."""

import json
import os
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
from helpers import make_text
from hypothesis import given
from hypothesis import strategies as st
from nordlm.data import corpus as corpus_module
from nordlm.data import sources
from nordlm.data.baselines import bigram_loss, uniform_loss, unigram_loss
from nordlm.data.corpus import SequenceDataset, StreamedSequences, encode, load_corpus, pack, split
from nordlm.data.sources import Documents, python_documentation, read_documents
from nordlm.data.tokenizer import load_tokenizer, train_tokenizer
from nordlm.errors import DataError

TEXTS = [f"document {i} says {i * i} and rests" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


# --- sources


def test_text_files_are_read_completely(tmp_path):
    text = make_text() + "Ünïcode ✓ without a last line end"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert "".join(read_documents(str(tmp_path / "a.txt")).read()) == text


def test_unusable_jsonl_lines_are_counted_and_reported(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        '{"text": "one"}',
        '{"content": "two"}',
        '{"passage": "three"}',
        "{broken",
        '{"title": "no text"}',
        '{"text": 5}',
        "[1]",
        "",
        '{"text": "\\ud800"}',
        '{"text": "four"}',
    ]
    path.write_text("\n".join(lines))
    documents = read_documents(str(path))
    assert list(documents.read()) == ["one", "two", "three", "four"]
    assert documents.notes() == [
        f"left out 1: lines that are not JSON (first: {path}:4)",
        f"left out 3: records without text in a field text, content or passage (first: {path}:5)",
        f"left out 1: records that are not valid Unicode (first: {path}:9)",
    ]
    list(documents.read())
    assert sum(documents.skipped.values()) == 5  # a second pass does not count twice


def test_all_text_files_of_a_folder_are_read_sorted_by_path(tmp_path):
    datasets.Dataset.from_dict({"content": ["from parquet", "too"]}).to_parquet(str(tmp_path / "b.parquet"))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("from text\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "from jsonl"}))
    (tmp_path / "d.md").write_text("not read")
    documents = read_documents(str(tmp_path))
    assert list(documents.read()) == ["from parquet", "too", "from jsonl", "from text\n"]
    assert "left out 1: files that are not .txt, .jsonl or .parquet" in documents.notes()[0]


def test_the_documentation_that_ships_with_python_is_a_text():
    documents = list(python_documentation())
    assert sum(map(len, documents)) > 1_000_000
    assert any("yield expression" in text for text in documents)
    assert len(documents) > 300


def test_a_hub_dataset_is_streamed(monkeypatch, tokenizer):
    calls = []

    def load_dataset(name, config, **more):
        calls.append((name, config, more))
        return datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(60))}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read_documents("owner/name:config")
    assert calls == [("owner/name", "config", {"split": "train", "streaming": True})]
    corpus = load_corpus(documents, tokenizer, block_size=8, held_out=0.2)
    assert isinstance(corpus.train, StreamedSequences)
    streamed = torch.stack(list(corpus.train))
    assert torch.equal(streamed, torch.stack(list(corpus.train)))  # from the start again
    assert torch.equal(streamed.flatten(), corpus.sample[: streamed.numel()].long())


def test_every_entry_of_a_folder_that_is_not_read_is_counted_by_reason(tmp_path):
    """Links to files are followed, links to folders are not: otherwise text could be read twice, or endlessly."""
    folder, other = tmp_path / "books", tmp_path / "other"
    (folder / "deep").mkdir(parents=True)
    other.mkdir()
    (other / "b.txt").write_text("behind a link")
    (folder / "deep" / "a.txt").write_text("read")
    (folder / "c.txt").symlink_to(other / "b.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "more").symlink_to(other)
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "circle.txt").symlink_to("circle.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "blank.txt").write_text(" \n\t\n" * 3000)
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "d.md").write_text("not read")
    documents = read_documents(str(folder))
    assert list(documents.read()) == ["behind a link", "read"]
    assert sorted(documents.notes()) == [
        f"left out 1: files that are not .txt, .jsonl or .parquet (first: {folder}/d.md)",
        f"left out 1: pipes, sockets and devices (first: {folder}/pipe.txt)",
        f"left out 2: broken links (first: {folder}/circle.txt)",
        f"left out 2: files of white space only (first: {folder}/blank.jsonl)",
        f"left out 2: links to folders, which are not followed (first: {folder}/loop)",
    ]


@given(st.lists(st.sampled_from(["text", "blank", "markdown", "folder link", "dead link", "pipe"]), max_size=8))
def test_every_entry_of_a_folder_is_read_or_counted(kinds):
    with tempfile.TemporaryDirectory() as name:
        for number, kind in enumerate(kinds):
            path = Path(name) / f"{number}.txt"
            if kind in ("text", "blank"):
                path.write_text("text" if kind == "text" else " ")
            elif kind == "markdown":
                path.with_suffix(".md").write_text("text")
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to("/" if kind == "folder link" else "nowhere")
        if "text" not in kinds:
            with pytest.raises(DataError):
                read_documents(name)
            return
        documents = read_documents(name)
        assert len(list(documents.read())) + sum(documents.skipped.values()) == len(kinds)


def test_a_folder_that_cannot_be_read_raises(tmp_path, monkeypatch):
    """The error is raised by a patch because root can read every folder."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"closed: the folder cannot be read .Permission denied"):
        read_documents(str(tmp_path))


def test_a_pipe_as_the_text_raises(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="expected a regular file, got a pipe or a device"):
        read_documents(str(tmp_path / "pipe.txt"))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file or folder; expected .txt, .jsonl or .parquet"),
        ("empty.txt", b"", "the file is empty"),
        ("binary.txt", b"PK\x03\x04\x00\x00", "binary; expected UTF-8 text"),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), "not UTF-8 text"),
        ("a.pdf", b"%PDF", "expected .txt, .jsonl or .parquet"),
        ("bad.parquet", b"PAR1 but no more", "not a readable Parquet file"),
        ("all_bad.jsonl", b"{\n{\n", "no text found .left out 2: lines that are not JSON"),
        ("blank.txt", b"\n\n  \n", "no text found"),
        ("", None, "the name of the text is empty"),
    ],
)
def test_bad_sources_raise_one_sentence(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_corpus(read_documents(str(tmp_path / name) if name else ""), tokenizer, 8)


def test_a_name_of_neither_a_file_nor_a_dataset_raises(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="neither a file nor a dataset that can be opened"):
        read_documents("no-such-owner/no-such-dataset")
    with pytest.raises(DataError, match="no such file or folder"):
        read_documents("nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"expected .txt, .jsonl or .parquet files in it"):
        read_documents(str(tmp_path / "folder"))


# --- split


@given(st.lists(st.text(min_size=1), min_size=2, max_size=30), st.floats(0.01, 0.9))
def test_which_documents_are_held_out_does_not_depend_on_their_order(texts, held_out):
    for streamed in (False, True):
        if not streamed and len(set(texts)) < 2:
            continue  # load_corpus raises for a single document
        documents = Documents("test", lambda: iter(texts), streamed=streamed)
        train, held_out_texts = split(documents, held_out)
        assert sorted([*train(), *held_out_texts()]) == sorted(texts)
        assert set(train()).isdisjoint(held_out_texts())
        reversed_documents = Documents("test", lambda: iter(texts[::-1]), streamed=streamed)
        assert sorted(split(reversed_documents, held_out)[1]()) == sorted(held_out_texts())


def test_of_three_documents_one_is_held_out():
    train, held_out_texts = split(Documents("test", lambda: iter(TEXTS[:3]), streamed=False), 0.05)
    assert len(list(train())) == 2
    assert len(list(held_out_texts())) == 1


# --- tokens


@pytest.mark.quick
def test_the_trained_tokenizer_round_trips_any_text(tokenizer):
    for text in ("plain", "Ünïcode ✓ 日本語", "tabs\tand\n\nlines  ", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(train_tokenizer(TEXTS, 300)) == 300


@pytest.mark.quick
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 7))
def test_packing_drops_only_the_last_incomplete_sequence(lengths, block_size):
    encoded, start = [], 0
    for n in lengths:
        encoded.append(torch.arange(start, start + n, dtype=torch.int32))
        start += n
    blocks = list(pack(encoded, block_size))
    assert torch.equal(torch.cat([torch.empty(0).int(), *blocks]), torch.arange(start // block_size * block_size).int())
    assert all(len(block) == block_size for block in blocks)


@pytest.mark.quick
def test_corpus_counts_every_byte_and_terminates_every_document(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    corpus = load_corpus(read_documents(str(tmp_path / "a.jsonl")), tokenizer, 8, held_out=0.25)
    assert isinstance(corpus.train, SequenceDataset)
    assert (corpus.sample == tokenizer.eos_token_id).sum() == 45  # 75 % of 60 documents
    held_out_texts = tokenizer.decode(corpus.validation.flatten()).split(tokenizer.eos_token)[:-1]
    assert set(held_out_texts) <= set(TEXTS)
    assert 1 < corpus.bytes_per_token < 8
    reloaded = load_corpus(read_documents(str(tmp_path / "a.jsonl")), tokenizer, 8, held_out=0.25)
    assert reloaded.fingerprint == corpus.fingerprint
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t + "!"}) for t in TEXTS))
    assert load_corpus(read_documents(str(tmp_path / "a.jsonl")), tokenizer, 8).fingerprint != corpus.fingerprint


def test_validation_text_can_be_a_separate_file(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(make_text())
    (tmp_path / "b.txt").write_text("only this " * 40)
    corpus = load_corpus(
        read_documents(str(tmp_path / "a.txt")), tokenizer, 8, validation=read_documents(str(tmp_path / "b.txt"))
    )
    assert set(tokenizer.decode(corpus.validation.flatten()).split()) <= {  # sequences can begin and end within a word
        "only",
        "this",
        "o",
        "on",
        "onl",
        "t",
        "th",
        "thi",
    }
    assert len(tokenizer.decode(corpus.sample)) >= len(make_text())


def test_too_little_text_raises(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match="has only one document, which cannot be held out"):
        load_corpus(read_documents(str(tmp_path / "a.txt")), tokenizer, 64)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    documents = read_documents(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="less than one sequence of 64: give more text or a smaller --block-size"):
        load_corpus(documents, tokenizer, 64)
    with pytest.raises(DataError, match="expected held-out text to validate on"):
        load_corpus(documents, tokenizer, 64, held_out=0.0)


def test_a_file_without_line_ends_is_split_into_documents(tmp_path, tokenizer):
    text = make_text().replace("\n", " ")
    (tmp_path / "a.txt").write_text(text)
    documents = read_documents(str(tmp_path / "a.txt"))
    assert "".join(documents.read()) == text
    assert max(map(len, documents.read())) <= 4096
    load_corpus(documents, tokenizer, 24)


def test_a_byte_order_mark_is_removed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert list(read_documents(str(tmp_path / "a.jsonl")).read()) == ["one", "two"]


def test_json_that_python_cannot_parse_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + '\n{"n": ' + "9" * 5000 + '}\n{"text": "one"}')
    documents = read_documents(str(tmp_path / "a.jsonl"))
    assert list(documents.read()) == ["one"]
    assert documents.skipped["lines that are not JSON"] == 2


def test_text_that_spells_a_special_token_is_tokenized_as_text(tokenizer):
    (ids,) = encode(["a <|endoftext|> b"], tokenizer)
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert ids[-1] == tokenizer.eos_token_id


def test_records_that_a_stream_skips_are_counted(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS) + "\nbroken")
    monkeypatch.setattr(corpus_module, "BASELINE_TOKENS", 50)
    corpus = load_corpus(read_documents(str(tmp_path / "a.jsonl")), tokenizer, 8, held_out=0.1, max_validation_blocks=1)
    list(corpus.train)
    assert corpus.notes() == [f"left out 1: lines that are not JSON (first: {tmp_path}/a.jsonl:61)"]


def test_an_error_of_a_stream_raises(monkeypatch):
    def broken():
        yield {"text": "one"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: broken())
    with pytest.raises(DataError, match=r"the stream ended with an error \(ConnectionError: gone"):
        list(read_documents("owner/name").read())


def test_unsuitable_tokenizers_raise(tmp_path, tokenizer):
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "none"), 300)
    tokenizer.save_pretrained(tmp_path / "t")
    assert len(load_tokenizer(str(tmp_path / "t"), 300)) == 300
    with pytest.raises(DataError, match="the tokenizer has 300 tokens and the model only 200"):
        load_tokenizer(str(tmp_path / "t"), 200)
    with pytest.raises(DataError, match="at least 257 tokens, got 100"):
        train_tokenizer(TEXTS, 100)


# --- baselines


@pytest.mark.quick
def test_baselines_equal_values_computed_by_hand():
    train = torch.tensor([0, 1, 0, 1, 0, 2], dtype=torch.int32)
    validation = torch.tensor([[0, 1, 0]])
    log = torch.log
    unigram = (torch.tensor([3.0, 2.0, 1.0]) + 1) / 9  # counts plus one, divided by 6 tokens plus 3 types
    assert uniform_loss(3) == pytest.approx(log(torch.tensor(3.0)).item())
    assert unigram_loss(train, validation, 3) == pytest.approx(-log(unigram[[1, 0]]).mean().item())
    # two types follow token 0 (1 twice, 2 once), one type follows token 1 (0 twice)
    p1 = (2 + 2 * unigram[1]) / (3 + 2)
    p0 = (2 + 1 * unigram[0]) / (2 + 1)
    assert bigram_loss(train, validation, 3) == pytest.approx(-log(torch.stack((p1, p0))).mean().item())


def test_the_bigram_sums_to_one_and_falls_back_to_the_unigram():
    train = torch.randint(5, (200,)).int()
    for before in range(6):  # token 5 does not occur in the text
        total = sum(
            torch.tensor(-bigram_loss(train, torch.tensor([[before, after]]), 6), dtype=torch.float64).exp()
            for after in range(6)
        )
        assert total.item() == pytest.approx(1.0)
    never = torch.tensor([[5, 2]])
    assert bigram_loss(train, never, 6) == pytest.approx(unigram_loss(train, never, 6))
