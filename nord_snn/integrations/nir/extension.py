"""An extension of NIR: neurons with a refractory period."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np

__all__ = ["EXTENSION", "RefractoryCubaLIF", "RefractoryIF", "RefractoryLIF", "read", "with_refractory_time"]


class _Refractory:
    """Check the refractory period, and give it the shape of the thresholds."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        self.refractory_time: Any = np.ones_like(self.v_threshold, dtype=np.float64) * self.refractory_time  # type: ignore[attr-defined]
        if not np.all(self.refractory_time >= 0):
            raise ValueError(f"refractory_time must be 0 s or more, got {self.refractory_time.min()} s")


@dataclass(eq=False)
class RefractoryCubaLIF(_Refractory, nir.CubaLIF):
    """A ``CubaLIF`` whose membrane stays at ``v_reset`` for ``refractory_time`` seconds after a spike.

    The synaptic current is integrated meanwhile. NIR has no refractory period; this is the parameter that its developers
    propose for neurons, optional and 0 by default. Readers that do not know the node refuse the graph.

    Source: https://github.com/neuromorphs/NIR/issues/138.
    """

    refractory_time: Any = 0.0


@dataclass(eq=False)
class RefractoryLIF(_Refractory, nir.LIF):
    """A ``LIF`` with a refractory period, see :class:`RefractoryCubaLIF`."""

    refractory_time: Any = 0.0


@dataclass(eq=False)
class RefractoryIF(_Refractory, nir.IF):
    """An ``IF`` with a refractory period, see :class:`RefractoryCubaLIF`."""

    refractory_time: Any = 0.0


EXTENSION: dict[str, Any] = {"CubaLIF": RefractoryCubaLIF, "LIF": RefractoryLIF, "IF": RefractoryIF}


def with_refractory_time(node: Any, refractory_time: Any) -> Any:
    """Return an ``IF``, ``LIF`` or ``CubaLIF`` as the node with a refractory period, in seconds."""
    fields = {name: value for name, value in vars(node).items() if name not in ("input_type", "output_type")}
    return EXTENSION[type(node).__name__](**fields, refractory_time=refractory_time)


def read(path: str | Path) -> nir.NIRNode:
    """Return the graph in a file, as ``nir.read`` does, which refuses the nodes of the extension."""
    with h5py.File(path, "r") as file:
        found = nir.serialization.hdf2dict(file["node"])
    _to_standard(found)
    return _to_extension(nir.dict2NIRNode(found))


def _to_standard(node: dict[str, Any]) -> None:
    """Turn the description of a node of the extension into that of a NIR node with an entry in its metadata."""
    kind = str(node["type"]).removeprefix("Refractory")
    if kind != node["type"] and kind in EXTENSION:
        node["metadata"] = {**node.get("metadata", {}), "refractory_time": node.pop("refractory_time")}
        node["type"] = kind
    for inner in node.get("nodes", {}).values():
        _to_standard(inner)


def _to_extension(node: Any) -> Any:
    if isinstance(node, nir.NIRGraph):
        node.nodes = {name: _to_extension(inner) for name, inner in node.nodes.items()}
    elif type(node).__name__ in EXTENSION and "refractory_time" in node.metadata:
        return with_refractory_time(node, node.metadata.pop("refractory_time"))
    return node
