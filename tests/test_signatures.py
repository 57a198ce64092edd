"""Compare public signatures with ``tests/data/signatures.txt``, so that changes are visible in review.

After an intended change ``python tests/test_signatures.py`` writes the file.
"""

import importlib
import inspect
from pathlib import Path

import pytest
from test_house import PUBLIC

pytestmark = pytest.mark.quick

SNAPSHOT = Path(__file__).parent / "data" / "signatures.txt"


def lines_of(path: str, public_object: object) -> list[str]:
    """Return a line with the parameters of a public name, and one for each public method or property of a class."""
    if inspect.isclass(public_object):
        lines = [f"{path}{signature(public_object)}"]
        for name, member in sorted(vars(public_object).items()):
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if inspect.isfunction(function) and not name.startswith("_"):
                lines.append(f"{path}.{name}{signature(function)}")
            elif isinstance(member, property) and not name.startswith("_"):
                lines.append(f"{path}.{name}")
        return lines
    return [f"{path}{signature(public_object)}" if callable(public_object) else path]


def signature(public_object: object) -> str:
    """Return names, kinds and defaults of the parameters, without annotations."""
    try:
        parameters = inspect.signature(public_object).parameters.values()
    except ValueError:  # type aliases have no signature
        return ""
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(parameters))


def all_signatures() -> str:
    """Return one line for every public name of every public module."""
    lines = []
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in sorted(module.__all__):
            if name != "__version__":
                lines += lines_of(f"{package}.{name}", getattr(module, name))
    return "\n".join(lines) + "\n"


def test_public_signatures_match_the_snapshot():
    assert all_signatures() == SNAPSHOT.read_text(encoding="utf-8")


if __name__ == "__main__":
    SNAPSHOT.write_text(all_signatures(), encoding="utf-8")
