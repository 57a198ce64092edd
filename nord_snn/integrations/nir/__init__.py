"""Export to and import from NIR, the neuromorphic intermediate representation of simulators and neuromorphic hardware."""

from nord_snn.integrations.nir.exporting import deviation, export_to_nir
from nord_snn.integrations.nir.extension import RefractoryCubaLIF, RefractoryIF, RefractoryLIF
from nord_snn.integrations.nir.importing import import_from_nir
from nord_snn.integrations.nir.simulator import simulate

__all__ = [
    "RefractoryCubaLIF",
    "RefractoryIF",
    "RefractoryLIF",
    "deviation",
    "export_to_nir",
    "import_from_nir",
    "simulate",
]
