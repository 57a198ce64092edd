"""Evaluate a trained model on a text: loss, firing rates, detection of other kinds of text, and a report.

    python examples/nord_lm/evaluate.py books.txt
    python examples/nord_lm/evaluate.py --model runs/tiny-0001/model --stride 32 --json result.json books/
    python examples/nord_lm/evaluate.py --ood shuffled code french.txt
    python examples/nord_lm/evaluate.py --report report

The results are nats per token, perplexity and bits per byte, with a sliding window of the model's context. Every token is
scored once and has at least ``context - stride`` tokens before it (except at the start of the text), so a smaller stride
takes more time and lowers the loss. ``nordlm/analysis/ood_detection.py`` and ``report.py`` describe ``--ood`` and ``--report``.
"""

import argparse
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from nordlm.script import exit_on_interrupt, run_script

with exit_on_interrupt():
    from nordlm.analysis.ood_detection import BUILTIN_TEXTS, distinguish, open_others, passage_length
    from nordlm.analysis.perplexity import score
    from nordlm.analysis.report import PAGE, ReportInput, check_folder, uncertainty_sentence, write_report
    from nordlm.cli import file_name, number
    from nordlm.data.sources import read_documents
    from nordlm.errors import DataError, ModelError, RecipeError
    from nordlm.inference.loading import newest_model, open_model
    from nordlm.training.checkpoints import read_json, write_json
    from nordlm.training.held_out import STREAMED_WINDOWS, read_text, verified_held_out_text
    from nordlm.training.progress import print_table
    from rich.console import Console
    from transformers.utils import logging

    from nord_snn.monitor import SpikeMonitor


def evaluate_text(options: argparse.Namespace, visible: bool = False) -> dict[str, Any]:
    """Return the results of all evaluations that the command line requests."""
    if options.json is not None:
        check_results_file(options.json)
    if options.report is not None:
        check_folder(options.report.resolve())
    elif options.passage is not None and options.ood is None:
        raise ModelError("--passage needs --ood or --report")
    folder = options.model or newest_model()
    model, tokenizer = open_model(folder)
    run = folder.parent if (folder.parent / "settings.yaml").is_file() else None
    longest = model.config.max_position_embeddings
    context = longest if options.context is None else options.context
    if context > longest:
        raise ModelError(f"--context must be at most {longest}, the model's context, got {context}")
    stride = max(1, context // 2) if options.stride is None else options.stride
    if stride > context:
        raise ModelError(f"--stride must be at most the context of {context}, got {stride}")
    with_other_texts = options.ood is not None or options.report is not None
    others = open_others(options.ood or BUILTIN_TEXTS) if with_other_texts else {}
    length = passage_length(model, options.passage) if with_other_texts else None
    if options.text or run is None:
        documents = read_documents(options.text)
    else:
        documents = verified_held_out_text(run, tokenizer)
    max_tokens = STREAMED_WINDOWS * context if documents.streamed else None
    text = read_text(documents, tokenizer, options.max_tokens or max_tokens)
    n_predicted = len(text.tokens) - 1
    if not n_predicted:
        raise DataError(f"{documents.name}: no text found")
    with SpikeMonitor(model) as monitor:
        nats = score(model, text.tokens, context, stride, options.batch_size, visible=visible)
    loss = nats / n_predicted
    if not math.isfinite(loss):
        raise ModelError(f"{folder}: the loss on {documents.name} is {loss}, so the weights are damaged or diverged")
    results = {
        "model": str(folder),
        "text": documents.name,
        "context": context,
        "stride": stride,
        "tokens": n_predicted,
        "bytes": text.n_bytes,
        "nats_per_token": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / text.n_bytes / math.log(2),
        "firing_rates": monitor.rates(),
        "left_out": documents.notes(),
    }
    if options.report is not None:
        metrics = {name: results[name] for name in ("nats_per_token", "perplexity", "bits_per_byte")}
        command = shlex.join(["python", *sys.argv])
        subject = ReportInput(model, tokenizer, text.documents, text.tokens, documents.name, run, metrics, command)
        results["uncertainty"] = write_report(options.report, subject, others, length, visible)["uncertainty"]
    elif with_other_texts:
        ood, _, _ = distinguish(model, tokenizer, text.documents, others, length, visible)
        if not ood["auroc"]:
            raise DataError("; ".join(ood["left_out"]))
        results["uncertainty"] = ood | {"sentence": uncertainty_sentence(ood["auroc"])}
    return results


def check_results_file(path: Path) -> None:
    """Check that ``--json`` names a new file or one with earlier results of this script, also through a link.

    Raises:
        ModelError: the file has other content, is not a regular file, or its folder does not exist.
    """
    try:
        target = path.resolve()
        if not os.path.lexists(target):
            if target.parent.is_dir():
                return
            raise ModelError(f"--json {path}: expected a file in a folder that exists")
        if not target.is_file():
            raise ModelError(f"--json {path}: expected a new or a regular file in a folder that exists")
        earlier = read_json(target) if target.stat().st_size else {"nats_per_token": None}
    except OSError as error:  # for example a name that is too long
        raise ModelError(f"--json {path}: cannot be written ({error.strerror})") from error
    except RuntimeError:  # circular links, or a file that is not JSON
        earlier = None
    if not isinstance(earlier, dict) or "nats_per_token" not in earlier:
        raise ModelError(f"--json {path}: expected a new file, or one with results of evaluate.py, which are replaced")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "text", nargs="?", help=".txt, .jsonl or .parquet file, a folder of these, or a dataset owner/name (default: the "
        "held-out text of the model's run, or the documentation inside CPython)",
    )  # fmt: skip
    parser.add_argument(
        "--model",
        type=file_name,
        help="folder with model and tokenizer (default: from the newest finished run in runs/)",
    )
    parser.add_argument("--context", type=number(1, kind=int), help="tokens in a window (default: the model's context)")
    parser.add_argument(
        "--stride",
        type=number(1, kind=int),
        help="tokens between the starts of two windows (default: half of --context)",
    )
    parser.add_argument(
        "--max-tokens", type=number(1, kind=int), help="stop after the document that reaches this number of tokens"
    )
    parser.add_argument("--batch-size", type=number(1, kind=int), default=8, help="windows in a batch")
    parser.add_argument("--json", type=file_name, help="also write the results to this file")
    parser.add_argument(
        "--ood", nargs="*", metavar="TEXT", help="compute how well firing rates, entropy and loss separate the text from these "
        f"(AUROC): files, folders, datasets, or {', '.join(BUILTIN_TEXTS)} (without an argument: these three)",
    )  # fmt: skip
    parser.add_argument(
        "--passage", type=number(2, kind=int), help="tokens in a passage for --ood and --report (default: 32)"
    )
    parser.add_argument(
        "--report", type=file_name, metavar="DIR", help="write a report with plots of all results to this folder"
    )
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console = Console()
    try:
        results = evaluate_text(options, console.is_terminal)
        if options.json is not None:
            write_json(options.json.resolve(), results)
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print_results(results, console, options.report)
    return 0


def print_results(results: dict[str, Any], console: Console, report: Path | None) -> None:
    """Print the results as tables."""
    columns = ["tokens", "nats per token", "perplexity", "bits per byte"]
    row = [
        f"{results['tokens']:,}",
        f"{results['nats_per_token']:.4f}",
        f"{results['perplexity']:,.2f}",
        f"{results['bits_per_byte']:.4f}",
    ]
    title = f"{results['text']}, windows of {results['context']}, stride {results['stride']}"
    print_table(console, title, columns, [row])
    rates = [[name, f"{rate:.2%}"] for name, rate in results["firing_rates"].items()]
    print_table(console, "firing rates", ["neuron layer", "rate"], rates)
    if auroc := results.get("uncertainty", {}).get("auroc"):
        title = "AUROC: probability that a passage of the other text has the higher score (95 % interval)"
        rows = [
            [name, *(_with_interval(scores[name]) for scores in auroc.values())] for name in next(iter(auroc.values()))
        ]
        print_table(console, title, ["score", *auroc], rows)
        console.print(results["uncertainty"]["sentence"], highlight=False, markup=False)
    for note in results["left_out"] + results.get("uncertainty", {}).get("left_out", []):
        console.print(f"note: {note}", highlight=False, markup=False)
    if report is not None:
        console.print(f"report in {report / PAGE}", highlight=False, markup=False, soft_wrap=True)


def _with_interval(value: dict[str, float]) -> str:
    return f"{value['auroc']:.2f} ({value['low']:.2f}–{value['high']:.2f})"


if __name__ == "__main__":
    sys.exit(run_script(main))
