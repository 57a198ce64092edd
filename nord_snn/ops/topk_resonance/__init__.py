"""Temporal co-firing resonance. The formula is in ``reference.py``, the public function in ``op.py``."""
