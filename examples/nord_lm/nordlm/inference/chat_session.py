"""A chat with a trained model."""

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
from nordlm.inference.sampling import generate_arguments

__all__ = [
    "Chat",
]

HELP = """/temp X     sampling temperature, 0 for greedy search
/tokens N   maximum length of an answer, in tokens
/rep X      repetition penalty, 1 for none
/stdp on    from now on the model learns from each of your lines, by STDP, before it answers
/stdp off   stop learning; the learned changes stay
/good       reward the last answer: the model learns to prefer it (only with STDP on)
/bad        punish the last answer: the model learns to avoid it (only with STDP on)
/forget     revert all learned changes
/save-plastic FILE   write the learned changes, without the trained weights, to FILE
/load-plastic FILE   replace the learned changes by the changes in FILE
/live on    show the firing rates of all parts of the model at each token of an answer; /live off hides them
/stats      firing rates in the last answer, speed, and how much STDP has changed the weights
/reset      clear the conversation
/help       list the commands
/quit       end the chat"""


class TeeStreamer(BaseStreamer):
    """Pass the tokens of ``generate`` to several streamers."""

    def __init__(self, *streamers: BaseStreamer) -> None:
        self.streamers = streamers

    def put(self, value: Tensor) -> None:
        """Pass the prompt, then each token, to all streamers."""
        for streamer in self.streamers:
            streamer.put(value)

    def end(self) -> None:
        """Pass the end of the answer to all streamers."""
        for streamer in self.streamers:
            streamer.end()


class Chat:
    """A chat: the text so far, the commands, and learning by STDP.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        options: sampling options of the command line; commands change them.
        console: output. Default: standard output.
        plasticity: the synapses that learn after ``/stdp on``. Default: ``Plasticity(model)``.
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
        self.text: list[int] = []  # token ids of user and model
        self.answer_length = 0  # tokens of the last answer, at the end of the text
        self.live = False
        self.answer_rates: AnswerRates | None = None  # of the last answer, by part of the model and token
        self.rates: dict[str, float] = {}  # by layer: means over the last answer and the text before it
        self.tokens_per_second = 0.0

    def handle(self, line: str) -> bool:
        """Answer a line or run a command; return False on ``/quit``."""
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
            "stdp": self._switch_stdp,
            "good": lambda _: self._reward_answer(1.0),
            "bad": lambda _: self._reward_answer(-1.0),
            "forget": self._forget,
            "save-plastic": lambda text: self._use_file(text, self.plasticity.save, "learned changes written to"),
            "load-plastic": lambda text: self._use_file(text, self.plasticity.load, "learned changes loaded from"),
            "live": self._switch_live,
            "stats": self._stats,
            "reset": self._reset,
            "help": lambda _: self.say(HELP),
        }
        commands.get(name, lambda _: self.say(f"unknown command /{name}; /help lists the commands"))(argument.strip())
        return True

    def answer(self, line: str) -> None:
        """Append a line of the user, learn from it if STDP is on, and generate an answer."""
        new_ids = self.tokenizer(line + "\n", add_special_tokens=False, split_special_tokens=True)["input_ids"]
        self.text = (self.text + new_ids)[-self.model.config.max_position_embeddings :]
        self.answer_length = 0
        if self.learning:
            self._learn(len(new_ids), 1.0, "your text")
        ids = torch.tensor([self.text], device=self.model.device)
        self.answer_rates, self.rates, self.tokens_per_second = None, {}, 0.0
        start = time.monotonic()
        with SpikeMonitor(self.model) as monitor, self._rate_recorder() as recorder:
            ids_out = self.model.generate(
                ids,
                max_new_tokens=self.options.max_new_tokens,
                pad_token_id=self.tokenizer.eos_token_id,
                streamer=recorder if self.live else TeeStreamer(self._text_streamer(), recorder),
                **generate_arguments(
                    self.options.temperature, self.options.top_k, self.options.top_p, self.options.repetition_penalty
                ),
            )[0].tolist()
        self.tokens_per_second = (len(ids_out) - len(self.text)) / (time.monotonic() - start)
        self.answer_rates, self.rates = recorder, monitor.rates()
        self.answer_length = len(ids_out) - len(self.text)
        self.text = ids_out

    def _rate_recorder(self) -> AnswerRates:
        return (
            LiveRates(self.model, self.tokenizer, self.console)
            if self.live
            else AnswerRates(self.model, self.tokenizer)
        )

    def _text_streamer(self) -> BaseStreamer:
        return TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def say(self, message: str, style: str | None = None) -> None:
        """Print a message."""
        self.console.print(escape(message), style=style, highlight=False, soft_wrap=True)

    def _learn(self, n_new: int, reward_factor: float, source: str) -> None:
        """Learn from the last ``n_new`` tokens of the text; print their loss before learning, and the size of all changes."""
        context = torch.tensor([self.text[-self.model.config.max_position_embeddings :]], device=self.model.device)
        loss = self.plasticity.learn_from(context, min(n_new, context.shape[1]), reward_factor)
        if loss is not None:
            self.say(f"[loss on {source} {loss:.2f} nats per token; {self._learned_change()}]", style="dim")

    def _learned_change(self) -> str:
        return f"learned change so far: {self.plasticity.change():.1e} of the norm of the trained weights"

    def _reward_answer(self, reward_factor: float) -> None:
        if not self.learning:
            self.say("STDP is off; /stdp on switches it on")
        elif not self.answer_length:
            self.say("there is no answer to learn from")
        else:
            self._learn(self.answer_length, reward_factor, "the model's answer")

    def _use_file(self, name: str, action: Callable[[Path], None], message: str) -> None:
        if not name:
            self.say("expected the name of a file")
            return
        try:
            action(Path(name).expanduser())
        except (ValueError, OSError) as error:
            self.say(str(error))
            return
        self.say(f"{message} {name}")

    def _set(self, name: str, text: str, parse: Callable[[str], float]) -> None:
        try:
            setattr(self.options, name, parse(text))
        except (ValueError, argparse.ArgumentTypeError) as error:
            self.say(f"{error}; the {name.replace('_', ' ')} stays at {getattr(self.options, name)}")
            return
        self.say(f"{name.replace('_', ' ')} {getattr(self.options, name)}")

    def _switch_stdp(self, argument: str) -> None:
        self.learning = self._parse_switch("stdp", argument, self.learning)
        self.say(f"STDP is {_on_off(self.learning)}")

    def _switch_live(self, argument: str) -> None:
        self.live = self._parse_switch("live", argument, self.live)
        self.say(f"live rates are {_on_off(self.live)}")

    def _parse_switch(self, command: str, argument: str, current: bool) -> bool:
        if argument not in ("on", "off"):
            self.say(f"expected /{command} on or /{command} off")
            return current
        return argument == "on"

    def _forget(self, _: str) -> None:
        self.plasticity.forget()
        self.say("the weights are equal to the trained weights again, bit for bit")

    def _reset(self, _: str) -> None:
        self.text, self.answer_length = [], 0
        self.say("the conversation is cleared; changes by STDP stay until /forget")

    def _stats(self, _: str) -> None:
        for line in (
            [
                "firing rate of each part of the model, mean over the tokens of the last answer:",
                *self.answer_rates.summary(),
            ]
            if self.answer_rates
            else ["there is no answer yet"]
        ):
            self.say(line)
        if self.rates:
            self.say("firing rate of each layer, mean over the text before the answer and the answer:")
        for name, rate in self.rates.items():
            self.say(f"{name:28} {rate:7.2%}")
        self.say(
            f"{len(self.text)} tokens of context, {self.tokens_per_second:.1f} tokens/s; STDP {_on_off(self.learning)}; "
            f"synapses that learn: {', '.join(self.plasticity.synapses)}; {self._learned_change()}"
        )


def _on_off(switched: bool) -> str:
    return "on" if switched else "off"
