"""No script runs Python code from a model folder, even if standard input says yes: transformers asks there by default."""

import ast
import io
import json
import shutil
from pathlib import Path

import ablation as ablation_script
import chat as chat_script
import compare as compare_script
import convert_original
import energy
import evaluate as evaluate_script
import generate
import online_learning
import pytest
import scaling as scaling_script
import train as train_script
from helpers import make_text, write_config

ROOT = Path(__file__).parents[2]
CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"
TOKENIZER_CLASS = "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
CONFIG_CLASS = "from transformers import PreTrainedConfig\nclass Config(PreTrainedConfig):\n    model_type = 'own'\n"


@pytest.fixture
def answer_yes(monkeypatch):
    """Answer yes on standard input, where transformers asks whether to run code."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 50)))


@pytest.fixture
def marker(tmp_path):
    """Return the path of a file that the code in a prepared folder creates when it runs."""
    return tmp_path / "code_ran"


def add_tokenizer_code(folder: Path, marker: Path) -> None:
    """Make the tokenizer of a folder a class that the folder defines."""
    (folder / "own.py").write_text(CODE.format(marker=str(marker)) + TOKENIZER_CLASS)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def add_config_code(folder: Path, marker: Path) -> None:
    """Make the configuration of a folder a class that the folder defines."""
    (folder / "own_config.py").write_text(CODE.format(marker=str(marker)) + CONFIG_CLASS)
    content = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    content |= {"model_type": "own", "auto_map": {"AutoConfig": "own_config.Config"}}
    (folder / "config.json").write_text(json.dumps(content))


def add_generate_code(folder: Path, marker: Path) -> None:
    """Add a ``generate`` function to a folder."""
    (folder / "custom_generate").mkdir()
    code = CODE.format(marker=str(marker)) + "def generate(model, *args, **kwargs):\n    return None\n"
    (folder / "custom_generate" / "generate.py").write_text(code)


WITH_CODE = {"tokenizer": add_tokenizer_code, "config": add_config_code, "generate": add_generate_code}


@pytest.fixture(params=WITH_CODE)
def folder_with_code(request, trained, tmp_path, marker):
    """Return a copy of a model folder with code for the tokenizer, the configuration or ``generate``."""
    shutil.copytree(trained / "model", tmp_path / "model")
    WITH_CODE[request.param](tmp_path / "model", marker)
    return tmp_path / "model"


MODEL_SCRIPTS = {
    "generate": (generate.main, ["--model", "FOLDER", "--max-new-tokens", "2", "-"]),
    "chat": (chat_script.main, ["--model", "FOLDER", "--max-new-tokens", "2"]),
    "evaluate": (evaluate_script.main, ["--model", "FOLDER", "--max-tokens", "50", "TEXT"]),
    "energy": (energy.main, ["--model", "FOLDER", "--context", "4"]),
    "convert back": (convert_original.main, ["--to-original", "FOLDER", "OUT"]),
    "online learning": (online_learning.main, ["--models", "FOLDER", "--out", "OUT"]),
}


@pytest.mark.quick
@pytest.mark.parametrize("script", MODEL_SCRIPTS)
def test_no_script_that_opens_a_model_runs_its_code(
    script, folder_with_code, answer_yes, marker, tmp_path, monkeypatch
):
    monkeypatch.setattr(online_learning, "experiment", lambda options, models, console: open_all(options, models))
    (tmp_path / "text.txt").write_text(make_text(200))
    main, arguments = MODEL_SCRIPTS[script]
    names = {"FOLDER": folder_with_code, "TEXT": tmp_path / "text.txt", "OUT": tmp_path / "out"}
    run(main, [str(names.get(argument, argument)) for argument in arguments])
    assert not marker.exists()


def open_all(options, models):
    """Open each model as the experiment does, and end the script."""
    for folder in models:
        online_learning.open_model(folder)
    raise KeyboardInterrupt


def run(main, arguments) -> int:
    """Return the exit status of a command line, which some scripts report by ``SystemExit``."""
    try:
        return main(arguments)
    except SystemExit as error:
        return int(error.code is not None)


@pytest.mark.quick
@pytest.mark.parametrize("add_code", [add_tokenizer_code, add_config_code])
def test_training_runs_no_code_of_a_tokenizer_folder(add_code, trained, answer_yes, marker, tmp_path, capsys):
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    add_code(tmp_path / "tokenizer", marker)
    (tmp_path / "text.txt").write_text(make_text(2000))
    config = write_config(tmp_path, steps=1)
    arguments = ["--config", str(config), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "runs")]
    arguments += ["--tokenizer", str(tmp_path / "tokenizer"), "--no-report"]
    status = train_script.main(arguments)
    assert not marker.exists()
    if add_code is add_tokenizer_code:
        assert status == 1
        assert "needs Python code of its own, which is never run" in capsys.readouterr().err
    else:
        assert status == 0  # the configuration has code, the tokenizer has none


@pytest.mark.quick
def test_resuming_runs_no_code_of_the_run_folder(trained, answer_yes, marker, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    add_tokenizer_code(tmp_path / "run" / "tokenizer", marker)
    metadata = json.loads((tmp_path / "run" / "run.json").read_text())
    older = {name: metadata[name] for name in ("text", "fingerprint", "settings")}  # no digests of the tokenizer
    (tmp_path / "run" / "run.json").write_text(json.dumps(older))
    assert train_script.main(["--resume", str(tmp_path / "run"), "--no-report"]) == 1
    assert "needs Python code of its own, which is never run" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("script", [compare_script, ablation_script, scaling_script])
def test_no_study_runs_the_code_of_a_tokenizer(script, trained, answer_yes, marker, tmp_path, capsys):
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    add_tokenizer_code(tmp_path / "tokenizer", marker)
    (tmp_path / "text.txt").write_text(make_text(2000))
    config = write_config(tmp_path, data=str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "tokenizer"))
    assert script.main(["--config", str(config), "--out", str(tmp_path / "out"), "--seeds", "0"]) == 1
    assert "needs Python code of its own, which is never run" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.quick
def test_every_load_refuses_code_explicitly():
    """With the default, None, transformers asks on the terminal."""
    loaders, n_calls = {"from_pretrained", "pipeline", "load_custom_generate", "AutoModel"}, 0
    for folder in ("nord_snn", "examples", "studies", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
                called = ast.unparse(call.func)
                if called.rpartition(".")[2] not in loaders or called.startswith("super()"):
                    continue
                values = [ast.unparse(k.value) for k in call.keywords if k.arg == "trust_remote_code"]
                assert values == ["False"], f"{path}:{call.lineno}: {called} without trust_remote_code=False"
                n_calls += 1
    assert n_calls >= 3
