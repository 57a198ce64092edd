"""Learning rules: learners around ``nord_snn.ops.stdp`` with the interface of SpikingJelly's learners."""

from nord_snn.learning_rules.plastic import PlasticPart, load_plastic, save_plastic
from nord_snn.learning_rules.reward import RewardModulatedSTDP
from nord_snn.learning_rules.sources import GivenReward, LossBelowBaseline, RewardSource
from nord_snn.learning_rules.stdp import STDP
from nord_snn.learning_rules.triplet import TripletSTDP

__all__ = [
    "STDP",
    "GivenReward",
    "LossBelowBaseline",
    "PlasticPart",
    "RewardModulatedSTDP",
    "RewardSource",
    "TripletSTDP",
    "load_plastic",
    "save_plastic",
]
