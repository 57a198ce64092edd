"""Monitors count while several threads run the network: no spike is lost or counted twice."""

import threading

import pytest
import torch
from spikingjelly.activation_based.neuron import LIFNode

from nord_snn.layers import SpikingFeedForward
from nord_snn.monitor import RowRates, SpikeMonitor, profile_energy
from nord_snn.neurons import AssociativeLIFNode

NEURONS = {"ours": lambda n: AssociativeLIFNode(n, n_clusters=4), "SpikingJelly": lambda n: LIFNode()}
THREADS = 4


def in_threads(run, inputs, calls):
    """Call ``run`` with each input in a thread of its own; return the errors."""
    errors = []

    def work(x):
        try:
            for _ in range(calls):
                run(x)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.quick
@pytest.mark.parametrize("calls", [30, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("neuron", NEURONS)
def test_four_threads_are_counted_as_one(neuron, calls):
    net = SpikingFeedForward(256, 512, neuron=NEURONS[neuron]).eval().requires_grad_(False)
    inputs = [3 * torch.randn(4, 2, 256) for _ in range(THREADS)]
    with SpikeMonitor(net) as monitor, RowRates(net) as rows:
        for x in inputs:
            net(x)
        alone, alone_rows = monitor.activity(), rows.take()
        monitor.clear()
        assert not in_threads(net, inputs, calls)
        together, together_rows = monitor.activity(), rows.take()
    for name, layer in alone.items():
        assert together[name].rows == calls * layer.rows
        torch.testing.assert_close(together[name].per_neuron, layer.per_neuron)
        torch.testing.assert_close(together_rows[name], alone_rows[name])
    assert alone["lif1"].rate > 0


def test_an_energy_profile_counts_its_own_thread():
    """Other threads run the network meanwhile: every figure is that of the profiled call."""
    net = SpikingFeedForward(64, 128, neuron=NEURONS["ours"]).eval().requires_grad_(False)
    x, done = 3 * torch.randn(4, 2, 64), threading.Event()
    expected = profile_energy(net, x)
    others = [threading.Thread(target=lambda: [net(x) for _ in iter(done.is_set, True)]) for _ in range(THREADS - 1)]
    for thread in others:
        thread.start()
    profiles = [profile_energy(net, x) for _ in range(10)]
    done.set()
    for thread in others:
        thread.join()
    for profile in profiles:
        assert (profile.macs, profile.acs, profile.additions) == (expected.macs, expected.acs, expected.additions)
        assert [(p.name, p.calls) for p in profile.products] == [(p.name, p.calls) for p in expected.products]
