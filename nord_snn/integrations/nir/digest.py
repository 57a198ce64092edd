"""A digest of names, numbers, texts, and shapes and types of arrays in a NIR file, for which HDF5 has no checksum.

Entries of arrays are not in the digest: gzip, which compresses them, has a checksum, and users may change them after an export.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

__all__ = ["DIGEST", "digest_of"]

#: Name of the digest in the metadata of the graph.
DIGEST = "digest"


def digest_of(description: Mapping[str, Any]) -> str:
    """Return the digest of a graph's ``to_dict()``, or of the same content read from a file."""
    lines = "\n".join(_lines(description, ""))
    return hashlib.blake2b(lines.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _lines(description: Mapping[str, Any], path: str) -> Iterator[str]:
    for name in sorted(description, key=str):
        value = description[name]
        if isinstance(value, Mapping):
            yield from _lines(value, f"{path}/{name}")
        elif f"{path}/{name}" != f"/metadata/{DIGEST}":
            yield f"{path}/{name} {_line(value)}"


def _line(value: Any) -> str:
    array = np.asarray(value)
    if array.dtype.kind in "OSU":  # text of a graph is bytes in a file
        texts = [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in array.flat]
        return f"{array.shape} {texts}"
    return f"{array.shape} {array.dtype}" if array.ndim else repr(float(array))
