"""An extension of NIR: neurons with a refractory period."""

import os
from collections.abc import Iterator
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


#: Data of an HDF5 file that is compressed by gzip is at most this many times larger than the file.
MOST_COMPRESSED = 1100
MAX_DEPTH = 32
MAX_OBJECTS = 200_000


def read(path: str | Path) -> nir.NIRNode:
    """Return the graph in a file, as ``nir.read`` does, which refuses the nodes of the extension.

    Nothing outside the file is read: links to other files and data in other files are refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is not a file with a graph.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)}: expected a file with a NIR graph, got no such file")
    try:
        with h5py.File(path, "r") as file:
            limit = MOST_COMPRESSED * os.path.getsize(path)
            for count, _ in enumerate(_sizes(file["node"], limit, MAX_DEPTH)):
                if count == MAX_OBJECTS:
                    raise ValueError(f"it has more than {MAX_OBJECTS:,} arrays")
            found = nir.serialization.hdf2dict(file["node"])
        _to_standard(found)
        return _to_extension(nir.dict2NIRNode(found))
    except Exception as error:  # h5py, numpy and nir raise many types for a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{os.fspath(path)}: not a readable file with a NIR graph ({reason})") from error


def _sizes(group: h5py.Group, limit: int, depth: int) -> Iterator[int]:
    """Yield the bytes of each array in a group, after a check that it is in the file; reading it could take for ever."""
    if depth == 0:
        raise ValueError(f"its groups nest deeper than {MAX_DEPTH} levels")
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name} is a link")
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _sizes(item, limit, depth - 1)
        elif not isinstance(item, h5py.Dataset) or item.external or item.is_virtual:
            raise ValueError(f"the data of {name} is not in the file")
        elif item.size is not None and item.size * item.dtype.itemsize > limit:
            raise ValueError(f"{name} has {item.size:,} entries, more than a file of this length can have")
        else:
            yield item.nbytes


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
