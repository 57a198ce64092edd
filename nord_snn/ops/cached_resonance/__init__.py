"""Resonance of new positions with cached ones. The formula is in ``reference.py``, the public function in ``op.py``."""
