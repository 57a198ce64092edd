"""How well a trained model predicts a text: nats per token, perplexity, bits per byte.

    python examples/nord_lm/evaluate.py books.txt
    python examples/nord_lm/evaluate.py --model runs/tiny-0001/model --stride 32 --json result.json books/

A window of the model's context slides over the text. Every token is scored once, with at least ``context - stride`` tokens
before it (but for the first ones): a smaller stride costs more and predicts better.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoints import CheckpointError, write_json
from data import DataError, encode, read_documents
from generate import ModelError, newest_model, number, open_model
from modeling_nord import NordForCausalLM
from progress import print_table
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from nord_snn.monitor import SpikeMonitor

__all__ = ["Text", "score", "windows"]


class Text(NamedTuple):
    """Tokens of a text, an end-of-text token before the first document and behind each; and its bytes in UTF-8."""

    tokens: Tensor
    n_bytes: int


class Window(NamedTuple):
    """Inputs ``[begin, end)`` of a text, of which the last ``scored`` predict a token that no window before did."""

    begin: int
    end: int
    scored: int


def read_text(source: str | None, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> tuple[Text, list[str]]:
    """The whole documents of a source, up to about ``max_tokens``; and notes on what was left out."""
    documents = read_documents(source)
    parts, n_bytes, n_tokens = [torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)], 0, 0
    for text in documents.read():
        parts.extend(encode([text], tokenizer))
        n_bytes, n_tokens = n_bytes + len(text.encode()), n_tokens + len(parts[-1])
        if max_tokens is not None and n_tokens >= max_tokens:
            break
    return Text(torch.cat(parts).long(), n_bytes), documents.notes()


def windows(n_predicted: int, context: int, stride: int) -> Iterator[Window]:
    """Cover ``n_predicted`` tokens, each predicted once."""
    done = 0
    while done < n_predicted:
        end = min(n_predicted, done + (stride if done else context))
        yield Window(max(0, end - context), end, end - done)
        done = end


@torch.no_grad()
def score(
    model: NordForCausalLM, tokens: Tensor, context: int, stride: int, batch_size: int = 8, visible: bool = False
) -> float:
    """Nats for all tokens but the first.

    Args:
        model: in eval mode.
        tokens: ``[n]``, n at least 2.
        context: tokens that a window sees, at most the model's.
        stride: tokens that a window goes on, at most ``context``.
        batch_size: windows of one size computed together.
        visible: whether to show progress.
    """
    groups: list[list[Window]] = []
    for window in windows(len(tokens) - 1, context, stride):
        last = groups[-1] if groups else []
        same = last and (last[0].end - last[0].begin, last[0].scored) == (window.end - window.begin, window.scored)
        if same and len(last) < batch_size:
            last.append(window)
        else:
            groups.append([window])
    total = 0.0
    for group in track(groups, "evaluating", disable=not visible, transient=True):
        ids = torch.stack([tokens[w.begin : w.end] for w in group]).to(model.device)
        targets = torch.stack([tokens[w.end - w.scored + 1 : w.end + 1] for w in group]).to(model.device)
        logits = model(input_ids=ids, logits_to_keep=group[0].scored, use_cache=False).logits
        total += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").double().item()
    return total


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command line asks for."""
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise ModelError(f"--json {options.json}: expected a file in a folder that exists")
    folder = options.model or newest_model()
    model, tokenizer = open_model(folder)
    longest = model.config.max_position_embeddings
    context = longest if options.context is None else options.context
    if context > longest:
        raise ModelError(f"--context must be at most {longest}, what the model was made for, got {context}")
    stride = max(1, context // 2) if options.stride is None else options.stride
    if stride > context:
        raise ModelError(f"--stride must be at most the context of {context}, got {stride}")
    text, notes = read_text(options.text, tokenizer, options.max_tokens)
    n_predicted = len(text.tokens) - 1
    with SpikeMonitor(model) as monitor:
        nats = score(model, text.tokens, context, stride, options.batch_size, visible=True)
    loss = nats / n_predicted
    return {
        "model": str(folder),
        "text": options.text or "the documentation inside CPython",
        "context": context,
        "stride": stride,
        "tokens": n_predicted,
        "bytes": text.n_bytes,
        "nats_per_token": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / text.n_bytes / math.log(2),
        "firing_rates": monitor.rates(),
        "left_out": notes,
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "text", nargs="?", help=".txt, .jsonl or .parquet file, a folder of these, or a dataset owner/name; default: the "
        "documentation inside CPython",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=Path, help="folder with model and tokenizer (default: of the newest run in runs/)"
    )
    parser.add_argument("--context", type=number(1, kind=int), help="tokens that a window sees (default: the model's)")
    parser.add_argument(
        "--stride", type=number(1, kind=int), help="tokens that a window goes on (default: half of them)"
    )
    parser.add_argument("--max-tokens", type=number(1, kind=int), help="stop after the document that reaches so many")
    parser.add_argument("--batch-size", type=number(1, kind=int), default=8, help="windows computed together")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        results = evaluate(options)
        if options.json is not None:
            write_json(options.json, results)
    except (ModelError, DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    console = Console()
    columns = ["tokens", "nats per token", "perplexity", "bits per byte"]
    row = [
        f"{results['tokens']:,}",
        f"{results['nats_per_token']:.4f}",
        f"{results['perplexity']:,.2f}",
        f"{results['bits_per_byte']:.4f}",
    ]
    title = f"{results['text']}, windows of {results['context']} by {results['stride']}"
    print_table(console, title, columns, [row])
    rates = [[name, f"{rate:.2%}"] for name, rate in results["firing_rates"].items()]
    print_table(console, "firing rates", ["neuron layer", "rate"], rates)
    for note in results["left_out"]:
        console.print(f"note: {note}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
