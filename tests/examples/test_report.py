"""Tests of the report of a model and of energy.py: page, pictures and JSON are complete, consistent and self-contained."""

import base64
import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import energy as energy_script
import evaluate as evaluate_script
import pytest
import torch
import train as train_script
from helpers import fire_easily, make_text, write_config
from nordlm.analysis import report as report_script
from nordlm.analysis import token_energy
from nordlm.analysis.ood_detection import open_others
from nordlm.analysis.report import PAGE, ReportInput, write_report
from nordlm.inference.loading import open_model
from nordlm.training.checkpoints import CheckpointError
from nordlm.training.held_out import held_out_text
from nordlm.training.settings import Settings

from nord_snn.monitor import EnergyProfile, ProductCost, SpikeMonitor

PICTURES = {"rates", "steps", "neurons", "raster", "kinds", "energy", "auroc", "training"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def subject(trained):
    """Return what a report is about: a model whose neurons fire, texts, one of them with HTML, and results."""
    model, tokenizer = open_model(trained / "model")
    fire_easily(model)
    texts = [make_text(400, seed) for seed in range(6)]
    texts[0] = "<script>alert('the neuron fires')</script> $x$ & \"time\" " + texts[0]
    tokens = torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]])
    results, command = {"nats_per_token": 2.5}, "python evaluate.py --report"
    return ReportInput(model, tokenizer, texts, tokens, "some <text>", trained, results, command)


@pytest.fixture(scope="module")
def written(subject, tmp_path_factory):
    """Write a report and return its folder."""
    folder = tmp_path_factory.mktemp("report") / "report"
    write_report(folder, subject, open_others(["shuffled", "chinese"]), length=16)
    return folder


class Page(HTMLParser):
    """Parser that collects the tags of a page and the URLs of its links and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.tags: set[str] = set()
        self.open_tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.urls += [
            value for name, value in attributes if name in ("src", "href", "srcset", "poster", "data", "action")
        ]
        if tag not in ("meta", "img", "br"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag


def test_the_report_is_complete(written):
    assert {path.stem for path in written.glob("*.png")} == PICTURES
    assert {path.name for path in written.iterdir()} == {f"{name}.png" for name in PICTURES} | {PAGE, "report.json"}
    for path in written.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    content = json.loads((written / "report.json").read_text())
    assert content["about"]["on_this_text"] == {"nats_per_token": 2.5}
    assert content["about"]["of_the_run"]["steps"] == 12
    assert set(content["uncertainty"]["auroc"]) == {"shuffled", "chinese"}


def test_the_page_is_self_contained_and_has_no_scripts(written):
    text = (written / PAGE).read_text()
    page = Page(text)
    assert page.open_tags == []
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert "url(" not in text
    assert "@import" not in text
    pictures = [value for value in page.urls if not value.startswith("#")]
    assert all(value.startswith("data:image/png;base64,") for value in pictures)
    embedded = {base64.b64decode(value.partition(",")[2]) for value in pictures}
    assert embedded == {path.read_bytes() for path in written.glob("*.png")}
    assert "some &lt;text&gt;" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_chromium_without_network_shows_every_picture_within_the_width_of_the_window(written, tmp_path):
    loaded = "[...document.images].every(i => i.complete && i.naturalWidth > 100)"
    fits = "document.documentElement.scrollWidth <= innerWidth"
    probe = f"<script>onload = () => document.title = `${{document.images.length}} ${{{loaded}}} ${{{fits}}}`</script>"
    page = tmp_path / "page.html"
    page.write_text((written / PAGE).read_text().replace("</body>", probe + "</body>"))
    offline = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    for width in (1280, 500):
        command = [CHROMIUM, *offline, profile, f"--window-size={width},900", "--dump-dom", page.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        assert f"<title>{len(PICTURES)} true true</title>" in shown


def test_the_numbers_in_the_json_match_the_network(written, subject):
    content = json.loads((written / "report.json").read_text())
    ids = report_script._known_sequences(subject)
    with torch.no_grad(), SpikeMonitor(subject.model) as monitor:
        subject.model(input_ids=ids, use_cache=False)
    rates = {name: layer["rate"] for name, layer in content["rates"].items()}
    assert rates == pytest.approx(monitor.rates())
    assert content["published_sparsity"] == pytest.approx(1 - monitor.rates()["readout.lif"])
    kinds = content["rates_by_kind_of_token"]
    assert sum(kinds["tokens"].values()) == ids.numel()
    for name, by_kind in kinds["rates"].items():
        mean = sum(rate * kinds["tokens"][kind] for kind, rate in by_kind.items()) / ids.numel()
        assert mean == pytest.approx(rates[name], rel=1e-4)
    curves = content["training"]["loss"]
    assert curves["held out"]["12"] == json.loads((subject.run / "results.json").read_text())["validation_loss"]
    assert list(content["training"]["rates"]) == ["input", "block 0", "readout"]


def test_training_writes_a_report(trained):
    assert (trained / "report" / PAGE).is_file()


def test_a_report_that_cannot_be_written_does_not_fail_the_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(make_text())
    arguments = ["--config", str(write_config(tmp_path, steps=1)), "--data", str(tmp_path / "text.txt")]

    def full(*_):
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(report_script, "write_report", full)
    assert train_script.main([*arguments, "--out", str(tmp_path / "runs")]) == 0
    assert "warning: no report was written (the disk is full)" in capsys.readouterr().out
    monkeypatch.setattr(report_script, "write_report", lambda *_: 1 / 0)
    assert train_script.main([*arguments, "--out", str(tmp_path / "runs")]) == 0
    assert "warning: no report was written (division by zero)" in capsys.readouterr().out
    assert train_script.main([*arguments, "--out", str(tmp_path / "runs"), "--no-report"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert not list((tmp_path / "runs").glob("*/report"))


def test_without_enough_text_to_compare_the_rest_of_the_report_is_complete(subject, tmp_path):
    short = subject._replace(texts=[subject.texts[1]], run=None)
    content = write_report(tmp_path / "report", short, open_others(["shuffled"]), length=16)
    assert "1 documents have passages of 16 tokens" in content["uncertainty"]["left_out"][0]
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == PICTURES - {"auroc", "training"}
    assert "Left out: the known text" in (tmp_path / "report" / PAGE).read_text()


@pytest.mark.parametrize("damage", ["no log", "no list", "truncated", "less"])
def test_a_report_on_a_damaged_run_folder_lacks_only_what_depends_on_its_log(subject, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(subject.run, run)
    results = run / "results.json"
    if damage == "no log":
        shutil.rmtree(run / "tensorboard")
    else:
        results.write_text({"no list": "[1, 2]", "truncated": '{"steps": 1', "less": '{"steps": 12}'}[damage])
    write_report(tmp_path / "report", subject._replace(run=run, texts=subject.texts[:1]), {})
    pictures = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert pictures == PICTURES - {"auroc"} - ({"training"} if damage == "no log" else set())


# --- evaluate.py


def test_the_command_replaces_an_older_report_but_no_other_files(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text(make_text(6000, seed=3))
    arguments = [str(tmp_path / "text.txt"), "--model", str(trained / "model"), "--passage", "16", "--ood", "shuffled"]
    for _ in range(2):
        assert evaluate_script.main([*arguments, "--report", str(tmp_path / "new" / "report")]) == 0
    out = capsys.readouterr().out
    assert "AUROC" in out
    assert "firing rates of all layers" in out
    assert (tmp_path / "new" / "report" / PAGE).is_file()
    own_folder = tmp_path / "mine"
    own_folder.mkdir()
    (own_folder / "work.txt").write_text("own text")
    assert evaluate_script.main([*arguments, "--report", str(own_folder)]) == 1
    assert "expected a new or empty folder, or one with only an older report" in capsys.readouterr().err
    assert (own_folder / "work.txt").read_text() == "own text"
    (own_folder / PAGE).write_text("own page")
    (own_folder / "report.json").write_text("{}")
    assert evaluate_script.main([*arguments, "--report", str(own_folder)]) == 1
    assert (own_folder / "work.txt").read_text() == "own text"
    current = tmp_path / "here"
    current.mkdir()
    monkeypatch.chdir(current)
    (tmp_path / ".here.old").mkdir()  # left by a killed process
    (tmp_path / ".here.old" / PAGE).write_text("older")
    assert evaluate_script.main([*arguments, "--report", "."]) == 0
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()
    capsys.readouterr()
    assert evaluate_script.main([*arguments, "--report", "/dev/null/report"]) == 1
    assert "error: /dev/null/report: cannot be created" in capsys.readouterr().err


def test_results_of_other_texts_are_in_the_json(trained, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(make_text(6000, seed=3))
    (tmp_path / "other.txt").write_text(make_text(6000, seed=4))
    arguments = [str(tmp_path / "text.txt"), "--model", str(trained / "model"), "--json", str(tmp_path / "out.json")]
    assert evaluate_script.main([*arguments, "--ood", str(tmp_path / "other.txt"), "--passage", "12"]) == 0
    uncertainty = json.loads((tmp_path / "out.json").read_text())["uncertainty"]
    assert uncertainty["passage_tokens"] == 12
    assert set(uncertainty["auroc"][str(tmp_path / "other.txt")]["loss"]) == {"auroc", "low", "high"}
    assert evaluate_script.main([*arguments, "--ood", str(tmp_path / "none.txt")]) == 1
    assert "none.txt: no such file or folder" in capsys.readouterr().err
    assert evaluate_script.main([*arguments, "--ood", "--passage", "100"]) == 1
    assert "passages must have 2 to 24 tokens, got 100" in capsys.readouterr().err
    assert evaluate_script.main([*arguments, "--passage", "12"]) == 1
    assert "--passage needs --ood or --report" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("too short")
    assert evaluate_script.main([*arguments, "--ood", str(tmp_path / "short.txt"), "--passage", "12"]) == 1
    assert "0 documents have passages" in capsys.readouterr().err


def test_the_default_text_is_the_held_out_text_of_the_run(trained, capsys):
    assert evaluate_script.main(["--model", str(trained / "model")]) == 0
    assert "text.txt,heldout" in "".join(capsys.readouterr().out.split())  # a long path is wrapped
    documents = held_out_text(Settings.read(trained / "settings.yaml").training)
    whole = (trained.parent.parent / "text.txt").read_text()
    held_out_part = "".join(documents.read())
    assert 0 < len(held_out_part) < len(whole)


def test_a_changed_text_is_not_used_as_held_out(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    text = tmp_path / "text.txt"
    text.write_text((trained.parent.parent / "text.txt").read_text() + make_text(600, seed=9))
    settings = Settings.read(run / "settings.yaml")
    replace(settings, training=replace(settings.training, data=str(text))).write(run / "settings.yaml")
    assert evaluate_script.main(["--model", str(run / "model")]) == 1
    assert "has changed since the run in" in capsys.readouterr().err
    text.unlink()
    assert evaluate_script.main(["--model", str(run / "model")]) == 1
    assert "no such file" in capsys.readouterr().err


# --- energy.py


def test_the_energy_of_a_generated_token_excludes_other_tokens(subject):
    ids = report_script._known_sequences(subject)[:1]
    config = subject.model.config
    profile = token_energy.profile_generated_token(subject.model, ids)
    dense = {product.name: product.dense for product in profile.products}
    assert dense["lm_head"] == config.hidden_size * config.vocab_size
    assert dense["blocks.0.resonance.v_proj"] == config.hidden_size**2
    assert dense["blocks.0.ffn.up"] == 4 * config.hidden_size * config.intermediate_size
    coincidences = next(product for product in profile.products if product.kind == "coincidences")
    assert coincidences.dense == 4 * config.hidden_size * ids.shape[1]


@pytest.mark.parametrize(("macs", "acs", "ratio"), [(4000, 0, "4.00"), (0, 40, "0.01")])
def test_the_summary_sentence_matches_the_figures(macs, acs, ratio):
    product = ProductCost("up", "linear", dense=4000, macs=macs, acs=acs, calls=1, steps=4)
    profile = EnergyProfile([product], time_steps=4)
    assert f"costs {ratio} times the energy of its dense twin without memory" in token_energy.energy_sentence(profile)
    fed, repeated = (100, 0) if not macs else (0, 100)
    assert (
        f"{fed}% have spikes as input, {repeated}% have real numbers as input at each of 4 time steps, and 0% have real numbers "
        "as input once" in (token_energy.energy_sentence(profile))
    )
    assert "{" not in token_energy.energy_sentence(profile)


def test_the_energy_command(trained, tmp_path, capsys):
    assert energy_script.main(["--model", str(trained / "model"), "--context", "9"]) == 0
    out = capsys.readouterr().out
    assert "The last of 9 random tokens" in out
    assert "| blocks.*.ffn.down | linear |" in out
    assert energy_script.main(["--config", str(write_config(tmp_path)), "--every"]) == 0
    assert "| blocks.0.ffn.down | linear |" in capsys.readouterr().out
    for arguments, message in (
        (["--config", "none"], "error: "),
        (["--model", str(tmp_path)], "expected a folder with config.json, model.safetensors and a tokenizer"),
        (["--model", str(trained / "model"), "--context", "99"], "--context must be at most 24"),
    ):
        assert energy_script.main(arguments) == 1
        assert message in capsys.readouterr().err
