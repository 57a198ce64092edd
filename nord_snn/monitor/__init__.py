"""Instruments that look at a running network."""

from nord_snn.monitor.energy import CONVENTIONS, Convention, EnergyProfile, EnergyProfiler, ProductCost, profile_energy
from nord_snn.monitor.firing_rate import LayerActivity, SpikeMonitor

__all__ = [
    "CONVENTIONS",
    "Convention",
    "EnergyProfile",
    "EnergyProfiler",
    "LayerActivity",
    "ProductCost",
    "SpikeMonitor",
    "profile_energy",
]
