"""Instruments that look at a running network."""

from nord_snn.monitor.firing_rate import SpikeMonitor

__all__ = ["SpikeMonitor"]
