"""Tests of compare.py: same tokens and sizes for all models, search for learning rates, measures of samples."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import compare as compare_script
import pytest
import torch
import train as train_script
import trials
from accelerate.state import AcceleratorState
from compare import Comparison, best_lr, comparison_table, gaps, rate_tables, search_lr
from helpers import WORDS, make_text, two_processes, write_config
from nordlm.data.tokenizer import train_tokenizer
from nordlm.errors import DataError
from nordlm.training.model_card import parameter_counts
from nordlm.training.settings import read_config
from sample_quality import coherence, cut_prompts, generate_samples, repetition
from study_cli import markdown_table, spread
from variants import MODEL_MAKERS, gpt2, nord

from nord_snn.models.nord import NordConfig

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = Path(compare_script.__file__).parent


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([make_text()], 300)


@pytest.fixture
def text(tmp_path):
    """Write twenty documents and return their path."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": make_text(300, seed)}) + "\n" for seed in range(20)))
    return path


@pytest.fixture
def spike_fed(tmp_path):
    """Return a writer of configs with spike-fed blocks."""

    def write(**changes):
        return write_config(tmp_path, block="spike_fed", refractory_steps=0, **changes)

    return write


def test_all_models_have_the_same_size(tokenizer, spike_fed):
    tied = {"tie_word_embeddings": True, "top_k": 3}
    for config in ("tiny", "small", str(spike_fed()), str(spike_fed(name="tied", **tied))):
        settings = read_config(config)
        with torch.device("meta"):
            models = {kind: make(settings, tokenizer) for kind, make in MODEL_MAKERS.items()}
        counts = {kind: parameter_counts(model) for kind, model in models.items()}
        ours = models["spike-fed"]
        neuron = 2 * ours.config.hidden_size + 1  # one more in each feed-forward
        difference = counts["spike-fed"][1] - counts["gpt2"][1]
        assert abs(difference) <= neuron * ours.config.num_hidden_layers / 2
        for kind, model in models.items():
            whole, without = counts[kind]
            assert model.config.hidden_size == ours.config.hidden_size
            assert model.config.num_hidden_layers == ours.config.num_hidden_layers
            tables = 1 if ours.config.tie_word_embeddings else 2
            assert whole - without == tables * ours.config.vocab_size * ours.config.hidden_size
            assert getattr(model.config, "top_k", None) in (ours.config.top_k, None)
            assert abs(without / counts["spike-fed"][1] - 1) < 0.25, kind


def test_every_kind_of_model_has_the_properties_in_its_name(tokenizer, spike_fed):
    settings = read_config(str(spike_fed(threshold=0.5)))
    configs = {kind: make(settings, tokenizer).config for kind, make in MODEL_MAKERS.items()}
    default = NordConfig()
    for kind in ("published", "recency"):
        for field in ("t_fast", "t_slow", "threshold", "refractory_steps", "surrogate", "block", "top_k"):
            assert getattr(configs[kind], field) == getattr(default, field), field
        assert configs[kind].recency is (kind == "recency")
    for kind in ("spike-fed", "spiking-values", "dense-twin", "dense-plain"):
        assert configs[kind].block == "spike_fed"
        assert configs[kind].threshold == 0.5
        assert configs[kind].spiking_values is (kind == "spiking-values")
        assert configs[kind].dense is kind.startswith("dense")


def test_training_is_the_same_as_in_train_py(tmp_path, text, spike_fed):
    """Both give the same loss on the held-out text."""
    arguments = ["--config", str(spike_fed(steps=5)), "--data", str(text)]
    assert train_script.main([*arguments, "--seed", "3", "--out", str(tmp_path / "runs"), "--no-report"]) == 0
    expected = json.loads((tmp_path / "runs" / "test-0001" / "results.json").read_text())
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path / "compare"
    assert compare_script.main([*arguments, "--models", "spike-fed", "--seeds", "3", "--out", str(out)]) == 0
    (run,) = runs_in(out)
    assert run["loss"] == pytest.approx(expected["validation_loss"], rel=1e-6)
    assert run["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)


def runs_in(out):
    return [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))]


def test_the_command_resumes_and_selects_by_the_held_out_loss(tmp_path, text, capsys, monkeypatch, spike_fed):
    out = tmp_path / "compare"
    arguments = ["--config", str(spike_fed(steps=4)), "--data", str(text), "--out", str(out)]
    arguments += ["--seeds", "0", "1", "--lrs", "1e-6", "1e-2", "--models"]
    train_one, trained = trials.train_one, []

    def counted(settings, *others):
        lr = settings.training.lr
        trained.append((settings.training.seed, lr))
        if len(trained) == 5:
            raise KeyboardInterrupt
        return train_one(settings, *others) | {"loss": 2 + abs(math.log(lr / 1e-2))}

    monkeypatch.setattr(trials, "train_one", counted)
    both = [*arguments, "spike-fed", "gpt2"]
    assert compare_script.main(both) == 130
    assert "continues with the missing runs" in capsys.readouterr().err
    assert compare_script.main(both) == 0
    whole = [(0, 1e-6), (0, 1e-2), (0, 2e-2), (1, 1e-2)]  # and a higher rate, if the best is the highest
    assert trained == [*whole, (0, 1e-6), *whole]
    for run in runs_in(out):
        assert bool(run["firing_rates"]) == (run["kind"] == "spike-fed")
        assert bool(run["acs"]) <= (run["kind"] == "spike-fed")
        assert run["joules"] < run["joules_with_sram"]
    shown = (out / "table.md").read_text()
    assert shown.startswith("|  | spike-fed | gpt2 | held-out text |")
    assert "| peak learning rate | 0.01 | 0.01 |  |" in shown
    assert "bigram, interpolated" in shown
    assert "compare.py --config" in shown
    assert "tried at seed 0: spike-fed 1e-06, 0.01, 0.02; gpt2 1e-06, 0.01, 0.02; diverged: none" in shown
    assert compare_script.main(both) == 0
    assert len(trained) == 9
    alone = [*arguments, "gpt2", "--seeds", "0", "1", "2"]  # a seed that the other one has not
    assert compare_script.main(alone) == 0
    assert trained[9:] == [(2, 1e-2)]
    assert (out / "table.md").read_text().startswith("|  | gpt2 | held-out text |")
    capsys.readouterr()
    assert compare_script.main([*both, "--steps", "5"]) == 1
    assert "has another config or text; give another --out" in capsys.readouterr().err
    one, other, *_ = sorted((out / "runs").glob("*.json"))
    one.write_bytes(other.read_bytes())
    assert compare_script.main(both) == 1
    assert "is another run than gpt2, peak lr 0.01, seed 0" in capsys.readouterr().err
    one.write_text("[]")
    assert compare_script.main(both) == 1
    assert "not written by this program, or damaged" in capsys.readouterr().err
    (out / "about.json").write_text("[]")
    assert compare_script.main(both) == 1
    assert "about.json: not written by this program, or damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lrs", "optimum", "tried"),
    [
        ([2.0, 4.0, 8.0], 4.0, [2, 4, 8]),
        ([4.0, 8.0], 1.0, [4, 8, 2, 1, 0.5]),
        ([1.0, 2.0], 8.0, [1, 2, 4, 8, 16]),
        ([4.0], 1.0, [4]),
    ],
)
def test_the_search_ends_when_both_neighbouring_rates_are_worse(lrs, optimum, tried):
    class Fake:
        def run(self, kind, make, lr, seed, bars):
            return {"lr": lr, "diverged": lr > 8, "loss": abs(math.log(lr / optimum))}

    runs = search_lr(Fake(), "a model", gpt2, lrs, 0, None)
    assert [run["lr"] for run in runs] == tried
    assert best_lr("a model", runs) == (optimum if len(lrs) > 1 else 4.0)


def test_gaps_and_rates_match_the_runs(tmp_path, text, spike_fed):
    out = tmp_path / "compare"
    arguments = ["--config", str(spike_fed(steps=3)), "--data", str(text), "--out", str(out), "--seeds", "0", "1"]
    assert compare_script.main([*arguments, "--models", "spike-fed", "spiking-values", "dense-twin", "published"]) == 0
    shown, loss = (out / "table.md").read_text(), {(run["kind"], run["seed"]): run["loss"] for run in runs_in(out)}
    ratios = [loss["spike-fed", seed] / loss["dense-twin", seed] - 1 for seed in (0, 1)]
    assert f"- spike-fed against dense-twin: {spread(ratios, '{:+.1%}'.format)} bits per byte" in shown
    differences = [loss["spiking-values", seed] - loss["published", seed] for seed in (0, 1)]
    assert f"{spread(differences, '{:+.3f}'.format)} nats per token" in shown
    assert "against gpt2" not in shown
    for head in ("| layer | spike-fed |", "| layer | spiking-values |", "| layer | published |"):
        assert head in shown
    (first, *_) = (run for run in runs_in(out) if run["kind"] == "spiking-values")
    assert "blocks.0.resonance.lif_v" in first["firing_rates"]


def test_a_diverging_rate_is_reported_and_not_selected(tmp_path, text, spike_fed):
    config = spike_fed(steps=3, max_grad_norm=1e30)
    arguments = ["--config", str(config), "--data", str(text), "--out", str(tmp_path / "out")]
    arguments += ["--models", "spike-fed", "--seeds", "0", "--lrs", "1e-9", "1e30", "1e-3"]
    assert compare_script.main(arguments) == 0
    shown = (tmp_path / "out" / "table.md").read_text()
    assert "| peak learning rate | 0.001 |" in shown
    assert "diverged: spike-fed, peak lr 1e+30, seed 0" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compile": True}, "without compile and gradient_checkpointing"),
        ({"max_position_embeddings": 1000}, "tokens, expected at least two: give longer documents"),
        (
            {"lr": 1e30, "max_grad_norm": 1e30},
            "spike-fed diverged with every peak learning rate: give lower ones with --lrs",
        ),
        ({"block": "published"}, "expected a config with block: spike_fed in its section model"),
    ],
)
def test_bad_input_raises_one_sentence(tmp_path, text, capsys, change, message):
    if "max_position_embeddings" in change:
        shutil.copy(text, tmp_path / "longer.jsonl")
        change["block_size"] = 1000
        text.write_text("".join(json.dumps({"text": make_text(300 if s else 9000, s)}) + "\n" for s in range(20)))
    config = write_config(tmp_path, **({"block": "spike_fed"} | change))
    arguments = ["--config", str(config), "--data", str(text), "--out", str(tmp_path / "out"), "--seeds", "0"]
    assert (
        compare_script.main([*arguments, "--models", *(["published"] if "block" in change else []), "spike-fed"]) == 1
    )
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out" / "runs").glob("*lr0.0*.json"))  # before anything was trained


def test_two_commands_can_write_the_same_file(tmp_path):
    two_processes(
        f"""
import pathlib, sys
sys.path.insert(0, {str(EXAMPLE)!r})
from nordlm.training.checkpoints import write_text
for _ in range(300):
    write_text(pathlib.Path(sys.argv[2]) / "about.json", sys.argv[1] * 100_000)
""",
        tmp_path,
    )
    assert (tmp_path / "about.json").read_text() in ("0" * 100_000, "1" * 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["about.json"]


# --- samples


def test_repetition_counts_repeated_text():
    assert repetition(torch.arange(12)[None]) == 0
    assert repetition(torch.tensor([[1, 2, 3, 4] * 3])) == pytest.approx(5 / 9)  # 9 of them, of which 4 differ
    assert repetition(torch.zeros(1, 12)) == pytest.approx(8 / 9)
    assert repetition(torch.stack((torch.arange(12), torch.zeros(12)))) == pytest.approx(4 / 9)


def test_coherence_is_high_for_the_same_topic_low_for_another_and_half_by_chance():
    remainders = [" ".join(WORDS[i : i + 4] * 5) for i in range(0, 12, 4)]
    own = [" ".join(WORDS[i : i + 4]) for i in range(0, 12, 4)]
    assert coherence(own, remainders) == 1
    assert coherence([*own[1:], own[0]], remainders) == 0.25  # beside one of two others the own document is as far
    assert coherence(["nothing of it"] * 3, remainders) == 0.5
    assert coherence([own[0]] * 3, remainders) == 0.5  # always the same: nearer for one, and farther for the others


def test_prompts_are_beginnings_of_texts_and_samples_continue_them(tokenizer):
    texts = [make_text(300, seed) for seed in range(4)] + ["short"]
    prompts = cut_prompts(texts, tokenizer, 24)
    assert prompts.ids.shape == (4, 6)
    assert prompts.written.shape == (4, 12)
    for text, ids, written, rest in zip(texts, prompts.ids, prompts.written, prompts.remainders, strict=False):
        assert tokenizer.decode(ids) + tokenizer.decode(written) + rest == text
    with pytest.raises(DataError, match="1 of 2 documents have 42 tokens, expected at least two: give longer"):
        cut_prompts(texts[3:], tokenizer, 24)


@pytest.mark.parametrize("make", [nord, gpt2])
def test_samples_are_as_long_as_the_text_and_reproducible_by_seed(tokenizer, tmp_path, make):
    torch.manual_seed(0)
    model = make(read_config(str(write_config(tmp_path))), tokenizer).eval()
    prompts = cut_prompts([make_text(300, seed) for seed in range(4)], tokenizer, 24)
    written = generate_samples(model, prompts, tokenizer.eos_token_id, 1)
    assert written.shape == prompts.written.shape
    assert not (written == tokenizer.eos_token_id).any()
    assert torch.equal(written, generate_samples(model, prompts, tokenizer.eos_token_id, 1))
    assert not torch.equal(written, generate_samples(model, prompts, tokenizer.eos_token_id, 2))


@pytest.mark.parametrize("name", ["default", "books-tiny", "books-small"])
def test_the_page_matches_the_stored_runs(name):
    page = (DOCS / "results.md").read_text(encoding="utf-8").splitlines()
    found = comparison_of(name)
    assert all(len(runs) == len(SEEDS) for runs in found.runs.values())
    for lines in (comparison_table(found), *rate_tables(found)):
        assert set(markdown_table(lines).splitlines()) <= set(page)
    assert {f"- {sentence}" for sentence in gaps(found)} <= set(page)


SEEDS = [0, 1, 2]


def comparison_of(name):
    """Load the comparison from the runs stored in ``docs/runs``."""
    runs = [json.loads(line) for line in (DOCS / "runs" / f"{name}.jsonl").read_text().splitlines()]
    found = Comparison(SimpleNamespace(metadata=json.loads((DOCS / "runs" / f"{name}.about.json").read_text())), SEEDS)
    for kind in MODEL_MAKERS:
        own = [run for run in runs if run["kind"] == kind]
        tried = [run for run in own if run["seed"] == SEEDS[0]]
        if tried:
            chosen = best_lr(kind, tried)
            found.add(kind, chosen, {run["seed"]: run for run in own if run["lr"] == chosen}, tried)
    return found
