"""Tests of train.py: files of a run, resuming with the same weights, and errors for bad input."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train as train_script
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from helpers import make_text, write_config
from nordlm import files
from nordlm.data import corpus as corpus_module
from nordlm.data import sources
from nordlm.data.tokenizer import train_tokenizer
from nordlm.errors import DataError
from nordlm.training import checkpoints, loop
from nordlm.training.checkpoints import CheckpointError, latest_checkpoint, write_folder, write_json
from nordlm.training.progress import TrainingProgress
from nordlm.training.settings import Settings, SettingsError, read_config
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nord_snn.models.nord import NordForCausalLM

TRAIN = Path(train_script.__file__)


@pytest.fixture(autouse=True)
def _reset_accelerator():
    """Reset the process-wide state of accelerate, which would fix the precision of the first test."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def text(tmp_path) -> Path:
    """Write a text file to train on."""
    path = tmp_path / "text.txt"
    path.write_text(make_text())
    return path


def run(tmp_path, text, *arguments, config=None, out="runs") -> int:
    """Train on the text, without a report; return the exit status."""
    config = config or write_config(tmp_path)
    where = ["--config", str(config), "--data", str(text), "--out", str(tmp_path / out), "--no-report"]
    return train_script.main([*where, *arguments])


def resume(run_folder) -> int:
    """Resume the run in a folder; return the exit status."""
    return train_script.main(["--resume", str(run_folder), "--no-report"])


# --- a finished run


@pytest.mark.quick
def test_results_have_the_documented_keys(trained):
    results = json.loads((trained / "results.json").read_text())
    assert {
        "validation_loss",
        "unigram_loss",
        "bigram_loss",
        "bits_per_byte",
        "firing_rates",
        "tokens_per_second",
        "seconds",
        "peak_memory_mb",
    } <= results.keys()
    assert results["tokens"] == 12 * 4 * 2 * 24
    assert len(results["firing_rates"]) == 6
    assert results["validation_loss"] < results["uniform_loss"]
    assert results["steps"] == 12


@pytest.mark.quick
def test_the_run_folder_is_complete_without_partial_files(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"settings.yaml", "tokenizer", "model", "results.json", "run.json", "tensorboard"} <= names
    assert {name for name in names if name.startswith("checkpoint")} == {"checkpoint-000008", "checkpoint-000012"}
    assert not [name for name in names if name.startswith(".")]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.name for p in (trained / "model").iterdir()}
    assert list((trained / "tensorboard").rglob("events.*"))


def test_two_runs_use_different_folders(tmp_path, text):
    assert run(tmp_path, text, "--steps", "1") == 0
    assert run(tmp_path, text, "--steps", "1") == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["test-0001", "test-0002"]


def test_the_option_no_resonance_trains_without_resonance_and_prints_baselines(tmp_path, text, capsys):
    assert run(tmp_path, text, "--no-resonance", "--steps", "2") == 0
    results = json.loads((tmp_path / "runs" / "test-no-resonance-0001" / "results.json").read_text())
    assert results["resonance"] is False
    assert not any("resonance" in name for name in results["firing_rates"])
    out = capsys.readouterr().out
    assert "continuation by the model:" in out
    for row in ("uniform", "unigram", "bigram, interpolated", "this model"):
        assert row in out


def test_the_model_card_describes_the_model(trained):
    card = (trained / "model" / "README.md").read_text()
    results = json.loads((trained / "results.json").read_text())
    assert card.startswith("---\n")
    assert "library_name: transformers" in card
    for fact in (
        f"| held-out loss, nats per token | {results['validation_loss']:.4f} |",
        f"| held-out bits per byte | {results['bits_per_byte']:.4f} |",
        f"| tokens in training, with repetitions | {results['tokens']:,} |",
        f"| held-out loss of a bigram model, nats per token | {results['bigram_loss']:.4f} |",
        f"| parameters | {results['parameters']:,} |",
        f"| input_lif | {results['firing_rates']['input_lif']:.2%} |",
        '"hidden_size": 16',
        "lr: 0.01",
    ):
        assert fact in card
    assert "without embedding and head" in card
    assert '"alpha"' not in card  # has the default of NordConfig()


def test_gradient_checkpointing_is_an_option_and_does_not_change_the_loss(tmp_path, text):
    assert run(tmp_path, text, "--steps", "2", "--gradient-checkpointing") == 0
    settings = yaml.safe_load((tmp_path / "runs" / "test-0001" / "settings.yaml").read_text())
    assert settings["training"]["gradient_checkpointing"] is True
    assert settings["training"]["compile"] is False
    assert run(tmp_path, text, "--steps", "2", "--no-gradient-checkpointing") == 0
    losses = [json.loads((tmp_path / "runs" / f"test-000{n}" / "results.json").read_text()) for n in (1, 2)]
    assert losses[0]["validation_loss"] == losses[1]["validation_loss"]


@pytest.mark.parametrize("name", sorted(path.stem for path in (TRAIN.parent / "nordlm" / "configs").glob("*.yaml")))
def test_a_config_is_found_by_name_and_in_its_earlier_folder(name):
    assert read_config(str(TRAIN.parent / "configs" / f"{name}.yaml")) == read_config(name)


def test_bf16_trains(tmp_path, text):
    """The losses are close to those of float32, but not equal."""
    losses = []
    for precision in ("bf16", "no"):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert run(tmp_path, text, "--mixed-precision", precision, "--no-report", out=precision) == 0
        losses.append(json.loads((tmp_path / precision / "test-0001" / "results.json").read_text())["validation_loss"])
    assert 0 < abs(losses[0] - losses[1]) < 0.05, losses


# --- resuming


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    """Load the weights of the finished model."""
    return load_file(run_folder / "model" / "model.safetensors")


def test_a_resumed_run_reaches_the_same_weights_bit_for_bit(tmp_path, text, monkeypatch, capsys):
    """SIGINT stops the run in a later epoch, after a training step whose batches are from two epochs."""
    config = write_config(tmp_path, steps=40, batch_size=8)
    assert run(tmp_path, text, config=config, out="whole") == 0
    update = TrainingProgress.update

    def interrupt(self, step, *rest):
        update(self, step, *rest)
        if step == 27:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "update", interrupt)
        assert run(tmp_path, text, config=config, out="parts") == loop.INTERRUPTED
    run_folder = tmp_path / "parts" / "test-0001"
    assert latest_checkpoint(run_folder).name == "checkpoint-000027"
    position = json.loads((run_folder / "checkpoint-000027" / "position.json").read_text())
    assert position["epoch"] > 0
    assert position["batches"] > 0
    batches = (286 // 8) if "286" in capsys.readouterr().out else 0  # 286 sequences of training
    assert batches % 2 == 1  # two batches a training step: one step has batches of two epochs
    assert resume(run_folder) == 0
    whole, resumed = weights(tmp_path / "whole" / "test-0001"), weights(run_folder)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    results = [
        json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "whole" / "test-0001", run_folder)
    ]
    assert results[0]["validation_loss"] == results[1]["validation_loss"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_repeatedly_killed_run_ends_with_the_same_weights(tmp_path, text, kills):
    """The run is killed at random moments of training or saving, and resumed each time."""
    config = write_config(tmp_path, steps=60 * kills, save_every=1, eval_every=10_000)
    run_folder, generator = tmp_path / "runs" / "test-0001", random.Random(0)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = ["--config", str(config), "--data", str(text), "--out", str(tmp_path / "runs")]
    for kill in range(kills):
        arguments = ["--resume", str(run_folder)] if kill else start
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), "--no-report", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        before, deadline = newest_step(run_folder), time.monotonic() + 120
        while newest_step(run_folder) < before + 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
        process.stderr.close()
        assert before + 2 <= newest_step(run_folder) < 60 * kills
        checkpoint = latest_checkpoint(run_folder)
        checkpoints.check_digests(checkpoint, checkpoints.read_json(checkpoint / "position.json")["digests"])
    # Both processes have the number of threads of the killed ones, as weights are compared bit for bit.
    for arguments in (["--resume", str(run_folder)], [*start[:-1], str(tmp_path / "whole")]):
        subprocess.run(
            [sys.executable, str(TRAIN), "--no-report", *arguments], env=environment, check=True, capture_output=True
        )
    expected = weights(tmp_path / "whole" / "test-0001")
    assert all(torch.equal(value, expected[name]) for name, value in weights(run_folder).items())


def newest_step(run: Path) -> int:
    """Return the training step of the newest checkpoint, or 0."""
    return max((checkpoints.checkpoint_step(path) for path in run.glob("checkpoint-*")), default=0)


def test_relative_paths_of_a_config_are_stored_as_absolute_paths(tmp_path, text, monkeypatch):
    config = write_config(tmp_path, steps=2, data="text.txt")
    monkeypatch.chdir(tmp_path)
    assert train_script.main(["--config", str(config), "--out", "runs", "--no-report"]) == 0
    monkeypatch.chdir(tmp_path / "runs")
    assert resume("test-0001") == 0


def test_a_stopped_run_prints_how_to_resume(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(TrainingProgress, "update", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert run(tmp_path, text) == loop.INTERRUPTED
    assert f"--resume {tmp_path / 'runs' / 'test-0001'}" in capsys.readouterr().out


# --- errors


def error_of(capsys, status: int) -> str:
    """Check that the exit status is 1 and that standard error has one sentence; return the sentence."""
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_resuming_the_run_of_another_model_raises(tmp_path, text, trained, capsys):
    wider = write_config(tmp_path, "wider", hidden_size=32)
    error = error_of(capsys, train_script.main(["--resume", str(trained), "--config", str(wider)]))
    assert "is a run of another model (hidden_size = 16, not 32)" in error
    assert "started with lr = 0.01" in error_of(capsys, train_script.main(["--resume", str(trained), "--lr", "0.5"]))
    assert "started with resonance" in error_of(capsys, train_script.main(["--resume", str(trained), "--no-resonance"]))
    assert "expected a run of train.py" in error_of(capsys, train_script.main(["--resume", str(tmp_path)]))


def test_a_checkpoint_of_another_shape_raises(tmp_path, text, capsys):
    run(tmp_path, text, "--steps", "4")
    run_folder = tmp_path / "runs" / "test-0001"
    checkpoint = latest_checkpoint(run_folder)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["norm.weight"] = torch.ones(3)
    save_file(tensors, checkpoint / "model.safetensors")
    position = json.loads((checkpoint / "position.json").read_text())
    position["digests"] = checkpoints.digests(checkpoint)
    del position["digests"]["position.json"], position["seal"]
    (checkpoint / "position.json").write_text(json.dumps(checkpoints.seal(position)))
    error = error_of(capsys, resume(run_folder))
    assert "does not fit this model" in error
    assert "norm.weight" in error


def test_resuming_with_changed_settings_raises(tmp_path, text, capsys):
    run(tmp_path, text, "--steps", "4")
    run_folder = tmp_path / "runs" / "test-0001"
    content = yaml.safe_load((run_folder / "settings.yaml").read_text())
    content["training"]["seed"] = 7
    (run_folder / "settings.yaml").write_text(yaml.safe_dump(content))
    assert "changed since the run started, or is damaged" in error_of(capsys, resume(run_folder))


def test_resuming_on_changed_text_raises(tmp_path, text, capsys):
    run(tmp_path, text, "--steps", "4")
    text.write_text(make_text(seed=1))
    error = error_of(capsys, train_script.main(["--resume", str(tmp_path / "runs" / "test-0001")]))
    assert "changed since the run started" in error


def test_a_damaged_checkpoint_raises(tmp_path, text, capsys):
    run(tmp_path, text, "--steps", "8")
    run_folder = tmp_path / "runs" / "test-0001"
    checkpoint = latest_checkpoint(run_folder)
    for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])  # one flipped bit
        error = error_of(capsys, resume(run_folder))
        assert (
            f"checkpoint-000008: damaged or incomplete ({name}); remove the folder to resume from checkpoint-000004"
            in error
        )
        (checkpoint / name).write_bytes(whole)
    for content in ("{}", "[]", '{"step": 5}', "{"):
        whole = (checkpoint / "position.json").read_text()
        (checkpoint / "position.json").write_text(content)
        assert "position.json" in error_of(capsys, resume(run_folder))
        (checkpoint / "position.json").write_text(whole)
    (run_folder / "tokenizer" / "tokenizer.json").write_text("{")
    assert "tokenizer: changed since the run started, or damaged (tokenizer.json)" in error_of(
        capsys, resume(run_folder)
    )
    (run_folder / "run.json").write_text("{}")
    assert "run.json: not written by train.py" in error_of(capsys, resume(run_folder))


def test_resuming_a_run_without_checkpoints_raises(tmp_path, text, capsys):
    run(tmp_path, text, "--steps", "4")
    run_folder = tmp_path / "runs" / "test-0001"
    for folder in run_folder.glob("checkpoint-*"):
        folder.rename(run_folder / f"gone-{folder.name}")
    assert "no checkpoint to resume from" in error_of(capsys, resume(run_folder))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "huge"], "expected one of base, nord-144m, small, tiny, tiny-published, or a file"),
        (["--block-size", "100"], "block_size 100 is longer than the model's max_position_embeddings of 24"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--lr", "-1"], "lr must be positive, got -1.0"),
        (["--lr", "nan"], "lr must be positive, got nan"),
        (["--beta2", "1"], "beta2 must be at least 0 and less than 1"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--warmup-steps", "-5"], "warmup_steps must be at least 0"),
        (["--min-lr-ratio", "2"], "min_lr_ratio must be from 0 to 1"),
        (["--held-out", "1.0"], "held_out must be at least 0 and less than 1"),
        (["--tokenizer", "nowhere"], "tokenizer 'nowhere' cannot be loaded"),
        (["--data", ""], "the name of the text is empty"),
        (["--validation-data", ""], "the name of the text is empty"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["--batch-size", "10000"], "less than one batch of 10000"),
    ],
)
def test_bad_arguments_raise_one_sentence(tmp_path, text, capsys, arguments, message):
    assert message in error_of(capsys, run(tmp_path, text, *arguments))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "model: {hidden_size: 18}",
            "model: the width D must be a multiple of the number of heads H (num_attention_heads), got D = 18 and H = 8",
        ),
        ("model: {hidden_size: wide}", "hidden_size"),
        ("name: ../../evil", "name must be made of letters"),
        ("training: {1: 2}", "training has no field 1"),
        ("model: {hidden: 16}", "model has no field hidden"),
        ("training: {learning_rate: 1}", "training has no field learning_rate"),
        ("training: {lr: fast}", "training.lr must be float, got 'fast'"),
        ("training: {steps: 1.5}", "training.steps must be int, got 1.5"),
        ("model: [1]", "expected a mapping in the section model"),
        ("other: {}", "expected the sections model and training"),
        ("{", "expected YAML"),
    ],
)
def test_bad_configs_raise_one_sentence(tmp_path, text, capsys, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    assert message in error_of(capsys, run(tmp_path, text, config=tmp_path / "bad.yaml"))


def test_a_vocabulary_that_does_not_match_the_tokenizer_raises(tmp_path, text, trained, capsys):
    small = write_config(tmp_path, vocab_size=260)
    error = error_of(capsys, run(tmp_path, text, "--tokenizer", str(trained / "tokenizer"), config=small))
    assert "the tokenizer has 300 tokens and the model only 260" in error


def test_a_nan_loss_stops_the_run_with_one_sentence(tmp_path, text, capsys, monkeypatch):
    take_step = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda *args: (math.nan, take_step(*args)[1]))
    assert "the loss became nan at step 1" in error_of(capsys, run(tmp_path, text))


# --- files


def test_a_full_disk_is_reported_and_training_continues(tmp_path, text, capsys, monkeypatch):
    """The disk is full at the second checkpoint; the first is not damaged, and the run finishes."""
    save_state = Accelerator.save_state
    calls = []

    def full(self, folder, **more):
        calls.append(folder)
        save_state(self, folder, **more)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full)
    assert run(tmp_path, text) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: " in out
    assert "No space left on device); earlier files are complete; training continues" in out
    assert len(calls) == 3
    names = {p.name for p in (tmp_path / "runs" / "test-0001").iterdir()}
    assert {"checkpoint-000004", "checkpoint-000012"} <= names
    assert not any("unfinished" in name for name in names)


def test_a_disk_that_is_full_at_the_end_fails_with_one_sentence(tmp_path, text, capsys, monkeypatch):
    def full(self, folder, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full)
    assert "No space left on device" in error_of(capsys, run(tmp_path, text, "--steps", "2"))


def test_write_folder_leaves_the_old_or_the_new_folder_complete(tmp_path):
    def write(folder):
        (folder / "a").write_text("new")

    def fail(folder):
        (folder / "a").write_text("half")
        raise RuntimeError("disk on fire")

    with pytest.raises(CheckpointError, match=r"could not be written \(disk on fire\)"):
        write_folder(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "x", write)
    with pytest.raises(CheckpointError):
        write_folder(tmp_path / "x", fail)
    assert (tmp_path / "x" / "a").read_text() == "new"
    write_folder(tmp_path / "x", lambda folder: (folder / "b").write_text("newer"))
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_log_that_cannot_be_written_does_not_end_the_training(tmp_path, text, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "log", full)
    assert run(tmp_path, text) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        out.count("the TensorBoard log cannot be written (No space left on device); training continues without it") == 1
    )
    assert (tmp_path / "runs" / "test-0001" / "results.json").exists()


# --- streams and several processes


def test_a_stream_is_resumed_bit_for_bit_also_after_an_interruption(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    config = write_config(tmp_path, steps=40, batch_size=8)
    assert run(tmp_path, text, config=config, out="whole") == 0
    whole = tmp_path / "whole" / "test-0001"
    pack = corpus_module.pack
    passes = []

    def pack_with_error(encoded, block_size):
        passes.append(0)
        for n, block in enumerate(pack(encoded, block_size)):
            if len(passes) == 2 and n == 92:  # in the middle of the second epoch
                raise DataError("the stream broke off")
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "pack", pack_with_error)
        assert "the stream broke off" in error_of(capsys, run(tmp_path, text, config=config, out="parts"))
    run_folder = tmp_path / "parts" / "test-0001"
    position = json.loads((latest_checkpoint(run_folder) / "position.json").read_text())
    assert position["epoch"] == 1
    assert position["batches"] == 10  # the 11th was the first of two in a training step that was not finished
    assert resume(run_folder) == 0
    assert all(torch.equal(value, weights(run_folder)[name]) for name, value in weights(whole).items())


@pytest.mark.slow
def test_the_published_size_trains_within_8_gb(tmp_path):
    """Train one training step of 144 M parameters in float32 on a CPU, with two batches of one sequence of 512 tokens."""
    (tmp_path / "text.txt").write_text(make_text(12_000))
    train_tokenizer([make_text()], 1000).save_pretrained(tmp_path / "tokenizer")
    files = ["--data", str(tmp_path / "text.txt"), "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path)]
    shortened = ["--steps", "1", "--batch-size", "1", "--grad-accum", "2", "--mixed-precision", "no"]
    command = [sys.executable, str(TRAIN), "--config", "nord-144m", *files, *shortened]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    results = json.loads((tmp_path / "nord-144m-0001" / "results.json").read_text())
    assert results["parameters"] == 144_334_525
    assert results["tokens"] == 2 * 512
    assert results["firing_rates"]["blocks.5.ffn.lif1"] > 0
    assert results["peak_memory_mb"] < 8000


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_with_compiled_blocks_gives_the_same_loss(tmp_path, text, monkeypatch, backend):
    """The backend aot_eager tests everything but the code that Inductor generates."""
    compile_module, results = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend=backend, fullgraph=True))
    for switch in ("--no-compile", "--compile"):
        assert run(tmp_path, text, "--steps", "3", switch) == 0
        results.append(json.loads((tmp_path / "runs" / f"test-000{len(results) + 1}" / "results.json").read_text()))
    assert results[1]["validation_loss"] == pytest.approx(results[0]["validation_loss"], rel=1e-3)


def test_accelerate_reads_its_configs():
    folder = Path(train_script.__file__).parent / "configs" / "accelerate"
    assert {path.stem for path in folder.glob("*.yaml")} == {"ddp", "fsdp", "deepspeed"}
    for path in folder.glob("*.yaml"):
        config = load_config_from_file(str(path))
        assert config.num_processes == 8
        assert config.mixed_precision == "bf16"
    sharded = load_config_from_file(str(folder / "fsdp.yaml")).fsdp_config
    # the model names its block class, as there are two of them
    assert "fsdp_transformer_layer_cls_to_wrap" not in sharded
    assert (sharded["fsdp_version"], sharded["fsdp_auto_wrap_policy"]) == (2, "TRANSFORMER_BASED_WRAP")


@pytest.mark.parametrize("config", ["tiny", "tiny-published"])
def test_fsdp_shards_a_model_block_by_block(config):
    model = NordForCausalLM(read_config(config).model_config())
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    wrapped = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [name for name, module in model.named_modules() if wrapped(module)] == ["blocks.0", "blocks.1"]


def losses(run: Path) -> list[float]:
    """Return the loss of every logged training step."""
    logs = (run / "tensorboard").rglob("events.*")
    log = min(logs, key=lambda path: len(path.parts))  # files in deeper folders have the settings
    events = EventAccumulator(str(log))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


STREAMED = """
import sys
sys.path.insert(0, {folder!r})
import train
from nordlm.data import sources
sources.IN_MEMORY_BYTES = 0
sys.exit(train.main())
"""


@pytest.mark.parametrize("streamed", [False, True])
def test_two_processes_train_one_run_together_and_can_resume_it(tmp_path, text, streamed, monkeypatch):
    """The losses equal those of one process with batches twice as large, from memory or from a stream."""
    config = write_config(tmp_path, steps=4, save_every=2, log_every=1)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = TRAIN
    if streamed:
        script = tmp_path / "streamed.py"
        script.write_text(STREAMED.format(folder=str(TRAIN.parent)))
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    command = [sys.executable, *launch, str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    first = [*command, "--no-report", "--config", str(config), "--data", str(text), "--out", str(tmp_path / "runs")]
    subprocess.run(first, env=environment, check=True, capture_output=True, timeout=240)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["test-0001"]
    run_folder = tmp_path / "runs" / "test-0001"
    results = json.loads((run_folder / "results.json").read_text())
    assert results["tokens"] == 2 * 4 * 4 * 2 * 24
    assert run(tmp_path, text, "--batch-size", "8", config=config, out="one") == 0
    alone = tmp_path / "one" / "test-0001"
    assert losses(run_folder) == pytest.approx(losses(alone), rel=1e-4)
    assert len(losses(run_folder)) == 4
    expected = json.loads((alone / "results.json").read_text())["validation_loss"]
    assert results["validation_loss"] == pytest.approx(expected, rel=1e-3)
    before = weights(run_folder)
    shutil.rmtree(run_folder / "checkpoint-000004")
    shutil.rmtree(run_folder / "model")
    subprocess.run(
        [*command, "--resume", str(run_folder)], env=environment, check=True, capture_output=True, timeout=240
    )
    assert all(torch.equal(value, weights(run_folder)[name]) for name, value in before.items())


def test_json_is_written_atomically(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_run_folders_that_cannot_be_created_raise(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be created"):
        files.create_numbered(tmp_path / "file", "run", lambda folder: None)


@pytest.mark.quick
def test_settings_round_trip_through_a_file(tmp_path):
    settings = Settings.read(write_config(tmp_path))
    settings.write(tmp_path / "again.yaml")
    assert Settings.read(tmp_path / "again.yaml") == settings
    with pytest.raises(SettingsError, match="cannot be read"):
        Settings.read(tmp_path / "none.yaml")


PRINT_LIBRARIES = """
import sys
import train
try:
    status = train.main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
assert not status
print(*(name for name in ("torch", "matplotlib", "sklearn", "pandas") if name in sys.modules))
"""


def loaded_libraries(*arguments: str) -> list[str]:
    """Return the large libraries that the training script has imported at its end."""
    folder = Path(train_script.__file__).parent
    command = [sys.executable, "-c", PRINT_LIBRARIES, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_help_does_not_import_torch_and_no_report_imports_no_report_libraries(tmp_path, text):
    assert loaded_libraries("--help") == []
    arguments = ("--config", str(write_config(tmp_path, steps=1)), "--data", str(text), "--out", str(tmp_path / "runs"))
    assert loaded_libraries(*arguments, "--no-report") == ["torch"]
