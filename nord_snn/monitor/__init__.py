"""Firing rates and energy of a running network."""

from nord_snn.monitor.energy import CONVENTIONS, Convention, EnergyProfile, EnergyProfiler, ProductCost, profile_energy
from nord_snn.monitor.firing_rate import LayerActivity, SpikeMonitor
from nord_snn.monitor.row_rates import RowRates

__all__ = [
    "CONVENTIONS",
    "Convention",
    "EnergyProfile",
    "EnergyProfiler",
    "LayerActivity",
    "ProductCost",
    "RowRates",
    "SpikeMonitor",
    "profile_energy",
]
