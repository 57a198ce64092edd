"""Tests of examples/online_learning: conditions, statistics and output files."""

import ast
import json
import shutil

import online_learning as script
import pytest
import torch
from helpers import fire_easily, make_text
from nordlm.inference.loading import open_model
from online_learning import Outcome, compare, helps, interval, percent_old


@pytest.fixture
def models(trained, tmp_path):
    """Return the folders of two models whose neurons fire, and the folder of a new text, ``new.txt``."""
    folders = []
    for name in ("a", "b"):
        run = shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*"))
        model, _ = open_model(run / "model")
        fire_easily(model)
        model.save_pretrained(run / "model")
        folders.append(run / "model")
    (tmp_path / "new.txt").write_text(make_text(6000, seed=5)[::-1])
    return folders, tmp_path


def arguments(models, *more):
    """Return a command line that reads 480 tokens of the new text."""
    folders, path = models
    paths = ["--models", *map(str, folders), "--text", str(path / "new.txt"), "--out", str(path / "out")]
    return [*paths, "--read", "480", "--measure", "240", *more]


def test_the_script_runs_every_condition_and_writes_tables_json_and_plot(models, capsys):
    assert script.main(arguments(models, "--rate", "0.01")) == 0
    printed = capsys.readouterr().out
    assert "on - shuffled" in printed
    assert "reading once" in printed
    results = json.loads((models[1] / "out" / "results.json").read_text())
    assert set(results) == {"on", "off", "shuffled", "zero", "tokens", "steps"}
    for outcomes_by_seed in results.values():
        assert len(outcomes_by_seed) == 2
        assert len(outcomes_by_seed[0]["windows"]) == 480 // 24
    for seed in range(2):
        off, zero, on = (results[name][seed] for name in ("off", "zero", "on"))
        assert zero["windows"] == pytest.approx(off["windows"], abs=1e-5)
        assert zero["old"] == off["old"]
        # the first window is predicted before anything is learned
        assert on["windows"][0] == pytest.approx(off["windows"][0], abs=1e-5)
        assert on["windows"][1:] != pytest.approx(off["windows"][1:], abs=1e-5)
        assert sum(on["windows"]) < sum(off["windows"])
    plot = models[1] / "out" / "online_learning.png"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_condition_restores_the_weights(models):
    model, tokenizer = open_model(models[0][0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = script.read_texts(script.parse(arguments(models)), models[0][0], 24, tokenizer)
    assert texts.new.shape == (20, 24)
    script.read_once(model, texts, "on", (None, 0.01, "error"), 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_search_tries_every_setting_and_writes_its_results(models, capsys, monkeypatch):
    monkeypatch.setattr(script, "SEARCHED", ((("lm_head",), 0.01, "error"), (("blocks.*.ffn.down",), 0.01, "loss")))
    assert script.main(arguments(models, "--search")) == 0
    rows = json.loads((models[1] / "out" / "search.json").read_text())
    assert [row[0] for row in rows] == ["lm_head, error", "blocks.*.ffn.down, loss"]
    assert "paired differences over 2 seeds" in capsys.readouterr().out


def test_the_control_conditions_only_permute_or_remove_spikes_and_rewards():
    spikes = (torch.rand(5, 7, 3) < 0.5).float()
    tokens, steps = (script.changes_of(name).spikes(spikes) for name in ("tokens", "steps"))
    assert not torch.equal(tokens, spikes)
    assert not torch.equal(steps, spikes)
    by_token = lambda x: sorted(x.transpose(0, 1).flatten(1).tolist())  # noqa: E731
    assert by_token(tokens) == by_token(spikes)
    assert torch.equal(steps.sum(0), spikes.sum(0))
    for token in range(7):  # whole time steps are permuted
        assert sorted(steps[:, token].tolist()) == sorted(spikes[:, token].tolist())
    rewards = torch.arange(9.0)
    assert sorted(script.changes_of("shuffled").rewards(rewards).tolist()) == rewards.tolist()
    assert script.changes_of("zero").rewards(rewards).abs().sum() == 0
    assert script.changes_of("on").spikes(spikes) is spikes


def outcomes(on, off, shuffled, old_on=4.0):
    """Return outcomes with these losses while reading, by condition; the loss on old text is 4.0, for "on" ``old_on``."""
    return {
        name: [Outcome([loss], loss, old) for loss in losses]
        for name, losses, old in (("on", on, old_on), ("off", off, 4.0), ("shuffled", shuffled, 4.0))
    }


def test_differences_are_paired_by_seed_with_student_t_intervals():
    losses = outcomes([5.0, 6.0, 7.0], [5.1, 6.3, 7.2], [5.0, 6.0, 7.0])
    mean, half = compare(losses, "while_reading", "off")
    assert mean == pytest.approx(-0.2)
    assert half == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t for 2 degrees of freedom
    assert interval([1.0, 1.0]).half == 0
    assert percent_old(outcomes([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], old_on=4.1)).mean == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (outcomes([5.0, 6.0, 7.0], [5.1, 6.11, 7.1], [5.1, 6.1, 7.11]), True),
        (outcomes([5.0, 6.0, 7.0], [5.1, 6.11, 7.1], [5.0, 6.0, 7.0]), False),  # no better than shuffled rewards
        (outcomes([5.0, 6.0, 7.0], [5.1, 5.9, 7.2], [5.1, 6.1, 7.11]), False),  # not significant
        (outcomes([5.0, 6.0, 7.0], [5.1, 6.11, 7.1], [5.1, 6.1, 7.11], old_on=4.05), False),  # worse on old text
    ],
)
def test_helps_needs_significantly_less_loss_than_every_control_and_no_more_on_old_text(losses, expected):
    assert helps(losses) is expected


def test_the_default_text_is_code_without_docstrings():
    module = next(text for text in script.source_code() if "class ArgumentParser" in text)
    tree = ast.parse(module)
    assert ast.get_docstring(tree) is None
    assert not any(ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def test_impossible_options_raise_one_sentence(models, capsys, tmp_path):
    def sentence(*command_line):
        assert script.main(list(command_line)) == 1
        return capsys.readouterr().err

    assert "expected 999,999,999 to read" in sentence(*arguments(models, "--read", "999999999"))
    assert "at least one sequence of 24" in sentence(*arguments(models, "--read", "20"))
    assert "no synapse that can learn" in sentence(*arguments(models, "--synapses", "blocks.0.ffn.up"))
    assert "expected a folder with config.json, model.safetensors and a tokenizer" in sentence(
        "--models", str(tmp_path / "none"), "--out", str(tmp_path / "out")
    )
    alone = shutil.copytree(models[0][0], tmp_path / "alone" / "model")
    assert "give the old text with --old" in sentence(
        "--models", str(alone), *arguments(models)[3:], "--models", str(alone), "--read", "96"
    )
