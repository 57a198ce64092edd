"""One training step of the language model of `benchmarks/language_model.py`, with and without a `SpikeMonitor`."""

from collections.abc import Callable

import torch
from language_model import keep_freed_memory, make_model, ours, training_step

from nord_snn.monitor import SpikeMonitor

__all__ = ["check", "implementations"]


def monitored() -> Callable[[], object]:
    """Return a training step of ``examples/nord_lm/train.py`` with a monitor."""
    keep_freed_memory()
    net = make_model()
    monitor = SpikeMonitor(net)
    step = training_step(net)

    def run() -> None:
        step()
        assert monitor._counters  # the reference prevents garbage collection of the monitor

    return run


def implementations() -> dict[str, Callable[[], Callable[[], object]]]:
    """Return a function for each name that builds a training step."""
    return {"without": ours, "with `SpikeMonitor`": monitored}


def check() -> str:
    """Compare the firing rates of one forward pass with the means of the recorded spikes; exit if they differ."""
    net, recorded = make_model(), {}
    for name, module in net.named_modules():
        if hasattr(module, "refractory_steps"):
            module.register_forward_hook(lambda m, i, out, name=name: recorded.update({name: out.mean().item()}))
    with torch.no_grad(), SpikeMonitor(net) as monitor:
        net(input_ids=torch.randint(0, 2048, (2, 64)))
    worst = max(abs(rate - recorded[name]) for name, rate in monitor.rates().items())
    if worst > 1e-6:
        raise SystemExit(f"SpikeMonitor's rates differ from the spikes' means by {worst:.1e}")
    return f"rates within {worst:.0e} of the means of the recorded spikes"
