"""Files with flipped bits or cut ends: reading raises one sentence, or gives the result of the undamaged file."""

import json
import os
import random
import shutil
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import convert_original
import h5py
import nir
import pytest
import torch
import train as train_script
from helpers import DATA, fire_easily
from nordlm.data.tokenizer import open_tokenizer
from nordlm.errors import RecipeError
from nordlm.inference.loading import load_model, open_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from nord_snn.integrations.nir import export_to_nir, extension, import_from_nir
from nord_snn.layers import SpikingFeedForward
from nord_snn.learning_rules import PlasticPart, load_plastic, save_plastic
from nord_snn.models.nord import load_original
from nord_snn.neurons import AssociativeLIFNode

SENTENCES = ["the neuron fires and rests", "Grüße 你好 <|endoftext|>", " a  b\n\tc"]
SECONDS = 20


class Subject(NamedTuple):
    """A folder whose files are damaged, and a function that uses them.

    Attributes:
        folder: folder of all its files.
        use: returns all results of the folder, to be compared.
        errors: types of the errors that are expected.
        unread: endings of files that ``use`` does not read.
    """

    folder: Path
    use: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    unread: tuple[str, ...] = ()


@torch.no_grad()
def logits_of(model: Any) -> list[Any]:
    """Return the logits of two texts, and the settings of generation."""
    ids = torch.arange(2 * 12).view(2, 12) % model.config.vocab_size
    generation = model.generation_config
    return [model(input_ids=ids).logits, generation.eos_token_id, generation.bos_token_id, generation.temperature]


def tokens_of(tokenizer: Any) -> list[Any]:
    """Return ids and decoded texts."""
    ids = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in SENTENCES]
    return [ids, [tokenizer.decode(row) for row in ids], tokenizer.eos_token_id, len(tokenizer)]


def model_folder(trained: Path, folder: Path) -> Subject:
    """Return the folder of a finished model."""
    shutil.copytree(trained / "model", folder)

    def use(path: Path) -> list[Any]:
        model, tokenizer = open_model(path)
        return [*logits_of(model), *tokens_of(tokenizer)]

    return Subject(folder, use, (RecipeError,))


def converted_folder(trained: Path, folder: Path) -> Subject:
    """Return a converted published checkpoint."""
    convert_original.main([str(DATA / "tiny_checkpoint.pt"), str(folder)])
    return Subject(folder, lambda path: logits_of(load_model(path)), (RecipeError,))


def converted_folder_with_auto_classes(trained: Path, folder: Path) -> Subject:
    """Return a converted published checkpoint, loaded by transformers alone."""
    convert_original.main([str(DATA / "tiny_checkpoint.pt"), str(folder)])

    def use(path: Path) -> list[torch.Tensor]:
        return logits_of(AutoModelForCausalLM.from_pretrained(path))

    # Any error of transformers will do, but no other result.
    return Subject(folder, use, (Exception,))


def published_checkpoint(trained: Path, folder: Path) -> Subject:
    """Return a published checkpoint."""
    folder.mkdir()
    shutil.copy(DATA / "tiny_checkpoint.pt", folder / "published.pt")
    return Subject(folder, lambda path: logits_of(load_original(path / "published.pt")), (ValueError,))


def plastic_file(trained: Path, folder: Path) -> Subject:
    """Return a file of plastic parts: weight changes of a learning rule."""
    folder.mkdir()
    torch.manual_seed(0)
    synapse = nn.Linear(6, 20)
    part = PlasticPart(synapse)
    part.apply(torch.randn(3, 6), torch.tensor([1, 4, 17]))
    save_plastic(folder / "mine.safetensors", {"fc": part})
    part.revert()

    def use(path: Path) -> torch.Tensor:
        try:
            load_plastic(path / "mine.safetensors", {"fc": part})
            return synapse.weight.detach().clone()
        finally:
            part.revert()

    return Subject(folder, use, (ValueError, OSError))


def tokenizer_folder(trained: Path, folder: Path) -> Subject:
    """Return the tokenizer of a run."""
    shutil.copytree(trained / "tokenizer", folder)
    return Subject(folder, lambda path: tokens_of(open_tokenizer(str(path))), (RecipeError,))


def nir_file(trained: Path, folder: Path) -> Subject:
    """Return an exported network."""
    folder.mkdir()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 8), AssociativeLIFNode(8, n_clusters=4, step_mode="m"), SpikingFeedForward(8, 16), nn.Linear(8, 3)
    )
    fire_easily(net)
    x_seq = 2 * torch.rand(6, 2, 5, generator=torch.Generator().manual_seed(1))
    nir.write(folder / "net.nir", export_to_nir(net, x_seq, extension=True))

    def use(path: Path) -> torch.Tensor:
        with torch.no_grad():
            return import_from_nir(path / "net.nir")(x_seq)

    return Subject(folder, use, (ValueError, OSError, TypeError))


def run_folder(trained: Path, folder: Path) -> Subject:
    """Return the folder of a run, which is resumed."""
    shutil.copytree(trained, folder)

    def use(path: Path) -> list[Any]:
        status = train_script.main(["--resume", str(path), "--no-report"])
        if status == 1:
            raise RecipeError("see standard error")
        results = json.loads((path / "results.json").read_text())
        names = ("validation_loss", "unigram_loss", "firing_rates", "steps", "parameters", "tokens")
        return [load_file(path / "model" / "model.safetensors"), *(results[name] for name in names)]

    return Subject(folder, use, (RecipeError,), unread=("README.md",))


SUBJECTS = {
    make.__name__: make
    for make in (
        model_folder,
        converted_folder,
        converted_folder_with_auto_classes,
        published_checkpoint,
        plastic_file,
        tokenizer_folder,
        nir_file,
        run_folder,
    )
}


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise KeyboardInterrupt, which no script catches, after 20 seconds."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt(f"it took more than {SECONDS} seconds")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def damage(file: Path, generator: random.Random) -> str:
    """Flip one to three bits of a file, or cut its end off; return a description of the damage."""
    content = bytearray(file.read_bytes())
    if generator.random() < 0.25:
        length = generator.randrange(len(content))
        file.write_bytes(content[:length])
        return f"{file.name} cut to {length} of {len(content)} bytes"
    places = [generator.randrange(8 * len(content)) for _ in range(generator.choice((1, 1, 1, 2, 3)))]
    for place in places:
        content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    return f"{file.name} with bits {places} flipped"


def same(one: Any, other: Any) -> bool:
    """Return whether two results are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return one == other


def fuzz(subject: Subject, copy: Path, n_cases: int, seed: int) -> tuple[int, int]:
    """Damage and use copies of a subject; return the number that raised or warned, and the number with the expected result."""
    shutil.copytree(subject.folder, copy)
    expected = subject.use(copy)
    refused = harmless = 0
    for case in range(n_cases):
        shutil.rmtree(copy)
        shutil.copytree(subject.folder, copy)
        generator = random.Random(f"{seed} {case}")
        files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
        description = damage(
            generator.choice([file for file in files if not file.name.endswith(subject.unread)]), generator
        )
        try:
            with time_limit(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = subject.use(copy)
        except subject.errors:
            refused += 1
        else:
            warned = any("is damaged, or was changed" in str(warning.message) for warning in caught)
            assert warned or same(result, expected), (
                f"another result without error or warning: {description} (case {case})"
            )
            refused, harmless = refused + warned, harmless + (not warned)
    return refused, harmless


@pytest.mark.parametrize("name", SUBJECTS)
def test_damaged_files_are_refused_or_harmless(name, trained, tmp_path, capsys):
    subject = SUBJECTS[name](trained, tmp_path / "whole")
    n_cases = {"run_folder": 4, "nir_file": 8, "converted_folder_with_auto_classes": 5, "converted_folder": 8}
    refused, _ = fuzz(subject, tmp_path / "copy", n_cases.get(name, 20), seed=0)
    assert refused
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_thousand_damaged_files_are_refused_or_harmless(name, trained, tmp_path, capsys):
    """One bit or a few in a thousand copies: 125 of each kind."""
    subject = SUBJECTS[name](trained, tmp_path / "whole")
    refused, harmless = fuzz(subject, tmp_path / "copy", 125, seed=1)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    with capsys.disabled():
        print(f"\n{name}: {refused} refused, {harmless} harmless")


def test_intentionally_changed_weights_load_after_checksums_json_is_removed(trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["norm.weight"] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"damaged, or was changed after .* remove checksums.json"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "checksums.json").unlink()
    assert torch.equal(load_model(tmp_path / "model").norm.weight, weights["norm.weight"])


# --- files without checksums, and further checks


def changed_checkpoint(tmp_path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a published checkpoint after a change to its content."""
    content = torch.load(DATA / "tiny_checkpoint.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


def set_weight(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change that sets a tensor of a checkpoint."""
    return lambda content: content["model_state_dict"].update({name: value})


BAD_CHECKPOINTS = {
    "NaN": (lambda c: c["model_state_dict"]["encoder.temporal_proj.weight"].fill_(float("nan")), "that are NaN"),
    "infinite": (
        lambda c: c["model_state_dict"]["lm_head.weight"][0].fill_(float("inf")),
        "of .* that are NaN or infinite",
    ),
    "integers": (lambda c: c["model_state_dict"].update({"lm_head.weight": torch.ones(96, 32).long()}), "torch.int64"),
    "two names": (
        lambda c: c["model_state_dict"].update({"norm.weight": c["model_state_dict"]["readout_norm.weight"].clone()}),
        "two names of the same parameter",
    ),
    "no tensor": (set_weight("lm_head.weight", [1.0]), "must be the name of a dense tensor, got list"),
    "sparse": (set_weight("lm_head.weight", torch.ones(96, 32).to_sparse()), "dense tensor"),
    "a number as a name": (lambda c: c["model_state_dict"].update({5: torch.ones(1)}), "must be the name of"),
    "a vast vocabulary": (
        lambda c: c["config"].update(vocab_size=2**31 - 1),
        "does not fit into the memory|size mismatch",
    ),
    "a fraction": (lambda c: c["config"].update(n_layers=1.5), "num_hidden_layers"),
    "a tensor in the configuration": (
        lambda c: c["config"].update(n_layers=torch.ones(1)),
        "must be a number, got Tensor",
    ),
    "a list for the configuration": (lambda c: c.update(config=[1]), "to be dictionaries"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_published_checkpoint_with_impossible_contents_raises(name, tmp_path):
    change, message = BAD_CHECKPOINTS[name]
    with pytest.raises(ValueError, match=message), time_limit():
        load_original(changed_checkpoint(tmp_path, change))


@pytest.mark.quick
def test_a_published_checkpoint_is_compared_with_the_checksums_of_its_zip_archive(tmp_path):
    content = bytearray((DATA / "tiny_checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    assert torch.load(tmp_path / "flipped.pt", weights_only=True)  # torch does not notice the change
    with pytest.raises(ValueError, match="differs from its checksum"):
        load_original(tmp_path / "flipped.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 10_000)
    with pytest.raises(ValueError, match="damaged"):
        load_original(tmp_path / "packed.pt")


@pytest.mark.quick
def test_a_plastic_file_of_an_earlier_release_without_digest_is_read(tmp_path):
    torch.manual_seed(0)
    part = PlasticPart(nn.Linear(4, 3))
    part.apply(torch.rand(3, 4))
    save_plastic(tmp_path / "new.safetensors", {"fc": part})
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "new.safetensors")
    learned = part.weight.detach().clone()
    earlier = {"format": "nord_snn plastic 1", "trained": metadata["trained"]}
    save_file(tensors, tmp_path / "old.safetensors", earlier)
    part.revert()
    load_plastic(tmp_path / "old.safetensors", {"fc": part})
    assert torch.equal(part.weight, learned)
    tensors["fc/delta"][0, 0] *= 1 + 2**-20
    save_file(tensors, tmp_path / "damaged.safetensors", metadata)
    part.revert()
    with pytest.raises(ValueError, match="the changes are damaged"):
        load_plastic(tmp_path / "damaged.safetensors", {"fc": part})
    assert part.delta is None


@pytest.mark.quick
def test_a_pipe_in_place_of_a_file_raises_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    part = PlasticPart(nn.Linear(4, 3))
    part.apply(torch.ones(3, 4))
    with time_limit():
        with pytest.raises(ValueError, match="expected a new file or a file of plastic weights"):
            save_plastic(tmp_path / "pipe", {"fc": part})
        for read in (lambda path: load_plastic(path, {"fc": part}), import_from_nir):
            with pytest.raises(FileNotFoundError, match="no such file"):
                read(tmp_path / "pipe")
        with pytest.raises(ValueError, match="no such file"):
            load_original(tmp_path / "pipe")


@pytest.mark.quick
def test_a_checkpoint_that_a_pipe_replaces_after_the_check_raises_without_waiting(tmp_path, monkeypatch):
    """Some files of /proc block as well, though they are regular."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    with pytest.raises(ValueError, match="the file is empty"), time_limit():
        load_original(tmp_path / "pipe")
    with pytest.raises(ValueError, match="cannot be read"):
        load_original(tmp_path)


@pytest.mark.quick
def test_a_nir_file_that_refers_to_other_files_raises(tmp_path):
    subject = nir_file(tmp_path, tmp_path / "whole")
    path = subject.folder / "net.nir"
    shutil.copy(path, tmp_path / "other.nir")
    with h5py.File(path, "r+") as file:
        del file["node/nodes/_0"]
        file["node/nodes/_0"] = h5py.ExternalLink(str(tmp_path / "other.nir"), "node/nodes/_0")
    with pytest.raises(ValueError, match="_0 is a link"):
        import_from_nir(path)
    shutil.copy(tmp_path / "other.nir", path)
    (tmp_path / "secret").write_bytes(b"12345678" * 5)
    with h5py.File(path, "r+") as file:
        group = file["node/nodes/_0"]
        del group["weight"]
        group.create_dataset("weight", (8, 5), "u1", external=[(str(tmp_path / "secret"), 0, 40)])
    with pytest.raises(ValueError, match="the data of weight is not in the file"):
        import_from_nir(path)


@pytest.mark.quick
def test_a_changed_number_in_a_nir_file_raises(tmp_path):
    subject = nir_file(tmp_path, tmp_path / "whole")
    with h5py.File(subject.folder / "net.nir", "r+") as file:
        file["node/metadata/dt"][()] = 2e-4
    with pytest.raises(ValueError, match="damaged, or was changed after the export"):
        import_from_nir(subject.folder / "net.nir")


def test_a_nir_file_that_hdf5_never_finishes_reading_raises(tmp_path, monkeypatch):
    """HDF5 does so for a circular list of strings. The file is first read in another process, which is killed after a time."""
    monkeypatch.setattr(extension, "READ_ALL", "while True: pass")
    monkeypatch.setattr(extension, "SECONDS", 0.5)
    subject = nir_file(tmp_path, tmp_path / "whole")
    with pytest.raises(ValueError, match="reading it did not end within"):
        import_from_nir(subject.folder / "net.nir")
