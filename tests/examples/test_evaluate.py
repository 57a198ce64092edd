"""Tests of evaluate.py: every token is scored once with the documented context; bad input gives one sentence."""

import json
import math
import os
import shutil
from pathlib import Path

import evaluate as evaluate_script
import pytest
import torch
import yaml
from helpers import make_text
from hypothesis import given
from hypothesis import strategies as st
from nordlm.analysis.perplexity import score, windows
from safetensors.torch import load_file, save_file

from nord_snn.models.nord import NordConfig, NordForCausalLM

SMALL = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 12, "n_clusters": 4, "recency": True,
}  # fmt: skip


@given(n=st.integers(0, 200), context=st.integers(1, 30), data=st.data())
def test_windows_score_every_token_once_with_enough_context(n, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for window in windows(n, context, stride):
        assert 0 <= window.begin < window.end <= n
        assert window.end - window.begin <= context
        scored_here = range(window.end - window.scored, window.end)
        if scored:
            positions_before = scored_here.start - window.begin
            assert positions_before >= min(context - stride, scored_here.start)
        scored.extend(scored_here)
    assert scored == list(range(n))


@pytest.mark.parametrize(("context", "stride"), [(12, 12), (12, 5), (7, 1), (1, 1)])
@pytest.mark.parametrize("n", [2, 12, 13, 40])
def test_the_score_is_the_sum_over_single_tokens(context, stride, n):
    torch.manual_seed(0)
    model = NordForCausalLM(NordConfig(**SMALL)).eval()
    tokens = torch.randint(30, (n,))
    expected, done = 0.0, 0
    for window in windows(n - 1, context, stride):
        for target in range(done + 1, window.end + 1):
            logits = model(input_ids=tokens[None, window.begin : target]).logits[0, -1]
            expected -= logits.log_softmax(-1)[tokens[target]].item()
        done = window.end
    for batch_size in (1, 3):
        assert score(model, tokens, context, stride, batch_size) == pytest.approx(expected, rel=1e-5)


def test_the_command_writes_consistent_measures_and_obeys_its_options(trained, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(make_text(2000, seed=3))
    arguments = [str(tmp_path / "text.txt"), "--model", str(trained / "model"), "--json", str(tmp_path / "out.json")]
    assert evaluate_script.main(arguments) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["context"] == 24
    assert results["stride"] == 12
    assert results["bytes"] == len(make_text(2000, seed=3))
    assert results["perplexity"] == pytest.approx(math.exp(results["nats_per_token"]))
    bits = results["nats_per_token"] * results["tokens"] / results["bytes"] / math.log(2)
    assert results["bits_per_byte"] == pytest.approx(bits)
    out = capsys.readouterr().out
    assert "bits per byte" in out
    assert "input_lif" in out
    assert evaluate_script.main([*arguments, "--stride", "24"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["nats_per_token"] != results["nats_per_token"]
    assert evaluate_script.main([*arguments, "--max-tokens", "50"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["tokens"] < results["tokens"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--stride", "25"], "--stride must be at most the context of 24, got 25"),
        (["--context", "30"], "--context must be at most 24"),
        (["--json", "nowhere/out.json"], "expected a file in a folder that exists"),
        (["none.txt"], "no such file or folder"),
        (["--model", "none"], "expected a folder with config.json, model.safetensors and a tokenizer"),
    ],
)
def test_bad_input_raises(trained, tmp_path, capsys, change, message):
    (tmp_path / "text.txt").write_text(make_text(100))
    text = [] if change[0] == "none.txt" else [str(tmp_path / "text.txt")]
    model = [] if change[0] == "--model" else ["--model", str(trained / "model")]
    assert evaluate_script.main([*text, *model, *change]) == 1
    assert message in capsys.readouterr().err


def test_lm_evaluation_harness_gives_the_same_score(trained, tmp_path, monkeypatch):
    """Bits per byte differ by up to 2 %: the harness scores documents separately, without end-of-text tokens."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (pip install lm-eval) is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    texts = [make_text(600, seed=seed) for seed in range(2)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "task": "local_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "text.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "local_text.yaml").write_text(yaml.safe_dump(task))
    evaluation = simple_evaluate(
        model="hf",
        model_args=f"pretrained={trained / 'model'},trust_remote_code=True",
        tasks=["local_text"],
        device="cpu",
        batch_size=1,
        task_manager=TaskManager(include_path=str(tmp_path)),
    )
    expected = evaluation["results"]["local_text"]["bits_per_byte,none"]
    arguments = ["--model", str(trained / "model"), "--stride", "24", "--json", str(tmp_path / "out.json")]
    assert evaluate_script.main([str(tmp_path / "text.jsonl"), *arguments]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["bits_per_byte"] == pytest.approx(expected, rel=0.02)


def test_the_json_option_overwrites_only_earlier_results(trained, tmp_path, capsys):
    """A link to a file is followed; the evaluated text, a device, a pipe, a folder and a link to itself raise."""
    text = tmp_path / "text.txt"
    text.write_text(make_text(500))

    def evaluate(json_path: object) -> int:
        return evaluate_script.main([str(text), "--model", str(trained / "model"), "--json", str(json_path)])

    (tmp_path / "link.json").symlink_to("real.json")
    for _ in range(2):
        assert evaluate(tmp_path / "link.json") == 0
    assert (tmp_path / "link.json").is_symlink()
    assert "nats_per_token" in json.loads((tmp_path / "real.json").read_text())
    capsys.readouterr()

    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "circle.json").symlink_to("circle.json")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "to_text.json").symlink_to(text)
    os.link(text, tmp_path / "same.json")
    before = text.read_text()
    for path in (
        text,
        "/dev/null",
        tmp_path,
        *(tmp_path / f"{n}.json" for n in ("pipe", "list", "to_text", "same")),
    ):
        assert evaluate(path) == 1
        assert capsys.readouterr().err.startswith(f"error: --json {path}: expected a new")
    with pytest.raises(SystemExit, match="2"):
        evaluate(tmp_path / "circle.json")
    assert "is a link that leads to itself" in capsys.readouterr().err
    assert text.read_text() == before
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "list.json").read_text() == "[1]"
    with pytest.raises(SystemExit, match="2"):
        evaluate(tmp_path / ("long" * 80))
    assert "expected a shorter name" in capsys.readouterr().err


def test_a_model_with_a_nan_weight_gives_one_sentence(trained, tmp_path, capsys):
    shutil.copytree(trained / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text(make_text(500))
    arguments = [str(tmp_path / "text.txt"), "--model", str(tmp_path / "model"), "--json", str(tmp_path / "out.json")]
    assert evaluate_script.main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out.json").exists()
