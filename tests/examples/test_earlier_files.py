"""Load files of nord-snn 0.1.0, whose model was not part of the package: a model folder, a run folder and a plastic file.

``expected.safetensors`` has the logits of that release: of the converted ``tests/data/tiny_checkpoint.pt`` in ``model/``,
of that model with ``plastic.safetensors``, and of the model in ``run/``.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train as train_script
from helpers import DATA, make_text
from nordlm.inference.plasticity import Plasticity
from nordlm.training.checkpoints import read_json, write_json
from nordlm.training.settings import Settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nord_snn.models.nord  # noqa: F401  # registers the model

BEFORE = DATA / "before"


@pytest.fixture(scope="module")
def expected():
    return load_file(BEFORE / "expected.safetensors")


@pytest.mark.quick
@pytest.mark.parametrize(("folder", "name"), [("model", "logits"), ("run/model", "run_logits")])
@torch.no_grad()
def test_a_model_folder_gives_the_stored_logits(folder, name, expected):
    model = AutoModelForCausalLM.from_pretrained(BEFORE / folder)
    assert torch.allclose(model(input_ids=expected["ids"]).logits, expected[name], atol=1e-5)


@pytest.mark.quick
@torch.no_grad()
def test_a_plastic_file_gives_the_stored_logits(expected):
    model = AutoModelForCausalLM.from_pretrained(BEFORE / "model")
    for name, parameter in model.named_parameters():
        if name.endswith("v_threshold"):
            parameter.fill_(0.02)
    Plasticity(model).load(BEFORE / "plastic.safetensors")
    learned = model(input_ids=expected["ids"]).logits
    assert torch.allclose(learned, expected["learned"], atol=1e-5)
    assert not torch.allclose(learned, expected["logits"], atol=1e-2)


def test_the_code_in_an_earlier_model_folder_runs_and_warns(tmp_path):
    """The process is a new one, in which the model class of the package is not registered."""
    code = (
        "import sys, torch; from safetensors.torch import load_file; from transformers import AutoModelForCausalLM\n"
        "before = sys.argv[1]; expected = load_file(before + '/expected.safetensors')\n"
        "model = AutoModelForCausalLM.from_pretrained(before + '/model', trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules'), type(model)\n"
        "with torch.no_grad(): logits = model(input_ids=expected['ids'], use_cache=False).logits\n"
        "assert torch.allclose(logits, expected['logits'], atol=1e-5)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONWARNINGS": "default", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code, str(BEFORE)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "save it again" in run.stderr


@pytest.mark.quick
def test_a_run_folder_is_resumed(tmp_path):
    """The final loss equals that of the stored run; only the path of the text is changed."""
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(make_text(1500))
    shutil.copytree(BEFORE / "run", run)
    stored_results = read_json(run / "results.json")
    Path(run / "results.json").unlink()
    settings = Settings.read(run / "settings.yaml")
    assert settings.digest() == read_json(run / "run.json")["settings"]
    settings = replace(settings, training=replace(settings.training, data=str(text)))
    settings.write(run / "settings.yaml")
    write_json(run / "run.json", read_json(run / "run.json") | {"text": str(text), "settings": settings.digest()})
    assert train_script.main(["--resume", str(run), "--no-report"]) == 0
    results = read_json(run / "results.json")
    assert results["steps"] == 6
    assert results["validation_loss"] == pytest.approx(stored_results["validation_loss"], abs=1e-3)
