"""Talk with a trained model, and let it learn from what you type while you do.

    python examples/nord_lm/chat.py --model runs/tiny-0001/model

The model knows no roles: what you type and what it answers is one running text. With ``/stdp on`` the synapses between the
two neuron layers of every feed-forward learn by reward-modulated STDP. The reward is how well the model predicted what you
really typed, compared with how well it usually does. ``/forget`` takes back all of it.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import cast

import torch
from data import DataError
from generate import ModelError, as_text, number, open_for, sampling, sampling_arguments, temperature
from modeling_nord import NordForCausalLM
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from nord_snn.layers import NordBlock
from nord_snn.learning_rules import RewardModulatedSTDP
from nord_snn.monitor import SpikeMonitor

HELP = """/temp X     temperature, 0 for the best token each time
/tokens N   longest answer
/rep X      repetition penalty, 1 for none
/stdp on    learn from what you type; /stdp off stops, what was learned stays
/forget     take back everything that was learned here
/stats      firing rates, speed, and what STDP did
/reset      forget the conversation
/help       this
/quit       leave"""


class Plasticity:
    """Reward-modulated STDP in the ``ffn.down`` of every block, between its two layers of spikes.

    Args:
        model: the model that learns.
    """

    def __init__(self, model: NordForCausalLM) -> None:
        self.model = model
        self.rules = [
            RewardModulatedSTDP(step_mode="m", synapse=ffn.down, sn=ffn.lif2, reduction="mean")
            for ffn in (cast(NordBlock, block).ffn for block in model.blocks)
        ]
        self._before = [rule.synapse.weight.detach().clone() for rule in self.rules]
        self._first = True
        for rule in self.rules:
            rule.disable()

    @property
    def reward(self) -> float | None:
        """Of the last text learned from, or None."""
        return self.rules[0].last_reward

    @torch.no_grad()
    def learn(self, context: Tensor, n_new: int) -> float | None:
        """Learn from the last ``n_new`` tokens of ``context [1, S]``; returns their loss in nats per token.

        What came before is context and takes no part in the change. The first text sets what is expected; a text of one
        token without context predicts nothing.
        """
        n_before = context.shape[1] - n_new
        labels = context.clone()
        labels[:, :n_before] = -100
        if (labels[:, 1:] == -100).all():
            return None
        try:
            for rule in self.rules:
                rule.enable()
            loss = self.model(input_ids=context, labels=labels).loss.item()
            for rule in self.rules:
                if self._first:
                    rule.baseline = loss
                delta = rule.step(loss=loss, on_grad=False, positions=slice(n_before, None))
                if delta is not None:
                    rule.apply(delta)
        finally:  # also after Ctrl-C: generation must not be recorded, nor half a pass kept
            for rule in self.rules:
                rule.reset()
                rule.disable()
        self._first = False
        return loss

    def forget(self) -> None:
        """Take back every change, bit for bit."""
        for rule in self.rules:
            rule.revert()

    @torch.no_grad()
    def change(self) -> float:
        """Norm of what was learned, relative to the weights."""
        pairs = list(zip(self.rules, self._before, strict=True))
        learned = sum((rule.synapse.weight - before).square().sum() for rule, before in pairs)
        return float((learned / sum(before.square().sum() for _, before in pairs)) ** 0.5)


class Chat:
    """One conversation.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        options: sampling options of the command line.
        console: where to print.
    """

    def __init__(
        self,
        model: NordForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        options: argparse.Namespace,
        console: Console | None = None,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.console = console or Console()
        self.plasticity = Plasticity(model)
        self.learning = False
        self.text: list[int] = []
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
            "forget": self._forget,
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
        ids = torch.tensor([self.text], device=self.model.device)
        if self.learning and (loss := self.plasticity.learn(ids, min(len(typed), len(self.text)))) is not None:
            self.say(f"[loss on your text {loss:.2f}, reward {self.plasticity.reward:+.2f}]", style="dim")
        began = time.monotonic()
        with SpikeMonitor(self.model) as monitor:
            whole = self.model.generate(
                ids,
                max_new_tokens=self.options.max_new_tokens,
                pad_token_id=self.tokenizer.eos_token_id,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **sampling(
                    self.options.temperature, self.options.top_k, self.options.top_p, self.options.repetition_penalty
                ),
            )[0].tolist()
        self.tokens_per_second = (len(whole) - len(self.text)) / (time.monotonic() - began)
        self.rates = monitor.rates()
        self.text = whole

    def say(self, message: str, style: str | None = None) -> None:
        """Print a message that is not the model's."""
        self.console.print(escape(message), style=style, highlight=False, soft_wrap=True)

    def _set(self, name: str, text: str, parse: Callable[[str], float]) -> None:
        try:
            setattr(self.options, name, parse(text))
        except (ValueError, argparse.ArgumentTypeError) as error:
            self.say(f"{error}; it stays at {getattr(self.options, name)}")
            return
        self.say(f"{name.replace('_', ' ')} {getattr(self.options, name)}")

    def _switch(self, argument: str) -> None:
        if argument not in ("on", "off"):
            self.say(f"expected /stdp on or /stdp off; it is {'on' if self.learning else 'off'}")
            return
        self.learning = argument == "on"
        self.say(f"STDP is {argument}")

    def _forget(self, _: str) -> None:
        self.plasticity.forget()
        self.say("the weights are what they were at the start, bit for bit")

    def _reset(self, _: str) -> None:
        self.text = []
        self.say("the conversation is forgotten; what STDP learned stays until /forget")

    def _stats(self, _: str) -> None:
        for name, rate in self.rates.items():
            self.say(f"{name:28} {rate:7.2%}")
        reward = "none yet" if self.plasticity.reward is None else f"{self.plasticity.reward:+.3f}"
        self.say(
            f"{len(self.text)} tokens of context, {self.tokens_per_second:.1f} tokens/s; STDP "
            f"{'on' if self.learning else 'off'}, last reward {reward}, weights changed by {self.plasticity.change():.2e}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sampling_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        model, tokenizer = open_for(options)
    except (ModelError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    chat = Chat(model, tokenizer, options)
    chat.say("/help lists the commands, /quit leaves")
    while True:
        try:
            line = as_text(input("> "))
            if line.strip() and not chat.handle(line.strip()):
                return 0
        except KeyboardInterrupt:  # stops an answer, not the conversation
            print()
        except EOFError:
            return 0
        except (ValueError, RuntimeError) as error:  # weights that give no probabilities, say; the conversation goes on
            chat.say(f"that did not work: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    sys.exit(main())
