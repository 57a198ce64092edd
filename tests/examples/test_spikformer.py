"""Tests of examples/spikformer: only attention is replaced, and the network learns."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from spikingjelly.activation_based import neuron

from nord_snn.layers import SpikeFedResonance
from nord_snn.monitor import SpikeMonitor

pytestmark = pytest.mark.quick

MODEL = "spikingjelly.activation_based.model.spikformer"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads do not make such small convolutions faster, and much slower if other processes run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def script() -> ModuleType:
    pytest.importorskip(MODEL, reason="SpikingJelly 0.0.0.0.14 has no Spikformer")
    return importlib.import_module("spikformer_digits")


def test_only_the_attention_is_replaced(script):
    torch.manual_seed(0)
    original = script.spikformer(None)
    torch.manual_seed(0)
    replaced = script.spikformer(script.resonance)
    without_attention = {name: value for name, value in original.state_dict().items() if ".attn." not in name}
    assert without_attention.keys() == {name for name in replaced.state_dict() if ".attn." not in name}
    assert all(torch.equal(value, replaced.state_dict()[name]) for name, value in without_attention.items())
    assert all(isinstance(block.attn, SpikeFedResonance) for block in replaced.blocks)
    original_weights, replaced_weights = (
        sum(p.numel() for name, p in net.named_parameters() if ".attn." in name and p.ndim > 1)
        for net in (original, replaced)
    )
    assert original_weights == replaced_weights


def test_queries_and_keys_fire_inside_the_network_before_training(script):
    """The neurons are SpikingJelly's with thresholds of 1."""
    torch.manual_seed(0)
    net, images = script.spikformer(script.resonance), script.digits()[0][:32]
    with SpikeMonitor(net) as monitor, torch.no_grad():
        script.predict(net, images)
    rates = {name: rate for name, rate in monitor.rates().items() if name.endswith(("lif_q", "lif_k"))}
    assert len(rates) == 2 * script.BLOCKS
    assert min(rates.values()) > 0.005
    assert max(rates.values()) < 0.25


@pytest.mark.parametrize("spiking_neuron", [neuron.ParametricLIFNode, neuron.IFNode])
def test_any_node_of_spikingjelly_fits(script, spiking_neuron):
    def make(width, heads):
        return SpikeFedResonance(width, heads, causal=False, neuron=lambda n: spiking_neuron(), spikes_out=True,
                                 norm="batch", channels_first=True)  # fmt: skip

    net = script.spikformer(make)
    script.predict(net, torch.rand(2, 1, 16, 16)).sum().backward()
    assert net.blocks[0].attn.q_proj.weight.grad is not None


@pytest.fixture
def small(script, monkeypatch):
    """Make the networks of the script have one block of width 32."""
    monkeypatch.setattr(script, "BLOCKS", 1)
    monkeypatch.setattr(script, "WIDTH", 32)


@pytest.mark.usefixtures("small")
def test_the_loss_on_a_batch_falls(script):
    torch.manual_seed(0)
    images, labels, *_ = (part[:32] for part in script.digits())
    net = script.spikformer(script.resonance)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(script.predict(net, images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.usefixtures("small")
def test_the_script_prints_both_tables(script, monkeypatch, capsys):
    few = tuple(part[:32] for part in script.digits())
    monkeypatch.setattr(script, "digits", lambda: few)
    assert script.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("resonance", "no attention", "lif_q", "over 1 seeds, after 3 epochs"))
    with pytest.raises(SystemExit):
        script.main(["--seeds", "0"])


def test_without_spikformer_the_script_names_the_required_release(monkeypatch):
    monkeypatch.setitem(sys.modules, MODEL, None)
    monkeypatch.delitem(sys.modules, "spikformer_digits", raising=False)
    with pytest.raises(SystemExit, match="needs SpikingJelly 2"):
        importlib.import_module("spikformer_digits")
