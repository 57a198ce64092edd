"""Compare public signatures with ``tests/data/signatures.txt``, so that changes are visible in review.

After an intended change: ``python tests/test_signatures.py`` writes the file.
"""

import importlib
import inspect
from pathlib import Path

import pytest
from test_house import PUBLIC

pytestmark = pytest.mark.quick

SNAPSHOT = Path(__file__).parent / "data" / "signatures.txt"


def described(path: str, thing: object) -> list[str]:
    """Return lines for one public name: its parameters, and those of the public methods of a class."""
    if inspect.isclass(thing):
        lines = [f"{path}{signature(thing)}"]
        for name, member in sorted(vars(thing).items()):
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if inspect.isfunction(function) and not name.startswith("_"):
                lines.append(f"{path}.{name}{signature(function)}")
            elif isinstance(member, property) and not name.startswith("_"):
                lines.append(f"{path}.{name}")
        return lines
    return [f"{path}{signature(thing)}" if callable(thing) else path]


def signature(thing: object) -> str:
    """Return names, kinds and defaults of the parameters, without annotations."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except ValueError:  # an alias of a type
        return ""
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(parameters))


def table() -> str:
    """Return one line for every public name of every public module."""
    lines = []
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in sorted(module.__all__):
            if name != "__version__":
                lines += described(f"{package}.{name}", getattr(module, name))
    return "\n".join(lines) + "\n"


def test_public_signatures_match_the_snapshot():
    assert table() == SNAPSHOT.read_text(encoding="utf-8")


if __name__ == "__main__":
    SNAPSHOT.write_text(table(), encoding="utf-8")
