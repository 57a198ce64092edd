"""Set up, save and restore a training run."""

import math
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list
from transformers import PreTrainedTokenizerBase

from nord_snn._compat.accelerate import reset_accumulation
from nord_snn.models.nord import NordForCausalLM
from nordlm.data.corpus import BASELINE_TOKENS, Corpus, SequenceDataset, load_corpus, split
from nordlm.data.sources import Documents, read_documents
from nordlm.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from nordlm.errors import CheckpointError, DataError, DivergedError, SettingsError
from nordlm.files import clean_up, create_numbered, locked, move_into_place, temporary_path, write_error, write_json
from nordlm.training.building import check_settings
from nordlm.training.checkpoints import (
    check_digests,
    check_seal,
    checkpoint_step,
    damaged,
    differing_files,
    digests,
    latest_checkpoint,
    read_json,
    remove_old_checkpoints,
    seal,
)
from nordlm.training.model_card import parameter_counts
from nordlm.training.processes import in_all_processes, on_main_process
from nordlm.training.progress import TrainingProgress
from nordlm.training.settings import Settings, TrainingSettings, read_run

__all__ = [
    "Position",
    "Run",
    "create_run_folder",
    "diverged",
    "lock_run",
    "make_accelerator",
    "prepare_text",
    "print_setup",
    "restore",
    "save",
]

#: Variables of the environment that accelerate and torch.distributed read.
LAUNCHER_VARIABLES = ("ACCELERATE_", "FSDP_", "LOCAL_RANK", "MASTER_", "RANK", "WORLD_SIZE")


@dataclass
class Position:
    """Progress of training. Together with the seed it determines all later training steps.

    Attributes:
        step: number of completed training steps.
        epoch: number of completed passes over the text.
        batches: number of micro-batches used in this epoch.
        tokens: training tokens, summed over all processes.
        seconds: time spent in training steps.
    """

    step: int = 0
    epoch: int = 0
    batches: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """The objects of a run that stay the same during training.

    Attributes:
        accelerator: device, precision and process group.
        settings: settings of model and training.
        tokenizer: the tokenizer.
        corpus: training and held-out sequences.
        folder: folder of the run.
        progress: display on the terminal.
    """

    accelerator: Accelerator
    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    folder: Path
    progress: TrainingProgress

    @staticmethod
    def progress_for(options: TrainingSettings, accelerator: Accelerator) -> TrainingProgress:
        """Return a progress display, visible on the first process of each machine."""
        return TrainingProgress(options.steps, visible=accelerator.is_local_main_process)


def make_accelerator(settings: Settings, out: Path) -> Accelerator:
    """Set up device, precision, accumulation and logging.

    Raises:
        SettingsError: the device does not support the precision, or an environment variable of accelerate has a value that
            this installation does not support.
    """
    options = settings.training
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise SettingsError(
            f"ACCELERATE_DYNAMO_BACKEND={backend}: expected no, since --compile is the setting that compiles; unset it"
        )
    try:
        return Accelerator(
            mixed_precision=options.mixed_precision,
            # Accumulate across the end of an epoch, so that every training step has grad_accum micro-batches.
            gradient_accumulation_plugin=GradientAccumulationPlugin(options.grad_accum, sync_with_dataloader=False),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed),
            step_scheduler_with_optimizer=False,
            log_with="tensorboard",
            project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
        )
    except Exception as error:  # wrong precisions or variables and missing libraries raise many types of exceptions
        reason = " ".join(str(error).split())[:300]
        variables = ", ".join(sorted(name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)))
        cause = f"the environment has {variables}" if variables else f"mixed_precision {options.mixed_precision}"
        raise SettingsError(f"accelerate cannot be set up ({reason}): {cause}") from error


def prepare_text(
    accelerator: Accelerator, settings: Settings, resume: Path | None
) -> tuple[PreTrainedTokenizerBase, Corpus]:
    """Load or train the tokenizer, and load the corpus; write no file."""
    options, vocab_size = settings.training, settings.model_config().vocab_size

    def read() -> tuple[Documents, Documents | None, PreTrainedTokenizerBase | None]:
        check_settings(settings, accelerator.device.type)
        documents = read_documents(options.data)
        validation = None if options.validation_data is None else read_documents(options.validation_data)
        tokenizer = None
        if resume is not None:
            check_tokenizer(resume)
            tokenizer = load_tokenizer(str(resume / "tokenizer"), vocab_size)
        elif options.tokenizer is not None:
            tokenizer = load_tokenizer(options.tokenizer, vocab_size)
        elif accelerator.is_main_process:
            texts, _ = split(documents, 0.0 if validation else options.held_out)
            tokenizer = train_tokenizer(texts(), vocab_size)
        return documents, validation, tokenizer

    documents, validation, tokenizer = in_all_processes(accelerator, read)
    if resume is None and options.tokenizer is None:
        tokenizer = broadcast_object_list([tokenizer])[0]

    def load() -> Corpus:
        corpus = load_corpus(documents, tokenizer, settings.block_size, options.held_out, validation)
        n_sequences = len(corpus.sample) // settings.block_size
        batch = options.batch_size * accelerator.num_processes
        if n_sequences < batch and len(corpus.sample) < BASELINE_TOKENS:
            raise DataError(
                f"{corpus.name} has {n_sequences} sequences, less than one batch of {batch}: "
                "give more text, a smaller --batch-size or a smaller --block-size"
            )
        return corpus

    return tokenizer, in_all_processes(accelerator, load)


def check_tokenizer(run: Path) -> None:
    """Raise CheckpointError if a file of the run's tokenizer has changed since the run started."""
    expected = read_run(run).get("tokenizer")  # missing in runs of earlier releases
    if expected is not None and (changed := differing_files(run / "tokenizer", expected)):
        raise CheckpointError(f"{run / 'tokenizer'}: changed since the run started, or damaged ({', '.join(changed)})")


def create_run_folder(
    accelerator: Accelerator, settings: Settings, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, out: Path
) -> Path:
    """Create the folder of a new run on the main process and return its path on every process."""

    def write(folder: Path) -> None:
        settings.write(folder / "settings.yaml")
        save_tokenizer(tokenizer, folder / "tokenizer")
        metadata = {
            "text": corpus.name,
            "fingerprint": corpus.fingerprint,
            "settings": settings.digest(),
            "tokenizer": digests(folder / "tokenizer"),
            "processes": accelerator.num_processes,
        }
        write_json(folder / "run.json", seal(metadata))

    folder = on_main_process(accelerator, lambda: create_numbered(out, settings.name, write))
    return broadcast_object_list([folder])[0]


def lock_run(stack: ExitStack, run: Path, accelerator: Accelerator, progress: TrainingProgress) -> None:
    """Lock a run until ``stack`` is closed, and delete temporary files of killed processes in its folder.

    Raises:
        CheckpointError: another process trains this run.
    """

    def lock() -> None:
        refusal = f"{run}: another process is training this run; wait for its end, or stop it"
        stack.enter_context(locked(run / "run.json", refusal, lambda sentence: progress.say(f"warning: {sentence}")))
        clean_up(run)

    on_main_process(accelerator, lock)


def print_setup(
    progress: TrainingProgress,
    settings: Settings,
    model: NordForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
) -> None:
    """Print the text, the size of the model and all notes before training."""
    if settings.training.warmup_steps > settings.training.steps:
        progress.say("note: the warm-up is longer than the run, so the peak learning rate is not reached")
    for note in corpus.notes():
        progress.say(f"note: {note}")
    sequences = f"{len(corpus.train):,} sequences" if isinstance(corpus.train, SequenceDataset) else "a stream"
    progress.say(
        f"text {corpus.name}: {sequences} to train on, {len(corpus.validation):,} held out, "
        f"{corpus.bytes_per_token:.2f} bytes per token, vocabulary {len(tokenizer):,}"
    )
    total, without_vocabulary = parameter_counts(model)
    progress.say(f"model of {total:,} parameters, {without_vocabulary:,} without embedding and head")


def diverged(what: str) -> DivergedError:
    """Return the error to raise in all processes if training diverged."""
    error = DivergedError(
        f"{what}; nothing more is saved, earlier checkpoints are complete: start again with a lower --lr"
    )
    error.shared = True
    return error


def save(run: Run, position: Position, model: torch.nn.Module) -> None:
    """Write a checkpoint and remove old ones. All processes write; the main process moves the folder into place.

    Raises:
        CheckpointError: the checkpoint could not be written; earlier ones are unchanged.
        DivergedError: a weight is NaN or infinite; nothing is written.
    """
    accelerator = run.accelerator
    folder = run.folder / f"checkpoint-{position.step:06d}"
    temporary = temporary_path(folder)

    def check() -> None:
        if names := [name for name, p in model.named_parameters() if not p.isfinite().all()]:
            raise diverged(
                f"{len(names)} parameters became NaN or infinite by step {position.step} (first: {names[0]})"
            )

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def finish() -> None:
        content = asdict(position) | {"processes": accelerator.num_processes, "digests": digests(temporary)}
        write_json(temporary / "position.json", seal(content))
        move_into_place(temporary, folder)

    in_all_processes(accelerator, check)
    try:
        on_main_process(accelerator, begin)
        in_all_processes(accelerator, lambda: accelerator.save_state(str(temporary)))
        on_main_process(accelerator, finish)
    except Exception as error:  # on a full disk OSError, RuntimeError or SafetensorError, depending on the library
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        failure = write_error(folder, error)
        failure.shared = accelerator.num_processes > 1
        raise failure from error
    on_main_process(accelerator, lambda: remove_old_checkpoints(run.folder))


def restore(run: Run) -> Position:
    """Load the newest checkpoint, after a check that it is complete and fits this text and model.

    A run that was stopped before its first checkpoint begins at its first training step.
    """
    checkpoint, position = in_all_processes(run.accelerator, lambda: _open_checkpoint(run))

    def load() -> None:
        try:
            run.accelerator.load_state(str(checkpoint))
            reset_accumulation(run.accelerator)
        except Exception as error:  # model, optimizer and schedule raise different exceptions
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{checkpoint}: does not fit this model ({reason})") from error

    if checkpoint is None:
        run.progress.say(f"{run.folder} has no checkpoint yet: training begins at its first step")
    else:
        in_all_processes(run.accelerator, load)
        run.progress.say(f"resuming from {checkpoint}")
    return position


def _open_checkpoint(run: Run) -> tuple[Path | None, Position]:
    """Return the newest checkpoint and its position; without a checkpoint, None and the start position."""
    metadata = read_run(run.folder)
    if metadata["fingerprint"] != run.corpus.fingerprint:
        raise CheckpointError(f"{run.folder}: the text ({run.corpus.name}) has changed since the run started")
    checkpoint = latest_checkpoint(run.folder)
    if checkpoint is None:
        if (run.folder / "model").exists():
            raise CheckpointError(f"{run.folder}: no checkpoint to resume from, though the run has a model")
        _check_processes(run, metadata.get("processes"))
        return None, Position()
    names = {field.name for field in fields(Position)}
    path = checkpoint / "position.json"
    saved = check_seal(path, read_json(path), unsealed=names | {"digests"})
    check_digests(checkpoint, saved.pop("digests", None))
    _check_processes(run, saved.pop("processes", len(list(checkpoint.glob("random_states_*.pkl")))))
    counts = [value for name, value in saved.items() if name != "seconds"]
    seconds = saved.get("seconds", math.nan)
    if saved.keys() != names or not all(type(value) is int and value >= 0 for value in counts):
        raise damaged(checkpoint, path.name)
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise damaged(checkpoint, path.name)
    if saved["step"] != checkpoint_step(checkpoint):
        raise damaged(checkpoint, path.name)
    return checkpoint, Position(**saved)


def _check_processes(run: Run, processes: int | None) -> None:
    """Raise SettingsError if the run was trained by another number of processes, which split the text in another way."""
    if processes not in (None, run.accelerator.num_processes):
        raise SettingsError(
            f"--resume {run.folder}: the run was trained by {processes} processes and cannot be resumed by "
            f"{run.accelerator.num_processes}; give accelerate launch --num_processes {processes}"
        )
