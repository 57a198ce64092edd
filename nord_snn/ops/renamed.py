"""Support one import path that the code in earlier model folders uses, for one release.

A model folder written before the model was part of the package has its own code, which ``trust_remote_code=True`` runs. That
code imports ``check_heads`` from ``nord_snn.ops.resonance``, a folder that no longer exists; ``resonance`` is a function now.
"""

import sys
import warnings
from types import ModuleType
from typing import Any

from nord_snn.ops.checks import check_heads

__all__ = ["keep_old_path"]

_MESSAGE = (
    "the code in this model folder is from an earlier nord-snn: load it without trust_remote_code after "
    "`import nord_snn.models.nord`, and save it again. With transformers 5.24 and later, generate() of that code ignores its "
    "cache"
)


class _Renamed(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name != "check_heads":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        warnings.warn(_MESSAGE, FutureWarning, stacklevel=2)
        return check_heads


def keep_old_path() -> None:
    """Make ``from nord_snn.ops.resonance import check_heads`` work; ``nord_snn.ops.resonance`` remains the function."""
    name = "nord_snn.ops.resonance"
    sys.modules[name] = _Renamed(name, "An earlier name of nord_snn.ops.checks.")
