"""The arguments of the kernels of the associative LIF neuron, and checks of what a kernel supports."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from nord_snn.ops.dispatch import CallSignature, Support
from nord_snn.ops.lif.reference import PUBLISHED, Dynamics
from nord_snn.ops.surrogate import SurrogateLike

__all__ = ["Arguments", "Options", "OutputGradients", "has_published_dynamics", "supports_surrogate"]


class Arguments(NamedTuple):
    """The arguments of one call, as :func:`nord_snn.ops.associative_lif` describes them.

    Attributes:
        x: input current ``[T, N, D]``; the Numba kernels take any shape.
        v: initial membrane potential, None at rest.
        i_syn: initial synaptic current, None at rest or if the neuron has none.
        refractory: initial refractory counter, None at rest or if the neuron has none.
        threshold: ``[D]``.
        beta_mem: membrane decay, ``[1]`` or ``[D]``; for the Numba kernels None if it is 0 or unused.
        beta_syn: synaptic decay, in the shape of ``beta_mem``; for the Numba kernels None if it is 0.
        coupling: matrix ``gain[c] * weight[c, k] / (D / C)`` of the cascade, ``[C, C]``; None for no cascade.
        v_reset: membrane potential while refractory.
        refractory_steps: refractory period, in time steps.
        dynamics: equations of the membrane potential.
        shape: shape in which the Numba kernels read ``x``: ``[T, N, D]``, or ``[T, N, D, M]`` for D channels of M pixels. Other
            kernels ignore it.
        step: shape of the state, for the Numba kernels; other kernels ignore it.
    """

    x: Tensor
    v: Tensor | None
    i_syn: Tensor | None
    refractory: Tensor | None
    threshold: Tensor
    beta_mem: Any
    beta_syn: Any
    coupling: Tensor | None
    v_reset: float
    refractory_steps: int
    dynamics: Dynamics = PUBLISHED
    shape: tuple[int, ...] = ()
    step: tuple[int, ...] = ()


class Options(NamedTuple):
    """The arguments of :func:`associative_lif` that are not tensors; ``keep_v`` is its ``return_v_seq``."""

    v_reset: float
    refractory_steps: int
    surrogate: SurrogateLike
    alpha: float
    dynamics: Dynamics
    membrane_only: bool
    keep_v: bool


class OutputGradients(NamedTuple):
    """The gradients of the outputs of one call, None for zero: of spikes, ``v_seq``, and the last ``v`` and ``i_syn``."""

    spikes: Tensor
    v_seq: Tensor | None
    v_last: Tensor | None
    i_last: Tensor | None


def supports_surrogate(call: CallSignature, ids: Mapping[str, int]) -> Support:
    """Return whether a kernel supports the surrogate of a call; ``ids`` has the names of those that it supports."""
    surrogate = dict(call.options).get("surrogate")
    if surrogate in ids:
        return Support(True, "runs")
    return Support(False, f"it supports the surrogates {sorted(ids)}, got {surrogate!r}")


def has_published_dynamics(call: CallSignature) -> Support:
    """Return whether a kernel that has only the dynamics :data:`PUBLISHED` supports the call."""
    options = dict(call.options)
    if not options.get("published_dynamics", True):
        return Support(False, "it supports the dynamics of the published neuron only, got others")
    if options.get("n_decays", 1) > 1:
        return Support(False, "it supports one decay shared by all neurons, got one decay per neuron")
    return Support(True, "runs")
