"""The arguments that all kernels of the neuron take, and the check of their surrogates."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from nord_snn.ops.dispatch import CallSignature, Support
from nord_snn.ops.lif.reference import PUBLISHED, Dynamics

__all__ = ["Arguments", "OutputGradients", "has_published_dynamics", "supports_surrogate"]


class Arguments(NamedTuple):
    """The arguments of one call, as :func:`nord_snn.ops.associative_lif` describes them.

    ``x`` is ``[T, N, D]`` or, for kernels that take channels first, ``[T, N, D, M]``. Both betas are ``[1]`` or ``[D]``; for
    numba also None, where they are 0. The state ``v, i_syn, refractory`` is None for rest, and ``i_syn`` and ``refractory``
    are None where the membrane potential is the whole state. ``coupling`` is the matrix
    ``gain[c] * weight[c, k] / members``, ``[C, C]``, or None for no cascade.

    For numba, ``x`` and the state may have any shape: ``shape`` says as which ``[T, N, D]`` or ``[T, N, D, M]`` the input is
    taken, ``step`` is the shape of the state. The other kernels do not read these two.
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
    """Return whether a call has the published dynamics and one decay for all neurons."""
    options = dict(call.options)
    if not options.get("published_dynamics", True):
        return Support(False, "it has the published dynamics only")
    if options.get("n_decays", 1) > 1:
        return Support(False, "it has one decay for all neurons")
    return Support(True, "runs")
