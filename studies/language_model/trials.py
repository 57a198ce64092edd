"""Training runs that are compared: the same steps on the same text, each written down in a file of its own."""

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
from nordlm.analysis.token_energy import generated_token
from nordlm.data.baselines import bigram_loss, uniform_loss, unigram_loss
from nordlm.data.corpus import Corpus
from nordlm.training.checkpoints import CheckpointError, read_json, write_json
from nordlm.training.held_out import held_out_text, read_text
from nordlm.training.loop import Position, accelerate, bits, endless, evaluate, prepare, prepare_text, take_step
from nordlm.training.model_card import parameter_counts
from nordlm.training.settings import Settings, SettingsError
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sample_quality import Prompts, coherence, cut_prompts, repetition, write
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from variants import Maker

from nord_snn.monitor import SpikeMonitor

__all__ = [
    "AfterStep",
    "Learner",
    "Text",
    "Trials",
    "check_makers",
    "nobody",
    "prepare_for",
    "progress_bars",
    "train_one",
]

#: Is told the loss of every step, when the weights have changed.
AfterStep = Callable[[float], None]
#: What learns beside the optimizer for as long as a model is trained.
Learner = Callable[[PreTrainedModel], AbstractContextManager[AfterStep]]

MOST_TOKENS = 400_000  # of held-out text, in which prompts are looked for
COUNTED = 16  # held-out blocks, at the end of which a generated token is counted
ABOUT = {"settings", "text", "bytes_per_token", "baselines"}


@contextmanager
def nobody(model: PreTrainedModel) -> Iterator[AfterStep]:
    """The optimizer learns alone."""
    yield lambda loss: None


class Text(NamedTuple):
    """What all models are trained on, validated on and, where there are samples, asked to go on from."""

    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    prompts: Prompts | None


class Trials:
    """The runs of one config on one text.

    Each is a file in ``out/runs``, so a command that was stopped goes on with those that are missing, and several commands may
    work on one folder at a time. A run is known by model, learning rate and seed: after a change to the code of a model give
    another folder. ``about`` says what the text is and how well counting alone predicts it.

    Args:
        settings: what all have in common.
        out: the folder.
        text: what ``prepare_for`` made of the same text; None to make it.
        samples: let every model write, and measure what it wrote; with a ``text``, whether there are prompts decides.

    Raises:
        SettingsError: a setting is not for comparisons, or ``out`` holds runs of other settings.
        DataError: the text cannot be used.
        CheckpointError: a file is damaged.
    """

    def __init__(self, settings: Settings, out: Path, text: Text | None = None, samples: bool = True) -> None:
        if settings.training.compile or settings.training.gradient_checkpointing:
            raise SettingsError("models are compared without compile and gradient_checkpointing: leave them out")
        self.settings, self.out = settings, out
        (out / "runs").mkdir(parents=True, exist_ok=True)
        self.text = text or prepare_for(settings, out, samples)
        self.about = self._about()

    def _about(self) -> dict[str, Any]:
        """What all runs have in common; computed anew where it is not on file."""
        path = self.out / "about.json"
        corpus, digest = self.text.corpus, self.settings.digest()
        ours = hashlib.blake2b(f"{digest} {corpus.fingerprint}".encode(), digest_size=16).hexdigest()
        if path.exists():
            about = read_json(path)
            if not isinstance(about, dict) or not about.keys() >= ABOUT:
                raise CheckpointError(f"{path}: not written by this program, or damaged")
            if about["settings"] != ours:
                raise SettingsError(f"{path}: of another config or text; give another --out")
            if self.text.prompts is not None and "held_out_text" not in about:
                raise SettingsError(f"{path}: of runs without samples; give another --out")
            return about
        about = {"settings": ours} | describe_text(self.text)
        write_json(path, about)
        return about

    def check(self, makers: Iterable[Maker]) -> None:
        """Make each model once, without its memory: what cannot be made is refused before anything is trained.

        Raises:
            SettingsError: a model cannot be made of these settings.
        """
        check_makers(makers, self.settings, self.text)

    def on_file(self) -> list[dict[str, Any]]:
        """All runs that were written down."""
        return [_read(path) for path in sorted((self.out / "runs").glob("*.json"))]

    def run(
        self,
        kind: str,
        make: Maker,
        lr: float,
        seed: int,
        bars: Progress,
        learner: Learner = nobody,
    ) -> dict[str, Any]:
        """Train and measure a model, unless that was done.

        Args:
            kind: its name.
            make: makes it.
            lr: peak learning rate.
            seed: of its initial weights and the order of the text.
            bars: show how far it is.
            learner: what else learns.
        """
        name = re.sub(r"[^\w.+-]+", "-", kind)
        path = self.out / "runs" / f"{name}_lr{lr:g}_seed{seed}.json"
        asked = {"kind": kind, "lr": lr, "seed": seed}
        if path.exists():
            run = _read(path)
            if run.items() >= asked.items():
                return run
            raise CheckpointError(f"{path}: holds another run than {kind}, peak lr {lr:g}, seed {seed}")
        settings = replace(self.settings, training=replace(self.settings.training, lr=lr, seed=seed))
        bar = bars.add_task(f"{settings.name}: {kind}, peak lr {lr:g}, seed {seed}", total=settings.training.steps)
        try:
            run = asked | train_one(settings, make, self.text, self.out, lambda: bars.advance(bar), learner)
        finally:
            bars.remove_task(bar)
        write_json(path, run)
        return run


def progress_bars() -> Progress:
    """For the runs of a command."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), transient=True)


def _read(path: Path) -> dict[str, Any]:
    run = read_json(path)
    if not isinstance(run, dict) or not run.keys() >= {"kind", "lr", "seed", "diverged"}:
        raise CheckpointError(f"{path}: not written by this program, or damaged")
    return run


def check_makers(makers: Iterable[Maker], settings: Settings, text: Text) -> None:
    """See :meth:`Trials.check`."""
    with torch.device("meta"):
        for make in makers:
            make(settings, text.tokenizer)


def prepare_for(settings: Settings, out: Path, samples: bool = True) -> Text:
    """Tokenizer, blocks and, for samples, prompts."""
    set_seed(settings.training.seed)
    tokenizer, corpus = prepare_text(accelerate(settings, out), settings, None)
    if not samples:
        return Text(tokenizer, corpus, None)
    held = read_text(held_out_text(settings.training), tokenizer, MOST_TOKENS)
    return Text(tokenizer, corpus, cut_prompts(held.documents, tokenizer, settings.block_size))


def describe_text(text: Text) -> dict[str, Any]:
    """What is known without a model: baselines, and how the held-out text itself is written."""
    corpus, size = text.corpus, len(text.tokenizer)
    about = {
        "text": corpus.name,
        "bytes_per_token": corpus.bytes_per_token,
        "baselines": {
            "uniform": uniform_loss(size),
            "unigram": unigram_loss(corpus.sample, corpus.validation, size),
            "bigram, interpolated": bigram_loss(corpus.sample, corpus.validation, size),
        },
    }
    if text.prompts is None:
        return about
    written = text.prompts.written
    return about | {"held_out_text": _writing(text, text.prompts, written) | {"prompts": len(written)}}


def _writing(text: Text, prompts: Prompts, written: Tensor) -> dict[str, float]:
    return {
        "repetition": repetition(written),
        "coherence": coherence(text.tokenizer.batch_decode(written), prompts.rests),
    }


def train_one(
    settings: Settings,
    make: Maker,
    text: Text,
    out: Path,
    advance: Callable[[], None],
    learner: Learner = nobody,
) -> dict[str, Any]:
    """The same steps as ``train.py``'s, in the same order."""
    options = settings.training
    accelerator = accelerate(settings, out)
    if accelerator.num_processes > 1:
        raise SettingsError("models are compared in one process: start without accelerate launch")
    set_seed(options.seed)
    torch.set_float32_matmul_precision(options.matmul_precision)
    model = make(settings, text.tokenizer)
    prepared = prepare(accelerator, model, text.corpus, options)
    batches = endless(prepared.loader, Position())
    seconds = []
    with learner(model) as after_step:
        for _ in range(options.steps):
            began = time.monotonic()
            loss, _ = take_step(accelerator, prepared, batches, options)
            if not math.isfinite(loss):
                return {"diverged": True}
            after_step(loss)
            seconds.append(time.monotonic() - began)
            advance()
    held_out = evaluate(accelerator, prepared.model, prepared.validation)
    if not math.isfinite(held_out):
        return {"diverged": True}
    return {
        "diverged": False,
        "loss": held_out,
        "bits_per_byte": bits(held_out, text.corpus),
        "tokens_per_second": options.grad_accum * options.batch_size * settings.block_size / statistics.median(seconds),
        "seconds": sum(seconds),
    } | look_at(model.eval(), text, options.seed)


def look_at(model: PreTrainedModel, text: Text, seed: int) -> dict[str, Any]:
    """What a trained model costs, how often it fires, and, where there are prompts, how it writes."""
    total, without = parameter_counts(model)
    written = {}
    if text.prompts is not None:
        ids = write(model, text.prompts, text.tokenizer.eos_token_id, seed)
        written = _writing(text, text.prompts, ids)
    rates = _rates(model, text)
    if isinstance(model, GPT2LMHeadModel):
        model.set_attn_implementation("eager")  # products that can be counted
    blocks = text.corpus.validation[:COUNTED].to(model.device).split(1)
    profiles = [generated_token(model, block) for block in blocks]
    return {
        "parameters": total,
        "parameters_without_vocabulary": without,
        "joules": statistics.mean(profile.joules for profile in profiles),
        "joules_with_sram": statistics.mean(profile.joules_under("45nm-fp32-sram") for profile in profiles),
        "macs": statistics.mean(profile.macs for profile in profiles),
        "acs": statistics.mean(profile.acs for profile in profiles),
        "firing_rates": rates,
    } | written


@torch.no_grad()
def _rates(model: PreTrainedModel, text: Text) -> dict[str, float]:
    """Of every layer of neurons on held-out blocks; empty where nothing fires."""
    if isinstance(model, GPT2LMHeadModel) or model.config.dense:
        return {}
    with SpikeMonitor(model) as monitor:
        for batch in text.corpus.validation[:64].split(8):
            model(input_ids=batch.to(model.device), use_cache=False)
    return monitor.rates()
