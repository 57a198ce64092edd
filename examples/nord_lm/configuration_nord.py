"""Re-export ``NordConfig`` for code that still imports it from ``configuration_nord``; release 0.2.0 removes this file.

Import ``NordConfig`` from ``nord_snn.models.nord``. Saved model folders have a file of this name and do not need this one.
"""

from nord_snn.models.nord import NordConfig

__all__ = ["NordConfig"]
