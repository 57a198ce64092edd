"""The associative LIF neuron. The formula is in ``reference.py``, the public function in ``op.py``."""
