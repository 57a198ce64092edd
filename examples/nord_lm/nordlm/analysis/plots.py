"""Plot the figures of a report, without a display. Every function returns a matplotlib Figure."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nord_snn.monitor import CONVENTIONS, EnergyProfile, LayerActivity
from nordlm.analysis.ood_detection import LEARNED

__all__ = ["auroc", "energy", "kinds", "neurons", "raster", "rates", "steps", "training"]

LINE = "#b0b0b0"  # colour of baselines and separators
RASTER_NEURONS = 16  # neurons of each layer in the raster plot


def rates(activity: Mapping[str, LayerActivity]) -> Figure:
    """Plot the firing rate and the highest possible rate of every layer, and the readout's rate, the published convention."""
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(activity)), layout="constrained")
    axis = figure.add_subplot()
    names = list(activity)
    axis.barh(names, [100 * activity[name].rate for name in names], color="#4878a8", label="firing rate")
    axis.scatter(
        [100 * activity[name].ceiling for name in names],
        names,
        marker="|",
        s=120,
        color="black",
        label="highest possible",
    )
    readout = 100 * activity[names[-1]].rate
    axis.axvline(readout, linestyle="--", color="#c44e52", label="readout, the only layer in the published convention")
    axis.invert_yaxis()
    axis.set(xlabel="firing rate, %", xlim=(0, None), title="Firing rate: spikes per neuron in 100 time steps")
    axis.legend(loc="lower right", fontsize="small")
    return figure


def steps(activity: Mapping[str, LayerActivity]) -> Figure:
    """Plot the rate of each layer at each time step."""
    names = list(activity)
    table = torch.stack([activity[name].per_step for name in names])
    shade = table / table.max().clamp(min=1e-9)
    figure, axis = _cells(100 * table, names, [str(step + 1) for step in range(table.shape[1])], shade < 0.6)
    axis.imshow(shade.tolist(), cmap="viridis", aspect="auto", vmin=0, vmax=1)
    axis.set_xlabel("time step")
    axis.set_title("Firing rate of each layer at each time step, %", fontsize="medium")
    return figure


def kinds(by_kind: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> Figure:
    """Plot the rate of each layer at each kind of token, coloured relative to the layer's mean over all tokens."""
    names = list(by_kind)
    columns = [f"{kind.replace(' ', chr(10))}\n({count:,})" for kind, count in counts.items()]
    table = torch.tensor([[by_kind[name][kind] for kind in counts] for name in names])
    share = torch.tensor([float(count) for count in counts.values()])
    mean = (table @ share / share.sum())[:, None].clamp(min=1e-9)
    relative = (table / mean).clamp(0.5, 2).log2()
    figure, axis = _cells(100 * table, names, columns, relative.abs() > 0.6)
    image = axis.imshow(relative.tolist(), cmap="RdBu_r", aspect="auto", vmin=-1, vmax=1)
    bar = figure.colorbar(image, ticks=[-1, 0, 1], pad=0.02)
    bar.set_ticklabels(["half as often\nor less", "as on\naverage", "twice as often\nor more"], fontsize="small")
    axis.set_title("Firing rate at each kind of token in %; colour: relative to the layer's mean", fontsize="medium")
    return figure


def _cells(table: Tensor, names: Sequence[str], columns: Sequence[str], dark: Tensor) -> tuple[Figure, Axes]:
    """Draw numbers in a grid, white on dark cells."""
    figure = Figure(figsize=(2.6 + 0.75 * len(columns), 1.4 + 0.32 * len(names)), layout="constrained")
    axis = figure.add_subplot()
    axis.set_xticks(range(len(columns)), columns, fontsize="small")
    axis.set_yticks(range(len(names)), names)
    for row, values in enumerate(table.tolist()):
        for column, value in enumerate(values):
            color = "white" if dark[row, column] else "black"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", color=color, fontsize="small")
    return figure, axis


def neurons(activity: Mapping[str, LayerActivity]) -> Figure:
    """Plot a histogram of the rates of single neurons for each layer."""
    columns = min(4, len(activity))
    rows = -(-len(activity) // columns)
    figure = Figure(figsize=(2.7 * columns, 0.4 + 1.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis, (name, layer) in zip(axes, activity.items(), strict=False):
        counts, edges = layer.histogram(20)
        axis.stairs(counts.tolist(), (100 * edges).tolist(), fill=True, color="#4878a8")
        dead, saturated = int(layer.dead.sum()), int(layer.saturated.sum())
        axis.set_title(f"{name}\n{dead} dead, {saturated} saturated of {layer.per_neuron.numel()}", fontsize="small")
        axis.set_xlim(0, 100 * layer.ceiling)
        axis.tick_params(labelsize="small")
    for axis in axes[len(activity) :]:
        axis.axis("off")
    figure.supxlabel("firing rate of a neuron, %")
    figure.supylabel("neurons")
    return figure


def raster(spikes: Mapping[str, Tensor], words: Sequence[str]) -> Figure:
    """Plot the spikes ``[T, S, D]`` of some neurons of each layer for a few tokens, one row per neuron."""
    steps, tokens, _ = next(iter(spikes.values())).shape
    figure = Figure(figsize=(2.5 + 0.45 * tokens, 1.2 + 0.75 * len(spikes)), layout="constrained")
    axes = figure.subplots(len(spikes), sharex=True, squeeze=False).flatten().tolist()
    for axis, (name, spike_seq) in zip(axes, spikes.items(), strict=True):
        index = torch.linspace(0, spike_seq.shape[2] - 1, min(RASTER_NEURONS, spike_seq.shape[2])).long()
        time, neuron = spike_seq[:, :, index].transpose(0, 1).flatten(0, 1).nonzero(as_tuple=True)
        axis.scatter(time.tolist(), neuron.tolist(), marker="|", s=9, color="black", linewidth=0.8)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
        axis.set(yticks=[], ylim=(-1, len(index)), xlim=(-0.5, steps * tokens - 0.5))
        for token in range(1, tokens):
            axis.axvline(token * steps - 0.5, color=LINE, linewidth=0.6)
    positions = [(token + 0.5) * steps for token in range(tokens)]
    axes[-1].set_xticks(positions, [_plain(word) for word in words], rotation=60, ha="right", fontsize="small")
    axes[0].set_title(
        f"Spikes of up to {RASTER_NEURONS} neurons of each layer; {steps} time steps for each token", fontsize="medium"
    )
    return figure


def training(
    losses: Mapping[str, Mapping[int, float]], rates: Mapping[str, Mapping[int, float]], baselines: Mapping[str, float]
) -> Figure:
    """Plot loss, baselines and firing rates of the model's parts over training."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in losses.items():
        marker = "o" if len(values) < 30 else None
        left.plot(list(values), list(values.values()), label=name, marker=marker, markersize=3, linewidth=1.2)
    for name, value in baselines.items():
        left.axhline(value, color=LINE, linestyle="--", linewidth=1)
        left.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize="small",
            color="gray",
        )
    left.set(xlabel="training step", ylabel="nats per token", title="Loss")
    left.legend(fontsize="small")
    for name, values in rates.items():
        right.plot(list(values), [100 * rate for rate in values.values()], label=name, linewidth=1.2)
    right.set(xlabel="training step", ylabel="firing rate, %", ylim=(0, None), title="Firing rate of each part")
    right.legend(fontsize="small", ncols=2)
    return figure


def energy(profile: EnergyProfile) -> Figure:
    """Plot the energy of the network and of its dense twin under every convention."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axis = figure.add_subplot()
    names = list(CONVENTIONS)
    for offset, label, values in (
        (-0.2, "this network", [profile.joules_under(name) for name in names]),
        (0.2, "dense twin", [profile.twin_joules_under(name) for name in names]),
    ):
        places = [place + offset for place in range(len(names))]
        bars = axis.barh(places, [1e6 * value for value in values], 0.4, label=label)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize="small")
    quantised = axis.barh(
        [len(names)], [1e6 * profile.quantised_twin_joules], 0.4, label="quantised twin", color="#55a868"
    )
    axis.bar_label(quantised, fmt="%.3g", padding=3, fontsize="small")
    axis.set_yticks(range(len(names) + 1), [*names, "8-bit weights"])
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="microjoules", title="A generated token")
    axis.margins(x=0.15)
    axis.legend(fontsize="small", loc="lower right")
    return figure


def auroc(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Plot the AUROC of every score with its confidence interval, in a panel for each other text."""
    scores = list(next(iter(table.values())))
    figure = Figure(figsize=(2.6 + 2.6 * len(table), 0.9 + 0.27 * len(scores)), layout="constrained")
    axes = figure.subplots(1, len(table), sharey=True, squeeze=False).flatten().tolist()
    for axis, (other, results) in zip(axes, table.items(), strict=True):
        axis.axvline(0.5, color=LINE, linestyle="--")
        for place, score in enumerate(scores):
            value = results[score]
            color = "#55a868" if score in LEARNED else "#4878a8" if score.startswith("firing") else "#dd8452"
            axis.plot([value["low"], value["high"]], [place, place], color=color, linewidth=2)
            axis.plot(value["auroc"], place, "o", color=color)
        axis.set(xlim=(-0.03, 1.03), title=_plain(other))
    axes[0].set_yticks(range(len(scores)), scores)
    axes[0].invert_yaxis()
    figure.supxlabel("AUROC: probability that the other text has the higher score; 0.5 is chance", fontsize="medium")
    return figure


def _plain(text: str) -> str:
    """Escape text for matplotlib: no mathematics, and no characters that its font does not have."""
    shown = text.replace("$", r"\$").replace("\n", "↵")
    return "".join(c if c.isascii() or c == "↵" else "□" for c in shown)
