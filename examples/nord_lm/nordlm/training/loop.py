"""Train a model: training steps, evaluation, checkpoints and results."""

import itertools
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, get_cosine_with_min_lr_schedule_with_warmup

from nord_snn.models.nord import NordForCausalLM
from nord_snn.monitor import SpikeMonitor
from nordlm.data.corpus import Corpus, SequenceDataset, StreamedSequences
from nordlm.errors import CheckpointError, DataError
from nordlm.script import INTERRUPTED
from nordlm.training.building import new_model
from nordlm.training.processes import in_all_processes, on_main_process
from nordlm.training.results import collect_results, print_summary, write_report_page, write_trained_model
from nordlm.training.run import (
    Position,
    Run,
    create_run_folder,
    diverged,
    lock_run,
    make_accelerator,
    prepare_text,
    print_setup,
    restore,
    save,
)
from nordlm.training.runtime import Log, StopRequest
from nordlm.training.settings import Settings, TrainingSettings

__all__ = [
    "INTERRUPTED",
    "Prepared",
    "endless_batches",
    "held_out_loss",
    "model_config",
    "parameter_groups",
    "prepare",
    "take_step",
    "train",
]


@dataclass
class Prepared:
    """Objects that accelerate has moved to the device and wrapped for several processes."""

    accelerator: Accelerator
    sequences: SequenceDataset | StreamedSequences  # for training
    model: nn.Module
    optimizer: Any
    scheduler: Any
    loader: Any  # of the training sequences
    validation: Any  # loader of the held-out sequences


def train(settings: Settings, out: Path, resume: Path | None, with_report: bool = True) -> int:
    """Train a new model or resume a run; return the exit status.

    Args:
        settings: settings of the run.
        out: parent of the numbered folder that a new run gets.
        resume: folder of the run to resume, or None.
        with_report: whether to write the report at the end. Default: True.
    """
    options = settings.training
    accelerator = make_accelerator(settings, out)
    set_seed(options.seed)
    torch.set_float32_matmul_precision(options.matmul_precision)
    with ExitStack() as stack:
        progress = stack.enter_context(Run.progress_for(options, accelerator))
        if resume is not None:
            lock_run(stack, resume, accelerator, progress)
        tokenizer, corpus = prepare_text(accelerator, settings, resume)
        nord = new_model(model_config(settings, tokenizer))
        if options.gradient_checkpointing:
            nord.activation_checkpointing_enable()
        if options.compile:
            for block in nord.blocks:
                block.compile()
        print_setup(progress, settings, nord, tokenizer, corpus)
        prepared = prepare(accelerator, nord, corpus, options)
        folder = resume or create_run_folder(accelerator, settings, tokenizer, corpus, out)
        if resume is None:
            lock_run(stack, folder, accelerator, progress)
        run = Run(accelerator, settings, tokenizer, corpus, folder, progress)
        progress.say(f"run {folder}")
        return _train_run(run, prepared, restore(run) if resume else Position(), with_report)


def _train_run(run: Run, prepared: Prepared, position: Position, with_report: bool) -> int:
    """Train from ``position`` to the end of the run, whose folder is locked; return the exit status."""
    accelerator, options, progress = run.accelerator, run.settings.training, run.progress
    log = Log(accelerator, run.folder, options, progress)
    stop = StopRequest()
    progress.begin(position.step)
    saved = position.step if position.step else None
    _train_steps(run, prepared, position, log, stop)
    if position.step != saved:
        save(run, position, prepared.model)
    if position.step < options.steps:
        progress.say(f"stopped at step {position.step}; resume with: python {sys.argv[0]} --resume {run.folder}")
        log.close()
        return INTERRUPTED
    stop.restore_handlers()
    progress.say("evaluating on the held-out text")
    with SpikeMonitor(accelerator.unwrap_model(prepared.model)) as monitor:
        validation_loss = held_out_loss(accelerator, prepared.model, prepared.validation)
    if not math.isfinite(validation_loss):
        raise diverged(f"the loss on the held-out text is {validation_loss} after step {position.step}")
    results = collect_results(run, prepared.model, position, validation_loss, monitor.rates())
    progress.stop()
    weights = accelerator.get_state_dict(prepared.model)  # a collective call when parameters are sharded

    def finish() -> NordForCausalLM:
        write_trained_model(run, accelerator.unwrap_model(prepared.model), weights, results)
        final_model = NordForCausalLM.from_pretrained(run.folder / "model", trust_remote_code=False)
        final_model = final_model.to(accelerator.device).eval()
        print_summary(run, final_model, results)
        return final_model

    final_model = on_main_process(accelerator, finish)
    log.close()
    if with_report and final_model is not None:  # outside of ``finish``: the other processes need not wait
        write_report_page(run, final_model)
    return 0


def _train_steps(run: Run, prepared: Prepared, position: Position, log: Log, stop: StopRequest) -> None:
    """Run training steps from ``position`` until the last one or until a stop is requested; update ``position`` in place."""
    accelerator, options, progress = run.accelerator, run.settings.training, run.progress
    monitor = SpikeMonitor(accelerator.unwrap_model(prepared.model))
    batches = endless_batches(prepared, position)
    step_tokens = options.grad_accum * options.batch_size * run.settings.block_size * accelerator.num_processes
    while position.step < options.steps and not stop.any_process_requested(accelerator):
        start, previous = time.monotonic(), replace(position)
        try:
            mean_loss, grad_norm = take_step(accelerator, prepared, batches, options)
        except DataError:  # the stream ended with an error: save the training steps before it
            save(run, previous, prepared.model)
            raise
        seconds = time.monotonic() - start
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
            raise diverged(f"the loss became {mean_loss} at step {position.step}")
        if position.step % options.eval_every == 0 and not last:
            monitor.pause()
            held_out = held_out_loss(accelerator, prepared.model, prepared.validation, options.eval_blocks)
            monitor.resume()
            if not math.isfinite(held_out):
                raise diverged(f"the loss on the held-out text became {held_out} at step {position.step}")
            per_byte = run.corpus.bits_per_byte(held_out)
            progress.say(f"step {position.step}: held-out loss {held_out:.4f}, {per_byte:.3f} bits per byte")
            log(position.step, held_out_loss=held_out, bits_per_byte=per_byte)
        if position.step % options.save_every == 0 and not last:
            try:
                save(run, position, prepared.model)
            except CheckpointError as error:  # the disk may have space at the next checkpoint
                progress.say(f"warning: {error}; training continues")
    monitor.close()


def model_config(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the model's configuration.

    If the run trains its tokenizer, ``vocab_size`` is the number of its tokens: on a short text fewer than in the config.
    """
    size = settings.model_config().vocab_size if settings.training.tokenizer else len(tokenizer)
    return settings.model_config(
        vocab_size=size, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )


def prepare(accelerator: Accelerator, model: nn.Module, corpus: Corpus, options: TrainingSettings) -> Prepared:
    """Create AdamW, its learning-rate schedule (linear warm-up, then cosine) and the data loaders."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        fused=accelerator.device.type in ("cpu", "cuda"),  # faster: one pass over the parameters
    )
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, options.warmup_steps, options.steps, min_lr_rate=options.min_lr_ratio
    )
    shuffle = isinstance(corpus.train, SequenceDataset)  # a stream is not shuffled
    loader = DataLoader(corpus.train, options.batch_size, shuffle=shuffle, drop_last=True)
    validation = DataLoader(SequenceDataset(corpus.validation), options.batch_size)
    return Prepared(accelerator, corpus.train, *accelerator.prepare(model, optimizer, scheduler, loader, validation))


def take_step(
    accelerator: Accelerator, prepared: Prepared, batches: Iterator[Tensor], options: TrainingSettings
) -> tuple[float, float]:
    """Run one training step on ``grad_accum`` micro-batches.

    Returns:
        The mean loss, and the norm of the gradient before clipping.
    """
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
    """Group parameters for an optimizer: weight decay on matrices, none on 1-D parameters."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def endless_batches(prepared: Prepared, position: Position) -> Iterator[Tensor]:
    """Yield batches from ``position`` on, epoch after epoch, and update ``position``.

    Raises:
        DataError: the stream ended with an error; all processes raise it.
    """
    loader, sequences = prepared.loader, prepared.sequences
    for epoch in itertools.count(position.epoch):
        loader.set_epoch(epoch)
        for batch in skip_first_batches(loader, position.batches) if position.batches else loader:
            position.batches += 1
            yield batch
        if isinstance(sequences, StreamedSequences):
            in_all_processes(prepared.accelerator, sequences.raise_error)
        position.epoch, position.batches = epoch + 1, 0


@torch.no_grad()
def held_out_loss(accelerator: Accelerator, model: nn.Module, loader: Any, max_blocks: int | None = None) -> float:
    """Return the mean loss in nats per token over held-out sequences, the first ``max_blocks`` or all (None)."""
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
