"""The Nord spiking language model as classes of transformers; importing this package registers them for the auto classes."""

from nord_snn.models.nord.configuration_nord import NordConfig
from nord_snn.models.nord.modeling_nord import NordForCausalLM
from nord_snn.models.nord.original import load_original, to_original

__all__ = ["NordConfig", "NordForCausalLM", "load_original", "to_original"]
