"""The firing rate of every part of the model, token by token, while it answers."""

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

BLOCKS = " ▁▂▃▄▅▆▇█"
BAR_WIDTH, HISTORY = 20, 40


class AnswerRates(BaseStreamer):
    """Rates of an answer as it is generated, in constant memory but for one number per part and token.

    A streamer for ``generate``, which hands it the prompt first and then every token.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.rates: dict[str, list[float]] = {}  # part -> rate at each token: where the token was chosen
        self._rows = RowRates(model)
        self._begun = False

    def put(self, value: Tensor) -> None:
        """The prompt, then a token at a time."""
        if not self._begun:
            self._begun = True
            return
        now = {
            name: rate[..., -1] for name, rate in self._rows.take().items()
        }  # the last position is the one that chose
        self.tokens.append(int(value.flatten()[0]))
        for part, rate in zone_means(now, self._rows.neurons()).items():
            self.rates.setdefault(part, []).append(rate.mean().item())
        self.show()

    def end(self) -> None:
        """The answer is complete."""

    def show(self) -> None:
        """What is to be seen so far."""

    def close(self) -> None:
        """Stop watching."""
        self._rows.close()

    def __enter__(self) -> Self:
        """Watch until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        self.close()

    def summary(self) -> list[str]:
        """A line for each part: mean, and the tokens before which, to choose them, it fired least and most."""
        lines = []
        for part, rates in self.rates.items():
            values = torch.tensor(rates)
            low, high = int(values.argmin()), int(values.argmax())
            lines.append(
                f"{part:12} {values.mean():6.2%}   least {values[low]:6.2%} before {self._word(low)}   "
                f"most {values[high]:6.2%} before {self._word(high)}"
            )
        return lines

    def _word(self, place: int) -> str:
        return repr(self.tokenizer.decode([self.tokens[place]]))


class LiveRates(AnswerRates):
    """The same, shown: a bar and the last tokens' rates of every part, and below them the end of the answer. Without a
    terminal, a line a token.
    """

    def __init__(self, model: NordForCausalLM, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        super().__init__(model, tokenizer)
        steps, every = model.config.t_fast + model.config.t_slow, model.config.refractory_steps + 1
        self.full = ceil(steps / every) / steps  # a bar is full where no neuron can fire more often
        self.console = console
        self._live = Live(console=console, refresh_per_second=12) if console.is_terminal else None
        if self._live:
            self._live.start()

    def show(self) -> None:
        """Draw."""
        if self._live:
            self._live.update(self._panel())
            return
        rates = "  ".join(f"{part} {rates[-1]:.2%}" for part, rates in self.rates.items())
        self.console.print(f"{self._word(-1):20} {rates}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last picture where it is."""
        super().close()
        if self._live:
            self._live.update(Group(self._bars(), Text(), Text(self._answer())))
            self._live.stop()
        elif self.tokens:
            self.console.print(self._answer(), highlight=False, markup=False, soft_wrap=True)

    def _answer(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _panel(self) -> Group:
        room = max(1, self.console.height - len(self.rates) - 2)
        lines = Text(self._answer()).wrap(self.console, self.console.width)
        return Group(self._bars(), Text(), *lines[-room:])

    def _bars(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for part, rates in self.rates.items():
            history = "".join(BLOCKS[min(int(rate / self.full * 8.99), 8)] for rate in rates[-HISTORY:])
            bar = ProgressBar(self.full, rates[-1], width=BAR_WIDTH)
            table.add_row(part, bar, f"{rates[-1]:6.2%}", Text(history, style="cyan"))
        return table
