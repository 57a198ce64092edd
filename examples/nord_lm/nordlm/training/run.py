"""Set up, save and restore a training run."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list
from transformers import PreTrainedTokenizerBase

from nord_snn._compat.accelerate import reset_accumulation
from nord_snn.models.nord import NordForCausalLM
from nordlm.data.corpus import (
    BASELINE_TOKENS,
    Corpus,
    SequenceDataset,
    load_corpus,
    load_tokenizer,
    save_tokenizer,
    split,
    train_tokenizer,
)
from nordlm.data.sources import read_documents
from nordlm.errors import CheckpointError, DataError, SettingsError
from nordlm.training.building import check_settings
from nordlm.training.checkpoints import (
    check_digests,
    checkpoint_step,
    digests,
    latest_checkpoint,
    new_run_folder,
    read_json,
    remove_old_checkpoints,
    temporary_path,
    write_folder,
    write_json,
)
from nordlm.training.model_card import parameter_counts
from nordlm.training.progress import TrainingProgress
from nordlm.training.settings import Settings, TrainingSettings, read_run

__all__ = [
    "Position",
    "Run",
    "bits_per_byte",
    "create_run_folder",
    "make_accelerator",
    "prepare_text",
    "print_setup",
    "restore",
    "save",
]


@dataclass
class Position:
    """Progress of training. Together with the seed it determines all later steps.

    Attributes:
        step: training steps taken.
        epoch: completed passes over the text.
        batches: micro-batches of this epoch that were used.
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
    """The parts of a run that do not change between its first and its last step.

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
    """Set up device, precision, accumulation and logging."""
    options = settings.training
    try:
        return Accelerator(
            mixed_precision=options.mixed_precision,
            # Accumulate across the end of an epoch, so that every step has grad_accum micro-batches.
            gradient_accumulation_plugin=GradientAccumulationPlugin(options.grad_accum, sync_with_dataloader=False),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed),
            step_scheduler_with_optimizer=False,
            log_with="tensorboard",
            project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
        )
    except ValueError as error:  # the device does not support this precision
        raise SettingsError(f"mixed_precision {options.mixed_precision}: {error}") from error


def prepare_text(
    accelerator: Accelerator, settings: Settings, resume: Path | None
) -> tuple[PreTrainedTokenizerBase, Corpus]:
    """Load or train the tokenizer and load the corpus, without writing anything."""
    options, vocab_size = settings.training, settings.model_config().vocab_size
    check_settings(settings, accelerator.device.type)
    documents = read_documents(options.data)
    validation = None if options.validation_data is None else read_documents(options.validation_data)
    if resume is not None:
        tokenizer = load_tokenizer(str(resume / "tokenizer"), vocab_size)
    elif options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer, vocab_size)
    else:
        tokenizers = [None]
        if accelerator.is_main_process:
            texts, _ = split(documents, 0.0 if validation else options.held_out)
            tokenizers = [train_tokenizer(texts(), vocab_size)]
        tokenizer = broadcast_object_list(tokenizers)[0]
    corpus = load_corpus(documents, tokenizer, settings.block_size, options.held_out, validation)
    n_sequences = len(corpus.sample) // settings.block_size
    batch = options.batch_size * accelerator.num_processes
    if n_sequences < batch and len(corpus.sample) < BASELINE_TOKENS:
        raise DataError(
            f"{corpus.name} has {n_sequences} sequences, less than one batch of {batch}: "
            "give more text, a smaller --batch-size or a smaller --block-size"
        )
    return tokenizer, corpus


def create_run_folder(
    accelerator: Accelerator, settings: Settings, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, out: Path
) -> Path:
    """Create the folder of a new run on the main process and return its path on every process."""
    folders: list[Path | None] = [None]
    if accelerator.is_main_process:
        folder = new_run_folder(out, settings.name)
        settings.write(folder / "settings.yaml")
        write_folder(folder / "tokenizer", lambda temporary: save_tokenizer(tokenizer, temporary))
        metadata = {"text": corpus.name, "fingerprint": corpus.fingerprint, "settings": settings.digest()}
        write_json(folder / "run.json", metadata)
        folders = [folder]
    return broadcast_object_list(folders)[0]


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
    total, without = parameter_counts(model)
    progress.say(f"model of {total:,} parameters, {without:,} without embedding and head")


def bits_per_byte(loss: float, corpus: Corpus) -> float:
    """Convert nats per token to bits per byte of the held-out text."""
    return loss / corpus.bytes_per_token / math.log(2)


def save(run: Run, position: Position) -> None:
    """Write a checkpoint and remove old ones. All processes write; the main process moves the folder into place."""
    accelerator = run.accelerator

    def write(folder: Path) -> None:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(folder))
        accelerator.wait_for_everyone()
        write_json(folder / "position.json", asdict(position) | {"digests": digests(folder)})

    folder = run.folder / f"checkpoint-{position.step:06d}"
    if accelerator.is_main_process:
        write_folder(folder, write)
        remove_old_checkpoints(run.folder)
    else:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary_path(folder)))
        accelerator.wait_for_everyone()


def restore(run: Run) -> Position:
    """Load the newest checkpoint, after a check that it is complete and fits this text and model."""
    if read_run(run.folder)["fingerprint"] != run.corpus.fingerprint:
        raise CheckpointError(f"{run.folder}: the text ({run.corpus.name}) has changed since the run started")
    checkpoint = latest_checkpoint(run.folder)
    saved = read_json(checkpoint / "position.json")
    if not isinstance(saved, dict) or saved.get("step") != checkpoint_step(checkpoint):
        raise CheckpointError(f"{checkpoint / 'position.json'}: not written by train.py, or damaged")
    check_digests(checkpoint, saved.pop("digests", None))
    try:
        run.accelerator.load_state(str(checkpoint))
        reset_accumulation(run.accelerator)
        position = Position(**saved)
    except Exception as error:  # each part raises its own exception if it does not fit
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint}: does not fit this model ({reason})") from error
    run.progress.say(f"resuming from {checkpoint}")
    return position
