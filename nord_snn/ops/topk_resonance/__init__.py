"""Temporal co-firing resonance: attention whose scores count the coincident spikes of a query and a key position.

Each query attends to the ``top_k`` positions with the best scores. The formula is in ``reference.py``, the public function in
``op.py``.
"""
