"""Train a Nord spiking language model.

    python examples/nord_lm/train.py                                    # tiny, on text that every Python has
    python examples/nord_lm/train.py --config small --data books.txt
    accelerate launch examples/nord_lm/train.py --config nord-144m

Every run gets a folder of its own under ``runs/``; ``--resume FOLDER`` goes on with one. Ctrl-C saves before it stops.
"""

import itertools
import math
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from baselines import bigram_loss, uniform_loss, unigram_loss
from checkpoints import (
    CheckpointError,
    latest_checkpoint,
    new_run_folder,
    read_json,
    remove_old_checkpoints,
    write_folder,
    write_json,
)
from data import (
    Blocks,
    Corpus,
    DataError,
    check_vocabulary,
    load_corpus,
    load_tokenizer,
    read_documents,
    train_tokenizer,
)
from data import split as split_documents
from modeling_nord import NordForCausalLM
from progress import Progress, duration, print_table
from settings import Settings, SettingsError, parse_arguments, settings_from
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase, get_cosine_with_min_lr_schedule_with_warmup
from transformers.utils import logging

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


def train(settings: Settings, out: Path, resume: Path | None) -> int:
    """Run from start to finish; returns the exit status."""
    options = settings.training
    run = resume or new_run_folder(out, settings.name)
    accelerator = accelerate(settings, run)
    set_seed(options.seed)
    with Progress(options.steps, visible=accelerator.is_local_main_process) as progress:
        progress.say(f"run {run}")
        tokenizer, corpus = prepare_text(settings, run, resumed=resume is not None)
        model = NordForCausalLM(model_config(settings, tokenizer))
        describe(progress, model, tokenizer, corpus)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, options.weight_decay), lr=options.lr, betas=(options.beta1, options.beta2)
        )
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, options.warmup_steps, options.steps, min_lr_rate=options.min_lr_ratio
        )
        if isinstance(corpus.train, Blocks) and len(corpus.train) < options.batch_size:
            raise DataError(
                f"{corpus.name}: {len(corpus.train)} blocks of text are less than one batch of {options.batch_size}: "
                "give more text, a smaller --batch-size or a smaller --block-size"
            )
        shuffle = isinstance(corpus.train, Blocks)  # a stream keeps its order
        loader = DataLoader(corpus.train, options.batch_size, shuffle=shuffle, drop_last=True)
        validation_loader = DataLoader(Blocks(corpus.validation), options.batch_size)
        model, optimizer, scheduler, loader, validation_loader = accelerator.prepare(
            model, optimizer, scheduler, loader, validation_loader
        )
        position = Position()
        if resume is None:
            settings.write(run / "settings.yaml")
            write_json(run / "corpus.json", {"name": corpus.name, "fingerprint": corpus.fingerprint})
        else:
            position = restore(accelerator, run, corpus, progress)
        accelerator.init_trackers("tensorboard", config={k: v for k, v in asdict(options).items() if v is not None})

        stop = StopRequest()
        progress.begin(position.step)
        monitor = SpikeMonitor(accelerator.unwrap_model(model))
        batches = endless(loader, position)
        while position.step < options.steps and not stop.requested:
            began = time.monotonic()
            loss = 0.0
            for _ in range(options.grad_accum):
                batch = next(batches)
                with accelerator.accumulate(model):
                    micro_loss = model(input_ids=batch, labels=batch).loss
                    accelerator.backward(micro_loss)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                loss += micro_loss.item() / options.grad_accum
                position.tokens += batch.numel() * accelerator.num_processes
            scheduler.step()
            position.step += 1
            seconds = time.monotonic() - began
            position.seconds += seconds

            last = position.step == options.steps
            if position.step % options.log_every == 0 or position.step == 1 or last:
                step_tokens = options.grad_accum * batch.numel() * accelerator.num_processes
                lr, rates = scheduler.get_last_lr()[0], monitor.rates()
                progress.update(position.step, loss, lr, step_tokens / seconds, rates)
                log = {
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": float(grad_norm),
                    "tokens_per_second": step_tokens / seconds,
                }
                accelerator.log(log | {f"rate/{name}": rate for name, rate in rates.items()}, step=position.step)
                monitor.clear()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss became {loss} at step {position.step}: lower --lr and start again")
            if position.step % options.eval_every == 0 and not last:
                monitor.close()
                held_out = evaluate(accelerator, model, validation_loader, options.eval_blocks)
                monitor = SpikeMonitor(accelerator.unwrap_model(model))
                progress.say(
                    f"step {position.step}: held-out loss {held_out:.4f}, {bits(held_out, corpus):.3f} bits per byte"
                )
                accelerator.log(
                    {"held_out_loss": held_out, "bits_per_byte": bits(held_out, corpus)}, step=position.step
                )
            if position.step % options.save_every == 0 and not last and not stop.requested:
                try:
                    save(accelerator, run, position)
                except CheckpointError as error:  # the disk may have room again by the next one
                    progress.say(f"warning: {error}; training goes on")
        monitor.close()
        save(accelerator, run, position)
        if position.step < options.steps:
            progress.say(f"stopped at step {position.step}; go on with: python {sys.argv[0]} --resume {run}")
            accelerator.end_training()
            return INTERRUPTED
        stop.give_back()
        progress.say("evaluating on the held-out text")
        with SpikeMonitor(accelerator.unwrap_model(model)) as monitor:
            validation_loss = evaluate(accelerator, model, validation_loader)
        results = measure(accelerator, settings, model, corpus, position, validation_loss, monitor.rates())

    if accelerator.is_main_process:
        finish(accelerator.unwrap_model(model), tokenizer, run, results)
        report(progress, accelerator.unwrap_model(model), tokenizer, corpus, run, results)
    accelerator.end_training()
    return 0


def accelerate(settings: Settings, run: Path) -> Accelerator:
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
            project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run)),
        )
    except ValueError as error:  # a precision that this device does not have
        raise SettingsError(f"mixed_precision {options.mixed_precision}: {error}") from error


def prepare_text(settings: Settings, run: Path, resumed: bool) -> tuple[PreTrainedTokenizerBase, Corpus]:
    """The tokenizer, which is kept in the run folder, and the corpus."""
    options = settings.training
    config = settings.model_config()
    documents = read_documents(options.data)
    if resumed:
        tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    elif options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer, config.vocab_size)
    else:
        texts, _ = split_documents(documents, 0.0 if options.validation_data else options.held_out)
        tokenizer = train_tokenizer(texts(), config.vocab_size)
    check_vocabulary(tokenizer, config.vocab_size)
    if not resumed:
        tokenizer.save_pretrained(run / "tokenizer")
    validation = None if options.validation_data is None else read_documents(options.validation_data)
    return tokenizer, load_corpus(documents, tokenizer, settings.block_size, options.held_out, validation)


def model_config(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model's configuration; a vocabulary trained here on a short text may be smaller than asked for."""
    size = settings.model_config().vocab_size if settings.training.tokenizer else len(tokenizer)
    return settings.model_config(
        vocab_size=size, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )


def describe(progress: Progress, model: NordForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> None:
    """Say what is about to be trained on what."""
    for note in corpus.notes:
        progress.say(f"note: {note}")
    blocks = f"{len(corpus.train):,} blocks" if isinstance(corpus.train, Blocks) else "a stream"
    progress.say(
        f"text {corpus.name}: {blocks} to train on, {len(corpus.validation):,} held out, "
        f"{corpus.bytes_per_token:.2f} bytes per token, vocabulary {len(tokenizer):,}"
    )
    vocabulary = {id(p): p.numel() for p in (model.embed_tokens.weight, model.lm_head.weight)}
    total = model.num_parameters()
    progress.say(f"model of {total:,} parameters, {total - sum(vocabulary.values()):,} without embedding and head")


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
        logits = model(input_ids=batch).logits[:, :-1]
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
    """Write a checkpoint and drop the oldest."""

    def write(folder: Path) -> None:
        accelerator.save_state(str(folder))
        write_json(folder / "position.json", asdict(position))

    write_folder(run / f"checkpoint-{position.step:06d}", write)
    remove_old_checkpoints(run)


def restore(accelerator: Accelerator, run: Path, corpus: Corpus, progress: Progress) -> Position:
    """Load the newest checkpoint of a run, after a look at whether it belongs to this text and model."""
    checkpoint = latest_checkpoint(run)
    if read_json(run / "corpus.json")["fingerprint"] != corpus.fingerprint:
        raise CheckpointError(f"{run}: the text is no longer the one that the run was begun with ({corpus.name})")
    try:
        accelerator.load_state(str(checkpoint))
        position = Position(**read_json(checkpoint / "position.json"))
    except CheckpointError:
        raise
    except Exception as error:  # every part has its own way of not fitting
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint}: does not fit this model ({reason})") from error
    progress.say(f"going on from {checkpoint}")
    return position


class StopRequest:
    """Ctrl-C and SIGTERM ask for a stop after the step at hand; asked twice, they end the program at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before = {kind: signal.signal(kind, self._ask) for kind in (signal.SIGINT, signal.SIGTERM)}

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
    }


def finish(model: NordForCausalLM, tokenizer: PreTrainedTokenizerBase, run: Path, results: dict[str, Any]) -> None:
    """Write the model as a folder that ``from_pretrained`` opens, and the results."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(run / "model", write)
    write_json(run / "results.json", results)


def report(
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
    progress.say(
        f"{duration(results['seconds'])} of training at {results['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {results['peak_memory_mb']:,.0f} MB\n"
        f"model in {run / 'model'}, results in {run / 'results.json'}"
    )


def _against(loss: float, unigram: float) -> str:
    return f"{loss / unigram - 1:+.1%}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "true"
    )  # its warning about forks is not for a loader without workers
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator is found.*")
    logging.disable_progress_bar()  # of transformers; the panel shows what there is to see
    options = parse_arguments(arguments)
    try:
        return train(settings_from(options), options.out, options.resume)
    except (SettingsError, DataError, CheckpointError, FloatingPointError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
