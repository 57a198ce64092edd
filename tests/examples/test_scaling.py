"""scaling.py: the fit finds the curve that points were made from, sizes are what they say, and the picture is drawn."""

import argparse
import json

import numpy as np
import pytest
import scaling as scaling_script
from accelerate.state import AcceleratorState
from helpers import make_text, write_config
from scaling import Curve, Point, Size, fit, table
from settings import read_config


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


def points(curve, noise=0.0):
    generator = np.random.default_rng(0)
    return [
        Point("gpt2", Size(64, 2), n, d, 1e-3, curve(n, d) + noise * generator.normal(), 1.0)
        for n in (70_000, 280_000, 950_000, 2_200_000)
        for d in (266_240, 532_480, 1_064_960)
    ]


def test_the_fit_finds_the_curve_that_the_points_lie_on():
    curve = Curve(floor=2.0, a=40.0, alpha=0.35, b=150.0, beta=0.36)
    found = fit(points(curve))
    for n, d in ((70_000, 266_240), (600_000, 700_000), (4_000_000, 2_000_000)):
        assert found(n, d) == pytest.approx(curve(n, d), abs=0.01)
    noisy = fit(points(curve, noise=0.01))
    assert noisy(600_000, 700_000) == pytest.approx(curve(600_000, 700_000), abs=0.03)
    assert str(curve) == "2.00 + 40 / N^0.35 + 150 / D^0.36"


def test_too_few_points_are_not_fitted():
    whole = points(Curve(2.0, 40.0, 0.35, 150.0, 0.36))
    assert fit(whole[:5]) is None
    assert fit([point for point in whole if point.tokens == 266_240] * 3) is None


def test_sizes(tmp_path):
    settings = read_config(str(write_config(tmp_path, block="spike_fed")))
    there = Size.parse("96x3").of(settings, 7)
    config = there.model_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (96, 3, 3)
    assert config.intermediate_size == 192
    assert there.training.steps == 7
    for wrong in ("96", "33x2", "0x2", "64x0", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected width x blocks"):
            Size.parse(wrong)


def test_ratios_are_of_the_means():
    def point(kind, bits):
        return Point(kind, Size(64, 2), 1000, 2000, 1e-3, 2 * bits, bits)

    head, line = table([point("spike-fed", 2.0), point("spike-fed", 2.2), point("gpt2", 2.0)])
    assert head == ["size", "parameters", "tokens", "spike-fed", "gpt2", "spike-fed / gpt2"]
    assert line == ["64x2", "1,000", "2,000", "4.200 (4.000 to 4.400)", "4.000", "+5.0%"]


def test_the_command_trains_every_size_and_draws(tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": make_text(300, seed)}) + "\n" for seed in range(20)))
    config, out = write_config(tmp_path, block="spike_fed"), tmp_path / "out"
    arguments = ["--config", str(config), "--data", str(text), "--out", str(out), "--sizes", "32x1", "64x1"]
    arguments += ["--steps", "2", "4", "--seeds", "0", "--lrs", "1e-3", "1e-2", "--models", "gpt2"]
    assert scaling_script.main(arguments) == 0
    for size in ("32x1", "64x1"):  # the rate is chosen once, with the fewest steps
        assert len(list((out / size / "2" / "runs").glob("*.json"))) == 2
        assert len(list((out / size / "4" / "runs").glob("*.json"))) == 1
    shown = (out / "table.md").read_text()
    assert "| 64x1 | " in shown
    assert "- gpt2: L(N, D) = " in shown
    assert (out / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    before = shown
    assert scaling_script.main(arguments) == 0
    assert (out / "table.md").read_text() == before
    assert scaling_script.main([*arguments, "--data", str(tmp_path / "none.txt")]) == 1
    assert "error: " in capsys.readouterr().err
