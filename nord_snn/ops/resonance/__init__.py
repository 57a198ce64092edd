"""Temporal co-firing resonance as a pure function; the formula stands in ``reference.py``."""

from nord_snn.ops.resonance.autograd import check_heads, resonance
from nord_snn.ops.resonance.cached import check_spikes, pack_spikes, resonance_cached, unpack_spikes

__all__ = ["check_heads", "check_spikes", "pack_spikes", "resonance", "resonance_cached", "unpack_spikes"]
