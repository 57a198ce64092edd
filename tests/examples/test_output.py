"""Tests of scripts whose standard output is full or closed, and of interrupts before a first checkpoint."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import make_text, write_config
from killing import SCRIPTS
from nordlm.training.checkpoints import check_digests, latest_checkpoint, read_json
from nordlm.training.runtime import StopRequest

from nord_snn.models.nord import NordConfig, NordForCausalLM
from nord_snn.models.nord.original import to_original


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("output")
    (path / "text.txt").write_text(make_text())
    write_config(path, steps=4, save_every=2, grad_accum=1, log_every=1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = NordForCausalLM(NordConfig(vocab_size=300, n_clusters=4, max_position_embeddings=24, **sizes))
    torch.save(to_original(model, "tokenizer"), path / "published.pt")
    return path


# --- training


@pytest.mark.parametrize(("lost", "reason"), [("disk", "No space left on device"), ("pipe", "Broken pipe")])
def test_training_continues_if_standard_output_is_lost(server, folder, lost, reason):
    config, text, log = folder / "test.yaml", folder / "text.txt", folder / "log"
    arguments = ["--config", config, "--data", text, "--out", folder / lost, "--no-report"]
    assert server.run("train", *arguments, log=log, lost=lost)[0] == 0, log.read_text()
    assert read_json(folder / lost / "test-0001" / "results.json")["steps"] == 4
    assert (
        log.read_text().count(f"warning: standard output can no longer be written ({reason}); the script continues")
        == 1
    )


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_an_interrupt_of_training_and_tee_saves_a_whole_checkpoint(tmp_path, times):
    """Ctrl-C is sent to the whole process group: ``tee`` ends first, and then the script prints into a pipe without a reader."""
    (tmp_path / "text.txt").write_text(make_text())
    config = write_config(tmp_path, steps=100_000, save_every=100_000, eval_every=100_000, log_every=1, grad_accum=1)
    command = f"{sys.executable} {SCRIPTS / 'train.py'} --config {config} --data {tmp_path / 'text.txt'}"
    for number in range(times):
        out, log = tmp_path / f"runs-{number}", tmp_path / f"log-{number}"
        pipeline = f"{{ {command} --out {out}; echo $? > {out}.status; }} 2>&1 | tee {log}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NORD_SNN_BACKEND": "torch"}
        shell = ["bash", "-c", f"trap : INT; {pipeline}"]
        process = subprocess.Popen(shell, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        wait_until(lambda log=log: log.exists() and "step 3/" in log.read_text())
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
        assert Path(f"{out}.status").read_text() == "130\n", log.read_text()
        checkpoint = latest_checkpoint(out / "test-0001")
        position = read_json(checkpoint / "position.json")
        assert position["step"] >= 3
        check_digests(checkpoint, position["digests"])


def wait_until(condition, seconds: float = 120) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.quick
def test_sighup_and_repeated_sigterm_request_a_stop_and_a_second_ctrl_c_ends_the_program():
    """Launchers such as torchrun send SIGTERM after Ctrl-C, while the checkpoint is being saved."""
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore_handlers()
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
        stop.restore_handlers()
    finally:
        signal.signal(signal.SIGHUP, previous)


# --- scripts that print their results


@pytest.mark.parametrize("script", ["generate", "evaluate", "energy", "convert_original"])
def test_results_that_cannot_be_printed_give_an_exit_status_and_no_traceback(server, folder, trained, tmp_path, script):
    model = ["--model", trained / "model"]
    arguments = {
        "generate": [*model, "--max-new-tokens", "5", "the neuron"],
        "evaluate": [*model, "--max-tokens", "100", folder / "text.txt"],
        "energy": [*model, "--context", "4"],
        "convert_original": [folder / "published.pt"],
    }[script]
    for lost, expected, message in (
        ("disk", 1, "error: standard output cannot be written (No space left on device)\n"),
        ("pipe", 141, ""),
    ):
        more = [tmp_path / lost] if script == "convert_original" else []
        assert server.run(script, *arguments, *more, log=folder / "log", lost=lost)[0] == expected
        printed = [line for line in (folder / "log").read_text().splitlines() if "Warning" not in line]
        assert "Traceback" not in "\n".join(printed)
        assert "".join(line + "\n" for line in printed if line.startswith("error")) == message


# --- interrupts and the environment

INTERRUPT = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
library, script, *arguments = sys.argv[1:]
sys.meta_path.insert(0, Interrupt())
sys.path.insert(0, os.path.dirname(script))
sys.argv[:] = [script, library, *arguments]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train", "generate", "evaluate", "energy", "chat", "convert_original"])
def test_an_interrupt_while_libraries_are_loaded_gives_one_line(script):
    code = INTERRUPT.replace("sys.argv[1]:", "library:")
    library = "yaml" if script == "train" else "torch"
    command = [sys.executable, "-c", code, library, str(SCRIPTS / f"{script}.py")]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parents[1])}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "ACCELERATE_DYNAMO_BACKEND",
            "inductor",
            "expected no, since --compile is the setting that compiles; unset it",
        ),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not installed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "the environment has ACCELERATE_USE_MEGATRON_LM"),
    ],
)
def test_unsupported_environment_variables_of_accelerate_give_one_sentence(server, folder, variable, value, message):
    arguments = ["--config", folder / "test.yaml", "--data", folder / "text.txt", "--out", folder / "none"]
    log = folder / "log"
    assert server.run("train", *arguments, log=log, fault=f"{variable}={value}")[0] == 1
    error = log.read_text()
    assert error.startswith("error: ")
    assert message in error
    assert len(re.findall("\n", error)) == 1
    assert not (folder / "none").exists()
