"""What replacing did, neuron by neuron."""

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Replacement", "ReplacementReport"]


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
    """

    name: str
    was: str
    now: str = ""
    width: int | None = None
    channel_dim: int | None = None
    skipped: str = ""


@dataclass
class ReplacementReport:
    """What :func:`replace_neurons` did; ``str`` gives a Markdown table."""

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
        """Return the Markdown table."""
        lines = ["| name | was | is | width | channel_dim | skipped |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row.name} | {row.was} | {row.now} | {_shown(row.width)} | {_shown(row.channel_dim)} | {row.skipped} |"
            for row in self.rows
        ]
        return "\n".join(lines)


def _shown(value: int | None) -> str:
    return "" if value is None else str(value)
