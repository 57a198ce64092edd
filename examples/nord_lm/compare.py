"""Nord against a GPT-2 of as many parameters: the same tokens, tokenizer, schedule and seeds.

    python examples/nord_lm/compare.py                                  # tiny, three seeds
    python examples/nord_lm/compare.py --config small --data books.txt --lrs 1e-3 3e-3

Both have the same width, blocks, heads, vocabulary and window; the GPT-2's feed-forward is made as wide as it takes for both to
have as many parameters without embedding and head. With several ``--lrs`` each model is trained with each of them at the first
seed, and all its runs take the peak learning rate at which it was best there on the held-out text.

Every run is written down when it ends: the same command again goes on where it stopped.
"""

import argparse
import hashlib
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from baselines import bigram_loss, uniform_loss, unigram_loss
from card import parameter_counts
from checkpoints import CheckpointError, read_json, write_json, write_text
from data import Corpus, DataError
from energy import generated_token
from evaluate import held_out_text, read_text
from generate import number
from modeling_nord import NordForCausalLM
from progress import print_table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from samples import Prompts, coherence, cut_prompts, repetition, write
from settings import Settings, SettingsError, read_config
from train import (
    Position,
    accelerate,
    bits,
    endless,
    evaluate,
    keep_freed_memory,
    model_config,
    prepare,
    prepare_text,
    take_step,
)
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from nord_snn.monitor import SpikeMonitor

__all__ = ["KINDS", "compare", "gpt2", "nord"]

MOST_TOKENS = 400_000  # of held-out text, in which prompts are looked for


def nord(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of the config."""
    return NordForCausalLM(model_config(settings, tokenizer))


def gpt2(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A GPT-2 with as many parameters without embedding and head, to within one neuron of its feed-forwards.

    Raises:
        SettingsError: its attention alone has more.
    """
    config = model_config(settings, tokenizer)
    with torch.device("meta"):
        wanted = parameter_counts(NordForCausalLM(config))[1]

    def of(n_inner: int) -> GPT2Config:
        return GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_position_embeddings,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_inner=n_inner,
            tie_word_embeddings=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    with torch.device("meta"):
        one, two = (parameter_counts(GPT2LMHeadModel(of(n)))[1] for n in (1, 2))
    n_inner = 1 + round((wanted - one) / (two - one))
    if n_inner < 1:
        raise SettingsError(f"a GPT-2 of this width has {one:,} parameters at least, more than the {wanted:,} of Nord")
    return GPT2LMHeadModel(of(n_inner))


KINDS: dict[str, Callable[[Settings, PreTrainedTokenizerBase], PreTrainedModel]] = {"nord": nord, "gpt2": gpt2}


class Text(NamedTuple):
    """What all models are trained on, validated on and asked to go on from."""

    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    prompts: Prompts


def compare(settings: Settings, kinds: Iterable[str], seeds: list[int], lrs: list[float], out: Path) -> dict[str, Any]:
    """Train every kind with every seed, after the choice of its learning rate; returns what is in ``results.json``.

    Raises:
        SettingsError: a setting is not for comparisons, or ``out`` holds those of other settings.
        DataError: the text cannot be used.
    """
    if settings.training.compile or settings.training.gradient_checkpointing:
        raise SettingsError("models are compared without compile and gradient_checkpointing: leave them out")
    text = prepare_for(settings, out)
    results = _begin(settings, text, out)
    results["tried"] = sorted({*results["tried"], *lrs})
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), transient=True) as bars:
        for kind in kinds:
            for lr in lrs:
                one_run(settings, kind, lr, seeds[0], text, results, out, bars)
            chosen = _best(kind, seeds[0], results)
            results["lr"][kind] = chosen
            for seed in seeds[1:]:
                one_run(settings, kind, chosen, seed, text, results, out, bars)
    write_json(out / "results.json", results)
    return results


def _best(kind: str, seed: int, results: dict[str, Any]) -> float:
    """The peak learning rate of the lowest held-out loss among all that were tried at this seed."""
    tried = [
        run for run in results["runs"].values() if (run["kind"], run["seed"]) == (kind, seed) and not run["diverged"]
    ]
    if not tried:
        raise SettingsError(f"{kind} diverged with every peak learning rate: give lower ones with --lrs")
    return min(tried, key=lambda run: run["loss"])["lr"]


def prepare_for(settings: Settings, out: Path) -> Text:
    """Tokenizer, blocks and prompts."""
    set_seed(settings.training.seed)
    tokenizer, corpus = prepare_text(accelerate(settings, out), settings, None)
    held = read_text(held_out_text(settings.training), tokenizer, MOST_TOKENS)
    return Text(tokenizer, corpus, cut_prompts(held.documents, tokenizer, settings.block_size))


def _begin(settings: Settings, text: Text, out: Path) -> dict[str, Any]:
    """The results so far, or those of no model: baselines, and how the held-out text itself is written."""
    digest = hashlib.blake2b(f"{settings.digest()} {text.corpus.fingerprint}".encode(), digest_size=16).hexdigest()
    path = out / "results.json"
    if path.exists():
        held = read_json(path)
        if not isinstance(held, dict) or not {"settings", "runs", "lr", "tried"} <= held.keys():
            raise CheckpointError(f"{path}: not written by compare.py, or damaged")
        if held["settings"] != digest:
            raise SettingsError(f"{path}: of another config or text; give another --out")
        return held
    corpus, written = text.corpus, text.prompts.written
    size = len(text.tokenizer)
    return {
        "settings": digest,
        "text": corpus.name,
        "bytes_per_token": corpus.bytes_per_token,
        "baselines": {
            "uniform": uniform_loss(size),
            "unigram": unigram_loss(corpus.sample, corpus.validation, size),
            "bigram, interpolated": bigram_loss(corpus.sample, corpus.validation, size),
        },
        "held_out_text": {
            "repetition": repetition(written),
            "coherence": coherence(text.tokenizer.batch_decode(written), text.prompts.rests),
            "prompts": len(written),
        },
        "tried": [],
        "lr": {},
        "runs": {},
    }


def one_run(
    settings: Settings, kind: str, lr: float, seed: int, text: Text, results: dict[str, Any], out: Path, bars: Progress
) -> None:
    """Train and measure one model, unless that was done, and write the results down."""
    name = _name(kind, lr, seed)
    if name in results["runs"]:
        return
    settings = replace(settings, training=replace(settings.training, lr=lr, seed=seed))
    bar = bars.add_task(name, total=settings.training.steps)
    results["runs"][name] = {"kind": kind, "lr": lr, "seed": seed} | train_one(
        settings, KINDS[kind], text, out, lambda: bars.advance(bar)
    )
    write_json(out / "results.json", results)
    bars.remove_task(bar)


def train_one(
    settings: Settings,
    make: Callable[[Settings, PreTrainedTokenizerBase], PreTrainedModel],
    text: Text,
    out: Path,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """The same steps as ``train.py``'s, in the same order."""
    options = settings.training
    accelerator = accelerate(settings, out)
    if accelerator.num_processes > 1:
        raise SettingsError("models are compared in one process: start compare.py without accelerate launch")
    set_seed(options.seed)
    torch.set_float32_matmul_precision(options.matmul_precision)
    prepared = prepare(accelerator, make(settings, text.tokenizer), text.corpus, options)
    batches = endless(prepared.loader, Position())
    seconds = []
    for _ in range(options.steps):
        began = time.monotonic()
        loss, _ = take_step(accelerator, prepared, batches, options)
        seconds.append(time.monotonic() - began)
        if not math.isfinite(loss):
            return {"diverged": True}
        advance()
    model = accelerator.unwrap_model(prepared.model)
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
    """What a trained model costs, how often it fires, and how it writes."""
    total, without = parameter_counts(model)
    written = write(model, text.prompts, text.tokenizer.eos_token_id, seed)
    window = text.corpus.validation[:1].to(model.device)
    rates = _rates(model, text)
    if isinstance(model, GPT2LMHeadModel):
        model.set_attn_implementation("eager")  # products that can be counted
    profile = generated_token(model, window)
    return {
        "parameters": total,
        "parameters_without_vocabulary": without,
        "joules": profile.joules,
        "joules_with_sram": profile.joules_under("45nm-fp32-sram"),
        "macs": profile.macs,
        "acs": profile.acs,
        "repetition": repetition(written),
        "coherence": coherence(text.tokenizer.batch_decode(written), text.prompts.rests),
        "firing_rates": rates,
    }


@torch.no_grad()
def _rates(model: PreTrainedModel, text: Text) -> dict[str, float]:
    """Of every layer of neurons on held-out blocks; empty where nothing fires."""
    try:
        monitor = SpikeMonitor(model)
    except ValueError:
        return {}
    with monitor:
        for batch in text.corpus.validation[:64].split(8):
            model(input_ids=batch.to(model.device), use_cache=False)
    return monitor.rates()


def _name(kind: str, lr: float, seed: int) -> str:
    return f"{kind}, peak lr {lr}, seed {seed}"


#: What is shown: title, and how a figure is written.
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters_without_vocabulary": ("parameters", "{:,}".format),
    "lr": ("peak learning rate", "{:g}".format),
    "loss": ("nats per token", "{:.3f}".format),
    "bits_per_byte": ("bits per byte", "{:.3f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "joules": ("µJ a token", lambda joules: f"{1e6 * joules:.2f}"),
    "joules_with_sram": ("µJ with SRAM", lambda joules: f"{1e6 * joules:.2f}"),
    "repetition": ("repetition", "{:.1%}".format),
    "coherence": ("topic coherence", "{:.3f}".format),
}


def table(results: dict[str, Any], kinds: list[str], seeds: list[int]) -> list[list[str]]:
    """A column a model, mean and range over seeds; and the held-out text itself."""
    columns: dict[str, list[dict[str, float]]] = {}
    for kind in kinds:
        runs = [results["runs"][_name(kind, results["lr"][kind], seed)] for seed in seeds]
        columns[kind] = [run for run in runs if not run["diverged"]]
    columns["held-out text"] = [results["held_out_text"]]
    shown = [["", *columns]]
    for figure, (title, show) in FIGURES.items():
        shown.append(
            [title, *(_spread([run[figure] for run in runs if figure in run], show) for runs in columns.values())]
        )
    return shown


def notes(results: dict[str, Any], kinds: list[str], seeds: list[int]) -> str:
    """What the figures of the table are."""
    lost = [name for name, run in results["runs"].items() if run["diverged"] and run["kind"] in kinds]
    counted = ", ".join(f"{name} {loss:.3f}" for name, loss in results["baselines"].items())
    tried = ", ".join(f"{lr:g}" for lr in results["tried"])
    return (
        f"Mean (range) over seeds {', '.join(map(str, seeds))}; text: {results['text']}; by counting alone, nats per token: "
        f"{counted}. Peak learning rates tried at seed {seeds[0]}: {tried}; diverged: {'; '.join(lost) or 'none'}. Parameters "
        "without embedding and head; tokens/s in training; energy of a generated token at the end of a block, 45 nm, float32. "
        f"Samples: after {results['held_out_text']['prompts']} held-out beginnings; repetition is the share of 4-grams that "
        "stood there before, topic coherence the chance that a sample is nearer to the document of its prompt than to another "
        "(TF-IDF; 0.5 says nothing)."
    )


def _spread(values: list[float], show: Callable[[float], str]) -> str:
    """Mean, and range where there is one."""
    if not values:
        return ""
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{show(statistics.mean(values))} ({low}–{high})"


def markdown(results: dict[str, Any], kinds: list[str], seeds: list[int], command: str) -> str:
    """The table, with what made it."""
    head, *rows = table(results, kinds, seeds)
    lines = "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
    return f"{lines}\n\n{notes(results, kinds, seeds)}\n\n`{command}`\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="tiny", help="a name from configs/, or a YAML file (default: tiny)")
    parser.add_argument("--data", help="text file, folder or dataset name (default: the config's)")
    parser.add_argument("--steps", type=number(1, kind=int), help="optimizer steps (default: the config's)")
    parser.add_argument("--models", nargs="+", choices=KINDS, default=list(KINDS), help="default: all of them")
    parser.add_argument("--seeds", nargs="+", type=number(0, 2**32 - 1, int), default=[0, 1, 2])
    parser.add_argument(
        "--lrs", nargs="+", type=number(1e-9), help="peak learning rates to choose from (default: the config's)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for results.json and table.md")
    options = parser.parse_args(arguments)
    options.models, options.seeds = list(dict.fromkeys(options.models)), list(dict.fromkeys(options.seeds))
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    keep_freed_memory()
    try:
        settings = read_config(options.config)
        changes = {name: getattr(options, name) for name in ("data", "steps") if getattr(options, name) is not None}
        settings = replace(settings, training=replace(settings.training, **changes))
        options.out.mkdir(parents=True, exist_ok=True)
        lrs = options.lrs or [settings.training.lr]
        results = compare(settings, options.models, options.seeds, lrs, options.out)
        command = shlex.join(["python", *(sys.argv if arguments is None else ["compare.py", *arguments])])
        write_text(options.out / "table.md", markdown(results, options.models, options.seeds, command))
    except (SettingsError, DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the runs that are missing", file=sys.stderr)
        return 130
    head, *rows = table(results, options.models, options.seeds)
    console = Console()
    print_table(console, settings.name, head, rows)
    console.print(notes(results, options.models, options.seeds), highlight=False, markup=False)
    print(f"table in {options.out / 'table.md'}, all figures in {options.out / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
