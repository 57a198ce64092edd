"""A run: what it is made of, its folder, and its checkpoints."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list
from transformers import PreTrainedTokenizerBase

from nord_snn._compat.accelerate import begin_accumulation_anew
from nord_snn.models.nord import NordForCausalLM
from nordlm.data.corpus import (
    BASELINE_TOKENS,
    Blocks,
    Corpus,
    load_corpus,
    load_tokenizer,
    split,
    train_tokenizer,
)
from nordlm.data.sources import read_documents
from nordlm.errors import CheckpointError, DataError, SettingsError
from nordlm.training.checkpoints import (
    check_digests,
    checkpoint_step,
    digests,
    latest_checkpoint,
    new_run_folder,
    read_json,
    remove_old_checkpoints,
    unfinished,
    write_folder,
    write_json,
)
from nordlm.training.model_card import parameter_counts
from nordlm.training.progress import Progress
from nordlm.training.settings import Settings, TrainingSettings, read_run

__all__ = ["Position", "Run", "accelerate", "begin", "bits", "describe", "prepare_text", "restore", "save"]


@dataclass
class Position:
    """How far training is. With the seed it decides everything that comes next.

    Attributes:
        step: optimizer steps taken.
        epoch: passes over the text completed.
        batches: micro-batches taken of this epoch.
        tokens: trained on, by all processes.
        seconds: of training.
    """

    step: int = 0
    epoch: int = 0
    batches: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step of a run to the last.

    Attributes:
        accelerator: device, precision and processes.
        settings: of model and training.
        tokenizer: of the text.
        corpus: the text.
        folder: where everything is written.
        progress: what is shown.
    """

    accelerator: Accelerator
    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    folder: Path
    progress: Progress

    @staticmethod
    def progress_for(options: TrainingSettings, accelerator: Accelerator) -> Progress:
        """Show progress on the first process of a machine."""
        return Progress(options.steps, visible=accelerator.is_local_main_process)


def accelerate(settings: Settings, out: Path) -> Accelerator:
    """Set up device, precision, accumulation and logging."""
    options = settings.training
    try:
        return Accelerator(
            mixed_precision=options.mixed_precision,
            # An accumulation may reach across the end of an epoch, so that a step is always grad_accum micro-batches.
            gradient_accumulation_plugin=GradientAccumulationPlugin(options.grad_accum, sync_with_dataloader=False),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed),
            step_scheduler_with_optimizer=False,
            log_with="tensorboard",
            project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
        )
    except ValueError as error:  # a precision that this device does not have
        raise SettingsError(f"mixed_precision {options.mixed_precision}: {error}") from error


def prepare_text(
    accelerator: Accelerator, settings: Settings, resume: Path | None
) -> tuple[PreTrainedTokenizerBase, Corpus]:
    """Load or train the tokenizer, and load the corpus; write nothing yet."""
    options, vocab_size = settings.training, settings.model_config().vocab_size
    documents = read_documents(options.data)
    validation = None if options.validation_data is None else read_documents(options.validation_data)
    if resume is not None:
        tokenizer = load_tokenizer(str(resume / "tokenizer"), vocab_size)
    elif options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer, vocab_size)
    else:
        trained = [None]
        if accelerator.is_main_process:
            texts, _ = split(documents, 0.0 if validation else options.held_out)
            trained = [train_tokenizer(texts(), vocab_size)]
        tokenizer = broadcast_object_list(trained)[0]
    corpus = load_corpus(documents, tokenizer, settings.block_size, options.held_out, validation)
    blocks = len(corpus.sample) // settings.block_size
    batch = options.batch_size * accelerator.num_processes
    if blocks < batch and len(corpus.sample) < BASELINE_TOKENS:
        raise DataError(
            f"{corpus.name}: {blocks} blocks of text are less than one batch of {batch}: "
            "give more text, a smaller --batch-size or a smaller --block-size"
        )
    return tokenizer, corpus


def begin(
    accelerator: Accelerator, settings: Settings, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, out: Path
) -> Path:
    """Make the folder of a new run, the same on every process."""
    made: list[Path | None] = [None]
    if accelerator.is_main_process:
        folder = new_run_folder(out, settings.name)
        settings.write(folder / "settings.yaml")
        write_folder(folder / "tokenizer", lambda beside: tokenizer.save_pretrained(beside))
        about = {"text": corpus.name, "fingerprint": corpus.fingerprint, "settings": settings.digest()}
        write_json(folder / "run.json", about)
        made = [folder]
    return broadcast_object_list(made)[0]


def describe(
    progress: Progress, settings: Settings, model: NordForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus
) -> None:
    """Show what is about to be trained on what."""
    if settings.training.warmup_steps > settings.training.steps:
        progress.say("note: the warm-up is longer than the run, so the peak learning rate is not reached")
    for note in corpus.notes():
        progress.say(f"note: {note}")
    blocks = f"{len(corpus.train):,} blocks" if isinstance(corpus.train, Blocks) else "a stream"
    progress.say(
        f"text {corpus.name}: {blocks} to train on, {len(corpus.validation):,} held out, "
        f"{corpus.bytes_per_token:.2f} bytes per token, vocabulary {len(tokenizer):,}"
    )
    total, without = parameter_counts(model)
    progress.say(f"model of {total:,} parameters, {without:,} without embedding and head")


def bits(loss: float, corpus: Corpus) -> float:
    """Return bits per byte for nats per token."""
    return loss / corpus.bytes_per_token / math.log(2)


def save(run: Run, position: Position) -> None:
    """Write a checkpoint and drop the oldest. Every process has its part in it; the first one puts it in place."""
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
        accelerator.save_state(str(unfinished(folder)))
        accelerator.wait_for_everyone()


def restore(run: Run) -> Position:
    """Load the newest checkpoint of a run, after checking that it is whole and belongs to this text and model."""
    if read_run(run.folder)["fingerprint"] != run.corpus.fingerprint:
        raise CheckpointError(
            f"{run.folder}: the text is no longer the one that the run was begun with ({run.corpus.name})"
        )
    checkpoint = latest_checkpoint(run.folder)
    about = read_json(checkpoint / "position.json")
    if not isinstance(about, dict) or about.get("step") != checkpoint_step(checkpoint):
        raise CheckpointError(f"{checkpoint / 'position.json'}: not written by train.py, or damaged")
    check_digests(checkpoint, about.pop("digests", None))
    try:
        run.accelerator.load_state(str(checkpoint))
        begin_accumulation_anew(run.accelerator)
        position = Position(**about)
    except Exception as error:  # every part has its own way of not fitting
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint}: does not fit this model ({reason})") from error
    run.progress.say(f"going on from {checkpoint}")
    return position
