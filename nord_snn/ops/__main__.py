"""``python -m nord_snn.ops``: print the backends of every op, and whether each backend runs on this machine."""

import nord_snn.ops  # noqa: F401  # registers all ops
from nord_snn.ops.dispatch import BACKENDS, OPS

__all__ = ["table"]


def table() -> str:
    """Return a table of ops and backends, followed by one line per backend."""
    lines: list[tuple[str, ...]] = [("op", *BACKENDS)]
    lines += [(op, *("yes" if name in backends else "-" for name in BACKENDS)) for op, backends in sorted(OPS.items())]
    all_backends = {name: backend for backends in OPS.values() for name, backend in backends.items()}
    availability: list[tuple[str, ...]] = [("backend", "device", "runs here", "")]
    for name in BACKENDS:
        support = all_backends[name].available()
        availability.append((name, all_backends[name].device, "yes" if support.runs else "no", support.reason))
    return f"{_aligned(lines)}\n\n{_aligned(availability)}"


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


if __name__ == "__main__":
    print("backend='auto' takes the last backend of a row that can run on the device of the input\n")
    print(table())
