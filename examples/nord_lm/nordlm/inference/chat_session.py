"""One conversation with a trained model."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from nord_snn.models.nord import NordForCausalLM
from nord_snn.monitor import SpikeMonitor
from nordlm.cli import number, temperature
from nordlm.inference.live_rates import AnswerRates, LiveRates
from nordlm.inference.plasticity import Plasticity
from nordlm.inference.sampling import sampling

__all__ = [
    "Chat",
]

HELP = """/temp X     temperature, 0 for the best token each time
/tokens N   longest answer
/rep X      repetition penalty, 1 for none
/stdp on    learn from what you type; /stdp off stops, what was learned stays
/good       more of what it just answered; /bad less (where STDP is on)
/forget     take back everything that was learned here
/save-plastic FILE   write what was learned, and only that
/load-plastic FILE   put it in place of what was learned here
/live on    show the firing rate of every block while it answers, token by token; /live off
/stats      what fired in the last answer, and at which token most; speed, and what STDP did
/reset      forget the conversation
/help       this
/quit       leave"""


class Both(BaseStreamer):
    """Hands everything to several streamers."""

    def __init__(self, *streamers: BaseStreamer) -> None:
        self.streamers = streamers

    def put(self, value: Tensor) -> None:
        """The prompt, then a token at a time."""
        for streamer in self.streamers:
            streamer.put(value)

    def end(self) -> None:
        """The answer is complete."""
        for streamer in self.streamers:
            streamer.end()


class Chat:
    """One conversation.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        options: sampling options of the command line.
        console: where to print.
        plasticity: what learns; default: as found best.
    """

    def __init__(
        self,
        model: NordForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        options: argparse.Namespace,
        console: Console | None = None,
        plasticity: Plasticity | None = None,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.console = console or Console()
        self.plasticity = plasticity or Plasticity(model)
        self.learning = False
        self.text: list[int] = []
        self.answered = 0  # tokens at the end of the text that the model said
        self.live = False
        self.watched: AnswerRates | None = None  # of the last answer
        self.rates: dict[str, float] = {}
        self.tokens_per_second = 0.0

    def handle(self, line: str) -> bool:
        """Answer a line or obey a command; False when it is time to leave."""
        if not line.startswith("/"):
            self.answer(line)
            return True
        name, _, argument = line[1:].partition(" ")
        if name in ("quit", "exit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "temp": lambda text: self._set("temperature", text, temperature),
            "tokens": lambda text: self._set("max_new_tokens", text, number(1, kind=int)),
            "rep": lambda text: self._set("repetition_penalty", text, number(0.01, 100)),
            "stdp": self._switch,
            "good": lambda _: self._judge(1.0),
            "bad": lambda _: self._judge(-1.0),
            "forget": self._forget,
            "save-plastic": lambda text: self._file(text, self.plasticity.save, "what was learned is in"),
            "load-plastic": lambda text: self._file(text, self.plasticity.load, "learned as in"),
            "live": self._show_live,
            "stats": self._stats,
            "reset": self._reset,
            "help": lambda _: self.say(HELP),
        }
        commands.get(name, lambda _: self.say(f"there is no /{name}; /help lists what there is"))(argument.strip())
        return True

    def answer(self, line: str) -> None:
        """Read a line of the user, learn from it if switched on, and go on with the text."""
        typed = self.tokenizer(line + "\n", add_special_tokens=False, split_special_tokens=True)["input_ids"]
        self.text = (self.text + typed)[-self.model.config.max_position_embeddings :]
        self.answered = 0
        if self.learning:
            self._learn(len(typed), 1.0, "your text")
        ids = torch.tensor([self.text], device=self.model.device)
        self.watched, self.rates, self.tokens_per_second = None, {}, 0.0
        began = time.monotonic()
        with SpikeMonitor(self.model) as monitor, self._watch() as watched:
            whole = self.model.generate(
                ids,
                max_new_tokens=self.options.max_new_tokens,
                pad_token_id=self.tokenizer.eos_token_id,
                streamer=watched if self.live else Both(self._writer(), watched),
                **sampling(
                    self.options.temperature, self.options.top_k, self.options.top_p, self.options.repetition_penalty
                ),
            )[0].tolist()
        self.tokens_per_second = (len(whole) - len(self.text)) / (time.monotonic() - began)
        self.watched, self.rates = watched, monitor.rates()
        self.answered = len(whole) - len(self.text)
        self.text = whole

    def _watch(self) -> AnswerRates:
        return (
            LiveRates(self.model, self.tokenizer, self.console)
            if self.live
            else AnswerRates(self.model, self.tokenizer)
        )

    def _writer(self) -> BaseStreamer:
        return TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def say(self, message: str, style: str | None = None) -> None:
        """Print a message that is not the model's."""
        self.console.print(escape(message), style=style, highlight=False, soft_wrap=True)

    def _learn(self, n_new: int, approval: float, what: str) -> None:
        """Learn from the end of the text."""
        context = torch.tensor([self.text[-self.model.config.max_position_embeddings :]], device=self.model.device)
        loss = self.plasticity.read(context, min(n_new, context.shape[1]), approval)
        if loss is not None:
            self.say(f"[loss on {what} {loss:.2f}, weights changed by {self.plasticity.change():.1e}]", style="dim")

    def _judge(self, approval: float) -> None:
        if not self.learning:
            self.say("it does not learn; /stdp on lets it")
        elif not self.answered:
            self.say("there is no answer to judge")
        else:
            self._learn(self.answered, approval, "its answer")

    def _file(self, name: str, do: Callable[[Path], None], said: str) -> None:
        if not name:
            self.say("expected the name of a file")
            return
        try:
            do(Path(name).expanduser())
        except (ValueError, OSError) as error:
            self.say(str(error))
            return
        self.say(f"{said} {name}")

    def _set(self, name: str, text: str, parse: Callable[[str], float]) -> None:
        try:
            setattr(self.options, name, parse(text))
        except (ValueError, argparse.ArgumentTypeError) as error:
            self.say(f"{error}; it stays at {getattr(self.options, name)}")
            return
        self.say(f"{name.replace('_', ' ')} {getattr(self.options, name)}")

    def _switch(self, argument: str) -> None:
        self.learning = self._on_or_off("stdp", argument, self.learning)
        self.say(f"STDP is {_word(self.learning)}")

    def _show_live(self, argument: str) -> None:
        self.live = self._on_or_off("live", argument, self.live)
        self.say(f"live rates are {_word(self.live)}")

    def _on_or_off(self, command: str, argument: str, now: bool) -> bool:
        if argument not in ("on", "off"):
            self.say(f"expected /{command} on or /{command} off")
            return now
        return argument == "on"

    def _forget(self, _: str) -> None:
        self.plasticity.forget()
        self.say("the weights are what they were at the start, bit for bit")

    def _reset(self, _: str) -> None:
        self.text, self.answered = [], 0
        self.say("the conversation is forgotten; what STDP learned stays until /forget")

    def _stats(self, _: str) -> None:
        for line in ["of the last answer:", *self.watched.summary()] if self.watched else ["there is no answer yet"]:
            self.say(line)
        if self.rates:
            self.say("with what it read before:")
        for name, rate in self.rates.items():
            self.say(f"{name:28} {rate:7.2%}")
        self.say(
            f"{len(self.text)} tokens of context, {self.tokens_per_second:.1f} tokens/s; STDP "
            f"{_word(self.learning)} ({', '.join(self.plasticity.synapses)}), weights changed by "
            f"{self.plasticity.change():.2e}"
        )


def _word(switched: bool) -> str:
    return "on" if switched else "off"
