"""Set thresholds so that every layer of neurons fires at a given rate."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
def calibrate_thresholds(
    net: nn.Module,
    *example: Any,
    rate: float = 0.1,
    tolerance: float = 0.1,
    forward: Callable[..., Any] | None = None,
) -> list[Calibration]:
    """Scale the thresholds of every :class:`AssociativeLIFNode` so that its mean firing rate is ``rate`` on the example.

    ``net(*example)`` runs without gradient, from rest, and in the mode that it has: before training this is training mode, in
    which batch norms take the statistics of the example; their running statistics do not change.

    A layer is calibrated on the spikes of the layers before it as these are calibrated. A first run finds the order of the
    layers. If each node then receives its whole sequence in one call, a second run calibrates all of them, each when its input
    arrives. In a network that loops over time, a node receives its sequence over many calls: each further run records the
    sequence of one layer and calibrates it at the end, so there are as many runs as layers. The sequence is run from rest, as a
    network that is reset at its start runs it.
    A layer whose rate cannot be reached, such as one without input, keeps its thresholds.

    Args:
        net: a network with our nodes.
        example: positional arguments of the network: a batch of real data.
        rate: firing rate to reach, in (0, 1).
        tolerance: relative deviation from ``rate`` at which thresholds are left as they are. Default: 0.1.
        forward: what to call with the example: a function that runs ``net`` over one whole sequence, where the loop over time
            is outside of the network. Default: None, the network.

    Returns:
        One entry per node, in the order in which they run.

    Raises:
        ValueError: ``rate`` is not in (0, 1), the network has none of our nodes, a node that runs single time steps received
            one only, or inputs of several shapes, or an ``AssociativeLeaky`` resets its membrane outside of the node.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 64), AssociativeLIFNode(64, preset="lif", step_mode="m"))
        >>> [layer] = calibrate_thresholds(net, torch.rand(10, 16, 8), rate=0.2)
        >>> 0.15 < layer.after < 0.25
        True

        A network that runs one time step, with the loop outside:

        >>> net = nn.Sequential(nn.Linear(8, 64), AssociativeLIFNode(64, preset="lif", step_mode="s"))
        >>> [layer] = calibrate_thresholds(net, torch.rand(10, 16, 8), forward=lambda x_seq: [net(x) for x in x_seq])
        >>> 0.05 < layer.after < 0.15
        True
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie in (0, 1), got {rate}")
    nodes = {name: module for name, module in net.named_modules() if isinstance(module, AssociativeLIFNode)}
    if not nodes:
        raise ValueError(
            "calibrate_thresholds needs a network with AssociativeLIFNode: replace_neurons brings one there"
        )
    if outside := [name for name, node in nodes.items() if getattr(node, "resets_outside", False)]:
        raise ValueError(
            f"calibrate_thresholds cannot run {outside[0]} over a sequence: AssociativeLeaky resets its membrane between the "
            "time steps; replace_neurons(net, x) puts neurons in its place that can be calibrated"
        )
    run = net if forward is None else forward
    calls = _count_calls(net, nodes, lambda: run(*example))
    single = {id(module.node) for module in net.modules() if getattr(module, "runs_single_steps", False)}
    for name, n_calls in calls.items():
        if n_calls == 1 and (id(nodes[name]) in single or nodes[name].step_mode == "s"):
            raise ValueError(
                f"{name or 'the node'} runs single time steps and received one: pass forward=, a function that runs the network "
                "over a whole sequence, or call functional.set_step_mode(net, 'm') if the network takes sequences"
            )
    if all(n_calls == 1 for n_calls in calls.values()):
        done: dict[str, Calibration] = {}
        with _hooked(net, nodes, _calibrator(rate, tolerance, done)):
            run(*example)
        return list(done.values())
    return [_calibrate_recorded(net, nodes, name, lambda: run(*example), rate, tolerance) for name in calls]


_Hook = Callable[[str, AssociativeLIFNode, Tensor], None]


@contextmanager
def _hooked(net: nn.Module, nodes: Mapping[str, AssociativeLIFNode], hook: _Hook) -> Iterator[None]:
    """Call ``hook(name, node, input)`` before every call of a node, and leave everything but thresholds as it was."""

    def before(name: str) -> Any:
        return lambda node, args: hook(name, node, args[0])

    handles = [node.register_forward_pre_hook(before(name)) for name, node in nodes.items()]
    try:
        with unchanged(net, evaluate=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _count_calls(net: nn.Module, nodes: Mapping[str, AssociativeLIFNode], run: Callable[[], Any]) -> dict[str, int]:
    """Run the network and return how often each node was called, in the order of the first calls."""
    calls: dict[str, int] = {}

    def count(name: str, node: AssociativeLIFNode, x: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1

    with _hooked(net, nodes, count):
        run()
    return calls


def _calibrator(rate: float, tolerance: float, done: dict[str, Calibration]) -> _Hook:
    busy = False

    def calibrate(name: str, node: AssociativeLIFNode, x: Tensor) -> None:
        nonlocal busy
        if busy or name in done:  # a call from here, or the call that is calibrated now
            return
        busy = True
        try:
            done[name] = _calibrate(name, node, x, rate, tolerance)
        finally:
            busy = False

    return calibrate


def _calibrate_recorded(
    net: nn.Module,
    nodes: Mapping[str, AssociativeLIFNode],
    name: str,
    run: Callable[[], Any],
    rate: float,
    tolerance: float,
) -> Calibration:
    """Run the network, record what a node receives over all calls, and calibrate it on that sequence."""
    node, inputs = nodes[name], []

    def record(_: str, node: AssociativeLIFNode, x: Tensor) -> None:
        inputs.append(x.clone() if node.step_mode == "m" else x.clone().unsqueeze(0))

    with _hooked(net, {name: node}, record):
        run()
    shapes = sorted({tuple(x.shape[1:]) for x in inputs})
    if len(shapes) > 1:
        raise ValueError(
            f"{name or 'the node'} receives time steps of several shapes, {shapes}: it has no one sequence"
        )
    mode, node.step_mode = node.step_mode, "m"
    try:
        return _calibrate(name, node, torch.cat(inputs), rate, tolerance)
    finally:
        node.step_mode = mode
        node.reset()  # clears stored membrane potentials


def _calibrate(name: str, node: AssociativeLIFNode, x_seq: Tensor, rate: float, tolerance: float) -> Calibration:
    original = node.v_threshold.detach().clone()

    def rate_at(scale: float) -> float:
        node.v_threshold.copy_(original * scale)
        return node(x_seq, stateless=True).mean().item()

    before = rate_at(1.0)
    scale = 1.0 if abs(before - rate) <= tolerance * rate else _search(rate_at, rate)
    after = rate_at(scale)
    if not abs(after - rate) < abs(before - rate):  # also where a rate is NaN, of an empty input
        scale, after = 1.0, rate_at(1.0)
    return Calibration(name, before, after, scale)


def _search(rate_at: Callable[[float], float], rate: float) -> float:
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
