"""Tests of studies/language_model/scaling.py: the fit of a loss curve, the table, the picture and the command."""

import argparse
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import scaling as scaling_script
from accelerate.state import AcceleratorState
from helpers import make_text, write_config
from nordlm.training.settings import read_config
from scaling import Curve, Point, Size, best_lr_runs, describe_fits, fit, intervals, plot_scaling, scaling_table
from study_cli import markdown_table


@pytest.fixture(autouse=True)
def _reset_accelerator():
    """Reset the process-wide state of accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)


def run(kind, seed, parameters, loss, **rates):
    """Return a run in the format that the script writes."""
    return {
        "kind": kind,
        "seed": seed,
        "lr": 1e-3,
        "loss": loss,
        "bits_per_byte": loss / 2,
        "parameters_without_vocabulary": parameters,
        "firing_rates": rates,
    }


def points(curve, noise=0.0):
    """Return runs of four sizes and three numbers of tokens whose losses are those of the curve, plus noise."""
    generator = np.random.default_rng(0)
    return [
        Point(Size(width, 2), d, run("gpt2", 0, n, curve(n, d) + noise * generator.normal()))
        for width, n in ((64, 70_000), (128, 280_000), (192, 950_000), (256, 2_200_000))
        for d in (266_240, 532_480, 1_064_960)
    ]


def test_the_fit_recovers_the_curve_of_its_points():
    curve = Curve(floor=2.0, a=40.0, alpha=0.35, b=150.0, beta=0.36)
    fitted = fit(points(curve))
    for n, d in ((70_000, 266_240), (600_000, 700_000), (4_000_000, 2_000_000)):
        assert fitted(n, d) == pytest.approx(curve(n, d), abs=0.01)
    noisy = fit(points(curve, noise=0.01))
    assert noisy(600_000, 700_000) == pytest.approx(curve(600_000, 700_000), abs=0.03)
    assert str(curve) == "2.00 + 40 / N^0.35 + 150 / D^0.36"


def test_intervals_grow_with_the_noise_of_the_points():
    curve = Curve(floor=2.0, a=40.0, alpha=0.35, b=150.0, beta=0.36)
    widths = []
    for noise in (0.002, 0.02):
        noisy = points(curve, noise)
        ends = intervals(noisy, fit(noisy))
        assert ends["a"][0] < curve.alpha < ends["a"][1]
        widths.append(ends["a"][1] - ends["a"][0])
    assert 3 * widths[0] < widths[1]


def test_too_few_sizes_or_numbers_of_tokens_give_no_fit():
    all_points = points(Curve(2.0, 40.0, 0.35, 150.0, 0.36))
    assert fit([point for point in all_points if point.tokens > 266_240] * 3) is None
    assert fit([point for point in all_points if point.parameters > 280_000] * 3) is None
    assert fit([point for point in all_points if point.parameters > 70_000]) is not None


def test_the_picture_has_every_run_and_the_curves():
    all_points = points(Curve(2.0, 40.0, 0.35, 150.0, 0.36))
    budgets, sizes = {point.tokens for point in all_points}, {point.size for point in all_points}
    panels = plot_scaling(all_points, {"gpt2": fit(all_points)}).axes
    by_tokens, by_size = panels[: len(budgets)], panels[len(budgets) :]
    assert len(by_size) == len(sizes)
    for panel in panels:
        (line,), (scattered,) = panel.lines, panel.collections
        dots = scattered.get_offsets()
        assert len(dots) == (len(sizes) if panel in by_tokens else len(budgets))
        curve = np.interp(np.log(dots[:, 0]), np.log(line.get_xdata()), line.get_ydata())
        assert curve == pytest.approx(dots[:, 1], abs=0.01)


def test_a_size_changes_the_config_and_invalid_sizes_raise(tmp_path):
    settings = read_config(str(write_config(tmp_path, block="spike_fed")))
    sized = Size.parse("96x3").apply_to(settings, 7)
    config = sized.model_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (96, 3, 3)
    assert config.intermediate_size == 192
    assert sized.training.steps == 7
    for wrong in ("96", "33x2", "0x2", "64x0", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected width x blocks"):
            Size.parse(wrong)


def test_the_table_has_ratios_paired_by_seed_and_firing_rates():
    size = Size(64, 2)
    losses = {("spike-fed", 0): 4.0, ("spike-fed", 1): 4.4, ("spike-fed", 2): 1.0, ("gpt2", 1): 4.0, ("gpt2", 0): 4.0}
    rates = {"lif": 0.1, "readout": 0.04}
    points_of_seeds = [
        Point(size, 2000, run(kind, seed, 1000, loss, **(rates if kind != "gpt2" else {})))
        for (kind, seed), loss in losses.items()
    ]
    head, line = scaling_table(points_of_seeds)
    assert head == ["size", "parameters", "tokens", "spike-fed", "gpt2", "spike-fed / gpt2", "firing rates"]
    assert line[:3] == ["64x2", "1,000", "2,000"]
    assert line[3:] == ["3.133 (1.000 to 4.400)", "4.000", "+5.0% (+0.0% to +10.0%)", "4.0% to 10.0%"]
    (gpt2,) = (point for point in points_of_seeds if point.kind == "gpt2" and point.run["seed"] == 0)
    head, line = scaling_table([gpt2])
    assert (len(head), line[3:]) == (5, ["4.000", ""])
    few = "too few sizes and numbers of tokens for a curve"
    assert describe_fits(points_of_seeds, {"gpt2": None}) == [f"- gpt2: {few}; peak learning rates: 64x2 0.001"]
    all_points = points(Curve(2.0, 40.0, 0.35, 150.0, 0.36), noise=0.001)
    (sentence,) = describe_fits(all_points, {"gpt2": fit(all_points)})
    assert "N^0.3" in sentence
    assert " (95 %: E 1.9" in sentence


def _numbers(sentence):
    """Return the numbers of ``E + a / N^alpha + b / D^beta (95 %: E .. to .., a .. to .., b .. to ..)``.

    The last is a list, of the numbers in parentheses.
    """
    number = r"(\d+(?:\.\d+)?(?:e[+-]\d+)?)"
    curve = re.search(rf"= {number} \+ {number} / N\^{number} \+ {number} / D\^{number}", sentence).groups()
    ends = re.findall(rf"[Eab] {number} to {number}", sentence)
    assert len(ends) == 3
    return [*map(float, curve), [float(end) for pair in ends for end in pair]]


def test_results_md_matches_the_stored_runs():
    docs = Path(__file__).parents[2] / "docs"

    def stored_points(name):
        lines = (docs / "runs" / f"{name}.jsonl").read_text().splitlines()
        return [Point(Size.parse(run["size"]), run["tokens"], run) for run in map(json.loads, lines)]

    page = (docs / "results.md").read_text(encoding="utf-8")
    all_runs = stored_points("scaling")
    best = best_lr_runs(all_runs, seed=0)
    assert set(markdown_table(scaling_table(best)).splitlines()) <= set(page.splitlines())
    curves = {kind: fit([point for point in best if point.kind == kind]) for kind in scaling_script.MODELS}
    for sentence in describe_fits(best, curves):
        kind, _, rest = sentence.removeprefix("- ").partition(": ")
        written = re.search(rf"^- {kind}: (.*)$", page, flags=re.MULTILINE).group(1)
        assert written.partition("peak")[2] == rest.partition("peak")[2]  # equal learning rates
        # The optimiser stops at other parameters on another processor, but the losses of the curve are nearly equal.
        (*curve, ends), (*curve_on_page, ends_on_page) = _numbers(rest), _numbers(written)
        of_kind = [point for point in best if point.kind == kind]
        for point in of_kind:
            loss, loss_on_page = (Curve(*numbers)(point.parameters, point.tokens) for numbers in (curve, curve_on_page))
            assert loss == pytest.approx(loss_on_page, abs=0.05)  # the page has three digits of a and b
        assert ends == pytest.approx(ends_on_page, rel=0.3, abs=0.2)
    for point in best:
        rates = {one.run["lr"] for one in all_runs if one[:2] == point[:2] and one.kind == point.kind}
        assert min(rates) < point.run["lr"] < max(rates)
    for learning_rates in ("half", "quarter"):
        for line in scaling_table(stored_points(f"scaling-{learning_rates}"))[1:]:
            assert line[3] in page
            low, high = (end.rstrip("%") for end in line[-1].split(" to "))
            assert f"{low} to {high} %" in page


def test_the_command_trains_every_size_and_draws(tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": make_text(30, seed)}) + "\n" for seed in range(200)))
    config, out = write_config(tmp_path, block="spike_fed"), tmp_path / "out"
    arguments = ["--config", str(config), "--data", str(text), "--out", str(out), "--sizes", "32x1", "64x1"]
    arguments += ["--steps", "2", "4", "--seeds", "0", "--lrs", "1e-3", "2e-3", "4e-3", "--models", "gpt2"]
    assert scaling_script.main(arguments) == 0
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    points = [Point(Size.parse(run["size"]), run["tokens"], run) for run in runs]
    for point, (size, steps) in zip(
        best_lr_runs(points, 0), itertools.product(("32x1", "64x1"), ("2", "4")), strict=True
    ):
        file_names = {file.name for file in (out / size / steps / "runs").glob("*.json")}
        assert {f"gpt2_lr{factor * point.run['lr']:g}_seed0.json" for factor in (0.5, 1, 2)} <= file_names
        assert len(file_names) == sum(other[:2] == point[:2] for other in points)
    table = (out / "table.md").read_text()
    assert "| 64x1 | " in table
    assert "- gpt2: too few sizes" in table
    assert {(one["size"], one["seed"]) for one in runs} == {("32x1", 0), ("64x1", 0)}
    assert all("repetition" not in one for one in runs)  # no samples are generated, which is slow
    assert (out / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    before = table
    assert scaling_script.main(arguments) == 0
    assert (out / "table.md").read_text() == before
    assert scaling_script.main([*arguments, "--data", str(tmp_path / "none.txt")]) == 1
    assert "error: " in capsys.readouterr().err
