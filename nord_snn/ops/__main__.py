"""``python -m nord_snn.ops``: which backends every op has, and for each backend whether it runs here or why not."""

import nord_snn.ops  # noqa: F401  # enters all ops
from nord_snn.ops.dispatch import BACKENDS, OPS

__all__ = ["table"]


def table() -> str:
    """Return a table of ops and backends, and below it a line for each backend."""
    lines: list[tuple[str, ...]] = [("op", *BACKENDS)]
    lines += [(op, *("yes" if name in made else "-" for name in BACKENDS)) for op, made in sorted(OPS.items())]
    known = {name: backend for made in OPS.values() for name, backend in made.items()}
    below: list[tuple[str, ...]] = [("backend", "device", "runs here", "")]
    for name in BACKENDS:
        support = known[name].available()
        below.append((name, known[name].device, "yes" if support.runs else "no", support.reason))
    return f"{_aligned(lines)}\n\n{_aligned(below)}"


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


if __name__ == "__main__":
    print("backend='auto' takes the last backend of a row that runs on the device of its input\n")
    print(table())
