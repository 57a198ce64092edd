"""Invalid command lines, YAML, JSON and file types: each gives one sentence, without a traceback and without waiting."""

import json
import os
import shutil
import signal
import socket

import chat as chat_script
import convert_original
import energy
import evaluate as evaluate_script
import generate
import pytest
import torch
import train as train_script
import yaml
from helpers import CONFIG, make_text, write_config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nordlm.analysis.curves import read_results, training_curves
from nordlm.cli import file_name, number
from nordlm.errors import CheckpointError, RecipeError, SettingsError
from nordlm.inference.loading import load_model, newest_model
from nordlm.reading import read_json, read_text, read_yaml
from nordlm.training.model_card import escape, model_card
from nordlm.training.settings import Settings

from nord_snn.models.nord import NordConfig, NordForCausalLM

pytestmark = pytest.mark.quick

LONG = "x" * 300


@pytest.fixture(autouse=True)
def within_twenty_seconds():
    """Fail a test that waits for more than 20 seconds, for example to read a pipe."""

    def stop(*_):
        raise AssertionError("the test took more than 20 seconds")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.fixture
def text(tmp_path):
    """Write a text to train on and return its path."""
    path = tmp_path / "text.txt"
    path.write_text(make_text(1500))
    return path


def sentence(main, arguments, capsys) -> str:
    """Run a command line, check that it fails with one sentence, and return the sentence."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # the code is argparse's number, or the sentence
        status = stop.code
    if isinstance(status, str):
        assert status.startswith("error: ")
        return status
    assert status in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: " in lines[-1]
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


# --- command line


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--data", LONG, "no such file or folder"),
        ("--data", "/" + LONG, "no such file or folder"),
        ("--data", "a\0b", "no such file or folder"),
        ("--validation-data", LONG, "no such file or folder"),
        ("--tokenizer", LONG, "cannot be loaded"),
        ("--tokenizer", "/dev/null", "expected a folder"),
        ("--config", LONG, "expected one of base"),
        ("--config", "a\0b", "expected one of base"),
        ("--config", "/dev/zero", "expected a regular file, got a device"),
        ("--out", LONG, "expected a shorter name"),
        ("--out", "x\0", "without NUL bytes"),
        ("--resume", LONG, "expected a shorter name"),
        ("--grad-accum", "9" * 23, "less than 2^31"),
        ("--steps", "9" * 23, "less than 2^31"),
        ("--steps", "9" * 5000, "invalid int value"),
        ("--batch-size", 2**31 - 1, "does not fit into the memory"),
        ("--warmup-steps", "9" * 23, "less than 2^32"),
        ("--block-size", "9" * 12, "longer than the model's max_position_embeddings"),
        ("--lr", "1e400", "lr must be positive, got inf"),
        ("--validation-data", os.fsdecode(b"\xff.txt"), "validation_data must be valid UTF-8"),
        ("--beta1", "nan", "beta1 must be at least 0 and less than 1"),
    ],
)
def test_a_wrong_value_of_the_command_line_ends_in_one_sentence(option, value, message, text, tmp_path, capsys):
    arguments = {"--config": write_config(tmp_path), "--data": text, "--out": tmp_path / "runs"} | {option: value}
    pairs = [part for pair in arguments.items() for part in pair]
    assert message in sentence(train_script.main, pairs, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [LONG, "a\0b"])
def test_a_name_that_no_file_can_have_ends_in_one_sentence(name, capsys):
    for main, arguments in (
        (generate.main, ["--model", name, "x"]),
        (chat_script.main, ["--model", name]),
        (evaluate_script.main, ["--model", name]),
        (evaluate_script.main, ["--json", name]),
        (evaluate_script.main, ["--report", name]),
        (energy.main, ["--model", name]),
        (energy.main, ["--config", name]),
        (convert_original.main, [name, "out"]),
        (convert_original.main, ["in", name]),
    ):
        assert sentence(main, arguments, capsys)


def test_a_link_to_itself_ends_in_one_sentence(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for option in ("--report", "--json", "--model"):
        assert "leads to itself" in sentence(evaluate_script.main, [option, tmp_path / "loop"], capsys)


def test_numbers_of_options_must_be_finite_and_at_most_the_largest_integer():
    assert number(1, kind=int)("2147483647") == 2**31 - 1
    for parse, wrong in ((number(1, kind=int), "9" * 23), (number(0), "inf"), (number(0), "1e400"), (number(0), "nan")):
        with pytest.raises(Exception, match="expected a number"):
            parse(wrong)
    assert file_name("a/b").name == "b"


# --- YAML


def bomb(levels: int) -> str:
    """Return YAML in which aliases of lists expand to 9 ** ``levels`` values."""
    names = "abcdefghijkl"
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{names[i]}: &{names[i]} [{','.join(['*' + names[i - 1]] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


BAD_YAML = {
    "aliases that explode": (bomb(9), "including those of aliases"),
    "an alias inside its anchor": ("model: &a [*a]", "used before its anchor ends"),
    "nested lists": ("[" * 100_000, "nests deeper"),
    "nested fields": ("model: " + "{a: " * 3000, "nests deeper"),
    "a wrong date": ("model: {vocab_size: 2024-99-99}", "month must be"),
    "a date": ("model: {eos_token_id: 2024-01-01}", "model.eos_token_id must be"),
    "a date as the name": ("name: 2024-01-01", "name must be"),
    "no int": ("model: {vocab_size: !!int abc}", "invalid literal"),
    "no bool": ("model: {recency: !!bool abc}", "expected YAML"),
    "no float": ("training: {lr: !!float abc}", "could not convert"),
    "5,000 digits": ("model: {vocab_size: " + "9" * 5000 + "}", "4300 digits"),
    "too large for a float": ("training: {lr: 1" + "0" * 400 + "}", "too large for a float"),
    "an expression": ("training: {lr: 10**30}", "training.lr must be float"),
    "a list as a number": ("training: {steps: [1]}", "training.steps must be int"),
    "bytes": ("model: {block: !!binary abcd}", "model.block must be"),
    "a Python object": ("model: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "a list as a key": ("? [a]\n: b", "unhashable"),
    "two documents": ("a: 1\n---\nb: 2", "single document"),
    "a NUL byte": ("a\0b", "special characters"),
    "no text": (b"\xff\xfe\x00", "not UTF-8"),
    "too long": ("x" * 3_000_000, "expected at most"),
    "nothing": ("", "expected the sections"),
    "a field of transformers": ("model: {is_encoder_decoder: true}", "model has no field is_encoder_decoder"),
    "a field twice": ("model: {vocab_size: 300, vocab_size: 400}", "the field vocab_size occurs twice"),
    "a section twice": ("training: {steps: 1}\ntraining: {lr: 0.1}", "the field training occurs twice"),
    "two merged mappings": ("model: {<<: {recency: true}, <<: {alpha: 1.0}}", "the field << occurs twice"),
    "a list as a section": ("model: []", "expected a mapping in the section model"),
    "false as a section": ("training: false", "expected a mapping in the section training"),
    "no text as a section": ("model: ''", "expected a mapping in the section model"),
    "a misspelt field": ("model: {refractory_step: 0}", "model has no field refractory_step"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_yaml_that_cannot_be_used_ends_in_one_sentence(name, tmp_path, capsys):
    content, message = BAD_YAML[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in sentence(train_script.main, ["--config", path, "--out", tmp_path / "runs"], capsys)


def test_aliases_within_the_limits_are_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {hidden_size: &width 64, intermediate_size: *width, n_clusters: 4}\ntraining: {lr: 1}")
    read = Settings.read(path)
    assert read.model["intermediate_size"] == 64
    assert isinstance(read.training.lr, float)


def test_a_merged_mapping_supplies_the_fields_that_a_mapping_does_not_have(tmp_path):
    """PyYAML itself gives 1 for ``y`` in ``c`` and ``d``."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: &c {<<: *b, x: 3}\nd: {<<: *b}\ne: {<<: [{z: 5}, *a, *c]}"
    )
    read = read_yaml(path, SettingsError)
    assert read["e"] == {"z": 5, "x": 1, "y": 1}  # the first mapping of a list takes precedence
    assert (read["b"], read["c"], read["d"]) == ({"x": 1, "y": 2}, {"x": 3, "y": 2}, {"x": 1, "y": 2})


def test_sections_without_fields_have_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model:\ntraining:\n")
    assert Settings.read(path).model == {}


PIECES = st.sampled_from(
    ["&a ", "*a", "[", "]", "{", "}", ": ", ", ", "\n", "- ", "? ", "!!int ", "!!bool ", "<<", "1", "x", "'"]
)


@given(st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=30).map("".join)))
@settings(max_examples=200, deadline=None)
@example("&a {<<: *a}")
def test_any_text_is_read_as_yaml_like_pyyaml_or_gives_one_short_sentence(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("yaml", numbered=True) / "any.yaml"
    path.write_text(content, encoding="utf-8", errors="replace")
    try:
        expected = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception:
        expected = None
    try:
        assert read_yaml(path, SettingsError) == expected or expected != expected
    except SettingsError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        assert len(str(error)) < 600  # noqa: PT017


# --- values of the model


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 2**31 - 1, "does not fit into the memory"),
        ("hidden_size", 2**31 - 4, "does not fit into the memory"),
        ("t_fast", 100_000_000, "t_fast must be at most"),
        ("max_position_embeddings", 2**31 - 1, "does not fit into the memory"),
        ("num_hidden_layers", 100_000, "num_hidden_layers must be at most"),
        ("v_reset", float("nan"), "v_reset must be finite"),
        ("alpha", float("inf"), "alpha must be finite"),
        ("cascade_gain", 1e300, "cascade_gain must be finite in float32"),
        ("threshold", "0.5", "threshold"),
        ("eos_token_id", 500, "eos_token_id must be less than vocab_size"),
        ("backend", "nonsense", "backend must be 'auto' or one of"),
        pytest.param(
            "backend",
            "cupy",
            "needs a CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CuPy's kernels can run"),
        ),
    ],
)
def test_a_model_that_cannot_be_built_gives_one_sentence(field, value, message, text, tmp_path, capsys):
    content = {"model": CONFIG["model"] | {field: value}, "training": CONFIG["training"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    arguments = ["--config", path, "--data", text, "--out", tmp_path / "runs"]
    assert message in sentence(train_script.main, arguments, capsys)
    if field != "max_position_embeddings":  # energy.py computes only two positions, which fit
        assert field in sentence(energy.main, ["--config", path, "--context", 2], capsys)


@pytest.mark.parametrize("field", ["return_dict", "backend"])
def test_a_saved_model_generates_with_return_dict_false_but_not_with_an_unavailable_backend(
    field, trained, tmp_path, capsys
):
    """The scripts override ``return_dict=False``, since they read outputs by name."""
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    content = json.loads((folder / "config.json").read_text()) | {"return_dict": False, "backend": "auto"}
    content |= {"backend": "cupy"} if field == "backend" else {}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "checksums.json").unlink(missing_ok=True)
    arguments = ["--model", folder, "--max-new-tokens", "2", "x"]
    if field == "return_dict":
        assert generate.main([str(a) for a in arguments]) == 0
    elif not torch.cuda.is_available():
        assert "needs a CUDA GPU" in sentence(generate.main, arguments, capsys)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokenizer_class", "RagTokenizer"), ("model_max_length", "x"), ("eos_token", ""), ("extra_special_tokens", 5)],
)
def test_a_tokenizer_that_loads_but_cannot_be_used_ends_in_one_sentence(field, value, trained, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    (folder / "checksums.json").unlink()
    assert sentence(generate.main, ["--model", folder, "x"], capsys)


# --- pipes, devices and sockets where a file is expected


def make_pipe(path):
    """Replace a file by a pipe that nobody writes to."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_model_folder_ends_in_one_sentence(name, trained, tmp_path, capsys):
    shutil.copytree(trained / "model", tmp_path / "model")
    make_pipe(tmp_path / "model" / name)
    for main in (generate.main, chat_script.main, evaluate_script.main, energy.main):
        assert "expected a regular file, got a pipe" in sentence(main, ["--model", tmp_path / "model"], capsys)


@pytest.mark.parametrize("name", ["run.json", "settings.yaml", "tokenizer/tokenizer.json", "position.json"])
def test_a_pipe_in_a_run_folder_ends_in_one_sentence(name, trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    checkpoint = max(run.glob("checkpoint-*"))
    make_pipe(checkpoint / name if name == "position.json" else run / name)
    assert sentence(train_script.main, ["--resume", run], capsys)


def test_a_pipe_among_the_events_of_a_run_raises(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    make_pipe(next((tmp_path / "run" / "tensorboard").rglob("events*")))
    with pytest.raises(CheckpointError, match="expected a regular file, got a pipe"):
        training_curves(tmp_path / "run")


def test_pipes_links_to_nothing_sockets_folders_and_devices_raise_when_read_as_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("pipe", "loop", "gone", "socket", ".", LONG, "a\0b", "/dev/zero", "/dev/stdin"):
            with pytest.raises(CheckpointError, match=r"regular file|cannot be read"):
                read_text(tmp_path / name, CheckpointError)


def test_a_run_whose_results_are_a_link_to_nothing_is_not_the_newest_model(tmp_path):
    for name in ("a-0001", "a-0002"):
        (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / "a-0001" / "results.json").write_text("{}")
    (tmp_path / "a-0002" / "results.json").symlink_to(tmp_path / "nothing")
    assert newest_model(tmp_path) == tmp_path / "a-0001" / "model"


def test_a_file_of_proc_that_has_no_content_yet_is_empty_text(tmp_path, monkeypatch):
    """A pipe without a writer, opened without blocking, reads as such a file."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("nordlm.reading.check_regular", lambda *_: None)
    writer = os.open(tmp_path / "pipe", os.O_RDWR)
    assert read_text(tmp_path / "pipe", CheckpointError) == ""
    os.close(writer)


# --- JSON


def test_json_with_a_field_twice_raises(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(CheckpointError, match="the field b occurs twice"):
        read_json(path, CheckpointError)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 5000, "[" * 60 + "]" * 60, "9" * 5000, "{", "NaN", "\ud800"]
)
def test_json_that_cannot_be_used_ends_in_one_sentence(content, trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    checkpoint = max(run.glob("checkpoint-*"))
    for path in (run / "run.json", checkpoint / "position.json", run / "results.json", run / "model" / "config.json"):
        original = path.read_bytes()
        path.write_text(content, encoding="utf-8", errors="surrogatepass")
        with pytest.raises(CheckpointError):
            read_json(path, CheckpointError)
        if path.name == "results.json":
            assert read_results(run) == {}
        elif path.name == "config.json":
            assert sentence(generate.main, ["--model", run / "model"], capsys)
        else:
            assert sentence(train_script.main, ["--resume", run, "--no-report"], capsys)
        path.write_bytes(original)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", [1]), ("unigram_loss", None), ("validation_loss", "x"), ("seed", True)]
)
def test_results_with_a_value_of_a_wrong_type_are_ignored(name, value, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    results = json.loads((trained / "results.json").read_text())
    (tmp_path / "run" / "results.json").write_text(json.dumps(results | {name: value}))
    assert read_results(trained) == results
    assert read_results(tmp_path / "run") == {}
    assert training_curves(tmp_path / "run")


def test_a_configuration_that_is_no_dictionary_ends_in_one_sentence(trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "model")
    for content in ("[]", "5", "null", '"x"', '{"model_type": 5}', '{"hidden_size": null}'):
        (tmp_path / "model" / "config.json").write_text(content)
        with pytest.raises(RecipeError):
            load_model(tmp_path / "model")


@pytest.mark.parametrize(
    "content",
    [
        {"num_beams": "x"},
        {"num_beams": 10**9},
        {"eos_token_id": "x"},
        {"forced_eos_token_id": 10**9},
        {"no_repeat_ngram_size": "x"},
        {"max_time": "x"},
        {"exponential_decay_length_penalty": [1]},
        {"min_p": "x"},
        {"force_words_ids": [[1]]},
        {"assistant_early_exit": 1},
        [],
    ],
)
@pytest.mark.filterwarnings("ignore:.*is damaged, or was changed")
def test_wrong_values_for_generation_end_in_one_sentence(content, trained, tmp_path, capsys):
    shutil.copytree(trained / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(content))
    assert sentence(generate.main, ["--model", tmp_path / "model", "--max-new-tokens", "3", "x"], capsys)


# --- names in the model card


def test_the_model_card_escapes_markup_in_the_name_of_a_text():
    model = NordForCausalLM(NordConfig(**CONFIG["model"]))
    name = "a|b\n# x <script>y</script> [z](http://w) `c` \x1b[31m"
    numbers = dict.fromkeys(("tokens", "validation_loss", "bits_per_byte", "unigram_loss", "bigram_loss", "seed"), 1)
    results = numbers | {"text": name, "firing_rates": {}}
    card = model_card(model, f"Converted from {name}, with", results, {"data": "x\n```\n# y"})
    assert "<script>" not in card
    assert "\x1b" not in card
    assert "\n# x" not in card
    assert "](http://w)" not in card
    assert r"| training text | a\|b \# x" in card
    assert "\n````yaml\n" in card  # the fence is longer than the one in the settings
    assert escape("/home/me/books.txt") == "/home/me/books.txt"
