"""What replacing did, neuron by neuron."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import wrap

__all__ = ["Replacement", "ReplacementReport", "aligned", "wrapped"]

_WIDTH = 80  # of a terminal, and of a file


@dataclass(frozen=True)
class Replacement:
    """One neuron of the network.

    Attributes:
        name: its name in the network.
        was: what it was.
        now: what it is now; empty if it was skipped.
        width: number of its neurons, D.
        channel_dim: their dimension in a time step.
        skipped: why it was left as it is, or empty.
        note: what to check, or empty.
    """

    name: str
    was: str
    now: str = ""
    width: int | None = None
    channel_dim: int | None = None
    skipped: str = ""
    note: str = ""


@dataclass
class ReplacementReport:
    """What :func:`replace_neurons` did; ``str`` gives a table."""

    rows: list[Replacement] = field(default_factory=list)

    @property
    def replaced(self) -> list[Replacement]:
        """Return the neurons that were replaced."""
        return [row for row in self.rows if not row.skipped]

    @property
    def skipped(self) -> list[Replacement]:
        """Return the neurons that were left as they are."""
        return [row for row in self.rows if row.skipped]

    def __iter__(self) -> Iterator[Replacement]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        """Return the table of what was replaced, and below it notes, and what was skipped and why, in at most 80 columns."""
        rows = [(row.name, row.was, row.now, str(row.width), str(row.channel_dim)) for row in self.replaced]
        parts = [aligned(("name", "was", "is", "width", "channel_dim"), rows)] if rows else []
        lines = [f"note on {row.name} ({row.was}): {row.note}" for row in self.replaced if row.note]
        lines += [f"skipped {row.name or 'the network'} ({row.was}): {row.skipped}" for row in self.skipped]
        parts += [wrapped(line) for line in lines]
        return "\n".join(parts)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns; from the second one on, columns of numbers are aligned at the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = [all(cell[-1:].isdigit() or cell.endswith("%") for cell in column) for column in zip(*rows, strict=True)]
    right = [False, *numbers[1:]]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def wrapped(line: str) -> str:
    """Return the line in at most 80 columns, all but the first one indented."""
    return "\n".join(wrap(line, _WIDTH, subsequent_indent="  "))
