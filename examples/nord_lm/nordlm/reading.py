"""Read small untrusted text, JSON and YAML files: regular files only, within limits of size, nesting and number of values.

A field that occurs twice is an error: the parsers would drop its first value. Without the limits a pipe or device would block
the program, anchors in a few lines of YAML could expand to more values than fit into memory, and deep nesting could overflow the
stack of a parser.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from nordlm.errors import RecipeError

__all__ = ["check_files", "check_regular", "exists", "read_json", "read_text", "read_yaml"]

MAX_BYTES = 64 << 20  # of a text or JSON file: runs of a study have results of megabytes
MAX_YAML_BYTES = 1 << 17
MAX_DEPTH = 50  # levels of nesting
MAX_VALUES = 10_000  # of a YAML file; those of an anchor count at each of its aliases
MERGE = "tag:yaml.org,2002:merge"


def exists(name: str | Path) -> bool:
    """Return whether a file or folder exists; False for a name that no file can have."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # a name that is too long or has a NUL byte
        return False


def check_regular(path: Path, error: type[RecipeError]) -> None:
    """Raise ``error`` unless ``path`` is a regular file, or a link to one."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as reason:
        raise error(f"{str(path)[:300]}: cannot be read ({_reason(reason)})") from reason
    if not stat.S_ISREG(mode):
        raise error(f"{path}: expected a regular file, got a {_kind(mode)}")


def check_files(folder: Path, error: type[RecipeError]) -> None:
    """Raise ``error`` unless ``folder`` is a folder without pipes and devices, which would block a library that opens them."""
    if not folder.is_dir():
        raise error(f"{folder}: expected a folder")
    for file in sorted(folder.iterdir()):
        if not file.is_dir():
            check_regular(file, error)


def read_text(path: Path, error: type[RecipeError], max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a UTF-8 file; raise ``error`` if it is no regular file, too large or not text."""
    check_regular(path, error)
    try:
        # O_NONBLOCK: opening a pipe would block, and a pipe may have replaced the file since the check.
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(file, "rb") as opened:
            content = opened.read(max_bytes + 1) or b""  # None: such a file of /proc has no content yet
    except OSError as reason:
        raise error(f"{path}: cannot be read ({_reason(reason)})") from reason
    if len(content) > max_bytes:
        raise error(f"{path}: expected at most {max_bytes:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{path}: not UTF-8 text ({reason.reason})") from reason


def read_json(path: Path, error: type[RecipeError]) -> Any:
    """Return the content of a JSON file; raise ``error`` if it is not valid or nests too deep."""
    text = read_text(path, error)
    try:
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: expected JSON ({_reason(reason)})") from reason
    if _depth_exceeds(content, MAX_DEPTH):
        raise error(f"{path}: nests deeper than {MAX_DEPTH} levels")
    return content


def read_yaml(path: Path, error: type[RecipeError]) -> Any:
    """Return the content of a YAML file; raise ``error`` if it is not valid, nests too deep or has too many values."""
    text = read_text(path, error, MAX_YAML_BYTES)
    try:
        _check_yaml(text)
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except Exception as reason:  # invalid dates, numbers and tags raise many types of exceptions
        raise error(f"{path}: expected YAML ({_reason(reason)})") from reason


def _check_yaml(text: str) -> None:
    """Raise a ValueError if YAML exceeds the limits, without building any value."""
    sizes: dict[str, int] = {}  # number of values behind an anchor
    opened: list[tuple[str | None, int]] = []  # anchor of a collection, and the number of values before it
    n_values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, n_values))
            n_values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = n_values - before
        elif isinstance(event, yaml.ScalarEvent):
            n_values += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias {event.anchor} is used before its anchor ends")
            n_values += sizes[event.anchor]
        if n_values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values, including those of aliases")
        if len(opened) > MAX_DEPTH:
            raise ValueError(f"nests deeper than {MAX_DEPTH} levels")


class _Loader(yaml.SafeLoader):
    """Loader that raises at a key which occurs twice in a mapping, and merges mappings (``<<``) as YAML defines it.

    PyYAML keeps the last value of such a key, and loses values of a mapping into which another one was merged.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping and check its keys, before other mappings are merged into it."""
        node = super().compose_mapping_node(anchor)
        _check_unique([_name(key) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace the key ``<<`` by the fields of its mapping, or mappings, that the node does not have; the first one wins."""
        own = [(key, value) for key, value in node.value if key.tag != MERGE]
        names = {_name(key) for key, _ in own}
        merged = []
        for source in (value for key, value in node.value if key.tag == MERGE):
            for mapping in source.value if isinstance(source, yaml.SequenceNode) else [source]:
                if not isinstance(mapping, yaml.MappingNode):
                    raise TypeError("expected a mapping, or a list of mappings, after <<")
                self.flatten_mapping(mapping)
                new = [(key, value) for key, value in mapping.value if _name(key) not in names]
                merged += new
                names |= {_name(key) for key, _ in new}
        node.value = merged + own


def _name(key: yaml.Node) -> tuple[str, str]:
    return key.tag, str(key.value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_unique([("", name) for name, _ in pairs])
    return dict(pairs)


def _check_unique(keys: list[tuple[str, str]]) -> None:
    """Raise a ValueError if a key occurs twice."""
    if len(set(keys)) < len(keys):
        name = next(name for i, (tag, name) in enumerate(keys) if (tag, name) in keys[:i])
        raise ValueError(f"the field {name[:100]} occurs twice")


def _depth_exceeds(content: Any, limit: int) -> bool:
    level = [content]
    for _ in range(limit + 1):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _reason(error: BaseException) -> str:
    """Return the message of an error as one short line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
