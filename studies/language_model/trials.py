"""Run the training runs of a study, all with the same code on the same text, and write one result file per run."""

import hashlib
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nordlm.analysis.token_energy import profile_generated_token
from nordlm.data.baselines import bigram_loss, uniform_loss, unigram_loss
from nordlm.data.corpus import Corpus
from nordlm.training.checkpoints import CheckpointError, read_json, write_json
from nordlm.training.held_out import held_out_text, read_text
from nordlm.training.loop import (
    Position,
    endless_batches,
    held_out_loss,
    make_accelerator,
    prepare,
    prepare_text,
    take_step,
)
from nordlm.training.model_card import parameter_counts
from nordlm.training.settings import Settings, SettingsError
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sample_quality import Prompts, coherence, cut_prompts, generate_samples, repetition
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from variants import Maker

from nord_snn.monitor import SpikeMonitor

__all__ = [
    "AfterStep",
    "LearnerContext",
    "StudyData",
    "Trials",
    "check_makers",
    "no_learner",
    "prepare_study_data",
    "progress_bars",
    "train_one",
]

#: Called after every training step, with its loss.
AfterStep = Callable[[float], None]
#: Context manager around the training of a model, for a learning rule besides the optimizer.
LearnerContext = Callable[[PreTrainedModel], AbstractContextManager[AfterStep]]

MAX_PROMPT_SOURCE_TOKENS = 400_000  # maximum tokens of held-out text from which prompts are taken
ENERGY_SEQUENCES = 16  # held-out sequences on which the energy of the last token is measured
METADATA_KEYS = {"settings", "text", "bytes_per_token", "baselines"}


@contextmanager
def no_learner(model: PreTrainedModel) -> Iterator[AfterStep]:
    """Use no learning rule besides the optimizer."""
    yield lambda loss: None


class StudyData(NamedTuple):
    """Data of a study: tokenizer, training and held-out sequences and, for samples, prompts."""

    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    prompts: Prompts | None


class Trials:
    """The runs of one config on one text.

    Each run is a file in ``out/runs``, so a stopped command continues with the missing runs, and several commands can share a
    folder. A run is identified by model, learning rate and seed; after a change to the code of a model, use a new folder.
    ``metadata`` (``about.json``) has the name of the text and the losses of uniform, unigram and bigram predictions.

    Args:
        settings: settings of all runs; each run replaces learning rate and seed.
        out: folder of the runs.
        text: result of :func:`prepare_study_data` for these settings. Default: None, it is called here.
        samples: generate and measure samples. Default: True. Ignored with ``text``: then they are generated if it has prompts.

    Raises:
        SettingsError: a setting is not supported in studies, or ``out`` has runs of other settings.
        DataError: the text cannot be used.
        CheckpointError: a file is damaged.
    """

    def __init__(self, settings: Settings, out: Path, text: StudyData | None = None, samples: bool = True) -> None:
        if settings.training.compile or settings.training.gradient_checkpointing:
            raise SettingsError("models are compared without compile and gradient_checkpointing: leave them out")
        self.settings, self.out = settings, out
        (out / "runs").mkdir(parents=True, exist_ok=True)
        self.text = text or prepare_study_data(settings, out, samples)
        self.metadata = self._load_metadata()

    def _load_metadata(self) -> dict[str, Any]:
        """Read ``about.json``, or compute and write it."""
        path = self.out / "about.json"
        corpus, digest = self.text.corpus, self.settings.digest()
        config_digest = hashlib.blake2b(f"{digest} {corpus.fingerprint}".encode(), digest_size=16).hexdigest()
        if path.exists():
            metadata = read_json(path)
            if not isinstance(metadata, dict) or not metadata.keys() >= METADATA_KEYS:
                raise CheckpointError(f"{path}: not written by this program, or damaged")
            if metadata["settings"] != config_digest:
                raise SettingsError(f"{path}: has another config or text; give another --out")
            if self.text.prompts is not None and "held_out_text" not in metadata:
                raise SettingsError(f"{path}: has runs without samples; give another --out")
            return metadata
        metadata = {"settings": config_digest} | describe_text(self.text)
        write_json(path, metadata)
        return metadata

    def check(self, makers: Iterable[Maker]) -> None:
        """Construct each model on the meta device, so that an invalid model raises an error before any training.

        Raises:
            SettingsError: a model cannot be constructed from these settings.
        """
        check_makers(makers, self.settings, self.text)

    def on_file(self) -> list[dict[str, Any]]:
        """Return the results of all finished runs in the folder."""
        return [_read_run(path) for path in sorted((self.out / "runs").glob("*.json"))]

    def run(
        self,
        kind: str,
        make: Maker,
        lr: float,
        seed: int,
        bars: Progress,
        learner: LearnerContext = no_learner,
    ) -> dict[str, Any]:
        """Train and evaluate a model, or read its results if the run is finished.

        Args:
            kind: name of the model.
            make: function that constructs the model.
            lr: peak learning rate.
            seed: seed of initial weights and data order.
            bars: progress display.
            learner: learning rule besides the optimizer. Default: none.

        Returns:
            The results: those of :func:`train_one`, with ``kind``, ``lr`` and ``seed``.
        """
        name = re.sub(r"[^\w.+-]+", "-", kind)
        path = self.out / "runs" / f"{name}_lr{lr:g}_seed{seed}.json"
        key = {"kind": kind, "lr": lr, "seed": seed}
        if path.exists():
            run = _read_run(path)
            if run.items() >= key.items():
                return run
            raise CheckpointError(f"{path}: is another run than {kind}, peak lr {lr:g}, seed {seed}")
        settings = replace(self.settings, training=replace(self.settings.training, lr=lr, seed=seed))
        bar = bars.add_task(f"{settings.name}: {kind}, peak lr {lr:g}, seed {seed}", total=settings.training.steps)
        try:
            run = key | train_one(settings, make, self.text, self.out, lambda: bars.advance(bar), learner)
        finally:
            bars.remove_task(bar)
        write_json(path, run)
        return run


def progress_bars() -> Progress:
    """Return a progress display for the runs of a command."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), transient=True)


def _read_run(path: Path) -> dict[str, Any]:
    run = read_json(path)
    if not isinstance(run, dict) or not run.keys() >= {"kind", "lr", "seed", "diverged"}:
        raise CheckpointError(f"{path}: not written by this program, or damaged")
    return run


def check_makers(makers: Iterable[Maker], settings: Settings, text: StudyData) -> None:
    """Construct each model on the meta device, see :meth:`Trials.check`."""
    with torch.device("meta"):
        for make in makers:
            make(settings, text.tokenizer)


def prepare_study_data(settings: Settings, out: Path, samples: bool = True) -> StudyData:
    """Return tokenizer, sequences and, for samples, prompts."""
    set_seed(settings.training.seed)
    tokenizer, corpus = prepare_text(make_accelerator(settings, out), settings, None)
    if not samples:
        return StudyData(tokenizer, corpus, None)
    held_out = read_text(held_out_text(settings.training), tokenizer, MAX_PROMPT_SOURCE_TOKENS)
    return StudyData(tokenizer, corpus, cut_prompts(held_out.documents, tokenizer, settings.block_size))


def describe_text(text: StudyData) -> dict[str, Any]:
    """Return the metadata of a text: baseline losses, and, with prompts, repetition and coherence of the held-out text."""
    corpus, size = text.corpus, len(text.tokenizer)
    metadata = {
        "text": corpus.name,
        "bytes_per_token": corpus.bytes_per_token,
        "baselines": {
            "uniform": uniform_loss(size),
            "unigram": unigram_loss(corpus.sample, corpus.validation, size),
            "bigram, interpolated": bigram_loss(corpus.sample, corpus.validation, size),
        },
    }
    if text.prompts is None:
        return metadata
    written = text.prompts.written
    return metadata | {"held_out_text": _sample_quality(text, text.prompts, written) | {"prompts": len(written)}}


def _sample_quality(text: StudyData, prompts: Prompts, written: Tensor) -> dict[str, float]:
    return {
        "repetition": repetition(written),
        "coherence": coherence(text.tokenizer.batch_decode(written), prompts.remainders),
    }


def train_one(
    settings: Settings,
    make: Maker,
    text: StudyData,
    out: Path,
    advance: Callable[[], None],
    learner: LearnerContext = no_learner,
) -> dict[str, Any]:
    """Train one model with the training steps of ``examples/nord_lm/train.py``, and return its results.

    The results are held-out loss, bits per byte, tokens per second, seconds, and those of :func:`evaluate_model`; only
    ``diverged`` if a loss is not finite.
    """
    options = settings.training
    accelerator = make_accelerator(settings, out)
    if accelerator.num_processes > 1:
        raise SettingsError("models are compared in one process: start without accelerate launch")
    set_seed(options.seed)
    torch.set_float32_matmul_precision(options.matmul_precision)
    model = make(settings, text.tokenizer)
    prepared = prepare(accelerator, model, text.corpus, options)
    batches = endless_batches(prepared, Position())
    seconds = []
    with learner(model) as after_step:
        for _ in range(options.steps):
            start = time.monotonic()
            loss, _ = take_step(accelerator, prepared, batches, options)
            if not math.isfinite(loss):
                return {"diverged": True}
            after_step(loss)
            seconds.append(time.monotonic() - start)
            advance()
    held_out = held_out_loss(accelerator, prepared.model, prepared.validation)
    if not math.isfinite(held_out):
        return {"diverged": True}
    return {
        "diverged": False,
        "loss": held_out,
        "bits_per_byte": text.corpus.bits_per_byte(held_out),
        "tokens_per_second": options.grad_accum * options.batch_size * settings.block_size / statistics.median(seconds),
        "seconds": sum(seconds),
    } | evaluate_model(model.eval(), text, options.seed)


def evaluate_model(model: PreTrainedModel, text: StudyData, seed: int) -> dict[str, Any]:
    """Return parameters, energy, firing rates and, with prompts, repetition and coherence of a trained model."""
    total, without = parameter_counts(model)
    quality = {}
    if text.prompts is not None:
        ids = generate_samples(model, text.prompts, text.tokenizer.eos_token_id, seed)
        quality = _sample_quality(text, text.prompts, ids)
    rates = _firing_rates(model, text)
    if isinstance(model, GPT2LMHeadModel):
        model.set_attn_implementation("eager")  # EnergyProfiler raises an error on fused attention
    sequences = text.corpus.validation[:ENERGY_SEQUENCES].to(model.device).split(1)
    profiles = [profile_generated_token(model, sequence) for sequence in sequences]
    return {
        "parameters": total,
        "parameters_without_vocabulary": without,
        "joules": statistics.mean(profile.joules for profile in profiles),
        "joules_with_sram": statistics.mean(profile.joules_under("45nm-fp32-sram") for profile in profiles),
        "macs": statistics.mean(profile.macs for profile in profiles),
        "acs": statistics.mean(profile.acs for profile in profiles),
        "firing_rates": rates,
    } | quality


@torch.no_grad()
def _firing_rates(model: PreTrainedModel, text: StudyData) -> dict[str, float]:
    """Return the firing rate of each layer of neurons on held-out sequences; empty for models without neurons."""
    if isinstance(model, GPT2LMHeadModel) or model.config.dense:
        return {}
    with SpikeMonitor(model) as monitor:
        for batch in text.corpus.validation[:64].split(8):
            model(input_ids=batch.to(model.device), use_cache=False)
    return monitor.rates()
