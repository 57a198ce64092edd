"""Tests of run folders: changed files raise, a run is trained by one process group, and each error is printed once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_text, write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killing import KILLED, SCRIPTS, Server
from nordlm.errors import CheckpointError
from nordlm.files import locked
from nordlm.training.checkpoints import check_seal, read_json, seal
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a text and a config of six training steps."""
    path = tmp_path_factory.mktemp("runs")
    (path / "text.txt").write_text(make_text())
    write_config(path, steps=6, save_every=2, grad_accum=1, eval_every=100)
    return path


def start(server: Server, folder: Path, out: str, *arguments: object, **more) -> str:
    """Start a run; return its exit status and its output."""
    where = ["--config", folder / "test.yaml", "--data", folder / "text.txt", "--out", folder / out, "--no-report"]
    status, _ = server.run("train", *where, *arguments, log=folder / "log", **more)
    return f"{status} {(folder / 'log').read_text()}"


def resume(server: Server, run: Path, **more) -> str:
    """Resume a run; return its exit status and its output."""
    log = run.with_suffix(".log")
    status, _ = server.run("train", "--resume", run, "--no-report", log=log, **more)
    return f"{status} {log.read_text()}"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def error_in(output: str) -> str:
    """Check that the exit status is 1 and that one error was printed, once; return the error."""
    assert output.startswith("1 "), output
    assert output.count("error: ") == 1, output
    assert "Traceback" not in output
    return output[output.index("error: ") :]


@pytest.fixture(scope="module")
def stopped(server, folder):
    """Return a run that was killed after its checkpoint at training step 4."""
    assert start(server, folder, "stopped", point=14).startswith(str(KILLED))
    run = folder / "stopped" / "test-0001"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-000002", "checkpoint-000004"}
    return run


# --- files that decide how a run continues


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("position.json", "batches", 5),
        ("position.json", "batches", None),
        ("position.json", "epoch", 1),
        ("position.json", "tokens", 1),
        ("position.json", "seconds", 0.5),
        ("position.json", "processes", 2),
        ("position.json", "seal", None),
        ("run.json", "processes", None),
        ("run.json", "fingerprint", "0"),
    ],
)
def test_a_changed_position_or_run_file_raises(server, stopped, name, key, value):
    path = stopped / name if name == "run.json" else stopped / "checkpoint-000004" / name
    whole = path.read_text()
    content = json.loads(whole)
    content.pop(key)
    path.write_text(json.dumps(content if value is None else content | {key: value}))
    assert f"{name}: not written by train.py, or damaged" in error_in(resume(server, stopped))
    path.write_text(whole)


VALUES = st.integers() | st.text(max_size=5) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)


@pytest.mark.quick
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=5), VALUES, min_size=1, max_size=4), st.data())
def test_a_changed_byte_in_a_sealed_json_file_raises_or_keeps_its_content(tmp_path, content, data):
    path = tmp_path / "sealed.json"
    path.write_text(json.dumps(seal(content)))
    assert check_seal(path, read_json(path), unsealed=set()) == {k: v for k, v in content.items() if k != "seal"}
    changed = bytearray(path.read_bytes())
    index = data.draw(st.integers(0, len(changed) - 1))
    changed[index] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        accepted = check_seal(path, read_json(path), unsealed=set())
    except CheckpointError:
        return
    assert accepted == content  # for example, the change is another escape of the same character


def test_resuming_with_another_number_of_processes_raises(server, folder, stopped):
    """The number is stored in position.json, or in run.json if there is no checkpoint or an earlier release wrote it."""
    message = "the run was trained by {} processes and cannot be resumed by {}"
    assert message.format(1, 2) in error_in(resume(server, stopped, processes=2))
    assert start(server, folder, "two", processes=2, fault="broken_stream").startswith("1 ")
    two = folder / "two" / "test-0001"
    assert message.format(2, 1) in error_in(resume(server, two, fault="stream"))
    path = next(two.glob("checkpoint-*")) / "position.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("seal", "processes")}))
    assert message.format(2, 1) in error_in(resume(server, two, fault="stream"))
    assert start(server, folder, "early", point=5).startswith(str(KILLED))
    early = folder / "early" / "test-0001"
    assert not list(early.glob("checkpoint-*"))
    assert message.format(1, 2) in error_in(resume(server, early, processes=2))


# --- several processes


def test_a_broken_stream_stops_all_processes_and_resumes_to_the_same_weights(server, folder):
    output = start(server, folder, "broken", processes=2, fault="broken_stream")
    assert "the stream broke off" in error_in(output)
    run_folder = folder / "broken" / "test-0001"
    position = read_json(max(run_folder.glob("checkpoint-*")) / "position.json")
    assert position["batches"] == 5  # 40 sequences / (2 processes * 4 sequences a batch)
    assert resume(server, run_folder, processes=2, fault="stream").startswith("0 ")
    assert start(server, folder, "unbroken", processes=2, fault="stream").startswith("0 ")
    expected = weights(folder / "unbroken" / "test-0001")
    assert all(torch.equal(value, expected[name]) for name, value in weights(run_folder).items())


def test_a_full_disk_of_one_of_two_processes_does_not_end_the_training(server, folder):
    output = start(server, folder, "full", processes=2, fault="full_disk_in_process_1")
    assert output.startswith("0 "), output
    assert output.count("No space left on device); earlier files are complete; training") == 1, output
    names = {path.name for path in (folder / "full" / "test-0001").iterdir()}
    assert {"checkpoint-000004", "checkpoint-000006", "model"} <= names
    assert "checkpoint-000002" not in names


def test_an_error_under_two_processes_is_printed_once(server, folder):
    assert "no such file or folder" in error_in(start(server, folder, "x", "--data", "nowhere.txt", processes=2))
    assert "steps must be at least 1" in error_in(start(server, folder, "x", "--steps", "0", processes=2))
    assert "cannot be created" in error_in(start(server, folder, "text.txt", processes=2))


def test_an_error_in_a_training_step_of_one_process_ends_both(server, folder):
    output = start(server, folder, "one", processes=2, fault="error_in_process_1")
    assert not output.startswith("0 "), output
    assert "out of memory in this process alone" in output
    run = folder / "one" / "test-0001"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-000002"}
    assert resume(server, run, processes=2).startswith("0 ")


# --- one process group for each run


def test_a_run_that_is_being_trained_cannot_be_resumed(server, stopped):
    for processes in (1, 2):
        with locked(stopped / "run.json", "in use", print):
            message = "another process is training this run; wait for its end, or stop it"
            assert message in error_in(resume(server, stopped, processes=processes))


LOCK = """
import sys, time
from pathlib import Path
from nordlm.files import locked
with locked(Path(sys.argv[1]), "in use", print):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.quick
def test_the_lock_of_a_killed_process_is_released(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{}")
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    process = subprocess.Popen([sys.executable, "-c", LOCK, str(path)], env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(CheckpointError, match="in use"), locked(path, "in use", print):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locked(path, "in use", print):
        assert path.read_text() == "{}"
    with locked(path, "in use", print):
        pass


# --- divergence


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, "nan"),
        ("nan_weight", "1 parameters became NaN or infinite by step 4 (first: norm.weight); nothing more is saved"),
        ("infinite_held_out_loss", "the loss on the held-out text is inf after step 4"),
    ],
)
def test_a_diverged_run_raises_and_saves_no_model(server, folder, fault, message):
    out = f"diverged-{fault}"
    arguments = ["--steps", "4"] if fault else ["--steps", "2", "--lr", "1e30"]
    assert message in error_in(start(server, folder, out, *arguments, fault=fault))
    run = folder / out / "test-0001"
    assert not {"model", "results.json"} & {path.name for path in run.iterdir()}
    checkpoints = list(run.glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert all(value.isfinite().all() for value in load_file(checkpoint / "model.safetensors").values())
