"""Moved to ``nord_snn.models.nord``; this name stays for one release."""

from nord_snn.models.nord import NordForCausalLM

__all__ = ["NordForCausalLM"]
