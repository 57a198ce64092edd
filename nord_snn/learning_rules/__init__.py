"""Learning rules: thin learners around ``nord_snn.ops.stdp``, with SpikingJelly's life cycle."""

from nord_snn.learning_rules.reward import RewardModulatedSTDP
from nord_snn.learning_rules.stdp import STDP

__all__ = ["STDP", "RewardModulatedSTDP"]
