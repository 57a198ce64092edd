"""What the kernels of the neuron can run."""

from collections.abc import Mapping

from nord_snn.ops.dispatch import Call, Support

__all__ = ["knows_surrogate"]


def knows_surrogate(call: Call, ids: Mapping[str, int]) -> Support:
    """Return whether a kernel with these surrogates has the one that is asked for."""
    surrogate = dict(call.options).get("surrogate")
    if surrogate in ids:
        return Support(True, "runs")
    return Support(False, f"it does not know the surrogate {surrogate!r}: it has {sorted(ids)}")
