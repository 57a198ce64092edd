"""Train a Nord spiking language model.

    python examples/nord_lm/train.py                                    # tiny, on text that every Python has
    python examples/nord_lm/train.py --config small --data books.txt
    accelerate launch examples/nord_lm/train.py --config nord-144m

Every run gets a folder of its own under ``runs/``; ``--resume FOLDER`` goes on with one. Ctrl-C saves before it stops.
"""

import ctypes
import itertools
import math
import os
import resource
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list, set_seed
from baselines import bigram_loss, uniform_loss, unigram_loss
from card import model_card, parameter_counts
from checkpoints import (
    CheckpointError,
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
from data import (
    BASELINE_TOKENS,
    Blocks,
    Corpus,
    DataError,
    StreamedBlocks,
    load_corpus,
    load_tokenizer,
    read_documents,
    split,
    train_tokenizer,
)
from evaluate import STREAMED_WINDOWS, held_out_text, read_text
from modeling_nord import NordForCausalLM
from progress import Progress, duration, print_table
from report import PAGE, Subject, write_report
from settings import Settings, SettingsError, TrainingSettings, parse_arguments, read_run, settings_from
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, get_cosine_with_min_lr_schedule_with_warmup
from transformers.utils import logging

from nord_snn._compat.accelerate import begin_accumulation_anew, log_into
from nord_snn._compat.tensorboard import leave_write_errors_to_the_caller
from nord_snn.monitor import SpikeMonitor

SAMPLE_PROMPT_TOKENS, SAMPLE_TOKENS = 16, 64
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


@dataclass
class Position:
    """Where a run is. With the seed it decides everything that comes next."""

    step: int = 0
    epoch: int = 0
    batches: int = 0  # micro-batches taken of this epoch
    tokens: int = 0
    seconds: float = 0.0


def train(settings: Settings, out: Path, resume: Path | None, with_report: bool = True) -> int:
    """Run from start to finish; returns the exit status."""
    options = settings.training
    accelerator = accelerate(settings, out)
    set_seed(options.seed)
    torch.set_float32_matmul_precision(options.matmul_precision)
    with Progress(options.steps, visible=accelerator.is_local_main_process) as progress:
        tokenizer, corpus = prepare_text(accelerator, settings, resume)
        nord = NordForCausalLM(model_config(settings, tokenizer))
        if options.gradient_checkpointing:
            nord.activation_checkpointing_enable()
        if options.compile:
            for block in nord.blocks:
                block.compile()
        describe(progress, settings, nord, tokenizer, corpus)
        prepared = prepare(accelerator, nord, corpus, options)
        model = prepared.model
        run = resume or begin(accelerator, settings, tokenizer, corpus, out)
        progress.say(f"run {run}")
        position = restore(accelerator, run, corpus, progress) if resume else Position()
        log = Log(accelerator, run, options, progress)

        stop = StopRequest()
        progress.begin(position.step)
        monitor = SpikeMonitor(accelerator.unwrap_model(model))
        batches = endless(prepared.loader, position)
        step_tokens = options.grad_accum * options.batch_size * settings.block_size * accelerator.num_processes
        while position.step < options.steps and not stop.agreed(accelerator):
            began, before = time.monotonic(), replace(position)
            try:
                mean_loss, grad_norm = take_step(accelerator, prepared, batches, options)
            except DataError:  # a stream broke off, or something in it is no text: nothing that was learned is lost
                save(accelerator, run, before)
                raise
            seconds = time.monotonic() - began
            position.step, position.tokens = position.step + 1, position.tokens + step_tokens
            position.seconds += seconds

            last = position.step == options.steps
            if position.step % options.log_every == 0 or position.step == 1 or last:
                lr, rates, speed = prepared.scheduler.get_last_lr()[0], monitor.rates(), step_tokens / seconds
                progress.update(position.step, mean_loss, lr, speed, rates)
                log(position.step, loss=mean_loss, lr=lr, grad_norm=grad_norm, tokens_per_second=speed)
                log(position.step, **{f"rate/{name}": rate for name, rate in rates.items()})
                monitor.clear()
            if not math.isfinite(mean_loss):
                raise FloatingPointError(
                    f"the loss became {mean_loss} at step {position.step}: lower --lr and start again"
                )
            if position.step % options.eval_every == 0 and not last:
                monitor.pause()
                held_out = evaluate(accelerator, model, prepared.validation, options.eval_blocks)
                monitor.resume()
                progress.say(
                    f"step {position.step}: held-out loss {held_out:.4f}, {bits(held_out, corpus):.3f} bits per byte"
                )
                log(position.step, held_out_loss=held_out, bits_per_byte=bits(held_out, corpus))
            if position.step % options.save_every == 0 and not last:
                try:
                    save(accelerator, run, position)
                except CheckpointError as error:  # the disk may have room again by the next one
                    progress.say(f"warning: {error}; training goes on")
        monitor.close()
        save(accelerator, run, position)
        if position.step < options.steps:
            progress.say(f"stopped at step {position.step}; go on with: python {sys.argv[0]} --resume {run}")
            log.close()
            return INTERRUPTED
        stop.give_back()
        progress.say("evaluating on the held-out text")
        with SpikeMonitor(accelerator.unwrap_model(model)) as monitor:
            validation_loss = evaluate(accelerator, model, prepared.validation)
        results = measure(accelerator, settings, model, corpus, position, validation_loss, monitor.rates())

    weights = accelerator.get_state_dict(model)  # where they are spread over processes, all of them have a part in it
    try:
        if accelerator.is_main_process:
            finish(settings, accelerator.unwrap_model(model), weights, tokenizer, run, results)
            trained = NordForCausalLM.from_pretrained(run / "model").to(accelerator.device).eval()
            summarise(progress, trained, tokenizer, corpus, run, results)
    finally:
        accelerator.wait_for_everyone()  # the others: leaving before the first is done would break the group off
    log.close()
    if with_report and accelerator.is_main_process:  # which takes its time, and nobody waits for it
        report(progress, settings, trained, tokenizer, run)
    return 0


def accelerate(settings: Settings, out: Path) -> Accelerator:
    """Device, precision, accumulation and logging."""
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


def keep_freed_memory() -> None:
    """Let the C library keep what a step has freed for the next one, where it is glibc, and take large pages, where it is Linux.

    By default it gives large blocks back and fetches them anew in every step, page by page.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when torch allocates for the first time
    trim_threshold, mmap_threshold = -1, -3  # the names of these in malloc.h
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 32 * 2**20)  # the most it takes
        library.mallopt(trim_threshold, 2**31 - 1)


def prepare_text(
    accelerator: Accelerator, settings: Settings, resume: Path | None
) -> tuple[PreTrainedTokenizerBase, Corpus]:
    """The tokenizer and the corpus; nothing is written yet."""
    options, vocab_size = settings.training, settings.model_config().vocab_size
    documents = read_documents(options.data)
    validation = None if options.validation_data is None else read_documents(options.validation_data)
    if resume is not None:
        tokenizer = load_tokenizer(str(resume / "tokenizer"), vocab_size)
    elif options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer, vocab_size)
    else:
        held = [None]
        if accelerator.is_main_process:
            texts, _ = split(documents, 0.0 if validation else options.held_out)
            held = [train_tokenizer(texts(), vocab_size)]
        tokenizer = broadcast_object_list(held)[0]
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
        run = new_run_folder(out, settings.name)
        settings.write(run / "settings.yaml")
        write_folder(run / "tokenizer", lambda folder: tokenizer.save_pretrained(folder))
        about = {"text": corpus.name, "fingerprint": corpus.fingerprint, "settings": settings.digest()}
        write_json(run / "run.json", about)
        made = [run]
    return broadcast_object_list(made)[0]


def model_config(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model's configuration; a vocabulary trained here on a short text may be smaller than asked for."""
    size = settings.model_config().vocab_size if settings.training.tokenizer else len(tokenizer)
    return settings.model_config(
        vocab_size=size, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )


def describe(
    progress: Progress, settings: Settings, model: NordForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus
) -> None:
    """Say what is about to be trained on what."""
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


@dataclass
class Prepared:
    """Everything that a step needs, on its device and wrapped for its processes."""

    model: nn.Module
    optimizer: Any
    scheduler: Any
    loader: Any
    validation: Any


def prepare(accelerator: Accelerator, model: nn.Module, corpus: Corpus, options: TrainingSettings) -> Prepared:
    """AdamW, warm-up and cosine, and batches."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        fused=accelerator.device.type in ("cpu", "cuda"),  # one pass over the parameters
    )
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, options.warmup_steps, options.steps, min_lr_rate=options.min_lr_ratio
    )
    shuffle = isinstance(corpus.train, Blocks)  # a stream keeps its order
    loader = DataLoader(corpus.train, options.batch_size, shuffle=shuffle, drop_last=True)
    validation = DataLoader(Blocks(corpus.validation), options.batch_size)
    return Prepared(*accelerator.prepare(model, optimizer, scheduler, loader, validation))


def take_step(
    accelerator: Accelerator, prepared: Prepared, batches: Iterator[Tensor], options: TrainingSettings
) -> tuple[float, float]:
    """One optimizer step over ``grad_accum`` micro-batches; the mean loss and the norm of the gradient before clipping."""
    model, optimizer = prepared.model, prepared.optimizer
    loss = torch.zeros((), device=accelerator.device)
    for _ in range(options.grad_accum):
        batch = next(batches)
        with accelerator.accumulate(model):
            micro_loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(micro_loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        loss += micro_loss.detach() / options.grad_accum
    prepared.scheduler.step()
    return accelerator.reduce(loss, "mean").item(), float(grad_norm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices only: thresholds, decays, gains and norms have no business shrinking to zero."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def endless(loader: Any, position: Position) -> Iterator[Tensor]:
    """Batches from ``position`` on, epoch after epoch; keeps the position."""
    for epoch in itertools.count(position.epoch):
        loader.set_epoch(epoch)
        for batch in skip_first_batches(loader, position.batches) if position.batches else loader:
            position.batches += 1
            yield batch
        position.epoch, position.batches = epoch + 1, 0


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: Any, max_blocks: int | None = None) -> float:
    """Mean loss in nats per token over held-out blocks."""
    model.eval()
    losses: list[Tensor] = []
    for batch in loader:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        per_token = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.extend(accelerator.gather_for_metrics(per_token.view(len(batch), -1).mean(1)))
        if max_blocks is not None and len(losses) >= max_blocks:
            break
    model.train()
    return torch.stack(losses[:max_blocks]).double().mean().item()


def bits(loss: float, corpus: Corpus) -> float:
    """Bits per byte for nats per token."""
    return loss / corpus.bytes_per_token / math.log(2)


def save(accelerator: Accelerator, run: Path, position: Position) -> None:
    """Write a checkpoint and drop the oldest. Every process has its part in it; the first one puts it in place."""

    def write(folder: Path) -> None:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(folder))
        accelerator.wait_for_everyone()
        write_json(folder / "position.json", asdict(position) | {"digests": digests(folder)})

    folder = run / f"checkpoint-{position.step:06d}"
    if accelerator.is_main_process:
        write_folder(folder, write)
        remove_old_checkpoints(run)
    else:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished(folder)))
        accelerator.wait_for_everyone()


def restore(accelerator: Accelerator, run: Path, corpus: Corpus, progress: Progress) -> Position:
    """Load the newest checkpoint of a run, after a look at whether it is whole and belongs to this text and model."""
    if read_run(run)["fingerprint"] != corpus.fingerprint:
        raise CheckpointError(f"{run}: the text is no longer the one that the run was begun with ({corpus.name})")
    checkpoint = latest_checkpoint(run)
    about = read_json(checkpoint / "position.json")
    if not isinstance(about, dict) or about.get("step") != checkpoint_step(checkpoint):
        raise CheckpointError(f"{checkpoint / 'position.json'}: not written by train.py, or damaged")
    check_digests(checkpoint, about.pop("digests", None))
    try:
        accelerator.load_state(str(checkpoint))
        begin_accumulation_anew(accelerator)
        position = Position(**about)
    except Exception as error:  # every part has its own way of not fitting
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint}: does not fit this model ({reason})") from error
    progress.say(f"going on from {checkpoint}")
    return position


class Log:
    """TensorBoard, through accelerate. A log that cannot be written (a full disk) is given up, and the training is not."""

    def __init__(self, accelerator: Accelerator, run: Path, options: TrainingSettings, progress: Progress) -> None:
        self.accelerator, self.progress, self.works = accelerator, progress, True
        log_into(accelerator, run)
        config = {k: v for k, v in asdict(options).items() if v is not None}
        self._try(lambda: accelerator.init_trackers("tensorboard", config=config))
        if self.works and accelerator.is_main_process:
            leave_write_errors_to_the_caller(accelerator.get_tracker("tensorboard", unwrap=True))

    def __call__(self, step: int, **values: float) -> None:
        """Log values of a step."""
        self._try(lambda: self.accelerator.log(values, step=step))

    def close(self) -> None:
        """Write what is left."""
        self._try(self.accelerator.end_training)

    def _try(self, write: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            write()
        except OSError as error:
            self.works = False
            self.progress.say(
                f"warning: the TensorBoard log cannot be written ({error.strerror}); training goes on without"
            )


class StopRequest:
    """Ctrl-C and SIGTERM ask for a stop after the step at hand; asked twice, they end the program at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before = {kind: signal.signal(kind, self._ask) for kind in (signal.SIGINT, signal.SIGTERM)}

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked: all of them stop at the same step."""
        if accelerator.num_processes == 1:
            return self.requested
        return accelerator.reduce(torch.tensor(float(self.requested), device=accelerator.device)).item() > 0

    def _ask(self, *_: Any) -> None:
        self.requested = True
        self.give_back()

    def give_back(self) -> None:
        """Let the signals do what they did before."""
        for kind, handler in self._before.items():
            signal.signal(kind, handler)


def measure(
    accelerator: Accelerator,
    settings: Settings,
    model: nn.Module,
    corpus: Corpus,
    position: Position,
    validation_loss: float,
    rates: dict[str, float],
) -> dict[str, Any]:
    """Everything for ``results.json``."""
    vocab_size = accelerator.unwrap_model(model).config.vocab_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on macOS bytes
    return {
        "validation_loss": validation_loss,
        "bits_per_byte": bits(validation_loss, corpus),
        "uniform_loss": uniform_loss(vocab_size),
        "unigram_loss": unigram_loss(corpus.sample, corpus.validation, vocab_size),
        "bigram_loss": bigram_loss(corpus.sample, corpus.validation, vocab_size),
        "firing_rates": rates,
        "tokens": position.tokens,
        "tokens_per_second": position.tokens / position.seconds,
        "seconds": position.seconds,
        "peak_memory_mb": peak / (1 << 20 if sys.platform == "darwin" else 1 << 10),
        "peak_gpu_memory_mb": torch.cuda.max_memory_allocated() / (1 << 20) if torch.cuda.is_available() else 0.0,
        "steps": position.step,
        "parameters": accelerator.unwrap_model(model).num_parameters(),
        "resonance": accelerator.unwrap_model(model).config.resonance,
        "seed": settings.training.seed,
        "text": corpus.name,
        "left_out": corpus.notes(),
    }


def finish(
    settings: Settings,
    model: NordForCausalLM,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    run: Path,
    results: dict[str, Any],
) -> None:
    """Write the model as a folder that ``from_pretrained`` opens, with a card, and the results."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        text = model_card(model, "Trained with", results, asdict(settings.training))
        (folder / "README.md").write_text(text, encoding="utf-8")

    write_folder(run / "model", write)
    write_json(run / "results.json", results)


def summarise(
    progress: Progress,
    model: NordForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    run: Path,
    results: dict[str, Any],
) -> None:
    """Print a sample and the results beside the baselines."""
    prompt = corpus.validation[:1, :SAMPLE_PROMPT_TOKENS].to(model.device)
    ids = model.generate(
        prompt, do_sample=True, top_p=0.9, max_new_tokens=SAMPLE_TOKENS, pad_token_id=tokenizer.eos_token_id
    )
    progress.say(f"\nheld-out text: {tokenizer.decode(prompt[0])}")
    progress.say(f"the model goes on: {tokenizer.decode(ids[0, prompt.shape[1] :])}\n")

    rows = [
        [
            name,
            f"{results[key]:.4f}",
            f"{bits(results[key], corpus):.3f}",
            _against(results[key], results["unigram_loss"]),
        ]
        for name, key in (
            ("uniform", "uniform_loss"),
            ("unigram", "unigram_loss"),
            ("bigram, interpolated", "bigram_loss"),
            ("this model", "validation_loss"),
        )
    ]
    columns = ["held-out text", "nats per token", "bits per byte", "against unigram"]
    print_table(progress.console, f"{results['steps']} steps, {results['tokens']:,} tokens", columns, rows)
    rates = [[name, f"{rate:.2%}"] for name, rate in results["firing_rates"].items()]
    print_table(progress.console, "firing rates on the held-out text", ["neuron layer", "rate"], rates)
    for note in corpus.notes() if isinstance(corpus.train, StreamedBlocks) else []:  # the others were told at the start
        progress.say(f"note: {note}")
    progress.say(
        f"{duration(results['seconds'])} of training at {results['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {results['peak_memory_mb']:,.0f} MB\n"
        f"model in {run / 'model'}, results in {run / 'results.json'}"
    )


def report(
    progress: Progress, settings: Settings, model: NordForCausalLM, tokenizer: PreTrainedTokenizerBase, run: Path
) -> None:
    """Write what the network does as a page, see ``report.py``. The run has ended well, with it or without."""
    try:
        documents = held_out_text(settings.training)
        text = read_text(documents, tokenizer, STREAMED_WINDOWS * model.config.max_position_embeddings)
        command = shlex.join(["python", *sys.argv])
        subject = Subject(model, tokenizer, text.documents, text.tokens, documents.name, run, {}, command)
        write_report(run / "report", subject)
    except Exception as error:  # whatever it is: the model is trained and written
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        progress.say(f"warning: no report was written ({reason}); evaluate.py --report writes one")
    else:
        progress.say(f"report in {run / 'report' / PAGE}")


def _against(loss: float, unigram: float) -> str:
    return f"{loss / unigram - 1:+.1%}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "true"
    )  # its warning about forks is not for a loader without workers
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator is found.*")
    logging.disable_progress_bar()  # of transformers; the panel shows what there is to see
    logging.set_verbosity_error()  # it warns where text grows past the context, over which this model slides
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        return train(settings_from(options), options.out, options.resume, options.with_report)
    except (SettingsError, DataError, CheckpointError, FloatingPointError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training has begun, after it has ended, or asked for twice
        print("interrupted; what was saved before is whole", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
