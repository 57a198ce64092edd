"""Instruments that look at a running network."""

from nord_snn.monitor.firing_rate import LayerActivity, SpikeMonitor

__all__ = ["LayerActivity", "SpikeMonitor"]
