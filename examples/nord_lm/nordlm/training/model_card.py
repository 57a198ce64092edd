"""Write the model card, the file ``README.md`` in the folder of a model."""

import html
import json
import re
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from nord_snn import __version__
from nord_snn.models.nord import NordConfig, NordForCausalLM

__all__ = ["model_card", "parameter_counts"]

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  # needs pip install nord-snn
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
ids = tokenizer("Once", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
```"""


def parameter_counts(model: PreTrainedModel) -> tuple[int, int]:
    """Return the number of all parameters, and of those that are neither embedding nor head."""
    weights = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    vocabulary = {id(weight): weight.numel() for weight in weights}  # tied weights count once
    total = model.num_parameters()
    return total, total - sum(vocabulary.values())


def model_card(
    model: NordForCausalLM,
    origin: str,
    results: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> str:
    """Return the text of the model card.

    Args:
        model: the model.
        origin: start of the first sentence, which ends with nord-snn and its version, such as ``"Trained with"``.
        results: content of ``results.json``. Default: no results.
        training: training settings of the run. Default: no settings.
    """
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["spiking-neural-network", "nord-snn"]
    )
    total, without_vocabulary = parameter_counts(model)
    facts = {
        "parameters": f"{total:,}",
        "parameters without embedding and head": f"{without_vocabulary:,}",
    } | _facts(results)
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# A Nord spiking language model\n\n{escape(origin)} nord-snn {__version__}.",
        _markdown_table(("", ""), facts),
        USE,
    ]
    if results is not None:
        rates = {name: f"{rate:.2%}" for name, rate in results["firing_rates"].items()}
        parts.append(
            "## Firing rates\n\nSpikes per neuron and time step in each layer of neurons, mean over the held-out text.\n\n"
            + _markdown_table(("layer", "rate"), rates)
        )
    published = NordConfig().to_dict()
    differing = {name: value for name, value in model.config.to_dict().items() if published.get(name) != value}
    configuration = _code_block("json", json.dumps(differing, indent=2, default=str))
    parts.append(
        f"## Configuration\n\nFields that differ from those of the published model, `NordConfig()`:\n\n{configuration}"
    )
    if training is not None:
        parts.append(f"## Training\n\n{_code_block('yaml', yaml.safe_dump(training, sort_keys=False).rstrip())}")
    return "\n\n".join(parts) + "\n"


def _facts(results: dict[str, Any] | None) -> dict[str, str]:
    if results is None:
        return {}
    return {
        "training text": escape(results["text"]),
        "tokens in training, with repetitions": f"{results['tokens']:,}",
        "held-out loss, nats per token": f"{results['validation_loss']:.4f}",
        "held-out bits per byte": f"{results['bits_per_byte']:.4f}",
        "held-out loss of a unigram model, nats per token": f"{results['unigram_loss']:.4f}",
        "held-out loss of a bigram model, nats per token": f"{results['bigram_loss']:.4f}",
        "seed": str(results["seed"]),
    }


def escape(text: str) -> str:
    """Return ``text`` as one line of Markdown that displays the characters of ``text``, without markup or HTML."""
    line = html.escape(" ".join(text.split()), quote=False).replace("://", "&#58;//")
    printable = "".join(character if character.isprintable() else "\ufffd" for character in line)
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", printable)


def _code_block(language: str, code: str) -> str:
    """Return a fenced block of code, whose fence is longer than any run of backticks in the code."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", code)), 0)
    return f"{fence}{language}\n{code}\n{fence}"


def _markdown_table(columns: tuple[str, str], rows: dict[str, str]) -> str:
    head = f"| {columns[0]} | {columns[1]} |\n|---|---|\n"
    return head + "\n".join(f"| {name} | {value} |" for name, value in rows.items())
