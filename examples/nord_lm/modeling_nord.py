"""Re-export ``NordForCausalLM`` for code that still imports it from ``modeling_nord``; release 0.2.0 removes this file.

Import ``NordForCausalLM`` from ``nord_snn.models.nord``. Saved model folders have a file of this name and do not need this one.
"""

from nord_snn.models.nord import NordForCausalLM

__all__ = ["NordForCausalLM"]
