"""A trained Nord that learns from the text it reads, by reward-modulated STDP, apart from its trained weights.

Two kinds of synapses stand between neurons that fire:

``lm_head``
    from the readout neurons to the words. A word is given a spike of its own when it comes, one step after the last step of
    the token before it. For every token that is read two words fire: the one that really came, with reward +1, and one that
    the model expected there (drawn from its prediction), with reward -1. Where it expected what came, they cancel; so the
    reward is the prediction error. With the pre spikes' trace p at that step, the mean over what is drawn is
    ``dW = rate * sum over tokens of (one-hot(came) - probabilities) outer p``. This is a delta rule, though not the gradient of
    the loss: what the head multiplies in a forward pass are the membranes and rates of the same neurons, normalised. Only
    pairs of pre before post occur, so ``rate`` is ``a_plus`` and nothing weakens but by a negative reward.
``blocks.*.ffn.down``
    from the first to the second layer of neurons of a feed-forward, both of them true spikes. The reward of a token is
    its prediction error brought back to each neuron through the weights of the head and the gains of norm and block
    (``"error"``; what lies between, clamp, readout neurons, the norm's division and later blocks, is left out), or how far its
    loss lies below the running mean (``"loss"``, one number for all neurons of a token).
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
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
from nord_snn.models.nord import NordForCausalLM
from nord_snn.ops import reward_modulated_stdp
from nordlm.cli import number
from nordlm.errors import PlasticityError

__all__ = ["Control", "Plasticity", "PlasticityError", "plasticity_arguments", "synapse_names"]

#: Change per pair of spikes, by synapse, as ``examples/online_learning`` found it.
RATES = {"lm_head": 5e-5, "ffn.down": 0.05}
REWARDS = ("error", "loss")


class Reading(NamedTuple):
    """What a pass over a text says about the tokens that are learned from.

    Attributes:
        positions: of the tokens before them, at which they are predicted.
        targets: the tokens, ``[n]``.
        probabilities: of every word in their place, ``[n, V]``.
        losses: in nats, ``[n]``.
        feedback: the prediction error, brought back through the head to the channels of the residual stream, ``[n, D]``; None
            if no synapse wants it.
        approval: 1, or what the reader thinks of the text: everything that is learned is multiplied with it.
    """

    positions: slice
    targets: Tensor
    probabilities: Tensor
    losses: Tensor
    feedback: Tensor | None
    approval: float


def _as_it_is(x: Tensor) -> Tensor:
    return x


class Control(NamedTuple):
    """What an experiment changes: rewards, whose first dimension is that of the events, and pre spikes ``[T, n, D]``."""

    rewards: Callable[[Tensor], Tensor] = _as_it_is
    spikes: Callable[[Tensor], Tensor] = _as_it_is


class PlasticSynapse(Protocol):
    """What the two kinds of synapses have in common."""

    plastic: PlasticPart
    wants_feedback: bool

    def listen(self) -> None:
        """Record the next pass."""

    def stop(self) -> None:
        """Do not record, and forget what was."""

    def learn(self, reading: Reading, control: Control) -> Callable[[], None]:
        """Compute the change of the weights; what is returned makes it."""

    def forget(self) -> None:
        """Forget what is remembered beside the weights."""

    def close(self) -> None:
        """Stop watching the model."""


class WordSynapse:
    """The head: readout neurons to words."""

    wants_feedback = False

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

    def learn(self, reading: Reading, control: Control) -> Callable[[], None]:
        """Reward the words that came, punish those that were expected."""
        if self._spikes is None:
            raise RuntimeError("nothing was read")
        spikes = self._spikes[:, 0, reading.positions]
        if not self._warned and not spikes.any():
            self._warned = True
            warnings.warn(
                "the readout neurons did not fire in this text: the head learned nothing from it", stacklevel=3
            )
        pre = F.pad(control.spikes(spikes), (0, 0, 0, 0, 0, 1))  # [T + 1, n, D]: the word comes a step later
        expected = torch.multinomial(reading.probabilities, 1).flatten()
        events = torch.cat((reading.targets, expected))
        rewards = torch.ones(len(events), device=pre.device)
        rewards[len(expected) :] = -1
        words, index = events.unique(return_inverse=True)
        post = pre.new_zeros(len(pre), len(events), len(words))
        post[-1, torch.arange(len(events)), index] = 1
        given = reading.approval * control.rewards(rewards)
        change, _ = reward_modulated_stdp(pre.repeat(1, 2, 1), post, given, a_plus=self.rate, a_minus=0.0)
        return lambda: self.plastic.apply(change, words)

    def forget(self) -> None:
        """There is nothing beside the weights."""

    def close(self) -> None:
        """Stop watching the model."""
        self._hook.remove()

    def _record(self, module: Any, inputs: Any, spikes: Tensor) -> None:
        if self._listening:
            self._spikes = spikes.detach()


class BlockSynapse:
    """The second map of a feed-forward, between its two layers of neurons."""

    def __init__(self, model: NordForCausalLM, index: int, rate: float, reward: str) -> None:
        self.wants_feedback = reward == "error"
        self.source = LossBelowBaseline(baseline=None)
        self.norm, self.block = model.norm, cast(NordBlock, model.blocks[index])
        self.rule = RewardModulatedSTDP(
            step_mode="m",
            synapse=self.block.ffn.down,
            sn=self.block.ffn.lif2,
            a_plus=rate,
            a_minus=rate,
            reduction="mean",
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

    def learn(self, reading: Reading, control: Control) -> Callable[[], None]:
        """Strengthen what fired together where the reward is positive."""
        if reading.feedback is not None:
            gain = self.block.ffn_gain
            rewards = reading.feedback * self.norm.weight * gain / gain.abs().mean()
        else:
            rewards = cast(Tensor, self.source.reward(reading.losses))
        given = (reading.approval * control.rewards(rewards))[None]
        delta = cast(Tensor, self.rule.step(given, on_grad=False, positions=reading.positions))

        def change() -> None:
            self.plastic.apply(delta)
            if not self.wants_feedback:
                self.source.update(reading.losses.mean().item())

        return change

    def forget(self) -> None:
        """Expect nothing."""
        self.source.baseline = None

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
        control: what an experiment changes.

    Raises:
        PlasticityError: a name fits no synapse that can learn.
    """

    def __init__(
        self,
        model: NordForCausalLM,
        synapses: Sequence[str] | None = None,
        rate: float | None = None,
        reward: str = "error",
        control: Control = Control(),  # noqa: B008  # immutable
    ) -> None:
        if reward not in REWARDS:
            raise PlasticityError(f"the reward must be one of {', '.join(REWARDS)}, got {reward}")
        tied = model.config.tie_word_embeddings
        asked = synapses or (("blocks.*.ffn.down",) if tied else ("lm_head",))
        names = synapse_names(model)
        for pattern in asked:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise PlasticityError(f"{pattern}: no synapse that can learn; there are {', '.join(names)}")
        self.model, self.control = model, control
        self.synapses: dict[str, PlasticSynapse] = {}
        for name in (name for name in names if any(fnmatchcase(name, pattern) for pattern in asked)):
            if name == "lm_head":
                self.synapses[name] = WordSynapse(model, RATES["lm_head"] if rate is None else rate)
            else:
                index = int(name.split(".")[1])
                self.synapses[name] = BlockSynapse(model, index, RATES["ffn.down"] if rate is None else rate, reward)
        if control.spikes is not _as_it_is and set(self.synapses) != {"lm_head"}:
            raise PlasticityError("a control of the pre spikes is for the lm_head alone")

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
            probabilities = logits.float().softmax(-1)
            losses = F.cross_entropy(logits.float(), targets, reduction="none")
            feedback = None
            if any(synapse.wants_feedback for synapse in self.synapses.values()):
                feedback = self.model.lm_head.weight[targets] - probabilities.to(logits) @ self.model.lm_head.weight
            reading = Reading(slice(first - 1, -1), targets, probabilities, losses, feedback, approval)
            for change in [synapse.learn(reading, self.control) for synapse in self.synapses.values()]:
                change()
        finally:  # also after Ctrl-C: generation must not be recorded, nor half a pass kept
            for synapse in self.synapses.values():
                synapse.stop()
        return losses.mean().item()

    def forget(self) -> None:
        """Take back every change, bit for bit."""
        for synapse in self.synapses.values():
            synapse.plastic.revert()
            synapse.forget()

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
        parts = [synapse.plastic for synapse in self.synapses.values()]
        learned = sum(float(delta.square().sum()) for part in parts if (delta := part.delta) is not None)
        return float((learned / sum(float(part.trained.square().sum()) for part in parts)) ** 0.5)


def synapse_names(model: NordForCausalLM) -> list[str]:
    """Synapses between neurons that fire, but for a head whose weights are the embedding too."""
    head = [] if model.config.tie_word_embeddings else ["lm_head"]
    return head + [
        f"blocks.{index}.ffn.down" for index, block in enumerate(model.blocks) if isinstance(block, NordBlock)
    ]


def plasticity_arguments(parser: argparse.ArgumentParser) -> None:
    """What learns, and how fast: options of ``chat.py`` and ``examples/online_learning``."""
    parser.add_argument("--synapses", nargs="+", help="what learns: lm_head, blocks.0.ffn.down, or patterns of names")
    parser.add_argument("--rate", type=number(0, 1), help="change of a weight per pair of spikes")
    parser.add_argument("--reward", choices=REWARDS, default=REWARDS[0], help="of blocks.*.ffn.down")
