"""Show training progress: a live panel in a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

__all__ = ["TrainingProgress", "duration", "print_table"]

BAR_WIDTH = 24
FULL_BAR = 0.4  # firing rate of a full bar; bars of higher rates are red
SILENT = 0.001  # bars of lower rates are red


class TrainingProgress:
    """Show training step, loss, learning rate, tokens per second, remaining time and the firing rate of every layer of neurons.

    Args:
        total: training steps of the whole run.
        console: output; a live panel in a terminal, else a line per update. Default: standard output.
        visible: whether to print anything. Default: True.
    """

    def __init__(self, total: int, console: Console | None = None, visible: bool = True) -> None:
        self.total, self.visible = total, visible
        self.console = console or Console()
        self.begin(0)
        self._live = Live(console=self.console, refresh_per_second=4) if visible and self.console.is_terminal else None

    def __enter__(self) -> Self:
        """Open the panel."""
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the panel."""
        self.stop()

    def stop(self) -> None:
        """Stop the panel; its last state stays on the terminal."""
        if self._live:
            self._live.stop()

    def begin(self, step: int) -> None:
        """Start the clock at training step ``step``; the remaining time is estimated from here."""
        self._first_step, self._start_time = step, time.monotonic()

    def say(self, message: str) -> None:
        """Print a line above the panel."""
        if self.visible:
            self.console.print(escape(message), highlight=False, soft_wrap=True)

    def update(self, step: int, loss: float, lr: float, tokens_per_second: float, rates: Mapping[str, float]) -> None:
        """Show the state of training."""
        if not self.visible:
            return
        per_step = (time.monotonic() - self._start_time) / max(step - self._first_step, 1)
        time_left = duration(per_step * (self.total - step))
        if self._live:
            self._live.update(_panel(step, self.total, loss, lr, tokens_per_second, time_left, rates))
            return
        low, high = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
        self.say(
            f"step {step}/{self.total}  loss {loss:.3f}  lr {lr:.2e}  {tokens_per_second:,.0f} tokens/s  {time_left} left  "
            f"firing {rates[low]:.1%} ({low}) to {rates[high]:.1%} ({high})"
        )


def _panel(
    step: int, total: int, loss: float, lr: float, tokens_per_second: float, time_left: str, rates: Mapping[str, float]
) -> Panel:
    head = Text(
        f"step {step}/{total}   loss {loss:.3f}   lr {lr:.2e}   {tokens_per_second:,.0f} tokens/s   {time_left} left"
    )
    bars = Table.grid(padding=(0, 1))
    for name, rate in rates.items():
        in_range = SILENT <= rate <= FULL_BAR
        bar = ProgressBar(FULL_BAR, min(rate, FULL_BAR), width=BAR_WIDTH, complete_style="green" if in_range else "red")
        bars.add_row(name, bar, f"{rate:6.2%}")
    return Panel(
        Group(head, ProgressBar(total, step), Text(), Text("firing rates", style="bold"), bars), title="nord-snn"
    )


def duration(seconds: float) -> str:
    """Format seconds as ``1h 02m`` or ``3m 05s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def print_table(console: Console, title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a small table. The first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
