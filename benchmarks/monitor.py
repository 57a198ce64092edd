"""One training step of the language model as in the table above, with and without a `SpikeMonitor`."""

from collections.abc import Callable

import torch
from language_model import keep_freed_memory, model, ours, step_of

from nord_snn.monitor import SpikeMonitor

__all__ = ["contestants", "gate"]


def watched() -> Callable[[], object]:
    """As train.py runs it, and counted."""
    keep_freed_memory()
    net = model()
    monitor = SpikeMonitor(net)
    step = step_of(net)

    def run() -> None:
        step()
        assert monitor._counters  # held as long as the step is

    return run


def contestants() -> dict[str, Callable[[], Callable[[], object]]]:
    """What builds each of them."""
    return {"without": ours, "with `SpikeMonitor`": watched}


def gate() -> str:
    """The counts of one pass, beside the spikes themselves."""
    net, recorded = model(), {}
    for name, module in net.named_modules():
        if hasattr(module, "refractory_steps"):
            module.register_forward_hook(lambda m, i, out, name=name: recorded.update({name: out.mean().item()}))
    with torch.no_grad(), SpikeMonitor(net) as monitor:
        net(input_ids=torch.randint(0, 2048, (2, 64)))
    worst = max(abs(rate - recorded[name]) for name, rate in monitor.rates().items())
    if worst > 1e-6:
        raise SystemExit(f"SpikeMonitor's rates differ from the spikes' means by {worst:.1e}")
    return f"rates within {worst:.0e} of the means of the recorded spikes"
