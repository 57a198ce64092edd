"""Tests of scripts that are killed at a rename: the old or the new files are complete, and the script can be run again."""

import json
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
from helpers import make_text, write_config
from killing import KILLED, Server
from nordlm import files
from nordlm.training.checkpoints import check_digests, latest_checkpoint, read_json
from safetensors.torch import load_file

from nord_snn.models.nord import NordConfig, NordForCausalLM
from nord_snn.models.nord.original import to_original


class Training:
    """A training run of about a second, its command line, and its final weights without a kill."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        (folder / "text.txt").write_text(make_text())
        self.config = write_config(folder, steps=6, save_every=2, grad_accum=1, eval_every=4)
        assert self.start("whole")[0] == 0, self.log.read_text()
        self.expected = load_file(folder / "whole" / "test-0001" / "model" / "model.safetensors")

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self, out: str, **kill) -> tuple[int, int]:
        """Start a new run in the folder ``out``; ``kill`` are arguments of :meth:`killing.Server.run`."""
        where = ["--config", self.config, "--data", self.folder / "text.txt", "--out", self.folder / out, "--no-report"]
        return self.server.run("train", *where, log=self.log, **kill)

    def resume(self, run: Path, **kill) -> tuple[int, int]:
        """Resume a run."""
        return self.server.run("train", "--resume", run, "--no-report", log=self.log, **kill)

    def check_end(self, run: Path) -> None:
        """Check that a run ended with the expected weights, and that no unfinished file is left in its folder."""
        weights = load_file(run / "model" / "model.safetensors")
        assert all(torch.equal(weights[name], value) for name, value in self.expected.items())
        assert read_json(run / "results.json")["steps"] == 6
        assert not [path for path in run.rglob(".*") if path.name != ".gitattributes"]
        for checkpoint in run.glob("checkpoint-*"):
            check_digests(checkpoint, read_json(checkpoint / "position.json")["digests"])


@pytest.fixture(scope="module")
def training(server, tmp_path_factory):
    return Training(server, tmp_path_factory.mktemp("killed"))


def finish_killed_run(training: Training, out: str) -> None:
    """Resume a killed run, or start it again if it has no folder yet, and check its end."""
    runs = sorted((training.folder / out).glob("test-*"))
    if runs:
        assert training.resume(runs[0])[0] == 0, training.log.read_text()
    else:
        assert training.start(out)[0] == 0, training.log.read_text()
        runs = sorted((training.folder / out).glob("test-*"))
    training.check_end(runs[0])


def select_points(points: int, number: int | None) -> list[int]:
    """Return ``number`` evenly spaced points of all, or all if the number is None."""
    if number is None:
        return list(range(points))
    return sorted({round(k * (points - 1) / (number - 1)) for k in range(number)})


ALL = pytest.param(None, marks=pytest.mark.slow, id="all")
SLOW = [pytest.param(None, exchange, marks=pytest.mark.slow, id=f"all-{exchange}") for exchange in (True, False)]


@pytest.mark.parametrize(("number", "exchange"), [(2, True), (2, False), *SLOW])
def test_a_run_killed_at_a_rename_ends_with_the_same_weights(training, number, exchange):
    status, points = training.start(f"count-{exchange}-{number}", exchange=exchange)
    assert status == 0
    assert points >= 18  # run folder, four checkpoints, model, results
    for point in select_points(points, number):
        out = f"train-{exchange}-{number}-{point}"
        assert training.start(out, point=point, exchange=exchange)[0] == KILLED
        finish_killed_run(training, out)


@pytest.mark.parametrize(("number", "exchange"), [(2, True), *SLOW])
def test_a_resumed_run_killed_again_ends_with_the_same_weights(training, number, exchange):
    """The first kill is before the first checkpoint, or while the second one is written."""
    for point_before in (6, 9) if number is None else (9,):
        killed_run = training.folder / f"before-{exchange}-{number}-{point_before}"
        assert training.start(killed_run.name, point=point_before, exchange=exchange)[0] == KILLED
        copy = training.folder / f"copy-{killed_run.name}"
        shutil.copytree(killed_run, copy)
        status, points = training.resume(copy / "test-0001", exchange=exchange)
        assert status == 0, training.log.read_text()
        for point in select_points(points, number):
            second_copy = training.folder / f"again-{killed_run.name}-{point}"
            shutil.copytree(killed_run, second_copy)
            assert training.resume(second_copy / "test-0001", point=point, exchange=exchange)[0] == KILLED
            finish_killed_run(training, second_copy.name)


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_same_weights(training):
    generator = random.Random(0)
    for kill in range(50):
        out = f"random-{kill}"
        training.start(out, seconds=generator.uniform(0, 3))
        runs = sorted((training.folder / out).glob("test-*"))
        if runs and not (runs[0] / "results.json").exists():
            training.resume(runs[0], seconds=generator.uniform(0, 3))
        finish_killed_run(training, out)


@pytest.mark.parametrize("number", [2, ALL])
def test_a_conversion_killed_at_a_rename_is_complete_after_a_second_call(server, tmp_path, number):
    torch.save(to_original(small_published_model(), "tokenizer"), tmp_path / "published.pt")
    source, log = tmp_path / "published.pt", tmp_path / "log"
    status, points = server.run("convert_original", source, tmp_path / "whole", log=log)
    assert status == 0, log.read_text()
    for point in select_points(points, number):
        out = tmp_path / f"out-{point}"
        assert server.run("convert_original", source, out, log=log, point=point)[0] == KILLED
        if not out.exists():
            assert server.run("convert_original", source, out, log=log)[0] == 0, log.read_text()
        assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
        back = tmp_path / f"back-{point}.pt"
        assert server.run("convert_original", "--to-original", out, back, log=log, point=point % 2)[0] == KILLED
        if not back.exists():
            assert server.run("convert_original", "--to-original", out, back, log=log)[0] == 0, log.read_text()
        assert torch.load(back, weights_only=True).keys() == torch.load(source, weights_only=True).keys()


@pytest.mark.slow
def test_fifty_kills_of_conversions_and_reports_at_random_moments_go_on(training, tmp_path):
    """The same command ends as without a kill, and nothing unfinished stays."""
    torch.save(to_original(small_published_model(), "tokenizer"), tmp_path / "published.pt")
    server, log, generator = training.server, training.log, random.Random(0)
    model, text = training.folder / "whole" / "test-0001" / "model", training.folder / "text.txt"
    folder, back, report = tmp_path / "folder", tmp_path / "back.pt", tmp_path / "report"
    commands = [
        (folder, ["convert_original", tmp_path / "published.pt", folder]),
        (back, ["convert_original", "--to-original", folder, back]),
        (report, ["evaluate", text, "--model", model, "--max-tokens", 2000, "--report", report]),
    ]
    killed = 0
    for number in range(54):
        out, command = commands[number % 3]
        status, _ = server.run(*command, log=log, seconds=generator.uniform(0, 1.5))
        killed += status == KILLED
        if out is report or not out.exists():
            assert server.run(*command, log=log)[0] == 0, log.read_text()
        assert out.exists()
        if out is back:  # the conversions refuse to replace a result
            shutil.rmtree(folder)
            back.unlink()
    assert killed >= 20
    assert {path.name for path in tmp_path.iterdir()} <= {"published.pt", "folder", "back.pt", "report"}


def small_published_model() -> NordForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return NordForCausalLM(NordConfig(vocab_size=300, n_clusters=4, max_position_embeddings=24, **sizes))


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
def test_a_second_report_killed_at_a_rename_leaves_one_complete_report(training, tmp_path, exchange):
    model, text = training.folder / "whole" / "test-0001" / "model", training.folder / "text.txt"
    report = tmp_path / "report"
    command = ["evaluate", text, "--model", model, "--max-tokens", 2000, "--report", report]
    assert training.server.run(*command, log=training.log)[0] == 0, training.log.read_text()
    names = {path.name for path in report.iterdir()}
    status, points = training.server.run(*command, log=training.log, exchange=exchange)
    assert status == 0
    for point in range(points):
        assert training.server.run(*command, log=training.log, point=point, exchange=exchange)[0] == KILLED
        if exchange:
            assert {path.name for path in report.iterdir()} == names
        assert training.server.run(*command, log=training.log, exchange=exchange)[0] == 0, training.log.read_text()
        assert {path.name for path in report.iterdir()} == names
        assert [path.name for path in tmp_path.iterdir()] == ["report"]


REPLACE = """
import sys
from pathlib import Path
from killing import kill_at
from nordlm import files
folder, point, exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
count = kill_at(point, exchange)
files.write_folder(folder / "x", lambda new: (new / "content").write_text("new"))
files.write_json(folder / "y.json", {"content": "new"})
files.remove_folder(folder / "z")
print(count())
"""


@pytest.mark.quick
@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_rename_leaves_the_old_or_the_new_content(tmp_path, exchange):
    """Without an exchange of folders the kill can leave neither; ``clean_up`` then restores the old folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for point in range(100):
        folder = tmp_path / str(point)
        folder.mkdir()
        for name in ("x", "z"):
            files.write_folder(folder / name, lambda new: (new / "content").write_text("old"))
        files.write_json(folder / "y.json", {"content": "old"})
        command = [sys.executable, "-c", REPLACE, str(folder), str(point), str(exchange)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr
        if exchange:
            assert (folder / "x" / "content").exists()
        files.clean_up(folder)
        assert (folder / "x" / "content").read_text() in ("old", "new")
        assert json.loads((folder / "y.json").read_text())["content"] in ("old", "new")
        assert not (folder / "z").exists() or (folder / "z" / "content").read_text() == "old"
        assert {path.name for path in folder.iterdir()} <= {"x", "y.json", "z"}
        if process.returncode == 0:
            break
    assert point == (6 if exchange else 8)  # the first point after all renames


def test_a_folder_is_replaced_or_restored_on_a_file_system_without_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for content in ("old", "new"):
        files.write_folder(tmp_path / "x", lambda new, content=content: (new / "content").write_text(content))
    assert (tmp_path / "x" / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]

    replace = os.replace

    def refuse(source, target):
        if Path(target) == tmp_path / "x" and Path(source).name.endswith(".unfinished"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(files.CheckpointError, match="No space left on device"):
        files.write_folder(tmp_path / "x", lambda new: (new / "content").write_text("newer"))
    assert (tmp_path / "x" / "content").read_text() == "new"


def test_the_latest_checkpoint_is_the_newest_finished_one(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()
    (tmp_path / ".checkpoint-000006.unfinished").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-000004"


@pytest.mark.quick
def test_a_new_run_deletes_unfinished_folders_older_than_a_day(tmp_path):
    for name, age in (("recent", 0), ("stale", 100_000)):  # seconds
        unfinished = tmp_path / f".run.1.{name}.unfinished"
        unfinished.mkdir()
        os.utime(unfinished, (time.time() - age,) * 2)
    assert files.create_numbered(tmp_path, "run", lambda folder: (folder / "a").write_text("")).name == "run-0001"
    assert {path.name for path in tmp_path.iterdir()} == {"run-0001", ".run.1.recent.unfinished"}
