"""Set thresholds so that every layer of neurons fires at a given rate."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.convert.report import aligned, wrapped
from nord_snn.convert.restoring import unchanged
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import AssociativeLIFState

__all__ = ["Calibration", "CalibrationReport", "calibrate_thresholds"]

_ITERATIONS = 20  # doublings or halvings of the thresholds, a factor of a million, and then bisections


@dataclass(frozen=True)
class Calibration:
    """Calibration of one node.

    Attributes:
        name: name of the node.
        before: mean firing rate with the old thresholds, on the spikes of calibrated layers.
        after: mean firing rate with the new thresholds.
        scale: factor between old and new thresholds; 1 if they are kept.
        note: why the rate cannot be reached, or empty.
    """

    name: str
    before: float
    after: float
    scale: float
    note: str = ""


class CalibrationReport(list[Calibration]):
    """Report of :func:`calibrate_thresholds`, a list with an entry for each node; ``str`` gives a table."""

    def __str__(self) -> str:
        """Return a table, with rates in percent of the time steps, and notes below it in at most 80 columns."""
        rows = [
            (entry.name, f"{100 * entry.before:.2f} %", f"{100 * entry.after:.2f} %", f"{entry.scale:.4g}")
            for entry in self
        ]
        notes = [f"note on {entry.name or 'the node'}: {entry.note}" for entry in self if entry.note]
        return "\n".join(
            [aligned(("name", "rate before", "rate after", "thresholds times"), rows), *map(wrapped, notes)]
        )


@torch.no_grad()
def calibrate_thresholds(
    net: nn.Module,
    *example: Any,
    rate: float = 0.1,
    tolerance: float = 0.1,
    forward: Callable[..., Any] | None = None,
) -> CalibrationReport:
    """Scale the thresholds of every :class:`AssociativeLIFNode` so that its mean firing rate is ``rate`` on the example.

    ``net(*example)`` runs without gradient, from rest, in training or evaluation mode as ``net`` is. In training mode batch
    norms use the statistics of the example; their running statistics do not change.

    A node is calibrated on the spikes of the calibrated nodes before it. A first run finds their order. If each node is called
    once, with its whole sequence, a second run calibrates all of them, each when its input arrives. If a node is called several
    times (the network loops over time, or uses it in several places), each further run records the inputs of one node and
    calibrates it at the end, so there are as many further runs as nodes. Each call that starts from rest starts a sequence; the
    rate is the mean over all sequences.

    The thresholds of a node are multiplied by a factor between 1e-6 and 1e6. A node that cannot reach the rate keeps its
    thresholds, for example without input, or if it fires at its highest rate already; a warning and a note in the report name
    the node and its nearest rate. If the rate jumps from one side of ``rate`` to the other at some factor, the node gets the
    nearer of these two rates that is above 0. If an error is raised, all thresholds are as before.

    Args:
        net: a network with AssociativeLIFNodes.
        example: positional arguments of the network: a batch of real data.
        rate: firing rate to reach, spikes per neuron and time step, in (0, 1). Default: 0.1.
        tolerance: relative deviation from ``rate``. A node within it keeps its thresholds. If the highest rate of a node is
            below ``rate``, but within the tolerance, its thresholds are set for ``(1 - tolerance) * rate``. Default: 0.1.
        forward: the function that is called with the example: if the loop over time is outside of the network, it runs ``net``
            over one whole sequence. Default: None, ``net``.

    Returns:
        A list with one entry per node, in the order in which they run; ``print`` it for a table.

    Raises:
        TypeError: ``rate`` or ``tolerance`` is not a number.
        ValueError: ``rate`` is not in (0, 1), ``tolerance`` is negative, the network has no AssociativeLIFNode, the example
            reaches none of them, an input or a threshold of a node is NaN or infinite, a node that runs single time steps
            is called once only, or an ``AssociativeLeaky`` resets its membrane outside of the node.

    Warns:
        UserWarning: a node cannot reach the rate.

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
    _check_numbers(rate, tolerance)
    nodes = {name: module for name, module in net.named_modules() if isinstance(module, AssociativeLIFNode)}
    if not nodes:
        raise ValueError("calibrate_thresholds needs a network with AssociativeLIFNodes: call replace_neurons before")
    if outside := [name for name, node in nodes.items() if getattr(node, "resets_outside", False)]:
        raise ValueError(
            f"calibrate_thresholds cannot run {outside[0]} over a sequence: AssociativeLeaky resets its membrane between the "
            "time steps; replace_neurons(net, x) replaces it by neurons that can be calibrated"
        )
    run = net if forward is None else forward
    calls = _count_calls(net, nodes, lambda: run(*example))
    if not calls:
        raise ValueError(
            f"the example input reached none of the neurons {list(nodes)}: pass an example, or forward=, that runs them"
        )
    single = {id(module.node) for module in net.modules() if getattr(module, "runs_single_steps", False)}
    for name, n_calls in calls.items():
        if n_calls == 1 and (id(nodes[name]) in single or nodes[name].step_mode == "s"):
            raise ValueError(
                f"{name or 'the node'} runs single time steps and received one: pass forward=, a function that runs the network "
                "over a whole sequence, or call functional.set_step_mode(net, 'm') if the network takes sequences"
            )
    with _restored_on_error([nodes[name].v_threshold for name in calls]):
        if all(n_calls == 1 for n_calls in calls.values()):
            done: dict[str, Calibration] = {}
            with _hooked(net, nodes, _calibrator(rate, tolerance, done)):
                run(*example)
            report = CalibrationReport(done.values())
        else:
            report = CalibrationReport(
                _calibrate_recorded(net, nodes, name, lambda: run(*example), rate, tolerance) for name in calls
            )
    if notes := [f"{entry.name or 'the node'}: {entry.note}" for entry in report if entry.note]:
        warnings.warn(f"rate={rate} cannot be reached by {'; '.join(notes)}", stacklevel=3)
    return report


def _check_numbers(rate: float, tolerance: float) -> None:
    if not isinstance(rate, Real):
        raise TypeError(f"rate must be a number in (0, 1), got {rate!r}")
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie in (0, 1), got {rate}")
    if not isinstance(tolerance, Real):
        raise TypeError(f"tolerance must be a number, 0 or more, got {tolerance!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance}")


@contextmanager
def _restored_on_error(thresholds: list[Tensor]) -> Iterator[None]:
    before = [threshold.detach().clone() for threshold in thresholds]
    try:
        yield
    except BaseException:
        for threshold, value in zip(thresholds, before, strict=True):
            threshold.copy_(value)
        raise


_Hook = Callable[[str, AssociativeLIFNode, Tensor, Mapping[str, Any]], None]


@contextmanager
def _hooked(net: nn.Module, nodes: Mapping[str, AssociativeLIFNode], hook: _Hook) -> Iterator[None]:
    """Call ``hook(name, node, input, other arguments)`` before every call of a node; change nothing but thresholds."""

    def before(name: str) -> Any:
        return lambda node, args, kwargs: hook(name, node, args[0] if args else kwargs["x"], kwargs)

    handles = [node.register_forward_pre_hook(before(name), with_kwargs=True) for name, node in nodes.items()]
    try:
        with unchanged(net, evaluate=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _count_calls(net: nn.Module, nodes: Mapping[str, AssociativeLIFNode], run: Callable[[], Any]) -> dict[str, int]:
    """Run the network and return how often each node was called, in the order of the first calls."""
    calls: dict[str, int] = {}

    def count(name: str, *_: Any) -> None:
        calls[name] = calls.get(name, 0) + 1

    with _hooked(net, nodes, count):
        run()
    return calls


def _calibrator(rate: float, tolerance: float, done: dict[str, Calibration]) -> _Hook:
    busy = False

    def calibrate(name: str, node: AssociativeLIFNode, x: Tensor, _: Mapping[str, Any]) -> None:
        nonlocal busy
        if busy or name in done:  # a call by _calibrate, or a node that is calibrated already
            return
        busy = True
        try:
            done[name] = _calibrate(name, node, [x], rate, tolerance)
        finally:
            busy = False

    return calibrate


@dataclass
class _Sequence:
    """Calls of a node that run one sequence.

    Attributes:
        inputs: input ``[T, N, *]`` of each call.
        new_states: list with the state after the last call if the caller passes states, else None.
        is_open: whether further calls may continue the sequence.
    """

    inputs: list[Tensor] = field(default_factory=list)
    new_states: list[AssociativeLIFState] | None = None
    is_open: bool = True

    def ends_in(self, state: AssociativeLIFState | None) -> bool:
        """Return whether ``state`` shares the storage of the state after the last call: it may be detached or changed."""
        if state is None or not self.new_states:
            return False
        return self.new_states[-1].v.untyped_storage().data_ptr() == state.v.untyped_storage().data_ptr()


def _continued(sequences: list[_Sequence], node: AssociativeLIFNode, kwargs: Mapping[str, Any]) -> _Sequence | None:
    """Return the sequence that a call with ``kwargs`` continues, or None if the call starts from rest."""
    state, rest = kwargs.get("state"), node.dynamics.v_rest
    if kwargs.get("stateless"):
        return None
    if kwargs.get("new_states") is None:
        starts = not isinstance(node.v, Tensor)
    else:
        starts = state is None or not (
            (state.v != rest).any() or any(part is not None and part.any() for part in state[1:])
        )
    open_sequences = [] if starts else [sequence for sequence in sequences if sequence.is_open]
    matches = [sequence for sequence in open_sequences if sequence.ends_in(state)] or open_sequences
    return matches[-1] if matches else None


def _calibrate_recorded(
    net: nn.Module,
    nodes: Mapping[str, AssociativeLIFNode],
    name: str,
    run: Callable[[], Any],
    rate: float,
    tolerance: float,
) -> Calibration:
    """Run the network, record the inputs of a node in all its calls, and calibrate it on these sequences."""
    node, sequences = nodes[name], list[_Sequence]()

    def record(_: str, node: AssociativeLIFNode, x: Tensor, kwargs: Mapping[str, Any]) -> None:
        sequence = _continued(sequences, node, kwargs)
        if sequence is None:
            sequence = _Sequence(is_open=not kwargs.get("stateless"))
            sequences.append(sequence)
        sequence.inputs.append(x.clone() if node.step_mode == "m" else x.clone().unsqueeze(0))
        sequence.new_states = kwargs.get("new_states")

    with _hooked(net, {name: node}, record):
        run()
    mode, node.step_mode = node.step_mode, "m"
    try:
        return _calibrate(name, node, [torch.cat(sequence.inputs) for sequence in sequences], rate, tolerance)
    finally:
        node.step_mode = mode
        node.reset()  # clears stored membrane potentials


def _calibrate(
    name: str, node: AssociativeLIFNode, sequences: list[Tensor], rate: float, tolerance: float
) -> Calibration:
    _check_finite(name, node, sequences)
    original = node.v_threshold.detach().clone()
    size = sum(x_seq.numel() for x_seq in sequences)

    def rate_at(scale: float) -> float:
        node.v_threshold.copy_(original * scale)
        spikes = sum(node(x_seq, stateless=True).sum(dtype=torch.float64).item() for x_seq in sequences)
        return spikes / size if size else float("nan")

    before = rate_at(1.0)
    if not size or abs(before - rate) <= tolerance * rate:
        return Calibration(name, before, before, 1.0)
    scale, nearest = _search(rate_at, rate)
    if scale is None and (1 - tolerance) * rate <= nearest < rate:
        scale, nearest = _search(rate_at, (1 - tolerance) * rate)
    if scale is None:
        node.v_threshold.copy_(original)
        bound = "most" if nearest < rate else "least"
        note = f"its rate is at {bound} {100 * nearest:.2f} %, so its thresholds are kept"
        return Calibration(name, before, before, 1.0, note)
    after = rate_at(scale)
    if abs(after - rate) >= abs(before - rate):
        scale, after = 1.0, rate_at(1.0)
    return Calibration(name, before, after, scale)


def _check_finite(name: str, node: AssociativeLIFNode, sequences: list[Tensor]) -> None:
    if not all(bool(x_seq.isfinite().all()) for x_seq in sequences):
        raise ValueError(
            f"the input of {name or 'the node'} has NaN or infinity: check the example, and the weights of the layers before it"
        )
    if not bool(node.v_threshold.isfinite().all()):
        raise ValueError(f"the thresholds of {name or 'the node'} must be finite numbers, got NaN or infinity")


def _search(rate_at: Callable[[float], float], rate: float) -> tuple[float | None, float]:
    """Return the scale of the thresholds at which ``rate_at(scale)`` is nearest to ``rate``, and this firing rate.

    The scale is None if the firing rates at all scales are lower than ``rate``, or all are higher.
    """
    low = high = 1.0
    below = above = rate_at(1.0)
    for _ in range(_ITERATIONS):
        if below <= rate:
            break
        high *= 2
        below = rate_at(high)
    for _ in range(_ITERATIONS):
        if above >= rate:
            break
        low /= 2
        above = rate_at(low)
    if below > rate or above < rate:
        return None, below if below > rate else above
    for _ in range(_ITERATIONS):
        middle = (low + high) / 2
        rate_there = rate_at(middle)
        if rate_there >= rate:
            low, above = middle, rate_there
        else:
            high, below = middle, rate_there
    return (high, below) if below and rate - below < above - rate else (low, above)
