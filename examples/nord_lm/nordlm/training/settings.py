"""Read the settings of model and training from YAML and the command line."""

import argparse
import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub.errors import StrictDataclassError

from nordlm.cli import file_name, shorten
from nordlm.errors import SettingsError
from nordlm.reading import exists, read_yaml
from nordlm.training.checkpoints import check_seal, read_json, write_text

if TYPE_CHECKING:
    from nord_snn.models.nord import NordConfig

__all__ = [
    "Settings",
    "TrainingSettings",
    "parse_arguments",
    "read_config",
    "read_run",
    "settings_from",
]

CONFIGS = Path(__file__).parents[1] / "configs"


def _config_class() -> "type[NordConfig]":
    """Import the configuration late, so that ``--help`` does not load transformers."""
    from nord_snn.models.nord import NordConfig

    return NordConfig


def _setting(default: Any, description: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": description, **more})


@dataclass(frozen=True)
class TrainingSettings:
    """Training settings. Every field is an option of ``train.py``; learning-rate defaults are those of the published model."""

    data: str | None = _setting(None, "text file, folder or dataset name (default: the documentation inside CPython)")
    validation_data: str | None = _setting(None, "separate held-out text (default: part of the data, selected by hash)")
    held_out: float = _setting(0.05, "fraction of the documents that is held out")
    tokenizer: str | None = _setting(
        None, "folder or Hugging Face name of a tokenizer (default: train a byte-level BPE on the text)"
    )
    block_size: int | None = _setting(None, "sequence length in tokens (default: the model's max_position_embeddings)")
    steps: int = _setting(1000, "training steps")
    batch_size: int = _setting(4, "sequences in a micro-batch of each process")
    grad_accum: int = _setting(12, "micro-batches in a training step")
    lr: float = _setting(6e-4, "peak learning rate")
    min_lr_ratio: float = _setting(0.1, "final learning rate of the cosine, as a fraction of the peak")
    warmup_steps: int = _setting(100, "training steps of linear warm-up")
    weight_decay: float = _setting(0.05, "weight decay of AdamW, on matrices only")
    beta1: float = _setting(0.9, "beta1 of AdamW")
    beta2: float = _setting(0.95, "beta2 of AdamW")
    max_grad_norm: float = _setting(1.0, "maximum norm of the gradient")
    matmul_precision: str = _setting(
        "medium",
        "precision of float32 matrix products; below highest the device may use TF32 (GPU) or oneDNN's kernels (CPU)",
        choices=("highest", "high", "medium"),
    )
    mixed_precision: str = _setting("no", "dtype of autocast; no: without autocast", choices=("no", "bf16", "fp16"))
    gradient_checkpointing: bool = _setting(
        False, "store only the input of each transformer block and recompute the rest: less memory, more time"
    )
    compile: bool = _setting(False, "compile each transformer block with torch.compile")
    eval_every: int = _setting(500, "training steps between evaluations")
    eval_blocks: int = _setting(
        64, "held-out sequences in each evaluation during training; the final evaluation uses up to 1024"
    )
    save_every: int = _setting(500, "training steps between checkpoints")
    log_every: int = _setting(10, "training steps between two lines of the log")
    seed: int = _setting(0, "seed of initial weights and data order")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "grad_accum", "eval_every", "eval_blocks", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) >= 2**31:
                raise SettingsError(f"{name} must be less than 2^31, got {getattr(self, name)}")
        for name in ("data", "validation_data", "tokenizer"):
            if any("\ud800" <= character <= "\udfff" for character in getattr(self, name) or ""):
                raise SettingsError(f"{name} must be valid UTF-8, got {shorten(ascii(getattr(self, name)))}")
        if self.block_size is not None and self.block_size < 2:
            raise SettingsError(f"block_size must be at least 2, got {self.block_size}")
        for name in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps", "seed"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"{name} must be at least 0, got {getattr(self, name)}")
            if getattr(self, name) >= 2**32:
                raise SettingsError(f"{name} must be less than 2^32, got {getattr(self, name)}")
        for name in ("held_out", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise SettingsError(f"min_lr_ratio must be from 0 to 1, got {self.min_lr_ratio}")
        if self.matmul_precision not in ("highest", "high", "medium"):
            raise SettingsError(f"matmul_precision must be highest, high or medium, got {self.matmul_precision!r}")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise SettingsError(f"mixed_precision must be no, bf16 or fp16, got {self.mixed_precision!r}")


@dataclass(frozen=True)
class Settings:
    """All settings of a run: its name, the ``NordConfig`` fields that differ from the defaults, and the training."""

    name: str
    model: dict[str, Any]
    training: TrainingSettings

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """Read a YAML file with the sections ``model`` and ``training``.

        Raises:
            SettingsError: the file is missing, is not such a YAML file, or has an unknown field.
        """
        content = read_yaml(path, SettingsError)
        if not isinstance(content, dict) or not set(content) <= {"name", "model", "training"}:
            raise SettingsError(f"{path}: expected the sections model and training")
        name = content.get("name", path.stem)
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise SettingsError(f"{path}: name must be made of letters, digits, '-', '_' and '.', got {name!r}")
        sections = (content.get(name, {}) for name in ("model", "training"))
        model, training = ({} if section is None else section for section in sections)  # None: a header without fields
        _check_names(path, "training", training, {f.name for f in dataclasses.fields(TrainingSettings)})
        _check_names(path, "model", model, set(_config_class().__annotations__))
        for field_name, value in model.items():
            if not isinstance(value, int | float | str | list | None):  # JSON has no dates, for example
                raise SettingsError(
                    f"{path}: model.{field_name} must be a number, a string or a list, got {shorten(repr(value))}"
                )
        return cls(name, model, TrainingSettings(**_typed(path, training)))

    def write(self, path: Path) -> None:
        """Write the YAML that :meth:`read` reads."""
        content = {"name": self.name, "model": self.model, "training": dataclasses.asdict(self.training)}
        write_text(path, yaml.safe_dump(content, sort_keys=False))

    def model_config(self, **changes: Any) -> "NordConfig":
        """Return the model's configuration, with ``changes`` to its fields.

        Raises:
            SettingsError: sizes are inconsistent, or a value has the wrong type.
        """
        try:
            return _config_class()(**{**self.model, **changes})
        except (StrictDataclassError, ValueError, TypeError, OverflowError) as error:
            raise SettingsError(f"model: {shorten(str(error))}") from error

    def digest(self) -> str:
        """Return a hash of all settings."""
        return hashlib.blake2b(json.dumps(dataclasses.asdict(self)).encode(), digest_size=16).hexdigest()

    @property
    def block_size(self) -> int:
        """Return the number of tokens in a sequence."""
        longest = self.model_config().max_position_embeddings
        size = self.training.block_size or longest
        if size > longest:
            raise SettingsError(f"block_size {size} is longer than the model's max_position_embeddings of {longest}")
        return size


def _check_names(path: Path, section: str, content: Any, known: set[str]) -> None:
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected a mapping in the section {section}")
    if unknown := sorted(str(name) for name in set(content) - known):
        raise SettingsError(f"{path}: {section} has no field {', '.join(unknown)}")


def _typed(path: Path, training: dict[str, Any]) -> dict[str, Any]:
    """Check the types of the fields of a section; return the fields, with integers converted where a float is expected."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(TrainingSettings):
        value = training.get(f.name, f.default)
        kind = _kind(f)
        fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if not fits and not (value is None and f.default is None):
            raise SettingsError(f"{path}: training.{f.name} must be {kind.__name__}, got {shorten(repr(value))}")
        try:
            values |= {f.name: kind(value) if kind is float else value} if f.name in training else {}
        except OverflowError as error:
            raise SettingsError(f"{path}: training.{f.name} is too large for a float") from error
    return values


def _kind(setting: "dataclasses.Field[Any]") -> type:
    """Return the type of a setting. Of the settings with default None, only block_size is not a string."""
    if setting.default is not None:
        return type(setting.default)
    return int if setting.name == "block_size" else str


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of ``train.py``; the attribute ``changes`` has the training fields that are given."""
    parser = argparse.ArgumentParser(
        description="Train a Nord spiking language model. Without arguments: config tiny on the documentation inside CPython.",
        argument_default=argparse.SUPPRESS,
    )
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    parser.add_argument("--config", help=f"{names}, or a YAML file (default: tiny)")
    parser.add_argument(
        "--out", type=file_name, default=Path("runs"), help="parent of the numbered folder of the run (default: runs)"
    )
    parser.add_argument("--resume", type=file_name, default=None, metavar="RUN", help="resume the run in this folder")
    parser.add_argument(
        "--no-resonance",
        action="store_true",
        help="train the control without resonance, whose positions do not exchange information",
    )
    parser.add_argument(
        "--no-report", dest="with_report", action="store_false", default=True, help="do not write the report at the end"
    )
    group = parser.add_argument_group("training (override the config)")
    for f in dataclasses.fields(TrainingSettings):
        option, description = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if _kind(f) is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=description)
        else:
            group.add_argument(option, type=_kind(f), choices=f.metadata.get("choices"), help=description)
    options = parser.parse_args(arguments)
    fields = {f.name for f in dataclasses.fields(TrainingSettings)}
    changes = {name: value for name, value in vars(options).items() if name in fields}
    options.changes = changes | absolute_paths(changes)
    return options


def absolute_paths(training: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are existing paths, as absolute paths, so that a run can be resumed from any directory."""
    paths = {name: training.get(name) for name in ("data", "validation_data", "tokenizer")}
    return {name: str(Path(value).resolve()) for name, value in paths.items() if value and exists(value)}


def settings_from(options: argparse.Namespace) -> Settings:
    """Return the settings of a new run, or the unchanged settings of the run to resume.

    Raises:
        SettingsError: the config does not exist or is not valid, or an option contradicts the run to resume.
    """
    if options.resume is not None:
        return _resumed(options)
    settings = read_config(getattr(options, "config", "tiny"))
    model = settings.model | ({"resonance": False} if hasattr(options, "no_resonance") else {})
    name = settings.name + ("-no-resonance" if hasattr(options, "no_resonance") else "")
    if model.get("dense"):
        raise SettingsError("train.py does not train a dense model, which has no neurons: use compare.py")
    training = dataclasses.replace(settings.training, **options.changes)
    return Settings(name, model, dataclasses.replace(training, **absolute_paths(dataclasses.asdict(training))))


def read_config(name: str) -> Settings:
    """Read a config from ``configs/`` by its name, or a YAML file.

    Raises:
        SettingsError: the config does not exist or is not valid.
    """
    return Settings.read(_config_path(name))


def _config_path(name: str) -> Path:
    builtin = CONFIGS / f"{name}.yaml"
    if exists(builtin):
        return builtin
    if not exists(name):
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise SettingsError(f"--config {shorten(name)}: expected one of {known}, or a file")
    return Path(name)


def read_run(run: Path) -> dict[str, Any]:
    """Read ``run.json``: name and fingerprint of the text, digests of settings and tokenizer, number of processes.

    Files of earlier releases have no tokenizer and no number of processes.
    """
    path = run / "run.json"
    return check_seal(path, read_json(path), unsealed={"text", "fingerprint", "settings"})


def _resumed(options: argparse.Namespace) -> Settings:
    run = options.resume
    if not (run / "settings.yaml").is_file():
        raise SettingsError(f"--resume {run}: expected a run of train.py, settings.yaml is missing")
    settings = Settings.read(run / "settings.yaml")
    if settings.digest() != read_run(run)["settings"]:
        raise SettingsError(f"{run / 'settings.yaml'}: changed since the run started, or is damaged")
    for name, value in options.changes.items():
        if value != (initial := getattr(settings.training, name)):
            raise SettingsError(
                f"--resume {run}: the run started with {name} = {initial} and cannot resume with {value}"
            )
    if hasattr(options, "no_resonance") and settings.model.get("resonance", True):
        raise SettingsError(f"--resume {run}: the run started with resonance and cannot resume without it")
    if hasattr(options, "config"):
        requested = read_config(options.config).model_config().to_dict()
        saved = settings.model_config().to_dict()
        names = [name for name in saved if saved[name] != requested[name] and name != "resonance"]
        differing = [f"{name} = {saved[name]}, not {requested[name]}" for name in names]
        if differing:
            raise SettingsError(f"--resume {run}: is a run of another model ({', '.join(differing[:3])})")
    return settings
