"""Alias of ``nord_snn.models.nord`` for one more release."""

from nord_snn.models.nord import NordForCausalLM

__all__ = ["NordForCausalLM"]
