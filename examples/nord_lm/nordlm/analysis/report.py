"""A report on a trained model: one HTML page that needs nothing else, the pictures in it as PNG, and the figures as JSON."""

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
from nordlm.analysis.curves import read_results, training_curves
from nordlm.analysis.heat_map import heat_map
from nordlm.analysis.ood_detection import MADE, distinguish, open_others
from nordlm.analysis.token_activity import KINDS, kinds_of, rates_by_kind
from nordlm.analysis.token_energy import generated_token, sentence
from nordlm.data.sources import Documents
from nordlm.errors import DataError
from nordlm.training.checkpoints import CheckpointError, write_folder, write_json, write_text
from nordlm.training.model_card import parameter_counts

__all__ = ["PAGE", "Subject", "check_folder", "uncertainty_sentence", "write_report"]

PAGE, DATA = "index.html", "report.json"
PICTURES = ("rates", "steps", "neurons", "raster", "kinds", "energy", "auroc", "training")
BLOCKS = 64  # of the known text, in which rates are counted
RASTER_TOKENS = 12
OF_THE_RUN = ("steps", "tokens", "seed", "validation_loss", "bits_per_byte", "unigram_loss", "bigram_loss")


class Subject(NamedTuple):
    """What a report is about.

    Attributes:
        model: in eval mode.
        tokenizer: its tokenizer.
        texts: documents that the model has not seen, of the kind that it was trained on.
        tokens: these documents one after the other, ``[n]``.
        name: where they are from.
        run: the folder of its training run; None: the report has nothing on training.
        results: what else is known of the model on this text, for the table at the top.
        command: what made the report.
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
    subject: Subject,
    others: Mapping[str, Documents | None] | None = None,
    length: int | None = None,
    visible: bool = False,
) -> dict[str, Any]:
    """Measure, draw and write ``index.html``, the PNGs and ``report.json`` into ``folder``, all of them or none.

    Args:
        folder: is made; a report that stood there is replaced, see :func:`check_folder`.
        subject: what the report is about.
        others: other texts, see :func:`uncertainty.open_others`; None: those of :data:`uncertainty.MADE`. Where one of them, or
            the known text, cannot be used, the page says so in the place of its figures.
        length: tokens in a passage, see :func:`uncertainty.distinguish`.
        visible: whether to show progress.

    Returns:
        What is in ``report.json``.

    Raises:
        CheckpointError: the folder cannot be written, or is not one of a report.
    """
    folder = folder.resolve()
    check_folder(folder)
    others = open_others(MADE) if others is None else others
    content, figures, heat = _measure(subject, others, length, visible)
    pictures = {name: _png(figure) for name, figure in figures.items()}

    def write(beside: Path) -> None:
        for name, picture in pictures.items():
            (beside / f"{name}.png").write_bytes(picture)
        write_json(beside / DATA, content)
        write_text(beside / PAGE, _page(content, pictures, heat))

    write_folder(folder, write)
    return content


def check_folder(folder: Path) -> None:
    """Whether a report may be put there: where nothing is, or nothing but an older one.

    Raises:
        CheckpointError: something else is there, or the folder around it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error.strerror})") from error
    if {PAGE, DATA} <= names and all(name in (PAGE, DATA) or name.removesuffix(".png") in PICTURES for name in names):
        return
    raise CheckpointError(
        f"{folder}: expected a new folder, or that of an older report and nothing else, which is replaced"
    )


def _measure(
    subject: Subject, others: Mapping[str, Documents | None], length: int | None, visible: bool
) -> tuple[dict[str, Any], dict[str, Figure], dict[str, Any]]:
    """What goes into JSON, the pictures, and the tokens of the heat map."""
    model, tokenizer = subject.model, subject.tokenizer
    ids = _blocks(subject)
    activity, at_tokens = _run(model, ids)
    profile = generated_token(model, ids[:1])
    kinds = kinds_of(ids, tokenizer)
    by_kind = rates_by_kind(at_tokens, kinds)
    counts = {kind: int((kinds == place).sum()) for place, kind in enumerate(KINDS) if (kinds == place).any()}
    content: dict[str, Any] = {
        "about": _about(subject),
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
        told, known, measured = distinguish(model, tokenizer, subject.texts, others, length, visible)
    except DataError as error:  # a known text that is too short, say: the rest of the report stands without
        content["uncertainty"] = {"auroc": {}, "left_out": [str(error)]}
    else:
        content["uncertainty"] = told | {"sentence": uncertainty_sentence(told["auroc"])}
        heat = heat_map({"known text": known} | measured, tokenizer)
    if content["uncertainty"]["auroc"]:
        figures["auroc"] = plots.auroc(content["uncertainty"]["auroc"])
    if subject.run is not None and (curves := training_curves(subject.run)) is not None:
        losses, fired = curves
        results = read_results(subject.run)
        baselines = {name: results[f"{name}_loss"] for name in ("unigram", "bigram") if f"{name}_loss" in results}
        figures["training"] = plots.training(losses, fired, baselines)
        content["training"] = {"loss": losses, "rates": fired}
    return content, figures, heat


def _blocks(subject: Subject) -> Tensor:
    """Whole windows of the known text, taken evenly, ``[n, S]``."""
    length = min(subject.model.config.max_position_embeddings, len(subject.tokens))
    whole = len(subject.tokens) // length
    taken = torch.linspace(0, whole - 1, min(BLOCKS, whole)).round().long()
    return subject.tokens[: whole * length].view(whole, length)[taken].to(subject.model.device)


@torch.no_grad()
def _run(model: NordForCausalLM, ids: Tensor) -> tuple[dict[str, LayerActivity], dict[str, Tensor]]:
    """What each layer did, and its firing rates at each token, ``[n, S]``."""
    found: dict[str, list[Tensor]] = {}
    with SpikeMonitor(model) as monitor, RowRates(model) as rows:
        for batch in ids.split(8):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)  # large vocabularies have large logits
            for name, rate in rows.take().items():
                found.setdefault(name, []).append(rate.cpu())
    return monitor.activity(), {name: torch.cat(rates) for name, rates in found.items()}


@torch.no_grad()
def _spikes(
    model: NordForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: Tensor
) -> tuple[dict[str, Tensor], list[str]]:
    """Spikes ``[T, S, D]`` of every layer for some tokens, and these."""
    recorder = OutputMonitor(model, AssociativeLIFNode)
    try:
        model(input_ids=ids[None], use_cache=False)
        spikes = {name: recorder[name][0][:, 0].cpu() for name in recorder.monitored_layers}
    finally:
        recorder.remove_hooks()
    return spikes, [tokenizer.decode([token]) for token in ids.tolist()]


def _about(subject: Subject) -> dict[str, Any]:
    total, without = parameter_counts(subject.model)
    return {
        "name": subject.run.name if subject.run else str(subject.model.config.name_or_path or "a model"),
        "text": subject.name,
        "command": subject.command,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "nord_snn": __version__,
        "torch": torch.__version__,
        "device": str(subject.model.device),
        "parameters": total,
        "parameters_without_vocabulary": without,
        "on_this_text": subject.results,
        "of_the_run": {name: value for name, value in read_results(subject.run).items() if name in OF_THE_RUN},
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
        "sentence": sentence(profile),
    }


def uncertainty_sentence(auroc: dict[str, dict[str, dict[str, float]]]) -> str:
    """What follows from the AUROC of the rate of all neurons, beside that of the loss."""
    said = []
    for other, found in auroc.items():
        rate, loss = found["firing rate of all neurons"], found["loss"]
        how = (
            "fires more at"
            if rate["low"] > 0.5
            else "fires less at"
            if rate["high"] < 0.5
            else "shows no difference at"
        )
        said.append(f"{how} {other} ({rate['auroc']:.2f}; loss {loss['auroc']:.2f})")
    return f"Beside the known text, the network {', '.join(said)}." if said else ""


def _png(figure: Figure) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    return held.getvalue()


def _page(content: dict[str, Any], pictures: dict[str, bytes], heat: dict[str, Any]) -> str:
    folder = Path(__file__).parent
    page = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    inside = {name: base64.b64encode(picture).decode() for name, picture in pictures.items()}
    return page.get_template("report.html.j2").render(content=content, pictures=inside, heat=heat)
