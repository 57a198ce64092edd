"""Tests of scripts whose standard output is full or closed, and of interrupts before a first checkpoint."""

import importlib
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


# --- standard streams, and errors that a script does not expect


def run_python(code: str, **more) -> subprocess.CompletedProcess:
    """Run a script of a few lines through ``run_script``, within 20 seconds."""
    lines = f"import sys\nfrom nordlm.script import run_script\ndef main():\n    {code}\nsys.exit(run_script(main))"
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)} | more.pop("env", {})
    command = [sys.executable, "-c", lines]
    return subprocess.run(command, env=environment, capture_output=True, timeout=20, check=False, **more)


@pytest.mark.quick
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_stream_that_the_caller_closed_is_the_null_device(closed, tmp_path):
    """Without a stream ``input`` raises for ever, and a file could have the descriptor of standard error."""
    code = (
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('out'); print('err', file=sys.stderr)\n"
        "    assert file.fileno() > 2\n    try: input()\n    except EOFError: return 3"
    )
    done = run_python(
        code, stdin=subprocess.DEVNULL, preexec_fn=lambda: [os.close(descriptor) for descriptor in closed]
    )
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.quick
def test_a_character_that_standard_output_cannot_encode_is_escaped():
    done = run_python("print('\\u2501 \\udcff')", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, b"\\u2501 \\udcff\n")
    done = run_python("print('\\u2501 \\udcff')", env={"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stdout) == (0, "\u2501 \\udcff\n".encode())


@pytest.mark.quick
@pytest.mark.parametrize(
    ("code", "message"), [("open('/')", b"error: [Errno 21]"), ("raise MemoryError", b"error: out of memory")]
)
def test_an_error_of_the_system_is_one_sentence(code, message):
    done = run_python(code)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count(b"\n") == 1


EXAMPLES = ("conv_digits/conv_digits", "gun_point/gun_point", "sequence_classifier/sequence_classifier",
            "spikformer/spikformer_digits", "swap_stdp/swap_stdp")  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(
    ("option", "value"), [("--seeds", "0"), ("--seeds", "2147483647"), ("--epochs", "9" * 30), ("--out", "x\0")]
)
def test_wrong_values_of_the_other_examples_end_in_one_sentence(name, option, value, capsys):
    module = importlib.import_module(name.rpartition("/")[2])
    with pytest.raises(SystemExit) as stop:
        module.main([option, value])
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    path = SCRIPTS.parent / f"{name}.py"
    assert "sys.exit(run_script(main))" in path.read_text()  # which handles lost output


def test_a_prompt_without_end_is_refused(server, trained, tmp_path):
    arguments = ["--model", trained / "model", "--max-new-tokens", 1, "-"]
    log = tmp_path / "log"
    assert server.run("generate", *arguments, log=log, fault="endless_input")[0] == 1
    assert "error: expected a prompt of at most 1,048,576 bytes" in log.read_text()
