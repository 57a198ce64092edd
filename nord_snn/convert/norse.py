"""The protocol of Norse's neurons: ``spikes, state = cell(x, state)``, with state None at first."""

import functools
from typing import Any

from norse.torch.functional.reset import reset_subtract, reset_value
from norse.torch.functional.threshold import threshold
from torch import Tensor, nn

from nord_snn.convert.protocols import Protocol, require_our_node
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import AssociativeLIFState, Dynamics

__all__ = ["PROTOCOL", "CalledAsCell", "CalledAsSequence"]

_REPLACED = ("LIF", "LIFCell", "LIFBoxCell", "IAF", "IAFCell")
_INTEGRATORS = ("LI", "LICell", "LIBoxCell")  # leaky integrators, which do not fire
_BASES = ("SNN", "SNNCell", "SNNRecurrent", "SNNRecurrentCell")


class _CalledWithState(nn.Module):
    runs_single_steps = False

    def __init__(self, node: AssociativeLIFNode) -> None:
        super().__init__()
        self.node = node

    def forward(
        self, input_tensor: Tensor, state: AssociativeLIFState | None = None
    ) -> tuple[Tensor, AssociativeLIFState]:
        """Run from ``state``, None for rest; return spikes and the new state."""
        if state is not None and not isinstance(state, AssociativeLIFState):
            raise TypeError(
                f"{type(self).__name__} expects the state that it returned last, an AssociativeLIFState, or None for rest, got "
                f"{type(state).__name__}"
            )
        step_mode = "s" if self.runs_single_steps else "m"
        if self.node.step_mode != step_mode:  # set_step_mode may have changed it
            self.node.step_mode = step_mode
        if state is None:
            self.node.start_sequence()
        new_states: list[AssociativeLIFState] = []
        return self.node(input_tensor, state=state, new_states=new_states), new_states[0]


class CalledAsCell(_CalledWithState):
    """Call a node as networks call a cell of Norse, ``spikes, state = cell(x, state)``, with one time step ``[N, *]``.

    Args:
        node: the neurons.
    """

    runs_single_steps = True


class CalledAsSequence(_CalledWithState):
    """Call a node as networks call a sequence module of Norse, ``spikes, state = module(x_seq, state)``, with ``[T, N, *]``.

    Args:
        node: the neurons.
    """


def _is_neuron(module: nn.Module) -> bool:
    bases = {kind.__name__ for kind in type(module).__mro__ if kind.__module__ == "norse.torch.module.snn"}
    return bool(bases & set(_BASES)) and type(module).__name__ not in _INTEGRATORS


def _runs_sequences(module: nn.Module) -> bool:
    return not type(module).__name__.endswith("Cell")


def _why_not(module: Any) -> str:
    name = type(module).__name__
    if name not in _REPLACED:
        return f"Norse's {', '.join(_REPLACED)} can be replaced, {name} has other states or recurrent weights"
    if getattr(module, "record_states", False):
        return "record_states=True returns the states of all time steps, AssociativeLIFNode only that of the last one"
    return ""


def _like(module: Any, width: int, **options: Any) -> AssociativeLIFNode:
    """Return a node that gives the same spikes.

    Norse adds the input to the synaptic current, integrates the current, and lets it decay. The current that is integrated is
    ``i = (1 - dt / tau_syn) * i + x``, as in ours. Norse fires only above the threshold, hence its ``threshold`` function.
    """
    p, kind = module.p, type(module).__name__.removesuffix("Cell")  # p: Norse's parameters
    reset = getattr(p, "reset_method", reset_value)
    if reset not in (reset_value, reset_subtract):
        raise TypeError("like() cannot match a reset_method other than Norse's reset_value and reset_subtract")
    v_rest = _number(p, "v_reset" if kind == "IAF" else "v_leak")
    hard = reset is reset_value
    if hard and _number(p, "v_reset") != v_rest:
        raise TypeError(
            f"like() cannot match v_reset = {_number(p, 'v_reset')} with v_leak = {v_rest}: both must be equal, because a spike "
            "sets the membrane to its resting potential"
        )
    tau = float("inf") if kind == "IAF" else 1 / _fraction(module.dt * _number(p, "tau_mem_inv"), "dt * tau_mem_inv")
    fraction = _fraction(module.dt * _number(p, "tau_syn_inv"), "dt * tau_syn_inv") if kind == "LIF" else 1.0
    learnable = ("threshold", "beta_mem", "beta_syn") if options.pop("learnable", False) else ()
    return AssociativeLIFNode(
        width,
        preset="lif",
        threshold=_number(p, "v_th"),
        beta_syn=max(1 - fraction, 0.0),
        v_reset=v_rest if hard else None,
        hard_reset=hard,
        dynamics=Dynamics("leak" if kind == "IAF" else "relax", tau, v_rest, hard),
        surrogate=functools.partial(threshold, method=p.method, alpha=float(p.alpha)),
        learnable=learnable,
        step_mode="m",
        **options,
    )


def _number(p: Any, name: str) -> float:
    value = getattr(p, name)
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"like() needs one number for {name}, got {value.numel()}")
    return float(value)


def _fraction(value: float, name: str) -> float:
    """Return ``value``, the fraction that decays in a time step, if it is in (0, 1]."""
    if not 0 < value <= 1:
        raise TypeError(f"like() needs {name} in (0, 1], got {value:.3g}")
    return value


def _put(module: nn.Module, new_neuron: nn.Module) -> nn.Module:
    return (CalledAsSequence if _runs_sequences(module) else CalledAsCell)(require_our_node(new_neuron, "Norse"))


PROTOCOL = Protocol(_is_neuron, _runs_sequences, _why_not, _like, _put)
