"""Spike-timing-dependent plasticity. The formula is in ``reference.py``, the public functions in ``op.py``."""
