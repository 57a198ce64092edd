"""The leaky clamp. The formula is in ``reference.py``, the public function in ``op.py``."""
