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
        x: input ``[T, N, D]``; numba takes it in any shape.
        v: initial membrane potential, None at rest.
        i_syn: initial synaptic current, None at rest or if the neuron has none.
        refractory: initial refractory counter, None at rest or if the neuron has none.
        threshold: ``[D]``.
        beta_mem: membrane decay, ``[1]`` or ``[D]``; numba takes None instead of 0.
        beta_syn: synaptic decay, in the shape of ``beta_mem``; numba takes None instead of 0.
        coupling: matrix ``gain[c] * weight[c, k] / (D / C)`` of the cascade, ``[C, C]``; None for no cascade.
        v_reset: membrane potential while refractory.
        refractory_steps: refractory period, in time steps.
        dynamics: equations of membrane and reset.
        shape: shape ``[T, N, D]``, or ``[T, N, D, M]`` for D channels of M pixels, that numba reads ``x`` as. The other
            kernels ignore it, and ``step``.
        step: shape of the state.
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
    """The gradients of the outputs of one call; None counts as zero."""

    spikes: Tensor
    v_seq: Tensor | None
    v_last: Tensor | None
    i_last: Tensor | None


def supports_surrogate(call: CallSignature, ids: Mapping[str, int]) -> Support:
    """Return whether a kernel with the surrogates ``ids`` supports the requested one."""
    surrogate = dict(call.options).get("surrogate")
    if surrogate in ids:
        return Support(True, "runs")
    return Support(False, f"it supports the surrogates {sorted(ids)}, got {surrogate!r}")


def has_published_dynamics(call: CallSignature) -> Support:
    """Return whether a kernel that has only the dynamics of the published neuron supports the call."""
    options = dict(call.options)
    if not options.get("published_dynamics", True):
        return Support(False, "it supports the dynamics of the published neuron only, got others")
    if options.get("n_decays", 1) > 1:
        return Support(False, "it supports one decay shared by all neurons, got one for each")
    return Support(True, "runs")
