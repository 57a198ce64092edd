"""Support check shared by the neuron kernels."""

from collections.abc import Mapping

from nord_snn.ops.dispatch import CallSignature, Support

__all__ = ["knows_surrogate"]


def knows_surrogate(call: CallSignature, ids: Mapping[str, int]) -> Support:
    """Return whether a kernel with the surrogates ``ids`` has the requested one."""
    surrogate = dict(call.options).get("surrogate")
    if surrogate in ids:
        return Support(True, "runs")
    return Support(False, f"it does not know the surrogate {surrogate!r}: it has {sorted(ids)}")
