"""Run every part and draw the figures of its page: ``python docs/figures.py`` writes them to ``docs/figures``."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor, nn

from nord_snn.layers import (
    LeakyClamp,
    MembraneReadout,
    MultiScaleTemporalEncoder,
    NordBlock,
    SpikeFedBlock,
    SpikingFeedForward,
)
from nord_snn.monitor import SpikeMonitor, profile_energy
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import resonance, reward_from_loss, stdp, triplet_stdp

OUT = Path(__file__).parent / "figures"


def raster(axis: Axes, spikes: Tensor, color: str = "black") -> None:
    """Draw spikes ``[T, D]`` as marks, one row per neuron."""
    time_step, neuron = spikes.nonzero(as_tuple=True)
    axis.scatter(time_step, neuron, marker="|", s=20, color=color, linewidth=1.2)
    axis.set(xlabel="time step", ylabel="neuron", xlim=(-0.5, len(spikes) - 0.5))


def associative_lif() -> None:
    """Draw the response of one neuron to a current that is switched on and off."""
    node = AssociativeLIFNode(1, None, step_mode="s")
    current = torch.zeros(40)
    current[3:18] = 0.35
    current[24:27] = 1.2
    i_syn, v, spikes = [], [], []
    for x in current:
        spikes.append(node(x.reshape(1, 1)).item())
        assert isinstance(node.v, Tensor)
        assert isinstance(node.i_syn, Tensor)
        v.append(node.v.item())
        i_syn.append(node.i_syn.item())
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4), sharex=True, layout="constrained")
    top.step(range(40), current, where="mid", color="gray", label="input current x")
    top.step(range(40), i_syn, where="mid", label="synaptic current i")
    top.legend()
    bottom.step(range(40), v, where="mid", label="membrane potential v")
    bottom.axhline(0.25, linestyle="--", color="gray")
    bottom.axhline(-0.1, linestyle=":", color="gray")
    bottom.text(-1, 0.25, "threshold", va="bottom", color="gray")
    bottom.text(-1, -0.1, "v_reset, while refractory", va="top", color="gray")
    spike_times = [t for t, s in enumerate(spikes) if s]
    bottom.scatter(spike_times, [0.32] * len(spike_times), marker="|", s=120, color="black", label="spikes")
    bottom.set(xlabel="time step", ylim=(-0.2, 0.4))
    bottom.legend(loc="center right")
    save(figure, "associative_lif")


def cascade() -> None:
    """Drive one cluster, give all others a weak background current, and draw the rates with and without the cascade."""
    torch.manual_seed(0)
    n_features, n_clusters, n_steps = 64, 16, 40
    driven = torch.arange(n_features) % n_clusters == 4
    x = 0.2 * torch.rand(n_steps, 200, n_features)  # background current; alone it makes hardly any neuron fire
    x[:, :, driven] += 1.5
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    initial = AssociativeLIFNode(n_features, n_clusters).cascade
    assert initial is not None
    image = axes[0].imshow(initial.weight.detach().sigmoid(), cmap="viridis")
    axes[0].set(title="initial sigmoid(weight)", xlabel="firing cluster k", ylabel="receiving cluster c")
    figure.colorbar(image, ax=axes[0])
    for axis, clusters in zip(axes[1:], (None, n_clusters), strict=True):
        node = AssociativeLIFNode(n_features, clusters, step_mode="m")
        with torch.no_grad():
            rates = node(x).mean(1).reshape(n_steps, n_features // n_clusters, n_clusters).mean(1)
        image = axis.imshow(rates.T, aspect="auto", vmin=0, vmax=0.35, cmap="magma", origin="lower")
        axis.set(title="without cascade" if clusters is None else "with cascade", xlabel="time step", ylabel="cluster")
    figure.colorbar(image, ax=axes[1:], label="firing rate")
    save(figure, "cascade")


def leaky_clamp() -> None:
    """Draw output and derivative of LeakyClamp, ReLU and leaky ReLU."""
    x = torch.linspace(-3, 1.5, 901)[:, None].requires_grad_()
    activations = {"ReLU": nn.ReLU(), "leaky ReLU, 0.1": nn.LeakyReLU(0.1), "LeakyClamp": LeakyClamp(1)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for name, function in activations.items():
        y = function(x)
        (derivative,) = torch.autograd.grad(y.sum(), x)
        style = {"linewidth": 2.5 if name == "LeakyClamp" else 1.0}
        left.plot(x.detach(), y.detach(), label=name, **style)
        right.plot(x.detach(), derivative, label=name, **style)
    left.set(xlabel="x", ylabel="y", ylim=(-0.35, 1.0), title="output")
    right.set(xlabel="x", ylabel="dy/dx", title="derivative")
    left.legend()
    save(figure, "leaky_clamp")


def temporal_encoder() -> None:
    """Draw the currents of three features over ten time steps, and the membrane potentials of neurons."""
    torch.manual_seed(1)
    encoder = MultiScaleTemporalEncoder(3)
    nn.init.eye_(encoder.projection.weight)
    features = torch.tensor([[0.4, 0.15, -0.2]])
    node = AssociativeLIFNode(3, None, step_mode="m", store_v_seq=True)
    with torch.no_grad():
        current = encoder(features)
        spikes = node(current)
    assert node.v_seq is not None
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.step(range(10), current[:, 0], where="mid", label=[f"feature {value:g}" for value in features[0].tolist()])
    left.axvspan(-0.5, 7.5, color="tab:orange", alpha=0.1, label="fast path")
    left.axvspan(7.5, 9.5, color="tab:blue", alpha=0.1, label="slow path")
    left.set(xlabel="time step", ylabel="current", xlim=(-0.5, 9.5), ylim=(-2, 5.5))
    left.legend(fontsize=8, ncols=2, loc="upper left")
    right.step(range(10), node.v_seq[:, 0], where="mid", label=[f"feature {value:g}" for value in features[0].tolist()])
    for neuron in range(3):
        spike_times = spikes[:, 0, neuron].nonzero().flatten()
        right.scatter(spike_times, [0.28 + 0.06 * neuron] * len(spike_times), marker="|", s=120, color=f"C{neuron}")
    right.axhline(0.25, linestyle="--", color="gray")
    right.set(xlabel="time step", ylabel="membrane potential, spikes")
    right.legend(fontsize=8)
    save(figure, "temporal_encoder")


def co_firing_resonance() -> None:
    """Draw the resonance of eight positions; positions 2 and 6 fire the same pattern."""
    torch.manual_seed(0)
    n_steps, positions, width = 6, 8, 12
    spikes = (torch.rand(n_steps, 1, positions, width) < 0.25).float()
    spikes[:, :, 6] = spikes[:, :, 2]
    scores = torch.einsum("tbad,tbcd->ac", spikes, spikes)
    future = torch.ones(positions, positions).triu(1).bool()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    raster(axes[0], spikes[:, 0].flatten(1))
    for edge in range(1, positions):
        axes[0].axhline(edge * width - 0.5, color="lightgray", linewidth=0.6)
    axes[0].set(title="spikes of 8 positions", ylabel="position", yticks=[(p + 0.5) * width for p in range(positions)])
    axes[0].set_yticklabels(range(positions))
    image = axes[1].imshow(scores.masked_fill(future, math.nan), cmap="viridis")
    axes[1].set(title="coincident spikes", xlabel="key position", ylabel="query position")
    figure.colorbar(image, ax=axes[1])
    image = axes[2].imshow(_weights(spikes).masked_fill(future, math.nan), cmap="magma", vmin=0, vmax=1)
    axes[2].set(title="weights, top 3 of each query", xlabel="key position", ylabel="query position")
    figure.colorbar(image, ax=axes[2])
    save(figure, "resonance")


def _weights(spikes: Tensor) -> Tensor:
    """Return the weight of each key for each query: the context for values that are 1 at this key and 0 elsewhere."""
    positions, width = spikes.shape[2:]
    columns = []
    for key in range(positions):
        value = torch.zeros(1, positions, width)
        value[:, key] = 1.0
        context = resonance(spikes, spikes, value, n_heads=1, top_k=3, temperature=torch.tensor([width**-0.5]))
        columns.append(context[0, :, 0])
    return torch.stack(columns, 1)


def learning_rules() -> None:
    """Draw the weight change by lag of a pair, by rate of pairs and triplets, and the reward."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    lags = [lag for lag in range(-60, 61) if lag]
    changes = []
    for lag in lags:
        pre, post = torch.zeros(130, 1, 1), torch.zeros(130, 1, 1)
        pre[64], post[64 + lag] = 1.0, 1.0
        changes.append(stdp(pre, post)[0].item())
    axes[0].bar(lags, changes, width=1.0)
    axes[0].set(title="one pair", xlabel="post minus pre, time steps", ylabel="weight change")
    rates = [1, 5, 10, 20, 30, 40, 50]
    for lag, style in ((10, "-"), (-10, "--")):
        for name, rule in (("pairs", stdp), ("triplets", triplet_stdp)):
            changes = [_change_of_sixty_pairs(rule, rate, lag) for rate in rates]
            color = "tab:blue" if name == "pairs" else "tab:orange"
            axes[1].plot(rates, changes, style, color=color, label=f"{name}, {lag:+d} ms")
    axes[1].axhline(0, color="gray", linewidth=0.6)
    axes[1].set(title="60 pairs", xlabel="rate of the pairs, Hz (time steps of 1 ms)", ylabel="weight change")
    axes[1].legend(fontsize=7)
    loss = torch.linspace(-6, 6, 200)
    axes[2].plot(loss, reward_from_loss(loss, 0.0))
    axes[2].set(title="reward", xlabel="loss - running mean", ylabel="reward")
    save(figure, "learning_rules")


def _change_of_sixty_pairs(rule: Callable[..., tuple[Tensor, object]], rate: int, lag: int) -> float:
    """Return the weight change of sixty pairs, as in the experiments to which the triplet rule was fitted."""
    period = 1000 // rate
    n_steps = 60 * period + 100
    pre, post = torch.zeros(n_steps, 1, 1), torch.zeros(n_steps, 1, 1)
    pre_times = torch.arange(60) * period + 50
    pre[pre_times], post[pre_times + lag] = 1.0, 1.0
    return rule(pre, post)[0].item()


def membrane_readout() -> None:
    """Draw the membrane potentials of two neurons, their exponential means, and the outputs of the readout."""
    torch.manual_seed(0)
    readout = MembraneReadout(2, neuron=lambda n: AssociativeLIFNode(n, None))
    x = torch.stack((torch.full((12,), 0.22), torch.full((12,), 0.42)), 1)[:, None]
    decay = readout.decay_logit.sigmoid().item()
    node = AssociativeLIFNode(2, None, step_mode="m", store_v_seq=True)
    with torch.no_grad():
        spikes, out = node(x), readout(x)[0]
    assert node.v_seq is not None
    mean, means = torch.zeros(2), []
    for v in node.v_seq[:, 0]:
        mean = decay * mean + (1 - decay) * v
        means.append(mean)
    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    for neuron in range(2):
        color = f"C{neuron}"
        axis.step(
            range(12),
            node.v_seq[:, 0, neuron],
            where="mid",
            color=color,
            alpha=0.4,
            label=f"membrane potential {neuron}",
        )
        axis.plot(range(12), torch.stack(means)[:, neuron], color=color, label=f"exponential mean {neuron}")
        spike_times = spikes[:, 0, neuron].nonzero().flatten()
        axis.scatter(spike_times, [0.3] * len(spike_times), marker="|", s=120, color=color)
        axis.scatter([12.3], [out[neuron].item()], color=color, marker="D")
    axis.axhline(0.25, linestyle="--", color="gray")
    axis.text(12.3, out.max().item() + 0.03, "output:\nmean + rate", ha="center", fontsize=8)
    axis.set(xlabel="time step", ylabel="membrane potential", xlim=(-0.5, 13.2), ylim=(-0.15, 0.45))
    axis.legend(fontsize=8, loc="upper left")
    save(figure, "readout")


def feed_forward() -> None:
    """Draw the spikes of both layers, and their firing rates by the standard deviation of the input."""
    torch.manual_seed(0)
    ffn = SpikingFeedForward(64, 128)
    spikes: dict[str, Tensor] = {}
    for name in ("lif1", "lif2"):
        getattr(ffn, name).register_forward_hook(lambda m, i, out, name=name: spikes.update({name: out}))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    with torch.no_grad():
        ffn(2 * torch.randn(20, 1, 64))
        for axis, (name, title) in zip(axes, (("lif1", "lif1(up(x))"), ("lif2", "lif2(down(...))")), strict=False):
            raster(axis, spikes[name][:, 0])
            axis.set(title=title)
        deviations = torch.linspace(0, 6, 25)
        rates: dict[str, list[float]] = {"lif1": [], "lif2": []}
        for deviation in deviations:
            with SpikeMonitor(ffn) as monitor:
                ffn(deviation * torch.randn(20, 32, 64))
            for name, rate in monitor.rates().items():
                rates[name].append(rate)
    for name, values in rates.items():
        axes[2].plot(deviations, values, label=name)
    axes[2].set(xlabel="standard deviation of the input", ylabel="firing rate", title="before training")
    axes[2].legend()
    save(figure, "feed_forward")


def block() -> None:
    """Draw how much an untrained block changes its input, by residual scale, and the firing rates of its neurons."""
    torch.manual_seed(0)
    x = torch.randn(10, 4, 16, 64)
    scales = [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    changes, rates = [], {}
    for scale in scales:
        torch.manual_seed(1)
        untrained = NordBlock(64, 4, 128, residual_scale=scale)
        with torch.no_grad(), SpikeMonitor(untrained) as monitor:
            out, clamped = untrained(x), untrained.clamp(x)
        changes.append(((out - clamped).norm() / x.norm()).item())
        rates = monitor.rates()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(scales, changes, "o-")
    left.set(xlabel="residual_scale", ylabel="change relative to the input", xscale="symlog", title="both branches")
    left.set_xscale("symlog", linthresh=0.01)
    right.barh(list(rates), [100 * rate for rate in rates.values()])
    right.set(xlabel="firing rate before training, %", title="four layers of neurons")
    save(figure, "block")


def spike_fed() -> None:
    """Draw multiply-accumulates and additions of each product in both blocks."""
    torch.manual_seed(0)
    x = torch.randn(10, 4, 16, 64)
    blocks = {
        "NordBlock": NordBlock(64, 4, 128),
        "SpikeFedBlock": SpikeFedBlock(64, 4, 128),
        "SpikeFedBlock, spiking values": SpikeFedBlock(64, 4, 128, spiking_values=True),
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), sharex=True, layout="constrained")
    for axis, (name, block) in zip(axes, blocks.items(), strict=True):
        with torch.no_grad():
            for parameter_name, parameter in block.named_parameters():
                if name == "NordBlock" and parameter_name.endswith("v_threshold"):
                    parameter.fill_(0.05)  # for firing rates similar to those after training
        profile = profile_energy(block, x)
        labels = [
            f"{p.name.removeprefix('resonance.')} ({p.kind})" if p.kind != "linear" else p.name
            for p in profile.products
        ]
        axis.barh(labels, [p.macs / 1e3 for p in profile.products], color="#dd8452", label="multiply-accumulates")
        axis.barh(labels, [p.acs / 1e3 for p in profile.products], color="#4878a8", label="additions")
        axis.invert_yaxis()
        axis.tick_params(labelsize="small")
        axis.set_title(name, fontsize="medium")
        axis.set_xlabel("thousands")
    axes[-1].legend(fontsize="small")
    save(figure, "spike_fed")


def save(figure: plt.Figure, name: str) -> None:
    """Write a figure and close it."""
    figure.savefig(OUT / f"{name}.png", dpi=110)
    plt.close(figure)


FIGURES: dict[str, Callable[[], None]] = {
    "associative_lif": associative_lif,
    "cascade": cascade,
    "leaky_clamp": leaky_clamp,
    "temporal_encoder": temporal_encoder,
    "resonance": co_firing_resonance,
    "learning_rules": learning_rules,
    "readout": membrane_readout,
    "feed_forward": feed_forward,
    "block": block,
    "spike_fed": spike_fed,
}


def main(arguments: list[str] | None = None) -> None:
    """Draw all figures, or only those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("names", nargs="*", help=f"figures to draw, of {', '.join(FIGURES)}; default: all")
    names = parser.parse_args(arguments).names
    if unknown := set(names) - set(FIGURES):
        parser.error(f"unknown figure {', '.join(sorted(unknown))}; expected {', '.join(FIGURES)}")
    mpl.use("Agg")
    OUT.mkdir(exist_ok=True)
    for name in names or FIGURES:
        FIGURES[name]()


if __name__ == "__main__":
    main()
