"""Spike-timing-dependent plasticity as pure functions; the formula stands in ``reference.py``."""

from nord_snn.ops.stdp.autograd import stdp
from nord_snn.ops.stdp.reference import STDPState, reward_from_loss

__all__ = ["STDPState", "reward_from_loss", "stdp"]
