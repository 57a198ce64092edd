"""Write a report on a trained model: a self-contained HTML page, its plots as PNG files, and all numbers as JSON."""

import base64
import io
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from spikingjelly.activation_based.monitor import OutputMonitor
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nord_snn import __version__
from nord_snn.models.nord import NordForCausalLM
from nord_snn.monitor import CONVENTIONS, EnergyProfile, LayerActivity, RowRates, SpikeMonitor
from nord_snn.neurons import AssociativeLIFNode
from nordlm.analysis import plots
from nordlm.analysis.curves import RUN_RESULTS, read_results, training_curves
from nordlm.analysis.heat_map import heat_map
from nordlm.analysis.ood_detection import BUILTIN_TEXTS, distinguish, open_others
from nordlm.analysis.token_activity import TOKEN_KINDS, kinds_of, rates_by_kind
from nordlm.analysis.token_energy import energy_sentence, profile_generated_token
from nordlm.data.sources import Documents
from nordlm.errors import DataError
from nordlm.training.checkpoints import CheckpointError, write_folder, write_json, write_text
from nordlm.training.model_card import parameter_counts

__all__ = ["PAGE", "ReportInput", "check_folder", "uncertainty_sentence", "write_report"]

PAGE, DATA = "index.html", "report.json"
PICTURES = ("rates", "steps", "neurons", "raster", "kinds", "energy", "auroc", "training")
MAX_SEQUENCES = 64  # sequences of the known text on which rates are measured
RASTER_TOKENS = 12  # tokens in the plot of spikes


class ReportInput(NamedTuple):
    """Model, text and run of a report.

    Attributes:
        model: in eval mode.
        tokenizer: its tokenizer.
        texts: documents of the known text: of the kind that the model was trained on, but not in its training text.
        tokens: token ids of these documents, concatenated, ``[n]``.
        name: source of the documents.
        run: folder of the training run. None: the report has no section on training.
        results: other results of the model on this text, for the table at the top.
        command: the command that writes the report.
    """

    model: NordForCausalLM
    tokenizer: PreTrainedTokenizerBase
    texts: list[str]
    tokens: Tensor
    name: str
    run: Path | None
    results: dict[str, Any]
    command: str


def write_report(
    folder: Path,
    subject: ReportInput,
    others: Mapping[str, Documents | None] | None = None,
    length: int | None = None,
    visible: bool = False,
) -> dict[str, Any]:
    """Measure, plot and write ``index.html``, the PNG files and ``report.json`` to ``folder``, atomically.

    Args:
        folder: folder of the report; an older report is replaced, see :func:`check_folder`.
        subject: model, text and run of the report.
        others: other texts, see :func:`.ood_detection.open_others`. Default: those of :data:`.ood_detection.BUILTIN_TEXTS`.
            For each text that cannot be used, the page has the reason instead of figures.
        length: tokens in a passage. Default: 32, or the model's context if that is less.
        visible: whether to show progress. Default: False.

    Returns:
        The content of ``report.json``.

    Raises:
        CheckpointError: the folder cannot be written, or has other files than a report.
    """
    folder = folder.resolve()
    check_folder(folder)
    others = open_others(BUILTIN_TEXTS) if others is None else others
    content, figures, heat = _build_report(subject, others, length, visible)
    pictures = {name: _png(figure) for name, figure in figures.items()}

    def write(temporary: Path) -> None:
        for name, picture in pictures.items():
            (temporary / f"{name}.png").write_bytes(picture)
        write_json(temporary / DATA, content)
        write_text(temporary / PAGE, _page(content, pictures, heat))

    write_folder(folder, write)
    return content


def check_folder(folder: Path) -> None:
    """Check that ``folder`` is new, empty or an older report.

    Raises:
        CheckpointError: the folder has other files, or its parent cannot be created.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be created ({error.strerror})") from error
    if {PAGE, DATA} <= names and all(name in (PAGE, DATA) or name.removesuffix(".png") in PICTURES for name in names):
        return
    raise CheckpointError(
        f"{folder}: expected a new or empty folder, or one with only an older report, which is replaced"
    )


def _build_report(
    subject: ReportInput, others: Mapping[str, Documents | None], length: int | None, visible: bool
) -> tuple[dict[str, Any], dict[str, Figure], dict[str, Any]]:
    """Return the content for JSON, the plots, and the heat map."""
    model, tokenizer = subject.model, subject.tokenizer
    ids = _known_sequences(subject)
    activity, at_tokens = _record_activity(model, ids)
    profile = profile_generated_token(model, ids[:1])
    kinds = kinds_of(ids, tokenizer)
    by_kind = rates_by_kind(at_tokens, kinds)
    counts = {kind: int((kinds == place).sum()) for place, kind in enumerate(TOKEN_KINDS) if (kinds == place).any()}
    content: dict[str, Any] = {
        "about": _metadata(subject),
        "rates": _rates(activity),
        "published_sparsity": 1 - activity["readout.lif"].rate,
        "rates_by_kind_of_token": {"tokens": counts, "rates": by_kind},
        "energy": _energy(profile),
    }
    figures = {
        "rates": plots.rates(activity),
        "steps": plots.steps(activity),
        "neurons": plots.neurons(activity),
        "raster": plots.raster(*_spikes(model, tokenizer, ids[0, :RASTER_TOKENS])),
        "kinds": plots.kinds(by_kind, counts),
        "energy": plots.energy(profile),
    }
    heat: dict[str, Any] = {}
    try:
        ood, known, others_scored = distinguish(model, tokenizer, subject.texts, others, length, visible)
    except DataError as error:  # for example a known text that is too short: omit this section
        content["uncertainty"] = {"auroc": {}, "left_out": [str(error)]}
    else:
        content["uncertainty"] = ood | {"sentence": uncertainty_sentence(ood["auroc"])}
        heat = heat_map({"known text": known} | others_scored, tokenizer)
    if content["uncertainty"]["auroc"]:
        figures["auroc"] = plots.auroc(content["uncertainty"]["auroc"])
    if subject.run is not None and (curves := training_curves(subject.run)) is not None:
        losses, part_rates = curves
        results = read_results(subject.run)
        baselines = {name: results[f"{name}_loss"] for name in ("unigram", "bigram") if f"{name}_loss" in results}
        figures["training"] = plots.training(losses, part_rates, baselines)
        content["training"] = {"loss": losses, "rates": part_rates}
    return content, figures, heat


def _known_sequences(subject: ReportInput) -> Tensor:
    """Return complete sequences of the known text, evenly spaced, ``[n, S]``."""
    length = min(subject.model.config.max_position_embeddings, len(subject.tokens))
    n = len(subject.tokens) // length
    index = torch.linspace(0, n - 1, min(MAX_SEQUENCES, n)).round().long()
    return subject.tokens[: n * length].view(n, length)[index].to(subject.model.device)


@torch.no_grad()
def _record_activity(model: NordForCausalLM, ids: Tensor) -> tuple[dict[str, LayerActivity], dict[str, Tensor]]:
    """Return the activity of each layer, and its firing rate at each token, ``[n, S]``."""
    at_tokens: dict[str, list[Tensor]] = {}
    with SpikeMonitor(model) as monitor, RowRates(model) as rows:
        for batch in ids.split(8):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)  # logits of all positions would need much memory
            for name, rate in rows.take().items():
                at_tokens.setdefault(name, []).append(rate.cpu())
    return monitor.activity(), {name: torch.cat(rates) for name, rates in at_tokens.items()}


@torch.no_grad()
def _spikes(
    model: NordForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: Tensor
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the spikes ``[T, S, D]`` of every layer for the tokens ``ids [S]``, and the strings of these tokens."""
    recorder = OutputMonitor(model, AssociativeLIFNode)
    try:
        model(input_ids=ids[None], use_cache=False)
        spikes = {name: recorder[name][0][:, 0].cpu() for name in recorder.monitored_layers}
    finally:
        recorder.remove_hooks()
    return spikes, [tokenizer.decode([token]) for token in ids.tolist()]


def _metadata(subject: ReportInput) -> dict[str, Any]:
    total, without_vocabulary = parameter_counts(subject.model)
    return {
        "name": subject.run.name if subject.run else str(subject.model.config.name_or_path or "a model"),
        "text": subject.name,
        "command": subject.command,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "nord_snn": __version__,
        "torch": torch.__version__,
        "device": str(subject.model.device),
        "parameters": total,
        "parameters_without_vocabulary": without_vocabulary,
        "on_this_text": subject.results,
        "of_the_run": {name: value for name, value in read_results(subject.run).items() if name in RUN_RESULTS},
    }


def _rates(activity: dict[str, LayerActivity]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "rate": layer.rate,
            "highest_possible": layer.ceiling,
            "neurons": layer.per_neuron.numel(),
            "dead": int(layer.dead.sum()),
            "saturated": int(layer.saturated.sum()),
        }
        for name, layer in activity.items()
    }


def _energy(profile: EnergyProfile) -> dict[str, Any]:
    grouped = profile.grouped()
    return {
        "products": [{k: getattr(p, k) for k in ("name", "kind", "dense", "macs", "acs")} for p in grouped.products],
        "macs": profile.macs,
        "acs": profile.acs,
        "dense": profile.dense,
        "neuron_operations": profile.neuron_ops,
        "bytes": profile.bytes,
        "joules": {name: profile.joules_under(name) for name in CONVENTIONS},
        "twin_joules": {name: profile.twin_joules_under(name) for name in CONVENTIONS},
        "quantised_twin_joules": profile.quantised_twin_joules,
        "sources": sorted({convention.source for convention in CONVENTIONS.values()}),
        "sentence": energy_sentence(profile),
    }


def uncertainty_sentence(auroc: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return one sentence on the AUROC of the rate of all neurons and of the loss."""
    phrases = []
    for other, scores in auroc.items():
        rate, loss = scores["firing rate of all neurons"], scores["loss"]
        verb = (
            "fires more at"
            if rate["low"] > 0.5
            else "fires less at"
            if rate["high"] < 0.5
            else "shows no difference at"
        )
        phrases.append(f"{verb} {other} ({rate['auroc']:.2f}; loss {loss['auroc']:.2f})")
    return f"Compared with the known text, the network {', '.join(phrases)}." if phrases else ""


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _page(content: dict[str, Any], pictures: dict[str, bytes], heat: dict[str, Any]) -> str:
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    encoded = {name: base64.b64encode(picture).decode() for name, picture in pictures.items()}
    return environment.get_template("report.html.j2").render(content=content, pictures=encoded, heat=heat)
