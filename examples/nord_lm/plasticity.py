"""A trained Nord that learns from the text it reads, by reward-modulated STDP, apart from its trained weights.

Two kinds of synapses have true spikes on both sides:

``lm_head``
    from the readout neurons to the words. The neuron of a word fires when the word comes, one step after the last step of
    the token before it. For every token that is read two words fire: the one that really came, with reward +1, and one that
    the model expected there (drawn from its prediction), with reward -1. Where it expected what came, they cancel; so the
    reward is the prediction error. In the mean over what is drawn, the change is that of a delta rule.
``blocks.*.ffn.down``
    from the first to the second layer of neurons of a feed-forward. The reward of a token is its prediction error brought
    back to each neuron through the weights of the head (``"error"``), or how far its loss lies below the running mean
    (``"loss"``, one number for all neurons of a token).
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from generate import number
from modeling_nord import NordForCausalLM
from torch import Tensor
from torch.nn import functional as F

from nord_snn.layers import NordBlock
from nord_snn.learning_rules import (
    LossBelowBaseline,
    PlasticPart,
    RewardModulatedSTDP,
    load_plastic,
    save_plastic,
)
from nord_snn.ops import reward_modulated_stdp

__all__ = ["Plasticity", "PlasticityError", "plasticity_arguments", "synapse_names"]

#: Change per pair of spikes, by synapse, as ``examples/online_learning`` found it.
RATES = {"lm_head": 5e-5, "ffn.down": 0.05}
REWARDS = ("error", "loss")


class PlasticityError(ValueError):
    """What was asked for cannot learn; the message says what can."""


class Reading(NamedTuple):
    """What a pass over a text says about the tokens that are learned from.

    Attributes:
        positions: of the tokens before them, at which they are predicted.
        targets: the tokens, ``[n]``.
        log_probabilities: of every word in their place, ``[n, V]``.
        losses: in nats, ``[n]``.
        approval: 1, or what the reader thinks of the text: everything that is learned is multiplied with it.
    """

    positions: slice
    targets: Tensor
    log_probabilities: Tensor
    losses: Tensor
    approval: float


#: Rewards in, rewards out: a control shuffles them, or makes them zero. The first dimension is that of the events.
Alter = Callable[[Tensor], Tensor]


class PlasticSynapse(Protocol):
    """What the two kinds of synapses have in common."""

    plastic: PlasticPart

    def listen(self) -> None:
        """Record the next pass."""

    def stop(self) -> None:
        """Do not record, and forget what was."""

    def learn(self, reading: Reading, alter: Alter) -> None:
        """Change the weights."""

    def close(self) -> None:
        """Stop watching the model."""


class WordSynapse:
    """The head: readout neurons to words."""

    def __init__(self, model: NordForCausalLM, rate: float) -> None:
        self.rate = rate
        self.plastic = PlasticPart(model.lm_head)
        self._spikes: Tensor | None = None
        self._listening = self._warned = False
        self._hook = model.readout.lif.register_forward_hook(self._record)

    def listen(self) -> None:
        """Record the next pass."""
        self._listening = True

    def stop(self) -> None:
        """Do not record, and forget what was."""
        self._listening, self._spikes = False, None

    def learn(self, reading: Reading, alter: Alter) -> None:
        """Reward the words that came, punish those that were expected."""
        if self._spikes is None:
            raise RuntimeError("nothing was read")
        spikes = self._spikes[:, 0, reading.positions]
        if not self._warned and not spikes.any():
            self._warned = True
            warnings.warn(
                "the readout neurons did not fire in this text: the head learned nothing from it", stacklevel=3
            )
        pre = F.pad(spikes, (0, 0, 0, 0, 0, 1))  # [T + 1, n, D]: the word comes a step later
        expected = torch.multinomial(reading.log_probabilities.exp(), 1).flatten()
        events = torch.cat((reading.targets, expected))
        rewards = torch.ones(len(events), device=pre.device)
        rewards[len(expected) :] = -1
        words, index = events.unique(return_inverse=True)
        post = pre.new_zeros(len(pre), len(events), len(words))
        post[-1, torch.arange(len(events)), index] = 1
        change, _ = reward_modulated_stdp(
            pre.repeat(1, 2, 1), post, reading.approval * alter(rewards), a_plus=self.rate, a_minus=self.rate
        )
        delta = torch.zeros_like(self.plastic.weight)
        delta[words] = change.to(delta.dtype)
        self.plastic.apply(delta)

    def close(self) -> None:
        """Stop watching the model."""
        self._hook.remove()

    def _record(self, module: Any, inputs: Any, spikes: Tensor) -> None:
        if self._listening:
            self._spikes = spikes.detach()


class BlockSynapse:
    """The second map of a feed-forward, between its two layers of neurons."""

    def __init__(self, model: NordForCausalLM, index: int, rate: float, reward: str) -> None:
        self.model, self.reward = model, reward
        self.block = cast(NordBlock, model.blocks[index])
        self.rule = RewardModulatedSTDP(
            step_mode="m",
            synapse=self.block.ffn.down,
            sn=self.block.ffn.lif2,
            a_plus=rate,
            a_minus=rate,
            reduction="mean",
            source=LossBelowBaseline(baseline=None),
            name=f"blocks.{index}.ffn.down",
        )
        self.rule.disable()
        self.plastic = self.rule.plastic

    def listen(self) -> None:
        """Record the next pass."""
        self.rule.enable()

    def stop(self) -> None:
        """Do not record, and forget what was."""
        self.rule.reset()
        self.rule.disable()

    def learn(self, reading: Reading, alter: Alter) -> None:
        """Strengthen what fired together where the reward is positive."""
        if self.reward == "error":
            wrong = F.one_hot(reading.targets, reading.log_probabilities.shape[1]) - reading.log_probabilities.exp()
            rewards = wrong @ self.model.lm_head.weight * self.model.norm.weight * self.block.ffn_gain
            rewards = rewards / self.block.ffn_gain.abs().mean()
        else:
            rewards = cast(Tensor, self.rule.source(reading.losses))
        given = reading.approval * alter(rewards)
        self.rule.apply(cast(Tensor, self.rule.step(reward=given[None], on_grad=False, positions=reading.positions)))

    def close(self) -> None:
        """Stop watching the model."""
        self.rule.close()


class Plasticity:
    """Everything in a model that learns while it reads.

    Args:
        model: in eval mode.
        synapses: names, or patterns such as ``blocks.*.ffn.down``; default: ``lm_head``, or where it shares its weights with
            the embedding, which must not change, every ``ffn.down``.
        rate: change per pair of spikes; default: as found for each.
        reward: of the ``ffn.down``: ``"error"`` or ``"loss"``.
        alter: what becomes of the rewards, for controls.

    Raises:
        PlasticityError: a name fits no synapse between two layers of spikes.
    """

    def __init__(
        self,
        model: NordForCausalLM,
        synapses: Sequence[str] | None = None,
        rate: float | None = None,
        reward: str = "error",
        alter: Alter = lambda rewards: rewards,
    ) -> None:
        if reward not in REWARDS:
            raise PlasticityError(f"the reward must be one of {', '.join(REWARDS)}, got {reward}")
        tied = model.config.tie_word_embeddings
        asked = synapses or (("blocks.*.ffn.down",) if tied else ("lm_head",))
        names = synapse_names(model)
        for pattern in asked:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise PlasticityError(
                    f"{pattern}: no synapse between two layers of spikes; there are {', '.join(names)}"
                )
        self.model, self.alter = model, alter
        self.synapses: dict[str, PlasticSynapse] = {}
        for name in (name for name in names if any(fnmatchcase(name, pattern) for pattern in asked)):
            if name == "lm_head":
                self.synapses[name] = WordSynapse(model, RATES["lm_head"] if rate is None else rate)
            else:
                index = int(name.split(".")[1])
                self.synapses[name] = BlockSynapse(model, index, RATES["ffn.down"] if rate is None else rate, reward)
        self._before = {name: synapse.plastic.weight.detach().clone() for name, synapse in self.synapses.items()}

    @torch.no_grad()
    def read(self, context: Tensor, n_new: int, approval: float = 1.0) -> float | None:
        """Learn from the last ``n_new`` tokens of ``context [1, S]``; returns their loss before it, in nats per token.

        What came before is context and takes no part in the change. None where nothing is predicted: a text of one token
        without context.
        """
        first = max(context.shape[1] - n_new, 1)  # nothing predicts the first token
        targets = context[0, first:]
        if not len(targets):
            return None
        try:
            for synapse in self.synapses.values():
                synapse.listen()
            logits = self.model(input_ids=context, logits_to_keep=len(targets) + 1, use_cache=False).logits[0, :-1]
            log_probabilities = logits.float().log_softmax(-1)
            losses = -log_probabilities.gather(1, targets[:, None]).flatten()
            reading = Reading(slice(first - 1, -1), targets, log_probabilities, losses, approval)
            for synapse in self.synapses.values():
                synapse.learn(reading, self.alter)
        finally:  # also after Ctrl-C: generation must not be recorded, nor half a pass kept
            for synapse in self.synapses.values():
                synapse.stop()
        return losses.mean().item()

    def forget(self) -> None:
        """Take back every change, bit for bit."""
        for synapse in self.synapses.values():
            synapse.plastic.revert()

    def close(self) -> None:
        """Take back every change and stop watching the model."""
        self.forget()
        for synapse in self.synapses.values():
            synapse.close()

    def save(self, path: Path) -> None:
        """Write what was learned, and only that, into a small safetensors file."""
        save_plastic(path, {name: synapse.plastic for name, synapse in self.synapses.items()})

    def load(self, path: Path) -> None:
        """Put what was saved in place of what was learned here."""
        load_plastic(path, {name: synapse.plastic for name, synapse in self.synapses.items()})

    @torch.no_grad()
    def change(self) -> float:
        """Norm of what was learned, relative to the weights that can learn."""
        learned = sum(
            (synapse.plastic.weight - self._before[name]).square().sum() for name, synapse in self.synapses.items()
        )
        return float((learned / sum(before.square().sum() for before in self._before.values())) ** 0.5)


def synapse_names(model: NordForCausalLM) -> list[str]:
    """Synapses with true spikes on both sides."""
    head = [] if model.config.tie_word_embeddings else ["lm_head"]
    return head + [f"blocks.{index}.ffn.down" for index in range(len(model.blocks))]


def plasticity_arguments(parser: argparse.ArgumentParser) -> None:
    """What learns, and how fast: options of ``chat.py`` and ``examples/online_learning``."""
    parser.add_argument("--synapses", nargs="+", help="what learns: lm_head, blocks.0.ffn.down, or patterns of names")
    parser.add_argument("--rate", type=number(0), help="change of a weight per pair of spikes")
    parser.add_argument("--reward", choices=REWARDS, default=REWARDS[0], help="of blocks.*.ffn.down")
