"""Tests of studies/language_model/compare.py: sizes of the models, search for learning rates, tables, measures of samples."""

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
def _reset_accelerator():
    """Reset the process-wide state of accelerate."""
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
    """Return a function that writes a config with spike-fed blocks."""

    def write(**changes):
        return write_config(tmp_path, block="spike_fed", refractory_steps=0, **changes)

    return write


def test_all_models_have_similar_numbers_of_parameters(tokenizer, spike_fed):
    tied = {"tie_word_embeddings": True, "top_k": 3}
    for config in ("tiny", "small", str(spike_fed()), str(spike_fed(name="tied", **tied))):
        settings = read_config(config)
        with torch.device("meta"):
            models = {kind: make(settings, tokenizer) for kind, make in MODEL_MAKERS.items()}
        counts = {kind: parameter_counts(model) for kind, model in models.items()}
        spike_fed_model = models["spike-fed"]
        # weights and threshold of one neuron of the feed-forward
        parameters_per_neuron = 2 * spike_fed_model.config.hidden_size + 1
        difference = counts["spike-fed"][1] - counts["gpt2"][1]
        assert abs(difference) <= parameters_per_neuron * spike_fed_model.config.num_hidden_layers / 2
        for kind, model in models.items():
            with_vocabulary, without = counts[kind]
            assert model.config.hidden_size == spike_fed_model.config.hidden_size
            assert model.config.num_hidden_layers == spike_fed_model.config.num_hidden_layers
            tables = 1 if spike_fed_model.config.tie_word_embeddings else 2
            assert (
                with_vocabulary - without
                == tables * spike_fed_model.config.vocab_size * spike_fed_model.config.hidden_size
            )
            assert getattr(model.config, "top_k", None) in (spike_fed_model.config.top_k, None)
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


def test_a_run_has_the_same_loss_as_with_train_py(tmp_path, text, spike_fed):
    """The loss is that on the held-out text."""
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
    """Return the runs that the script has stored in its output folder."""
    return [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))]


def test_the_command_resumes_selects_by_held_out_loss_and_refuses_changed_files(
    tmp_path, text, capsys, monkeypatch, spike_fed
):
    out = tmp_path / "compare"
    arguments = ["--config", str(spike_fed(steps=4)), "--data", str(text), "--out", str(out)]
    arguments += ["--seeds", "0", "1", "--lrs", "1e-6", "1e-2", "--models"]
    train_one, trained = trials.train_one, []

    def count_and_stop_at_the_fifth(settings, *arguments):
        lr = settings.training.lr
        trained.append((settings.training.seed, lr))
        if len(trained) == 5:
            raise KeyboardInterrupt
        return train_one(settings, *arguments) | {"loss": 2 + abs(math.log(lr / 1e-2))}

    monkeypatch.setattr(trials, "train_one", count_and_stop_at_the_fifth)
    both = [*arguments, "spike-fed", "gpt2"]
    assert compare_script.main(both) == 130
    assert "continues with the missing runs" in capsys.readouterr().err
    assert compare_script.main(both) == 0
    expected = [(0, 1e-6), (0, 1e-2), (0, 2e-2), (1, 1e-2)]  # 2e-2 is tried as 1e-2, the highest given, is the best
    assert trained == [*expected, (0, 1e-6), *expected]
    for run in runs_in(out):
        assert bool(run["firing_rates"]) == (run["kind"] == "spike-fed")
        assert bool(run["acs"]) <= (run["kind"] == "spike-fed")
        assert run["joules"] < run["joules_with_sram"]
    table = (out / "table.md").read_text()
    assert table.startswith("|  | spike-fed | gpt2 | held-out text |")
    assert "| peak learning rate | 0.01 | 0.01 |  |" in table
    assert "bigram, interpolated" in table
    assert "compare.py --config" in table
    assert "tried at seed 0: spike-fed 1e-06, 0.01, 0.02; gpt2 1e-06, 0.01, 0.02; diverged: none" in table
    assert compare_script.main(both) == 0
    assert len(trained) == 9
    alone = [*arguments, "gpt2", "--seeds", "0", "1", "2"]  # seed 2 was not trained before
    assert compare_script.main(alone) == 0
    assert trained[9:] == [(2, 1e-2)]
    assert (out / "table.md").read_text().startswith("|  | gpt2 | held-out text |")
    capsys.readouterr()
    assert compare_script.main([*both, "--steps", "5"]) == 1
    assert "has another config or text; give another --out" in capsys.readouterr().err
    first, second, *_ = sorted((out / "runs").glob("*.json"))
    first.write_bytes(second.read_bytes())
    assert compare_script.main(both) == 1
    assert "is another run than gpt2, peak lr 0.01, seed 0" in capsys.readouterr().err
    first.write_text("[]")
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
    class FakeTrials:
        def run(self, kind, make, lr, seed, bars):
            return {"lr": lr, "diverged": lr > 8, "loss": abs(math.log(lr / optimum))}

    runs = search_lr(FakeTrials(), "a model", gpt2, lrs, 0, None)
    assert [run["lr"] for run in runs] == tried
    assert best_lr("a model", runs) == (optimum if len(lrs) > 1 else 4.0)


def test_the_printed_gaps_and_firing_rates_match_the_runs(tmp_path, text, spike_fed):
    out = tmp_path / "compare"
    arguments = ["--config", str(spike_fed(steps=3)), "--data", str(text), "--out", str(out), "--seeds", "0", "1"]
    assert compare_script.main([*arguments, "--models", "spike-fed", "spiking-values", "dense-twin", "published"]) == 0
    table, loss = (out / "table.md").read_text(), {(run["kind"], run["seed"]): run["loss"] for run in runs_in(out)}
    ratios = [loss["spike-fed", seed] / loss["dense-twin", seed] - 1 for seed in (0, 1)]
    assert f"- spike-fed against dense-twin: {spread(ratios, '{:+.1%}'.format)} bits per byte" in table
    differences = [loss["spiking-values", seed] - loss["published", seed] for seed in (0, 1)]
    assert f"{spread(differences, '{:+.3f}'.format)} nats per token" in table
    assert "against gpt2" not in table
    for head in ("| layer | spike-fed |", "| layer | spiking-values |", "| layer | published |"):
        assert head in table
    (first, *_) = (run for run in runs_in(out) if run["kind"] == "spiking-values")
    assert "blocks.0.resonance.lif_v" in first["firing_rates"]


def test_a_diverging_rate_is_reported_and_not_selected(tmp_path, text, spike_fed):
    config = spike_fed(steps=3, max_grad_norm=1e30)
    arguments = ["--config", str(config), "--data", str(text), "--out", str(tmp_path / "out")]
    arguments += ["--models", "spike-fed", "--seeds", "0", "--lrs", "1e-9", "1e30", "1e-3"]
    assert compare_script.main(arguments) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| peak learning rate | 0.001 |" in table
    assert "diverged: spike-fed, peak lr 1e+30, seed 0" in table


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


def test_two_processes_that_write_the_same_file_leave_it_whole(tmp_path):
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


def test_repetition_is_the_fraction_of_repeated_4_grams():
    assert repetition(torch.arange(12)[None]) == 0
    repeated = torch.tensor([[1, 2, 3, 4] * 3])  # 9 sequences of 4 tokens, 4 of them different
    assert repetition(repeated) == pytest.approx(5 / 9)
    assert repetition(torch.zeros(1, 12)) == pytest.approx(8 / 9)
    assert repetition(torch.stack((torch.arange(12), torch.zeros(12)))) == pytest.approx(4 / 9)


def test_coherence_is_1_for_the_right_topic_lower_for_another_and_one_half_by_chance():
    remainders = [" ".join(WORDS[i : i + 4] * 5) for i in range(0, 12, 4)]
    own = [" ".join(WORDS[i : i + 4]) for i in range(0, 12, 4)]
    assert coherence(own, remainders) == 1
    # a sample about another document is equally far from the right document and from one of the two wrong ones
    assert coherence([*own[1:], own[0]], remainders) == 0.25
    assert coherence(["nothing of it"] * 3, remainders) == 0.5
    assert coherence([own[0]] * 3, remainders) == 0.5  # the same sample for all: right for one, wrong for the rest


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
def test_results_md_matches_the_stored_runs(name):
    page = (DOCS / "results.md").read_text(encoding="utf-8").splitlines()
    comparison = comparison_of(name)
    assert all(len(runs) == len(SEEDS) for runs in comparison.runs.values())
    for lines in (comparison_table(comparison), *rate_tables(comparison)):
        assert set(markdown_table(lines).splitlines()) <= set(page)
    assert {f"- {sentence}" for sentence in gaps(comparison)} <= set(page)


SEEDS = [0, 1, 2]


def comparison_of(name):
    """Load the comparison from the runs stored in ``docs/runs``."""
    runs = [json.loads(line) for line in (DOCS / "runs" / f"{name}.jsonl").read_text().splitlines()]
    comparison = Comparison(
        SimpleNamespace(metadata=json.loads((DOCS / "runs" / f"{name}.about.json").read_text())), SEEDS
    )
    for kind in MODEL_MAKERS:
        own = [run for run in runs if run["kind"] == kind]
        tried = [run for run in own if run["seed"] == SEEDS[0]]
        if tried:
            chosen = best_lr(kind, tried)
            comparison.add(kind, chosen, {run["seed"]: run for run in own if run["lr"] == chosen}, tried)
    return comparison
