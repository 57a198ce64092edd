"""Set thresholds so that every layer of neurons fires at a given rate."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.convert.replacing import unchanged
from nord_snn.neurons import AssociativeLIFNode

__all__ = ["Calibration", "calibrate_thresholds"]

_STEPS = 20  # bisections: the threshold is found to a millionth of its range


@dataclass(frozen=True)
class Calibration:
    """What calibration did to one layer.

    Attributes:
        name: name of the node.
        before: mean firing rate before, with all layers before it calibrated.
        after: mean firing rate after.
        scale: factor of its thresholds.
    """

    name: str
    before: float
    after: float
    scale: float


@torch.no_grad()
def calibrate_thresholds(net: nn.Module, *example: Any, rate: float = 0.1, tolerance: float = 0.1) -> list[Calibration]:
    """Scale the thresholds of every :class:`AssociativeLIFNode` so that its mean firing rate is ``rate`` on the example.

    ``net(*example)`` runs once, without gradient and from rest. Each node is calibrated when its input arrives, on the spikes
    of the layers before it as these are calibrated, so one pass is enough. A layer whose rate cannot be reached, such as one
    without input, keeps its thresholds.

    Args:
        net: a network with our nodes in step mode "m".
        example: positional arguments of the network: a batch of real data.
        rate: firing rate to reach, in (0, 1).
        tolerance: relative deviation from ``rate`` at which thresholds are left as they are. Default: 0.1.

    Returns:
        One entry per node, in the order in which they run.

    Raises:
        ValueError: ``rate`` is not in (0, 1), the network has none of our nodes, or a node runs single time steps.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 64), AssociativeLIFNode(64, preset="lif", step_mode="m"))
        >>> [layer] = calibrate_thresholds(net, torch.rand(10, 16, 8), rate=0.2)
        >>> 0.15 < layer.after < 0.25
        True
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie in (0, 1), got {rate}")
    nodes = {name: module for name, module in net.named_modules() if isinstance(module, AssociativeLIFNode)}
    if not nodes:
        raise ValueError(
            "calibrate_thresholds needs a network with AssociativeLIFNode: replace_neurons brings one there"
        )
    if single := [name for name, node in nodes.items() if node.step_mode != "m"]:
        raise ValueError(
            f"calibrate_thresholds needs step mode 'm', {single[0]} has 's': call functional.set_step_mode(net, 'm')"
        )
    done: dict[str, Calibration] = {}
    hooks = [node.register_forward_pre_hook(_calibrator(name, rate, tolerance, done)) for name, node in nodes.items()]
    try:
        with unchanged(net):
            net(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return list(done.values())


def _calibrator(name: str, rate: float, tolerance: float, done: dict[str, Calibration]) -> Any:
    started = False

    def calibrate(node: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal started
        if started:  # a further call of the node, or one from here
            return
        started = True
        assert isinstance(node, AssociativeLIFNode)
        original = node.v_threshold.detach().clone()

        def rate_at(scale: float) -> float:
            node.v_threshold.copy_(original * scale)
            return node(args[0], stateless=True).mean().item()

        before = rate_at(1.0)
        scale = 1.0 if abs(before - rate) <= tolerance * rate else _search(rate_at, rate, before)
        after = rate_at(scale)
        if abs(after - rate) >= abs(before - rate):
            scale, after = 1.0, rate_at(1.0)
        done[name] = Calibration(name, before, after, scale)

    return calibrate


def _search(rate_at: Any, rate: float, before: float) -> float:
    """Return the scale at which the rate, which falls with the thresholds, is nearest."""
    low = high = 1.0
    for _ in range(_STEPS):
        if rate_at(high) <= rate:
            break
        high *= 2
    for _ in range(_STEPS):
        if rate_at(low) >= rate:
            break
        low /= 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if rate_at(middle) > rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2
