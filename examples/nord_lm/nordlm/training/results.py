"""Write the output of a finished run: results, a model folder, a summary on the terminal, a report."""

import resource
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.models.nord import NordForCausalLM
from nord_snn.models.nord.checksums import MODEL_FILES, write_checksums
from nordlm.data.baselines import bigram_loss, uniform_loss, unigram_loss
from nordlm.data.corpus import StreamedSequences
from nordlm.data.tokenizer import TOKENIZER_FILES
from nordlm.training.checkpoints import write_folder, write_json
from nordlm.training.held_out import STREAMED_WINDOWS, held_out_text, read_text
from nordlm.training.model_card import model_card
from nordlm.training.progress import duration, print_table
from nordlm.training.run import Position, Run

__all__ = ["collect_results", "print_summary", "write_report_page", "write_trained_model"]

SAMPLE_PROMPT_TOKENS, SAMPLE_TOKENS = 16, 64  # of the generated text in the summary


def collect_results(
    run: Run, model: nn.Module, position: Position, validation_loss: float, rates: dict[str, float]
) -> dict[str, Any]:
    """Return the content of ``results.json``."""
    unwrapped, corpus = run.accelerator.unwrap_model(model), run.corpus
    vocab_size = unwrapped.config.vocab_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
    return {
        "validation_loss": validation_loss,
        "bits_per_byte": corpus.bits_per_byte(validation_loss),
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
        "parameters": unwrapped.num_parameters(),
        "resonance": unwrapped.config.resonance,
        "seed": run.settings.training.seed,
        "text": corpus.name,
        "left_out": corpus.notes(),
    }


def write_trained_model(run: Run, model: NordForCausalLM, weights: dict[str, Tensor], results: dict[str, Any]) -> None:
    """Write ``model/``, a folder for ``from_pretrained`` with a model card, and ``results.json``."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=weights)
        run.tokenizer.save_pretrained(folder)
        text = model_card(model, "Trained with", results, asdict(run.settings.training))
        (folder / "README.md").write_text(text, encoding="utf-8")
        write_checksums(folder, (*MODEL_FILES, *TOKENIZER_FILES))

    write_folder(run.folder / "model", write)
    write_json(run.folder / "results.json", results)


def print_summary(run: Run, model: NordForCausalLM, results: dict[str, Any]) -> None:
    """Print a generated sample and a table of the results and the baselines."""
    progress, tokenizer, corpus = run.progress, run.tokenizer, run.corpus
    prompt = corpus.validation[:1, :SAMPLE_PROMPT_TOKENS].to(model.device)
    progress.say(f"\nheld-out text: {tokenizer.decode(prompt[0])}")
    try:
        ids = model.generate(
            prompt, do_sample=True, top_p=0.9, max_new_tokens=SAMPLE_TOKENS, pad_token_id=tokenizer.eos_token_id
        )
    except (ValueError, RuntimeError) as error:  # logits so large that their probabilities are not finite
        progress.say(f"note: the model cannot continue it ({' '.join(str(error).split())[:200]})\n")
    else:
        progress.say(f"continuation by the model: {tokenizer.decode(ids[0, prompt.shape[1] :])}\n")

    names = {"uniform": "uniform", "unigram": "unigram", "bigram, interpolated": "bigram", "this model": "validation"}
    losses = {title: results[f"{name}_loss"] for title, name in names.items()}
    rows = [
        [title, f"{loss:.4f}", f"{corpus.bits_per_byte(loss):.3f}", f"{loss / results['unigram_loss'] - 1:+.1%}"]
        for title, loss in losses.items()
    ]
    columns = ["held-out text", "nats per token", "bits per byte", "relative to unigram"]
    print_table(progress.console, f"{results['steps']} training steps, {results['tokens']:,} tokens", columns, rows)
    rates = [[name, f"{rate:.2%}"] for name, rate in results["firing_rates"].items()]
    print_table(progress.console, "firing rates on the held-out text", ["neuron layer", "rate"], rates)
    if isinstance(corpus.train, StreamedSequences):  # the notes of text in memory were printed before training
        for note in corpus.notes():
            progress.say(f"note: {note}")
    progress.say(
        f"{duration(results['seconds'])} of training at {results['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {results['peak_memory_mb']:,.0f} MB\n"
        f"model in {run.folder / 'model'}, results in {run.folder / 'results.json'}"
    )


def write_report_page(run: Run, model: NordForCausalLM) -> None:
    """Write the report page. An error gives only a warning, because the run is already complete."""
    try:
        from nordlm.analysis.report import PAGE, ReportInput, write_report  # loads matplotlib, scikit-learn and pandas

        documents = held_out_text(run.settings.training)
        text = read_text(documents, run.tokenizer, STREAMED_WINDOWS * model.config.max_position_embeddings)
        command = shlex.join(["python", *sys.argv])
        subject = ReportInput(
            model, run.tokenizer, text.documents, text.tokens, documents.name, run.folder, {}, command
        )
        write_report(run.folder / "report", subject)
    except ModuleNotFoundError as error:
        run.progress.say(f"note: no report was written, since {error.name} is not installed: install the extra reports")
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        run.progress.say(f"warning: no report was written ({reason}); evaluate.py --report writes one")
    else:
        run.progress.say(f"report in {run.folder / 'report' / PAGE}")
