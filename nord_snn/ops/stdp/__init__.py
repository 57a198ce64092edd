"""Spike-timing-dependent plasticity as pure functions; the formula stands in ``reference.py``."""

from nord_snn.ops.stdp.autograd import reward_modulated_stdp, stdp, triplet_stdp
from nord_snn.ops.stdp.correlation import ConvGeometry
from nord_snn.ops.stdp.reference import RewardSTDPState, STDPState, TripletState, reward_from_loss

__all__ = [
    "ConvGeometry",
    "RewardSTDPState",
    "STDPState",
    "TripletState",
    "reward_from_loss",
    "reward_modulated_stdp",
    "stdp",
    "triplet_stdp",
]
