"""The associative LIF neuron as a pure function; the formula stands in ``reference.py``."""

from nord_snn.ops.associative_lif.autograd import associative_lif, associative_lif_backend
from nord_snn.ops.associative_lif.reference import AssociativeLIFState

__all__ = ["AssociativeLIFState", "associative_lif", "associative_lif_backend"]
