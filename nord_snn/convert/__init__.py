"""Replace the neurons of a network of another library, and set thresholds for a firing rate."""

from nord_snn.convert.calibration import Calibration, CalibrationReport, calibrate_thresholds
from nord_snn.convert.replacing import replace_neurons
from nord_snn.convert.report import Replacement, ReplacementReport

__all__ = [
    "Calibration",
    "CalibrationReport",
    "Replacement",
    "ReplacementReport",
    "calibrate_thresholds",
    "replace_neurons",
]
