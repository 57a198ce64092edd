"""The leaky clamp as a pure function; the formula stands in ``reference.py``."""

from nord_snn.ops.leaky_clamp.autograd import leaky_clamp

__all__ = ["leaky_clamp"]
