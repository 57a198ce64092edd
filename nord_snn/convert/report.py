"""The report of ``replace_neurons``, and the layout of tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import wrap

__all__ = ["Replacement", "ReplacementReport", "aligned", "wrapped"]

_WIDTH = 80  # columns of a line


@dataclass(frozen=True)
class Replacement:
    """One neuron module of the network under one of its names.

    Attributes:
        name: its name in the network; empty for the network itself.
        was: its class before.
        now: its class after; empty if it was skipped.
        width: D, the number of its neurons; None if unknown.
        channel_dim: dimension of the neurons in a time step ``[N, *]``; None if it was skipped.
        skipped: why it was not replaced; empty if it was.
        note: what to check; empty if there is nothing to check.
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
    """Report of :func:`replace_neurons`; ``str`` gives a table."""

    rows: list[Replacement] = field(default_factory=list)

    @property
    def replaced(self) -> list[Replacement]:
        """Return the neuron modules that were replaced."""
        return [row for row in self.rows if not row.skipped]

    @property
    def skipped(self) -> list[Replacement]:
        """Return the neuron modules that were not replaced."""
        return [row for row in self.rows if row.skipped]

    def __iter__(self) -> Iterator[Replacement]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        """Return a table of the replaced modules and, below it in at most 80 columns, notes and skipped modules."""
        rows = [(row.name, row.was, row.now, str(row.width), str(row.channel_dim)) for row in self.replaced]
        parts = [aligned(("name", "was", "is", "width", "channel_dim"), rows)] if rows else []
        lines = [f"note on {row.name} ({row.was}): {row.note}" for row in self.replaced if row.note]
        lines += [f"skipped {row.name or 'the network'} ({row.was}): {row.skipped}" for row in self.skipped]
        parts += [wrapped(line) for line in lines]
        return "\n".join(parts)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns. Columns of numbers are right-aligned, except the first column."""
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
    """Return the text in lines of at most 80 columns, indented from the second line on."""
    return "\n".join(wrap(line, _WIDTH, subsequent_indent="  "))
