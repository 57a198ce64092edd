"""Record and show the firing rate of every part of the model (input, each block, readout) at each generated token."""

from math import ceil
from types import TracebackType
from typing import Self

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from nord_snn.models.nord import NordForCausalLM
from nord_snn.monitor import RowRates
from nordlm.analysis.token_activity import zone_means

__all__ = ["AnswerRates", "LiveRates"]

BAR_CHARACTERS = " ▁▂▃▄▅▆▇█"
BAR_WIDTH, HISTORY = 20, 40  # characters; tokens


class AnswerRates(BaseStreamer):
    """A streamer that records firing rates during ``generate``: one number for each part of the model and token.

    ``generate`` passes the prompt first, then each token.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.rates: dict[str, list[float]] = {}  # part -> rate at the position that predicts each token
        self._rows = RowRates(model)
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        """Ignore the prompt; record the rates for each token."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        last = {name: rate[..., -1] for name, rate in self._rows.take().items()}  # the position that predicts the token
        self.tokens.append(int(value.flatten()[0]))
        for part, rate in zone_means(last, self._rows.neurons()).items():
            self.rates.setdefault(part, []).append(rate.mean().item())
        self.show()

    def end(self) -> None:
        """Do nothing at the end of the answer."""

    def show(self) -> None:
        """Show the rates so far; this class shows nothing."""

    def close(self) -> None:
        """Remove the hooks."""
        self._rows.close()

    def __enter__(self) -> Self:
        """Return the recorder, which records until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the recorder."""
        self.close()

    def summary(self) -> list[str]:
        """Return a line for each part: its mean rate, and the tokens before which its rate was lowest and highest."""
        lines = []
        for part, rates in self.rates.items():
            values = torch.tensor(rates)
            low, high = int(values.argmin()), int(values.argmax())
            lines.append(
                f"{part:12} {values.mean():6.2%}   lowest {values[low]:6.2%} before {self._token_text(low)}   "
                f"highest {values[high]:6.2%} before {self._token_text(high)}"
            )
        return lines

    def _token_text(self, index: int) -> str:
        return repr(self.tokenizer.decode([self.tokens[index]]))


class LiveRates(AnswerRates):
    """Record firing rates and show a bar and the recent rates of every part, and the end of the answer.

    Without a terminal, print a line per token.
    """

    def __init__(self, model: NordForCausalLM, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        super().__init__(model, tokenizer)
        n_steps, interval = model.config.t_fast + model.config.t_slow, model.config.refractory_steps + 1
        self.full_bar = ceil(n_steps / interval) / n_steps  # the highest rate that the refractory period allows
        self.console = console
        self._live = Live(console=console, refresh_per_second=12) if console.is_terminal else None
        if self._live:
            self._live.start()

    def show(self) -> None:
        """Update the panel, or print a line."""
        if self._live:
            self._live.update(self._panel())
            return
        rates = "  ".join(f"{part} {rates[-1]:.2%}" for part, rates in self.rates.items())
        self.console.print(f"{self._token_text(-1):20} {rates}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the hooks, and leave the last panel on the terminal."""
        super().close()
        if self._live:
            self._live.update(Group(self._bars(), Text(), Text(self._answer())))
            self._live.stop()
        elif self.tokens:
            self.console.print(self._answer(), highlight=False, markup=False, soft_wrap=True)

    def _answer(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _panel(self) -> Group:
        height = max(1, self.console.height - len(self.rates) - 2)
        lines = Text(self._answer()).wrap(self.console, self.console.width)
        return Group(self._bars(), Text(), *lines[-height:])

    def _bars(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for part, rates in self.rates.items():
            history = "".join(BAR_CHARACTERS[min(int(rate / self.full_bar * 8.99), 8)] for rate in rates[-HISTORY:])
            bar = ProgressBar(self.full_bar, rates[-1], width=BAR_WIDTH)
            table.add_row(part, bar, f"{rates[-1]:6.2%}", Text(history, style="cyan"))
        return table
