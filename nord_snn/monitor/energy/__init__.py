"""Count the operations of a network, product by product, and compute their energy under published conventions."""

from nord_snn.monitor.energy.conventions import CONVENTIONS, Convention
from nord_snn.monitor.energy.counter import EnergyProfiler, profile_energy
from nord_snn.monitor.energy.report import EnergyProfile, ProductCost

__all__ = ["CONVENTIONS", "Convention", "EnergyProfile", "EnergyProfiler", "ProductCost", "profile_energy"]
