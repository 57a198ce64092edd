"""Temporal co-firing resonance as a pure function; the formula stands in ``reference.py``."""

from nord_snn.ops.resonance.autograd import check_heads, resonance

__all__ = ["check_heads", "resonance"]
