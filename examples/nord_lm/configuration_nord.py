"""Alias of ``nord_snn.models.nord`` for one more release."""

from nord_snn.models.nord import NordConfig

__all__ = ["NordConfig"]
