"""An extension of NIR: neurons with a refractory period."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np

from nord_snn.integrations.nir.digest import DIGEST, digest_of

__all__ = ["EXTENSION", "RefractoryCubaLIF", "RefractoryIF", "RefractoryLIF", "read", "with_refractory_time"]


class _Refractory:
    """Mixin: check the refractory period, and expand it to the shape of the thresholds."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        self.refractory_time: Any = np.ones_like(self.v_threshold, dtype=np.float64) * self.refractory_time  # type: ignore[attr-defined]
        if not np.all(self.refractory_time >= 0):
            raise ValueError(f"refractory_time must be 0 s or more, got {self.refractory_time.min()} s")


@dataclass(eq=False)
class RefractoryCubaLIF(_Refractory, nir.CubaLIF):
    """A ``CubaLIF`` whose membrane stays at ``v_reset`` for ``refractory_time`` seconds after a spike.

    The synaptic current is integrated meanwhile. NIR has no refractory period; its developers propose this parameter, with the
    default 0. Readers that do not know the node refuse the graph.

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


#: gzip compresses data to no less than 1 / 1100 of their size.
MAX_COMPRESSION = 1100
MIN_CHUNK = 16  # least bytes of a file for a chunk and its entry in the index
MAX_DEPTH = 32  # levels of groups
SECONDS, BYTES_PER_SECOND = 15, 5_000_000  # reading a file may take SECONDS + its size / BYTES_PER_SECOND
#: Script that reads everything in a file.
READ_ALL = """
import sys, h5py
def read(item):
    [read(item[name]) for name in item] if isinstance(item, h5py.Group) else item[()]
read(h5py.File(sys.argv[1], "r"))
"""
MAX_ARRAYS = 200_000


def read(path: str | Path) -> nir.NIRNode:
    """Return the graph in a file, as ``nir.read`` does, also with nodes of the extension.

    Links to other files and data in other files are refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is not a file with a graph.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)}: expected a file with a NIR graph, got no such file")
    _try_to_read(path)
    try:
        with h5py.File(path, "r") as file:
            for count, _ in enumerate(_sizes(file["node"], os.path.getsize(path), MAX_DEPTH)):
                if count == MAX_ARRAYS:
                    raise ValueError(f"it has more than {MAX_ARRAYS:,} arrays")
            description = nir.serialization.hdf2dict(file["node"])
        expected = description.get("metadata", {}).get(DIGEST)
        if expected is not None and expected != digest_of(description):
            raise ValueError(
                f"it is damaged, or was changed after the export: if that was on purpose, delete graph.metadata[{DIGEST!r}]"
            )
        _to_standard(description)
        return _to_extension(nir.dict2NIRNode(description))
    except Exception as error:  # h5py, numpy and nir raise many types for a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{os.fspath(path)}: not a readable file with a NIR graph ({reason})") from error


def _try_to_read(path: str | Path) -> None:
    """Read a file in another process, because reading a damaged file can crash HDF5 or never end.

    Raises:
        ValueError: the process did not end in time, or HDF5 crashed.
    """
    seconds = SECONDS + os.path.getsize(path) / BYTES_PER_SECOND
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-c", READ_ALL, os.fspath(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        message = f"{os.fspath(path)}: damaged, reading it did not end within {seconds:.0f} s"
        raise ValueError(message) from error
    except OSError:  # no process can be started here
        return
    if result.returncode < 0:
        raise ValueError(f"{os.fspath(path)}: damaged, HDF5 ended with signal {-result.returncode} while reading it")


def _sizes(group: h5py.Group, size: int, depth: int) -> Iterator[int]:
    """Yield the bytes of each array in a group, after checking that the array is in the file and not larger than it can be.

    Args:
        group: the group.
        size: bytes of the file.
        depth: number of levels of groups that are allowed below.
    """
    if depth == 0:
        raise ValueError(f"its groups nest deeper than {MAX_DEPTH} levels")
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name} is a link")  # noqa: TRY004
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _sizes(item, size, depth - 1)
        elif not isinstance(item, h5py.Dataset) or item.external or item.is_virtual:
            raise ValueError(f"the data of {name} is not in the file")
        elif item.size is not None and (
            MIN_CHUNK * _n_chunks(item) > size or item.nbytes > (MAX_COMPRESSION if item.chunks else 1) * size
        ):
            raise ValueError(f"{name} has {item.size:,} entries, more than a file of this length can have")
        else:
            yield item.nbytes


def _n_chunks(item: h5py.Dataset) -> int:
    """Return the number of chunks of an array, including missing ones, which h5py fills one by one."""
    chunks = item.chunks or item.shape
    return math.prod(-(-length // max(1, chunk)) for length, chunk in zip(item.shape, chunks, strict=True))


def _to_standard(node: dict[str, Any]) -> None:
    """Convert the description of a node of the extension to that of a NIR node with ``refractory_time`` in its metadata."""
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
